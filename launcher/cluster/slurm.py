"""What Slurm knows of its nodes: `cluster=slurm`, inside an allocation or for a partition. Parsers are pure."""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.cluster import detect, switches
from launcher.cluster.hostlist import expand
from launcher.cluster.spec import Link
from launcher.cluster.switches import SwitchTree
from launcher.decode import decode, encode
from launcher.errors import ClusterError

_GRES = re.compile(r"(?:^|,)(?:gres/)?gpu(?::(?P<kind>[A-Za-z][\w.+-]*))?[:=](?P<count>\d+)")
# A node in one of these gets no new job, but one that is powered down does: Slurm starts it. A * stands behind the
# state of one that does not answer.
_UNUSABLE = ("DOWN", "DRAIN", "FAIL", "INVAL", "MAINT", "NOT_RESPONDING", "UNKNOWN", "FUTURE")
# Kinds as sites and Slurm's own detection name them -> packaged preset. PCIe and NVL boards are slower than their
# namesakes and have none.
_KINDS = (
    (re.compile(r"gb300"), "gb300_nvl72"),
    (re.compile(r"gb200"), "gb200_nvl72"),
    (re.compile(r"b300"), "b300"),
    (re.compile(r"b200"), "b200"),
    (re.compile(r"(?<!g)h200(?!.*(nvl|pcie))"), "h200_sxm"),
    (re.compile(r"h800"), "h800_sxm"),
    (re.compile(r"h100(?!.*(nvl|pcie))"), "h100_sxm"),
    (re.compile(r"a100(?!.*pcie).*80 ?g"), "a100_80gb"),
    (re.compile(r"a100(?!.*pcie).*40 ?g"), "a100_40gb"),
    (re.compile(r"a10g"), "a10g"),
    (re.compile(r"l40s"), "l40s_pcie"),
    (re.compile(r"v100"), "v100"),
    (re.compile(r"mi(300x|325x|355x)"), "mi{0}"),
)
_SLICE = re.compile(r"\d+g\.\d+gb")  # a part of a GPU (MIG)
_TIMEOUT_S = 60


@dataclass(frozen=True, kw_only=True)
class SlurmNode:
    """One node of `scontrol show node`."""

    name: str
    gpu_kind: str  # as the site calls it; empty where it does not
    num_gpus: int
    num_cores: int
    memory_gib: float
    features: str
    partitions: tuple[str, ...]
    is_usable: bool


def parse_nodes(text: str) -> tuple[SlurmNode, ...]:
    """Read `scontrol show node`, with or without -o."""
    starts = [match.start() for match in re.finditer(r"(?:^|\n)NodeName=", text)]
    return tuple(_node(text[a:b]) for a, b in zip(starts, [*starts[1:], len(text)], strict=True))


def _node(text: str) -> SlurmNode:
    def field(name: str, default: str = "") -> str:
        found = re.search(rf"(?:^|\s){name}=(\S*)", text)
        return found[1] if found and found[1] not in ("(null)", "N/A") else default

    kinds = [(found["kind"] or "", int(found["count"])) for found in _GRES.finditer(field("Gres"))]
    kind, count = max(kinds, key=lambda pair: pair[1], default=("", 0))
    state = field("State").upper()
    return SlurmNode(
        name=field("NodeName"),
        gpu_kind=kind.lower(),
        num_gpus=count,
        num_cores=int(field("CPUTot", "1")),
        memory_gib=int(field("RealMemory", "0")) / 1024,
        features=field("AvailableFeatures").lower(),
        partitions=tuple(field("Partitions").split(",")),
        is_usable=not state.endswith("*")
        and not any(word.startswith(_UNUSABLE) for word in re.split(r"[+$~#%@^!-]", state)),
    )


def default_partition(text: str) -> str | None:
    """Read the name of the default one out of `scontrol show partition`."""
    for block in re.split(r"\n(?=PartitionName=)", text.strip()):
        found = re.search(r"PartitionName=(\S+)", block)
        if found and re.search(r"\bDefault=YES\b", block):
            return found[1]
    return None


# ---- the cluster section ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Told:
    """What scontrol printed, and what the job around us says, if there is one."""

    nodes: str
    topology: str
    partitions: str
    allocation: tuple[str, ...] = ()  # hosts of the job we are in


def ask(environ: Mapping[str, str] = os.environ) -> Told:
    """Run scontrol; raise ClusterError where it is missing or fails. A site without a topology is none."""
    return Told(
        nodes=_scontrol("show", "node", "-o"),
        topology=_scontrol("show", "topology", may_fail=True),
        partitions=_scontrol("show", "partition", "-o"),
        allocation=expand(environ.get("SLURM_JOB_NODELIST", "")),
    )


