"""Which settings of communication are worth a trial on a fabric, and when one has won beyond noise. Pure.

A trial times every operation and size under every setting in each of several rounds, in shuffled order. What is
compared is a setting's time over the inherited setting's in the same round, so that what slows a whole round down
weighs on neither. The test is a sign-flip permutation test of the rounds' mean log ratios (Fisher 1935): were the
setting no better, each round's ratio would as likely be its inverse; p is the share of all such flips that come out at
least as good. It assumes no distribution, and with n rounds no p is below 2^-n.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from launcher.cluster.nccl_variables import NCCL_GUIDE, Fabric

MIN_GAIN = 0.02  # of the time: less is not worth a setting that somebody has to understand later
SIGNIFICANCE = 0.05  # that any setting of a trial is adopted by chance
Times = Sequence[Sequence[float]]  # rounds of cells: seconds of an operation at a size
OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
SIZES = {"cpu": (2**12, 2**16, 2**20, 2**22), "cuda": (2**14, 2**18, 2**22, 2**26, 2**28)}
Verdict = Literal["adopt", "no gain", "within noise", "slows a part down", "could not run"]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Variables that are tried together, and why they might help."""

    environment: Mapping[str, str]
    source: str = "try="

    @property
    def name(self) -> str:
        """The variables as one would type them."""
        return ",".join(f"{key}={value}" for key, value in self.environment.items())


_NETWORKED: tuple[tuple[dict[str, str], str], ...] = (
    ({"NCCL_CROSS_NIC": "1"}, "NCCL_CROSS_NIC: rails that meet in one switch"),
    (
        {"NCCL_IB_QPS_PER_CONNECTION": "4"},
        "NCCL_IB_QPS_PER_CONNECTION: more routes through a fabric of several levels",
    ),
)
_BY_FABRIC: dict[Fabric, tuple[tuple[dict[str, str], str], ...]] = {
    "infiniband": _NETWORKED,
    "roce": _NETWORKED,
    "tcp": (
        (
            {"NCCL_SOCKET_NTHREADS": "4", "NCCL_NSOCKS_PERTHREAD": "4"},
            "NCCL_SOCKET_NTHREADS: generic networks of 100 Gb/s",
        ),
    ),
}
_ANYWHERE = (
    ({"NCCL_ALGO": "Ring"}, "NCCL_ALGO"),
    ({"NCCL_ALGO": "Tree"}, "NCCL_ALGO"),
)
_PROCESSORS = (
    ({"OMP_NUM_THREADS": "1"}, "torch: threads of each rank beside those that send"),
    ({"TORCH_GLOO_LAZY_INIT": "1"}, "torch, ProcessGroupGloo: connections when they are first used"),
)


def cells(device: str) -> tuple[tuple[str, int], ...]:
    """Return what is timed in a round, in order: operations, and bytes of the whole buffer on one rank."""
    return tuple((operation, size) for operation in OPERATIONS for size in SIZES[device])


def candidates(fabric: Fabric | None, *, device: str) -> tuple[Candidate, ...]:
    """Return what is tried where nobody says: settings that NCCL's guide or torch describes, none of them unsafe."""
    if device == "cpu":
        return tuple(Candidate(environment=given, source=source) for given, source in _PROCESSORS)
    if fabric in ("efa", "gcp"):
        return ()  # their plug-ins bring tuners of their own
    listed = (*_ANYWHERE, *(_BY_FABRIC.get(fabric, ()) if fabric is not None else ()))
    return tuple(Candidate(environment=given, source=f"{NCCL_GUIDE}, {source}") for given, source in listed)


def parse(text: str) -> Candidate:
    """Read NAME=VALUE,NAME=VALUE; raise ValueError where it is none."""
    pairs: dict[str, str] = {}
    for word in text.split(","):
        name, equals, value = word.partition("=")
        if not equals and pairs:  # a comma inside a value: NCCL_IB_HCA=mlx5_0,mlx5_1
            pairs[list(pairs)[-1]] += f",{word}"
        elif not name.isidentifier() or not equals:
            raise ValueError(f"try={text} is not NAME=VALUE or NAME=VALUE,NAME=VALUE")
        else:
            pairs[name] = value
    return Candidate(environment=pairs)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a setting did against the inherited one."""

    verdict: Verdict
    speedup: float = 1.0  # geometric mean over cells and rounds; above 1: faster
    p: float = 1.0  # that it is no better
    by_cell: tuple[float, ...] = ()  # speed-up of each operation and size
    reason: str = ""


def compare(bases: Sequence[Times], tried: Times, *, num_candidates: int) -> Outcome:
    """Judge a setting by its rounds beside those of the inherited one, which may have run twice: the worse of both.

    `num_candidates` share one level of chance.
    """
    level = SIGNIFICANCE / num_candidates
    found = [_compare(base, tried, level=level) for base in bases]
    return max(found, key=lambda outcome: (outcome.verdict != "adopt", outcome.p))


def _compare(base: Times, tried: Times, *, level: float) -> Outcome:
    assert len(base) == len(tried) > 0, "rounds are paired"
    logs = [
        [math.log(mine / other) for mine, other in zip(after, before, strict=True)]
        for before, after in zip(base, tried, strict=True)
    ]
    means = [statistics.fmean(cells) for cells in logs]
    by_cell = tuple(math.exp(-statistics.fmean(cell)) for cell in zip(*logs, strict=True))
    speedup, p = math.exp(-statistics.fmean(means)), p_value(means)
    slowed = _slowed(logs)
    verdict: Verdict
    if p > level:
        verdict, reason = "within noise", f"p={p:.3g}, {level:.3g} is wanted"
    elif speedup < 1 + MIN_GAIN:
        verdict, reason = "no gain", f"{speedup - 1:.1%} faster, {MIN_GAIN:.0%} is wanted"
    elif slowed is not None:
        verdict, reason = "slows a part down", f"{by_cell[slowed] - 1:.1%} in its worst part"
    else:
        verdict, reason = "adopt", f"p={p:.2g}"
    return Outcome(verdict=verdict, speedup=speedup, p=p, by_cell=by_cell, reason=reason)


def _slowed(logs: Sequence[Sequence[float]]) -> int | None:
    """Return the cell that got slower most, of those that did beyond noise and by more than a gain has to be."""
    parts = list(zip(*logs, strict=True))
    means = [statistics.fmean(part) for part in parts]
    slower = [
        cell
        for cell, part in enumerate(parts)
        if means[cell] > math.log(1 + MIN_GAIN)
        and p_value([-value for value in part]) <= SIGNIFICANCE / len(parts)
    ]
    return max(slower, key=lambda cell: means[cell], default=None)


def p_value(differences: Sequence[float]) -> float:
    """Share of all ways to flip signs whose mean is at most the one that was seen."""
    seen = sum(differences) + 1e-12
    count = sum(
        sum(sign * abs(value) for sign, value in zip(signs, differences, strict=True)) <= seen
        for signs in product((1, -1), repeat=len(differences))
    )
    return float(count) / 2.0 ** len(differences)


def fewest_rounds(*, num_candidates: int, num_cells: int) -> int:
    """Return how many rounds are needed before anything can win, and before any part of it can be shown to lose."""
    return math.ceil(math.log2(max(num_candidates, num_cells) / SIGNIFICANCE))
