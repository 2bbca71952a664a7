"""What this machine is: fills the nulls of the `cluster` section from NVML, nvidia-smi or the CPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import psutil
import yaml

from launcher.cluster.gpu_matrix import GpuMatrix, parse, refine
from launcher.cluster.spec import ClusterSpec, Link
from launcher.decode import decode, encode
from launcher.errors import ClusterError

GIB = 2**30

# NVML's product names -> packaged preset. Not listed: PCIe and NVL boards, slower than their namesakes.
_PRESETS = (
    (re.compile(r"\bGB200\b"), "gb200_nvl72"),
    (re.compile(r"\bB200\b"), "b200"),
    (re.compile(r"\bH200\b(?!.*(NVL|PCIe))"), "h200_sxm"),
    (re.compile(r"\bH100 80GB HBM3\b"), "h100_sxm"),
    (re.compile(r"\bA100-SXM4-80GB\b"), "a100_80gb"),
    (re.compile(r"\bA100-SXM4-40GB\b"), "a100_40gb"),
    (re.compile(r"\bV100-SXM2-(16|32)GB\b"), "v100"),
    (re.compile(r"\bL40S\b"), "l40s_pcie"),
)

# Guesses that only rank plans against each other; `peak_is_nominal` keeps them out of every reported MFU.
_NOMINAL_GPU_TFLOPS = {"fp32": 20.0, "bf16": 100.0, "fp16": 100.0}
_NOMINAL_TFLOPS_PER_CORE = 0.1  # two 8-wide fp32 multiply-adds a cycle at 3 GHz


@dataclass(frozen=True, kw_only=True)
class DetectedGpu:
    """One GPU as the driver describes it."""

    index: int
    uuid: str
    name: str
    memory_gib: float
    has_bf16: bool = True


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What was found on this host. `gpus` holds the visible ones only."""

    gpus: tuple[DetectedGpu, ...]
    num_cores: int
    memory_gib: float  # host memory that is free to use
    matrix: GpuMatrix | None = None  # how the GPUs hang together; None: unknown, or some are hidden


def detect(overrides: Mapping[str, Any]) -> ClusterSpec:
    """Return this machine as a ClusterSpec; keys of `overrides` that are not null stay as they are."""
    return decode(ClusterSpec, complete(overrides), "cluster")


def complete(config: Mapping[str, Any], *, machine: Machine | None = None) -> dict[str, Any]:
    """Return `config` with its nulls filled in from `machine`, probed only when something is null."""
    optional = ("num_nodes", "gpus_per_node", "gpu", "links", "host_memory_gib", "reserved_gib")
    given = {key: value for key, value in config.items() if value is not None}
    if all(key in given for key in optional) and None not in given["gpu"].values():
        return given
    machine = machine or probe()
    gpu = {key: value for key, value in given.get("gpu", {}).items() if value is not None}
    on_cpu = gpu.get("device") == "cpu" or not machine.gpus
    if on_cpu and gpu.get("device", "cpu") != "cpu":
        raise ClusterError(
            f"cluster.gpu.device={gpu['device']}, but this machine shows no GPU; "
            "use cluster.gpu.device=cpu, or name your nodes with cluster=h100_sxm or another preset"
        )
    wanted = given.get("gpus_per_node")
    found = _describe_cpu(machine, wanted) if on_cpu else _describe_gpus(machine, wanted)
    if on_cpu and given.get("num_nodes", 1) > 1 and found["gpus_per_node"] > 1:
        inside = found["links"][0] | {"size": found["gpus_per_node"]}
        found["links"] = [inside, *found["links"]]  # another one leads to the next host
    return {"name": "local", "num_nodes": 1} | found | given | {"gpu": found["gpu"] | gpu}