def complete(section: Mapping[str, Any], told: Told) -> dict[str, Any]:
    """Return the keys of a ClusterSpec: what `section` leaves null is taken from Slurm and from a preset.

    `partition`, `gpu_kind` and `preset` of the section only choose.
    """
    given = {key: value for key, value in section.items() if value is not None}
    partition, kind, preset = (given.pop(key, None) for key in ("partition", "gpu_kind", "preset"))
    partition = partition or (None if told.allocation else default_partition(told.partitions))
    chosen = _choose(parse_nodes(told.nodes), told, partition=partition, kind=kind)
    sizes = {
        "name": "slurm",
        "num_nodes": len(chosen),
        "partition": partition,
        "host_memory_gib": round(min(node.memory_gib for node in chosen), 2),
    }
    gpu = {key: value for key, value in given.pop("gpu", {}).items() if value is not None}
    if chosen[0].num_gpus == 0:
        return _of_processors(chosen, {**given, "gpu": gpu}) | sizes | given
    known = detect.preset(preset or _preset_of(chosen[0]))
    found = known | sizes | {"gpus_per_node": min(node.num_gpus for node in chosen)} | given
    links = tuple(decode(Link, link, "cluster.links") for link in found["links"])
    tree = switches.parse(told.topology)
    found["links"] = encode(_with_switches(links, tree, found["gpus_per_node"], chosen))
    return found | {"gpu": known["gpu"] | gpu}


def _with_switches(
    links: Sequence[Link], tree: SwitchTree, gpus_per_node: int, chosen: Sequence[SlurmNode]
) -> tuple[Link, ...]:
    return switches.tiers(
        links,
        tree.switches,
        gpus_per_node=gpus_per_node,
        blocks=tree.blocks,
        hosts=[node.name for node in chosen],
    )


def _of_processors(chosen: Sequence[SlurmNode], section: Mapping[str, Any]) -> dict[str, Any]:
    machine = detect.Machine(
        gpus=(),
        num_cores=min(node.num_cores for node in chosen),
        memory_gib=min(node.memory_gib for node in chosen),
    )
    found = detect.complete({**section, "gpu": {**section["gpu"], "device": "cpu"}}, machine=machine)
    return {key: value for key, value in found.items() if key not in section or key == "gpu"}


def _choose(
    nodes: Sequence[SlurmNode], told: Told, *, partition: str | None, kind: str | None
) -> list[SlurmNode]:
    """Return equal nodes: those of the allocation, else the usable ones of the partition."""
    if told.allocation:
        chosen = [node for node in nodes if node.name in told.allocation]
    else:
        chosen = [node for node in nodes if node.is_usable and partition in (None, *node.partitions)]
    where = "the allocation" if told.allocation else f"cluster.partition={partition}"
    if not chosen:
        known = ", ".join(sorted({name for node in nodes for name in node.partitions if name}))
        raise ClusterError(f"{where} has no usable node; set cluster.partition to one of {known}")
    kinds = Counter((node.gpu_kind, node.num_gpus) for node in chosen)
    if kind is not None:
        chosen = [node for node in chosen if kind.lower() == node.gpu_kind]
        if not chosen:
            raise ClusterError(f"cluster.gpu_kind={kind} is in no node of {where}; it has {_list(kinds)}")
    elif len({name for name, _ in kinds}) > 1:
        raise ClusterError(f"{where} mixes nodes of {_list(kinds)}; name one kind with cluster.gpu_kind")
    return chosen


def _list(kinds: Mapping[tuple[str, int], int]) -> str:
    return ", ".join(f"{name or 'no named kind'} ({count} a node)" for name, count in sorted(kinds))


def _preset_of(node: SlurmNode) -> str:
    words = f"{node.gpu_kind} {node.features}".replace("_", " ")
    for pattern, preset in _KINDS:
        found = pattern.search(words)
        if found and not _SLICE.search(node.gpu_kind):
            return preset.format(*found.groups())
    raise ClusterError(
        f"Slurm calls the GPUs of {node.name} '{node.gpu_kind}' (features '{node.features}'), which names no preset; "
        "set cluster.preset to one that has such GPUs, as in cluster.preset=a100_80gb"
    )


def _scontrol(*words: str, may_fail: bool = False) -> str:
    try:
        done = subprocess.run(
            ["scontrol", *words], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except FileNotFoundError as error:
        raise ClusterError(
            "cluster=slurm needs the command scontrol, which is not on this host's PATH; "
            "run it on a login node, or name your nodes with cluster=h100_sxm or another preset"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"scontrol gave no answer for {_TIMEOUT_S} s; is slurmctld up?") from error
    if done.returncode and not may_fail:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise ClusterError(f"`scontrol {' '.join(words)}` failed: {said[-1] if said else done.returncode}")
    return done.stdout if done.returncode == 0 else ""
