"""What all nodes have shown and measured, in one place: the collector's file, and what the verdict is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from launcher.preflight.look import NodeFacts


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """What one rank measured by itself, and with the other ranks of its node."""

    rank: int
    node: int
    facts: NodeFacts | None = None  # of the node, told by its first rank
    versions: Mapping[str, str] = field(default_factory=dict)  # of torch and what comes with it
    precision: str = "fp32"
    side: int = 0  # elements of the square product
    product_tflops: float | None = None
    inside_gb_per_s: float | None = None  # all-reduce on the node: bytes each rank sends, a second
    fault: str | None = None  # why it could not measure


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Two nodes whose ranks sent to each other, all at once; GB/s of the slowest of them, per direction."""

    a: int
    b: int
    gb_per_s: float | None = None
    fault: str | None = None


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """Everything that came in time."""

    world_size: int
    num_nodes: int
    ranks: tuple[RankFacts, ...]
    clocks_s: Mapping[str, float] = field(default_factory=dict)  # by node, ahead of the collector's
    exchanges: tuple[Exchange, ...] = ()

    def of_node(self, node: int) -> tuple[RankFacts, ...]:
        """Ranks of one node that have reported."""
        return tuple(rank for rank in self.ranks if rank.node == node)

    def facts(self, node: int) -> NodeFacts | None:
        """What a node shows; None where it has not told."""
        return next((rank.facts for rank in self.of_node(node) if rank.facts is not None), None)


def rounds_of(num_nodes: int) -> int:
    """Return the rounds after which everybody has met everybody: with an odd count somebody always has a pause."""
    return num_nodes - 1 + num_nodes % 2


def pairs(nodes: Sequence[int], *, number: int) -> list[tuple[int, int]]:
    """Return the pairs of round `number` from 0: everybody meets everybody once in `rounds_of` them.

    The circle method: the first stays, the others move one place a round; with an odd count one has a pause.
    """
    circle = list(nodes) if len(nodes) % 2 == 0 else [*nodes, -1]
    turn = number % max(1, len(circle) - 1)
    rest = circle[1:]
    circle = circle[:1] + rest[len(rest) - turn :] + rest[: len(rest) - turn]
    half = len(circle) // 2
    met = zip(circle[:half], reversed(circle[half:]), strict=True)
    return [(min(pair), max(pair)) for pair in met if -1 not in pair]
