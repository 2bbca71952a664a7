"""How the GPUs of one node hang together: the matrix of `nvidia-smi topo -m`, its islands, order and network cards."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from launcher.cluster.spec import Link

_NVLINK = re.compile(r"NV(\d+)")
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")  # the tool underlines its head line
# From near to far; the tool's own legend.
_PATHS = ("PIX", "PXB", "PHB", "NODE", "SYS")
# PCI Express as in hydra_configs/cluster/l40s_pcie.yaml: through the host, from memory.
_PCIE = Link(
    name="PCIe 4.0", size=None, within_node=True, gb_per_s=32.0, efficiency=0.6, start_us=20.0, latency_us=8.0
)
_ACROSS_SOCKETS = 0.5  # of PCI Express, where peer copies bounce through both sockets' memory: a guess


@dataclass(frozen=True, kw_only=True)
class GpuMatrix:
    """Paths between devices by name: (GPU0, GPU1) -> NV18, (GPU0, NIC3) -> PIX."""

    gpus: tuple[str, ...]
    cards: tuple[str, ...]  # network cards
    paths: Mapping[tuple[str, str], str]

    def nvlinks(self, one: str, other: str) -> int:
        """Links of NVLink between two GPUs."""
        found = _NVLINK.fullmatch(self.paths[one, other])
        return int(found[1]) if found else 0


def parse(text: str) -> GpuMatrix | None:
    """Read what `nvidia-smi topo -m` prints; None where it shows no GPU."""
    lines = [_ESCAPES.sub("", line) for line in text.splitlines()]
    head = next((line.split() for line in lines if re.match(r"\s+GPU0\b", line)), None)
    if head is None:
        return None
    columns = [word for word in head if re.fullmatch(r"(GPU|NIC)\d+|mlx\S+|rocep\S+|ibp\S+", word)]
    names = _card_names(lines)
    paths = {}
    for line in lines:
        row, *cells = line.split() or [""]
        if row in columns:
            for column, cell in zip(columns, cells, strict=False):
                paths[names.get(row, row), names.get(column, column)] = cell
    gpus = tuple(column for column in columns if column.startswith("GPU"))
    cards = tuple(names.get(column, column) for column in columns if column not in gpus)
    return GpuMatrix(gpus=gpus, cards=cards, paths=paths)


def _card_names(lines: Sequence[str]) -> dict[str, str]:
    """Return the legend of newer drivers: NIC0 -> mlx5_0."""
    found = (re.fullmatch(r"\s*(NIC\d+): (\S+)\s*", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def islands(matrix: GpuMatrix) -> tuple[tuple[str, ...], ...]:
    """Return groups of GPUs in which each one has NVLink to each other one, grown along the thickest links.

    Without NVLink: groups that no path between sockets (SYS) cuts.
    """
    any_nvlink = any(_NVLINK.fullmatch(path) for path in matrix.paths.values())

    def near(one: str, other: str) -> int:
        return matrix.nvlinks(one, other) if any_nvlink else int(matrix.paths[one, other] != "SYS")

    left, groups = list(matrix.gpus), []
    while left:
        group = [left.pop(0)]
        while candidates := [gpu for gpu in left if all(near(gpu, member) for member in group)]:
            best = max(candidates, key=lambda gpu: (sum(near(gpu, m) for m in group), -left.index(gpu)))
            group.append(best)
            left.remove(best)
        groups.append(tuple(sorted(group, key=matrix.gpus.index)))
    return tuple(groups)


def device_order(matrix: GpuMatrix) -> tuple[int, ...]:
    """Return the GPUs' numbers so that islands are runs of neighbours: local rank i takes the i-th of them."""
    by_size = sorted(islands(matrix), key=lambda group: (-len(group), matrix.gpus.index(group[0])))
    return tuple(int(gpu.removeprefix("GPU")) for group in by_size for gpu in group)


def nearest_cards(matrix: GpuMatrix) -> dict[str, tuple[str, ...]]:
    """Return for each GPU the network cards on its shortest path; () where the node has none."""
    found = {}
    for gpu in matrix.gpus:
        distance = {
            card: _PATHS.index(path) for card in matrix.cards if (path := matrix.paths[gpu, card]) in _PATHS
        }
        best = min(distance.values(), default=0)
        found[gpu] = tuple(card for card, steps in distance.items() if steps == best)
    return found


def has_rails(matrix: GpuMatrix) -> bool:
    """Tell whether each GPU has a network card of its own, behind a switch that no other GPU is as near to."""
    cards = nearest_cards(matrix)
    taken = [set(near) for near in cards.values()]
    closest = [
        min((_PATHS.index(matrix.paths[gpu, card]) for card in near), default=len(_PATHS))
        for gpu, near in cards.items()
    ]
    disjoint = sum(len(near) for near in taken) == len(set[str]().union(*taken))
    return all(taken) and disjoint and max(closest) <= _PATHS.index("PXB")


def refine(links: Sequence[Link], matrix: GpuMatrix) -> tuple[Link, ...]:
    """Return the tiers of a preset as the matrix shows them: NVLink ends where an island ends, PCI Express joins."""
    first, size, gpus = links[0], min(map(len, islands(matrix))), len(matrix.gpus)
    nvlink = any(_NVLINK.fullmatch(path) for path in matrix.paths.values())
    # What is no part of a node, or has links of its own between all pairs (a cube of meshes), the preset knows better.
    if (size == gpus and nvlink) or first.mesh or not first.within_node:
        return tuple(links)
    network = [link for link in links[1:] if not link.within_node]
    whole = replace(_PCIE, name="PCIe 4.0 between sockets", gb_per_s=_PCIE.gb_per_s * _ACROSS_SOCKETS)
    if nvlink:
        crosses = any(path == "SYS" for path in matrix.paths.values())
        inside = [replace(first, size=size, switch_reduction=None)] if size > 1 else []
        return (*inside, whole if crosses else _PCIE, *network)
    if size == gpus:
        return (_PCIE, *network)
    return (replace(_PCIE, size=size), whole, *network)
