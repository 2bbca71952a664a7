"""Seconds of collectives between the ranks of a group, on the tiers of links that the group spans.

Each algorithm is a line, seconds = latency + bytes * seconds per byte, and the fastest line counts, as in NCCL's own
choice (NVIDIA/nccl, src/graph/tuning.cc). Volumes are those of rings (Thakur et al. 2005, section 4). Latency is
that of the steps, each over the tier that it crosses: a ring has size - 1; a tree is a chain inside the fastest
tier and doubles between its domains. Sizes are bytes of the whole, unsharded buffer on one rank.

Bandwidth: a ring enters and leaves every node (or rack, or leaf switch) once, through the cards of all its members
there: NVIDIA/nccl#1801 measures 197 GB/s for 4 and 394 for 8 GPUs a domain with a card of 50 GB/s each. One that
stands alone in its node has its own card only, however many there are (NVIDIA/nccl-tests#232).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from launcher.cluster.spec import ClusterSpec, Link
from strategies.spec import Plan

# A double binary tree beside a ring, per byte sent (tuning.cc: 0.92, and 0.85 for its pattern).
_TREE_BANDWIDTH = 0.78
# NCCL's protocols for small messages. It promises half the bandwidth; the all-reduces measured by vTrain
# (VIA-Research/vTrain, trace/) and in NVIDIA/nccl#1244 leave them near 1 MiB, as if it were a tenth.
_SMALL_BANDWIDTH = 0.1


class Line(NamedTuple):
    """One way to do a collective."""

    seconds: float  # a call
    seconds_per_byte: float


class Border(NamedTuple):
    """What an all-to-all meets where it leaves the domains of a faster tier."""

    members: int  # ranks of the group in one domain
    seconds_per_byte: float


class Axis(NamedTuple):
    """So many ranks, so far apart."""

    size: int
    stride: int


class Tier(NamedTuple):
    """Links of a cluster, and how many neighbouring ranks of this job they join."""

    ranks: int
    link: Link

    @property
    def bytes_per_s(self) -> float:
        """What one rank reaches while all send."""
        return self.link.gb_per_s * self.link.efficiency * 1e9

    @property
    def alone_bytes_per_s(self) -> float:
        """What one rank reaches while its neighbours are silent."""
        return self.bytes_per_s * self.link.shared_by


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Ranks that communicate, and how fast."""

    size: int
    tier: str  # name of the slowest links they need
    nodes: int  # domains of the fastest links they are spread over
    bytes_per_s: float  # that a ring moves
    latency_s: float  # one step over the slowest links
    gathers: tuple[Line, ...]
    reductions: tuple[Line, ...]
    message: Line
    exchange_s: float  # latency of an all-to-all: channels serve partners side by side, so it grows with the logarithm
    borders: tuple[Border, ...]

    def all_gather_s(self, num_bytes: float, *, calls: int = 1) -> float:
        """Every rank ends with the whole buffer, in `calls` equal parts; a reduce-scatter costs the same."""
        return min([calls * line[0] + num_bytes * line[1] for line in self.gathers])

    def all_reduce_s(self, num_bytes: float, *, calls: int = 1) -> float:
        """Every rank ends with the sum of all buffers."""
        return min([calls * line[0] + num_bytes * line[1] for line in self.reductions])

    def all_to_all_s(self, num_bytes: float, *, calls: int = 1, copies: int = 1) -> float:
        """Every rank sends `num_bytes`, spread evenly over all ranks; the tiers work side by side.

        With `copies` above 1, `num_bytes` are so many copies of each part, for as many ranks at random, and a part
        crosses once into each domain that wants it, to be handed on inside (DeepEP; arXiv 2412.19437, section 3.2.2).
        A rank uses its own card only (NVIDIA/nccl-tests#267).
        """
        slowest = 0.0
        for members, seconds_per_byte in self.borders:
            others = self.size / members - 1
            wanted = (1 - (others / (others + 1)) ** copies) / copies
            slowest = max(slowest, others * wanted * seconds_per_byte)
        return calls * self.exchange_s + num_bytes * slowest

    def send_s(self, num_bytes: float) -> float:
        """One message to the neighbour in the group, while all ranks next to the sender send theirs."""
        return self.message[0] + num_bytes * self.message[1]


_ALONE = Group(
    size=1,
    tier="",
    nodes=1,
    bytes_per_s=math.inf,
    latency_s=0.0,
    gathers=(Line(0.0, 0.0),),
    reductions=(Line(0.0, 0.0),),
    message=Line(0.0, 0.0),
    exchange_s=0.0,
    borders=(),
)