def probe() -> Machine:
    """Look at this host: visible GPUs and how they hang together, usable cores, free memory."""
    gpus = _every_gpu()
    visible = select_visible(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return Machine(
        gpus=tuple(visible),
        num_cores=count_cores(),
        memory_gib=free_memory_bytes() / GIB,
        matrix=query_matrix() if len(gpus) == len(visible) > 1 else None,
    )


def visible_gpus() -> tuple[DetectedGpu, ...]:
    """Return the GPUs of this host that are to be used, without asking how they hang together."""
    return tuple(select_visible(_every_gpu(), os.environ.get("CUDA_VISIBLE_DEVICES")))


def query_matrix() -> GpuMatrix | None:
    """Ask nvidia-smi how the GPUs hang together; None where it cannot say."""
    return parse(_nvidia_smi("topo", "-m"))


def select_visible(gpus: Sequence[DetectedGpu], visible: str | None) -> list[DetectedGpu]:
    """Apply CUDA_VISIBLE_DEVICES as CUDA does: indices or UUID prefixes, up to the first unknown one."""
    if visible is None or not gpus:
        return list(gpus)
    chosen = []
    for word in (part.strip() for part in visible.split(",")):
        match = [gpu for gpu in gpus if word and (word == str(gpu.index) or gpu.uuid.startswith(word))]
        if len(match) != 1:
            break
        chosen += match
    if not chosen and visible.strip() not in ("", "-1"):
        raise ClusterError(
            f"CUDA_VISIBLE_DEVICES={visible} names none of this machine's {len(gpus)} GPUs; "
            f"use indices from 0 to {len(gpus) - 1}, or unset it"
        )
    return chosen


def _describe_gpus(machine: Machine, wanted: int | None) -> dict[str, Any]:
    names = sorted({gpu.name for gpu in machine.gpus})
    if len(names) > 1:
        raise ClusterError(
            f"the visible GPUs differ ({', '.join(names)}); set CUDA_VISIBLE_DEVICES to equal ones"
        )
    if wanted is not None and wanted > len(machine.gpus):
        raise ClusterError(
            f"cluster.gpus_per_node={wanted} exceeds the {len(machine.gpus)} GPUs visible here; "
            f"use {len(machine.gpus)} or less"
        )
    known = _preset_for(names[0]) or _unknown_gpu(machine.gpus[0])
    memory_gib = round(min(gpu.memory_gib for gpu in machine.gpus), 2)
    return {
        "gpus_per_node": wanted or len(machine.gpus),
        "gpu": known["gpu"] | {"name": names[0], "memory_gib": memory_gib},
        "links": _links(known["links"], machine.matrix),
        "host_memory_gib": round(machine.memory_gib, 2),
        "reserved_gib": known["reserved_gib"],
    }


def _describe_cpu(machine: Machine, wanted: int | None) -> dict[str, Any]:
    """Share cores and memory among processes: two by default, the smallest number that communicates."""
    processes = wanted or min(2, machine.num_cores)
    tflops = _NOMINAL_TFLOPS_PER_CORE * machine.num_cores / processes
    memory_gib = machine.memory_gib / processes
    return {
        "gpus_per_node": processes,
        "gpu": {
            "name": "cpu",
            "device": "cpu",
            "memory_gib": round(memory_gib, 2),
            "memory_gb_per_s": 10.0,
            "peak_tflops": {"fp32": tflops},
            "peak_is_nominal": True,
            "efficiency": _packaged("efficiency", "cpu"),
        },
        "links": [{"size": None, "gb_per_s": 2.0, "latency_us": 100.0}],
        "host_memory_gib": round(machine.memory_gib, 2),
        "reserved_gib": round(min(0.5, memory_gib / 8), 2),  # the interpreter and torch itself
    }


def _preset_for(name: str) -> dict[str, Any] | None:
    found = next((known for pattern, known in _PRESETS if pattern.search(name)), None)
    return preset(found) if found else None


def preset(name: str) -> dict[str, Any]:
    """Return a packaged cluster as Hydra would compose it; raise ClusterError for one that is not there."""
    try:
        loaded = _packaged("cluster", name)
    except FileNotFoundError as error:
        raise ClusterError(
            f"cluster.preset={name} is no packaged cluster; use h100_sxm or the like"
        ) from error
    # What Hydra would make of the preset's only default: the efficiency of its kind of GPU.
    defaults = loaded.pop("defaults", [])
    kinds = [default["/efficiency@gpu.efficiency"] for default in defaults if default != "_self_"]
    if kinds:
        loaded["gpu"]["efficiency"] = _packaged("efficiency", kinds[0])
    return loaded


def _packaged(group: str, name: str) -> dict[str, Any]:
    text = (resources.files("hydra_configs") / group / f"{name}.yaml").read_text("utf-8")
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def _unknown_gpu(gpu: DetectedGpu) -> dict[str, Any]:
    peaks = {key: value for key, value in _NOMINAL_GPU_TFLOPS.items() if gpu.has_bf16 or key != "bf16"}
    return {
        "gpu": {"memory_gb_per_s": 800.0, "peak_tflops": peaks, "device": "cuda", "peak_is_nominal": True},
        "links": [{"size": None, "gb_per_s": 16.0, "latency_us": 15.0, "efficiency": 0.6}],
        "reserved_gib": min(2.0, gpu.memory_gib / 10),
    }


def _every_gpu() -> list[DetectedGpu]:
    gpus = _query_nvml()
    return _query_nvidia_smi() if gpus is None else gpus


def _query_nvml() -> list[DetectedGpu] | None:
    """All GPUs that answer NVML; None when its bindings or the driver are absent, or none does."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        found = [_read_nvml(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [gpu for gpu in found if gpu is not None] or None
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _read_nvml(pynvml: Any, index: int) -> DetectedGpu | None:
    """One GPU; None where it does not answer: it is lost to this host until somebody resets it."""
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
        return DetectedGpu(
            index=index,
            uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
            name=_text(pynvml.nvmlDeviceGetName(handle)),
            memory_gib=(memory.total - memory.reserved) / GIB,  # the driver keeps `reserved` for itself
            has_bf16=pynvml.nvmlDeviceGetCudaComputeCapability(handle) >= (8, 0),
        )
    except pynvml.NVMLError:
        return None


def _text(value: str | bytes) -> str:
    """Older bindings return bytes."""
    return value.decode() if isinstance(value, bytes) else value


def _query_nvidia_smi() -> list[DetectedGpu]:
    """All GPUs by the command-line tool; none when it is absent or fails."""
    query = "--query-gpu=index,uuid,name,memory.total,compute_cap"
    return parse_nvidia_smi(_nvidia_smi(query, "--format=csv,noheader,nounits"))


def _nvidia_smi(*words: str) -> str:
    """What the tool prints; nothing where it is absent or fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    try:
        done = subprocess.run([tool, *words], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _links(known: list[dict[str, Any]], matrix: GpuMatrix | None) -> list[dict[str, Any]]:
    """Tiers of the preset, as far as the node agrees."""
    if matrix is None:
        return known
    links = tuple(decode(Link, link, "cluster.links") for link in known)
    return [encode(link) for link in refine(links, matrix)]


def parse_nvidia_smi(text: str) -> list[DetectedGpu]:
    """Read the lines `index, uuid, name, memory in MiB, compute capability`."""
    gpus = []
    for line in text.splitlines():
        fields = [part.strip() for part in line.split(",")]
        if len(fields) == 5 and fields[0].isdigit() and fields[3].isdigit():
            index, uuid, name, mebibytes, capability = fields
            has_bf16 = capability.partition(".")[0] not in ("3", "5", "6", "7")
            memory_gib = int(mebibytes) / 1024
            gpus.append(
                DetectedGpu(index=int(index), uuid=uuid, name=name, memory_gib=memory_gib, has_bf16=has_bf16)
            )
    return gpus


def count_cores() -> int:
    """Return the cores this process may use."""
    # Not os.cpu_count(): a container or a Slurm job often owns a few cores of many.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_memory_bytes() -> float:
    """Return the free host memory, the container's limit respected (cgroup v2)."""
    free = float(psutil.virtual_memory().available)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
    except OSError:
        return free
    return free if limit == "max" else max(GIB / 4, min(free, float(limit) - float(used)))
