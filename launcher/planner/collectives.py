"""Seconds of collectives by the alpha-beta model, on the tiers of links that a group of ranks spans.

Volumes are those of ring algorithms (Thakur et al. 2005, section 4). So is the latency of gathers, reduce-scatters
(rings) and all-to-alls (pairwise exchange): size - 1 hops, each over the tier that it crosses. An all-reduce may go
up and down a tree of log2(size) levels instead (NCCL's double binary trees, for which it picks the faster form; its
gathers and reduce-scatters have rings only: NCCL, src/graph/tuning.cc). Sizes are bytes of the whole, unsharded
buffer on one rank, moved in `calls` equal collectives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from launcher.cluster.spec import ClusterSpec
from strategies.spec import Plan


@dataclass(frozen=True, kw_only=True)
class Group:
    """Ranks that communicate, and what their links reach together."""

    size: int
    bytes_per_s: float  # per rank and direction, efficiency included
    latency_s: float  # one hop over the slowest tier
    ring_s: float  # the latency of size - 1 hops round the ring

    def all_gather_s(self, num_bytes: float, *, calls: int = 1) -> float:
        """Every rank ends with the whole buffer; a reduce-scatter costs the same."""
        return calls * self.ring_s + self._sent_s(num_bytes)

    def all_reduce_s(self, num_bytes: float, *, calls: int = 1) -> float:
        """The volume of a reduce-scatter and an all-gather; the latency of a tree where that is less."""
        tree_s = self.latency_s * math.ceil(math.log2(self.size))
        return 2 * (calls * min(tree_s, self.ring_s) + self._sent_s(num_bytes))

    def all_to_all_s(self, num_bytes: float) -> float:
        """Every rank keeps one part of its buffer and sends the others."""
        return self.all_gather_s(num_bytes)

    def send_s(self, num_bytes: float) -> float:
        """One message to the neighbour."""
        return 0.0 if self.size == 1 else self.latency_s + num_bytes / self.bytes_per_s

    def _sent_s(self, num_bytes: float) -> float:
        return num_bytes * (self.size - 1) / self.size / self.bytes_per_s


def group_of(cluster: ClusterSpec, *, size: int, stride: int) -> Group:
    """Describe `size` ranks that stand `stride` apart.

    On the slowest tier the members inside one domain of the next faster tier drive their network cards
    together, one ring each, until the faster tier is the limit.
    """
    extent = size * stride
    link = cluster.link_for(extent)
    reach = link.gb_per_s * link.efficiency
    ring_s = (size - 1) * link.latency_us
    faster = [tier for tier in cluster.links[: cluster.links.index(link)] if tier.size is not None]
    if faster:
        inner = faster[-1]
        neighbours = max(1, min(size, (inner.size or 1) // stride))
        if neighbours > 1:
            reach = min(inner.gb_per_s * inner.efficiency, reach * neighbours)
        borders = -(-size // neighbours) - 1
        ring_s = borders * link.latency_us + (size - 1 - borders) * inner.latency_us
    return Group(size=size, bytes_per_s=reach * 1e9, latency_s=link.latency_us * 1e-6, ring_s=ring_s * 1e-6)


def groups_of(cluster: ClusterSpec, plan: Plan) -> dict[str, Group]:
    """Return the groups of one plan by degree: tp, cp, dp, pp by `plan.rank_order`, state and ep derived."""
    stride, groups = 1, {}
    strides = {}
    for degree in plan.rank_order:
        size = getattr(plan, degree)
        strides[degree] = stride
        groups[degree] = group_of(cluster, size=size, stride=stride)
        stride *= size
    # ZeRO shards over all ranks that hold the same weights: dp and cp together.
    same_weights = min(strides["cp"], strides["dp"])
    groups["state"] = group_of(cluster, size=plan.dp * plan.cp, stride=same_weights)
    groups["ep"] = group_of(cluster, size=plan.ep, stride=same_weights)
    return groups