def groups_of(cluster: ClusterSpec, plan: Plan) -> dict[str, Group]:
    """Return the groups of one plan; not to be changed, as plans of equal degrees share them.

    tp, cp, dp and pp stand as `plan.rank_order` says. `state` is what ZeRO shards over: dp and cp together. As in
    Megatron-core (core/parallel_state.py), experts count the ranks of one pipeline stage anew: `etp` neighbours
    hold one expert, `ep` such sets hold all of them, and the rest, `expert_state`, hold the same.
    """
    degrees = (plan.tp, plan.cp, plan.dp, plan.pp, plan.ep, plan.etp)
    return _groups(cluster.links, cluster.gpus_per_node, plan.rank_order, degrees)


def group_of(cluster: ClusterSpec, *, size: int, stride: int) -> Group:
    """Describe `size` ranks that stand `stride` apart, one of such groups that together fill the cluster."""
    tiers = _tiers(cluster.links, cluster.gpus_per_node, cluster.world_size)
    return _group(tiers, (Axis(size, stride),))


@lru_cache(maxsize=1 << 16)
def _groups(
    links: tuple[Link, ...], gpus_per_node: int, rank_order: tuple[str, ...], degrees: tuple[int, ...]
) -> dict[str, Group]:
    tp, cp, dp, pp, ep, etp = degrees
    sizes = {"tp": tp, "cp": cp, "dp": dp, "pp": pp}
    axes, stride = {}, 1
    for name in rank_order:
        axes[name] = Axis(sizes[name], stride)
        stride *= sizes[name]
    stage = [axes[name] for name in rank_order if name != "pp"]
    members: dict[str, tuple[Axis, ...]] = {name: (axis,) for name, axis in axes.items()}
    members["state"] = tuple(axes[name] for name in rank_order if name in ("dp", "cp"))
    members["etp"] = _part(stage, skip=1, count=etp)
    members["ep"] = _part(stage, skip=etp, count=ep)
    members["expert_state"] = _part(stage, skip=etp * ep, count=max(1, tp * cp * dp // (ep * etp)))
    tiers = _tiers(links, gpus_per_node, stride)
    return {
        name: _group(tiers, tuple(axis for axis in parts if axis.size > 1)) for name, parts in members.items()
    }


def _part(axes: Sequence[Axis], *, skip: int, count: int) -> tuple[Axis, ...]:
    """Return `count` ranks out of those that `axes` count through, `skip` places apart."""
    found, stride = [], 1
    for size, step in axes:
        passed = math.gcd(skip, size)
        skip //= passed
        stride = step * passed
        taken = math.gcd(count, size // passed)
        count //= taken
        found.append(Axis(taken, stride))
    # Degrees that do not divide each other: the rest goes on where the last axis ends.
    return (*found, Axis(count, stride * found[-1].size))


@lru_cache(maxsize=64)
def _tiers(links: tuple[Link, ...], gpus_per_node: int, world: int) -> tuple[Tier, ...]:
    """Size the tiers for a job of `world` ranks.

    Where the job does not fill whole domains, it takes as many nodes of each as make all alike, as schedulers do on
    request: 512 ranks take 64 of the 72 of each NVL72 rack.
    """
    tiers: list[Tier] = []
    for link in links:
        ranks = min(link.size or world, world)
        if link.within_node:
            ranks = min(ranks, gpus_per_node)
        whole = [taken for taken in range(ranks, ranks // 2, -1) if world % taken == 0]
        even = next((taken for taken in whole if taken % gpus_per_node == 0 or ranks <= gpus_per_node), ranks)
        tiers.append(Tier(even if link is not links[-1] else world, link))
    return tuple(tiers)


@lru_cache(maxsize=1 << 14)
def _group(tiers: tuple[Tier, ...], axes: tuple[Axis, ...]) -> Group:
    size = math.prod(axis.size for axis in axes)
    if size == 1:
        return _ALONE
    spans: list[tuple[Tier, int, int]] = []
    for tier in tiers:
        members, domains = _spread(axes, tier.ranks, world=tiers[-1].ranks)
        spans.append((tier, members, domains))
        if domains == 1:
            break
    (first, near, nodes), last = spans[0], spans[-1][0].link
    inside = _inside_bytes_per_s(first, near)
    across = min(
        (
            min(members * tier.bytes_per_s, near * tier.alone_bytes_per_s)
            for (_, members, _), (tier, _, _) in pairwise(spans)
        ),
        default=math.inf,
    )
    reach = min(inside if nodes < size else math.inf, across)
    ring = Line((last.start_us + _ring_us(spans, size)) * 1e-6, (size - 1) / size / reach)
    return Group(
        size=size,
        tier=last.name or f"links[{len(spans) - 1}]",
        nodes=nodes,
        bytes_per_s=reach,
        latency_s=last.latency_us * 1e-6,
        gathers=_with_small([ring], last, ring),
        reductions=_reductions(spans, ring, size=size, inside=inside, across=across),
        message=_message(spans, axes),
        exchange_s=(last.start_us + math.log2(size) * first.link.latency_us + last.latency_us) * 1e-6,
        borders=_borders(spans, inside),
    )


def _reductions(
    spans: Sequence[tuple[Tier, int, int]], ring: Line, *, size: int, inside: float, across: float
) -> tuple[Line, ...]:
    """All-reduces: a ring twice round, a tree, or a tree with sums made in the switch of the fastest tier.

    Between nodes a tree sends what a ring does, but a node's sum only once. So two nodes exceed what their cards
    give a ring (NVIDIA/nccl-tests#196).
    """
    (first, near, nodes), last = spans[0], spans[-1][0].link
    start_s = last.start_us * 1e-6
    twice = Line(2 * ring.seconds - start_s, 2 * ring.seconds_per_byte)
    tree_s = start_s + 2 * _tree_us(spans, size) * 1e-6
    between = 2 * (nodes - 1) / nodes / across
    lines = [twice]
    if nodes > 1 or first.link.size is None:
        chain = 2 / inside if near > 1 else 0.0
        lines.append(Line(tree_s, max(chain, between) / _TREE_BANDWIDTH))
    if first.link.switch_reduction and near > 1:
        lines.append(Line(tree_s, max(1 / (inside * first.link.switch_reduction), between)))
    return _with_small(lines, last, twice)


def _with_small(lines: list[Line], link: Link, ring: Line) -> tuple[Line, ...]:
    """Add how messages of some KiB go."""
    if link.small_latency == 1:
        return tuple(lines)
    quickest = min(line.seconds for line in lines)
    return (*lines, Line(quickest * link.small_latency, ring.seconds_per_byte / _SMALL_BANDWIDTH))


def _spread(axes: Sequence[Axis], ranks: int, *, world: int) -> tuple[int, int]:
    """Return the members in one domain of `ranks` ranks, the fewest in any, and the domains that they are spread over.

    Where a group does not divide a domain, some of its like lie across a border; all wait for the worst placed.
    """
    members = domains = 1
    if ranks >= world:
        return math.prod(axis.size for axis in axes), 1
    for size, stride in axes:
        extent = size * stride
        if ranks % extent == 0:
            members *= size
        elif extent % ranks == 0:
            members *= max(1, ranks // stride)
            domains *= min(size, extent // ranks)
        else:
            before = math.gcd(extent, ranks)
            members *= max(1, before // stride)
            domains *= min(size, 1 + math.ceil((extent - before) / ranks))
    return members, domains


def _inside_bytes_per_s(tier: Tier, members: int) -> float:
    """What a ring reaches inside one domain of the fastest tier."""
    if tier.link.mesh and tier.ranks > 1:
        return tier.bytes_per_s * max(1, members - 1) / (max(tier.ranks, tier.link.size or 0) - 1)
    return tier.bytes_per_s


def _ring_us(spans: Sequence[tuple[Tier, int, int]], size: int) -> float:
    """Latency of size - 1 steps, most of them between neighbours."""
    total, domains = 0.0, size
    for tier, _, remaining in spans:
        total += (domains - remaining) * tier.link.latency_us
        domains = remaining
    return total


def _tree_us(spans: Sequence[tuple[Tier, int, int]], size: int) -> float:
    """Latency from the leaves to the root: a chain inside the fastest tier, doubling between its domains."""
    total, domains = 0.0, size
    for tier, _, remaining in spans:
        fan = math.ceil(domains / remaining)
        chained = tier is spans[0][0] and tier.link.size is not None
        total += (fan - 1 if chained else math.ceil(math.log2(fan))) * tier.link.latency_us
        domains = remaining
    return total


def _message(spans: Sequence[tuple[Tier, int, int]], axes: Sequence[Axis]) -> Line:
    """One message across the slowest border; ranks nearer than the stride send at the same time.

    No more than two ranks have to meet, so half the start of a collective is lost.
    """
    tier = spans[-1][0]
    if len(spans) == 1:
        rate = _inside_bytes_per_s(tier, 2)
    else:
        ranks = spans[-2][0].ranks
        senders = min(ranks, min(axis.stride for axis in axes))
        rate = min(tier.alone_bytes_per_s, tier.bytes_per_s * ranks / senders)
    return Line((tier.link.start_us / 2 + tier.link.latency_us) * 1e-6, 1 / rate)


def _borders(spans: Sequence[tuple[Tier, int, int]], inside: float) -> tuple[Border, ...]:
    """Return the borders of single ranks, then of each domain that the group does not fit into."""
    borders = [Border(1, 1 / inside)] if spans[0][1] > 1 else []
    for (_, members, _), (tier, _, _) in pairwise(spans):
        borders.append(Border(members, 1 / tier.bytes_per_s))
    return tuple(borders)
