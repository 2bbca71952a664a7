"""The search itself: every legal plan is counted, few are costed, and the first ones in the order are exact.

A plan is out for the first of these reasons. Its weights, gradients and optimizer states alone exceed the memory. What
happens inside its micro-batches, with the filling of the pipeline, takes longer than both the tie with the fastest plan
and the last of the `KEPT` fastest: such a plan is neither chosen nor among the first runners-up, whatever ZeRO,
offloading and the optimizer cost besides (branch and bound; small spaces go without). Its memory exceeds the usable
one.

Plans of one layout and batch share their bound. They are taken in its order, so that the search ends at the first bound
that is too high: first by their arithmetic, which costs next to nothing, and once they come up, by all that the stages
do. Where the smallest micro-batch of a layout does not fit, larger ones do not either. What was weighed before the
limit had fallen to its last value is sorted out afterwards, so that the answer does not depend on the order.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heapreplace
from typing import Any

from launcher.planner.cost import Candidate
from launcher.planner.price.calibrated import estimator_of
from launcher.planner.price.estimate import Bounds, Footprint, usable_bytes
from launcher.planner.problem import Problem
from launcher.planner.search.order import TIE, simplicity
from launcher.planner.space.layouts import Layout
from launcher.planner.space.plans import Batch, Space, Switches
from strategies.spec import Plan

KEPT = 32
# Spaces of fewer plans are weighed in full, so that what a person looks at is complete.
SMALL = 1000


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Plans that fit and may matter; how many do not fit, by engine and ZeRO stage; and the rest."""

    fitting: tuple[Candidate, ...]
    misses: dict[tuple[str, int], tuple[int, Candidate]]  # how many, and the nearest
    num_slow: int
    num_considered: int
    num_costed: int
    limit_s: float


@dataclass(frozen=True, kw_only=True)
class _Miss:
    """A plan that does not fit, and why."""

    plan: Plan
    footprint: Footprint
    reason: str

    def size(self) -> tuple[Any, ...]:
        """Order misses by how near they are to fitting."""
        return (self.footprint.memory.total, self.footprint.host_bytes, simplicity(self.plan))


@dataclass(frozen=True, kw_only=True)
class _Unseen:
    """Plans that need more than `least_bytes`, which is already too much."""

    least_bytes: float
    layout: Layout
    batches: tuple[Batch, ...]
    switches: Sequence[Switches]


@dataclass(kw_only=True)
class _Class:
    """Plans of one engine and ZeRO stage that do not fit."""

    count: int = 0
    nearest: _Miss | None = None
    unseen: list[_Unseen] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """Plans of one layout and batch, with a bound of their seconds; `bounds` are tighter ones, by placement."""

    floor_s: float
    layout: Layout
    batches: tuple[Batch, ...]  # of the layout, the smallest first
    batch: Batch
    switches: tuple[Switches, ...]
    bounds: Mapping[tuple[object, ...], Bounds] | None = None

    def bound_s(self, switches: Switches) -> float:
        """Return seconds that the plan with these switches cannot undercut."""
        assert self.bounds is not None, "an entry is tightened before its plans are weighed"
        bounds = self.bounds[switches.placement]
        if switches.recompute != "full":
            return bounds.busy_s
        some = switches.recompute_num_layers
        return bounds.busy_s + bounds.recompute_s * (min(1.0, some / max(1, bounds.layers)) if some else 1.0)


_NOTHING_RECOMPUTED: Mapping[str, Any] = {
    "recompute": "none",
    "recompute_num_layers": 0,
    "recompute_modules": (),
}


class _Engine:
    """The plans of one engine: their bounds, and which of them fit."""

    def __init__(self, problem: Problem, space: Space) -> None:
        self.space = space
        self.estimator = estimator_of(problem, space.capabilities)
        self.classes: dict[int, _Class] = {}
        self.num_considered = 0
        self.may_offload = False  # more than was asked
        self.queue: list[_Entry] = []
        self._usable = usable_bytes(problem.cluster)
        request = problem.request
        self._resident = (bool(request.offload_optimizer), bool(request.offload_parameters))
        self._seen: dict[tuple[Layout, int, object], tuple[Footprint, str | None]] = {}

    def fill(self, *, resident: bool) -> None:
        """Queue the plans whose states fit: those that offload no more than was asked, or the others."""
        self.queue = []
        for layout, batches in self.space.members:
            switches = self.space.switches(layout)
            wanted = [one for one in switches if (one.on_host == self._resident) == resident]
            self.may_offload = self.may_offload or (resident and len(wanted) < len(switches))
            self.num_considered += len(wanted) * len(batches)
            light = self._light(layout, batches, wanted)
            if light:
                self.queue += [self._entry(layout, batches, batch, light) for batch in batches]

    def fits(self) -> bool:
        """Say whether any queued plan fits, however slow."""
        entries = sorted(self.queue, key=lambda entry: entry.batch.size)
        return any(
            self.look(entry, switches)[1] is None
            for entry in entries
            for switches in reversed(entry.switches)
        )

    def look(self, entry: _Entry, switches: Switches) -> tuple[Footprint, str | None]:
        """Return what a plan needs, and why that is too much, or None.

        Where the smallest micro-batch of the layout is too large already, it is what that one needs.
        """
        least = self._look(entry.layout, entry.batches[0], switches)
        return least if least[1] is not None else self._look(entry.layout, entry.batch, switches)

    def refuse(self, entry: _Entry, switches: Switches) -> None:
        """Count a plan that does not fit."""
        group = self.classes.setdefault(switches.zero_stage, _Class())
        group.count += 1
        size = self.look(entry, switches)[0].memory.total
        group.unseen.append(
            _Unseen(least_bytes=size, layout=entry.layout, batches=(entry.batch,), switches=(switches,))
        )

    def nearest(self, group: _Class) -> Candidate:
        """Find the plan of a class that came closest to fitting; its cost is for comparison with what fits."""
        for unseen in sorted(group.unseen, key=lambda unseen: unseen.least_bytes):
            if group.nearest is not None and unseen.least_bytes > group.nearest.footprint.memory.total:
                break
            for batch in unseen.batches:
                for switches in unseen.switches:
                    group.nearest = self._nearer(group.nearest, unseen.layout, batch, switches)
        assert group.nearest is not None, "a class has members"
        cost = self.estimator.cost(group.nearest.plan, group.nearest.footprint)
        return Candidate(plan=group.nearest.plan, cost=cost, rejected=group.nearest.reason)

    def _look(self, layout: Layout, batch: Batch, switches: Switches) -> tuple[Footprint, str | None]:
        key = (layout, batch.size, switches.memory_key)
        found = self._seen.get(key)
        if found is None:
            footprint = self.estimator.footprint(self.space.plan(layout, batch, switches))
            found = self._seen[key] = (footprint, self.estimator.too_large(footprint))
        return found

    def _nearer(
        self, nearest: _Miss | None, layout: Layout, batch: Batch, switches: Switches
    ) -> _Miss | None:
        footprint, reason = self._look(layout, batch, switches)
        assert reason is not None, "a plan that needs more than one that is too large is too large"
        miss = _Miss(plan=self.space.plan(layout, batch, switches), footprint=footprint, reason=reason)
        return miss if nearest is None else min(nearest, miss, key=_Miss.size)

    def tightened(self, entry: _Entry) -> _Entry:
        """Return an entry with the communication inside micro-batches in its bounds."""
        plain = {one.placement: one for one in entry.switches}
        bounds = {
            placement: self.estimator.bounds(
                self.space.plan(entry.layout, entry.batch, replace(one, **_NOTHING_RECOMPUTED))
            )
            for placement, one in plain.items()
        }
        return replace(entry, floor_s=min(bound.busy_s for bound in bounds.values()), bounds=bounds)

    def _entry(
        self, layout: Layout, batches: tuple[Batch, ...], batch: Batch, switches: tuple[Switches, ...]
    ) -> _Entry:
        return _Entry(
            floor_s=self.estimator.floor_s(self.space.plan(layout, batch, switches[0])),
            layout=layout,
            batches=batches,
            batch=batch,
            switches=switches,
        )

    def _light(
        self, layout: Layout, batches: tuple[Batch, ...], wanted: Sequence[Switches]
    ) -> tuple[Switches, ...]:
        """Return the switches under which the states fit; count the others."""
        light: list[Switches] = []
        for (stage, _), members in _by_states(wanted).items():
            size = self.estimator.state_bytes(self.space.plan(layout, batches[0], members[0]))
            if size <= self._usable:
                light += members
                continue
            group = self.classes.setdefault(stage, _Class())
            group.count += len(members) * len(batches)
            group.unseen.append(_Unseen(least_bytes=size, layout=layout, batches=batches, switches=members))
        return tuple(light)


def sweep(
    problem: Problem, spaces: Iterable[Space], *, small: int = SMALL, only_best: bool = False
) -> Outcome:
    """Weigh every plan of all engines together.

    With `only_best` no runners-up are looked for, and no nearest misses where any plan fits.
    """
    engines = [_Engine(problem, space) for space in spaces]
    for engine in engines:
        engine.fill(resident=True)
    is_small = sum(engine.num_considered for engine in engines) <= small
    search = _Search(engines, exhaustive=is_small, only_best=only_best)
    search.drain(engines)
    # Offloading is weighed only where nothing fits without it.
    helpless = [e for e in engines if e.may_offload and not search.fitted(e) and not e.fits()]
    for engine in helpless:
        engine.fill(resident=False)
    search.drain(helpless)
    return search.outcome()


class _Search:
    """The fastest plans so far, and what was weighed on the way to them."""

    def __init__(self, engines: Sequence[_Engine], *, exhaustive: bool, only_best: bool) -> None:
        self._engines, self._exhaustive, self._only_best = engines, exhaustive, only_best
        self._kept = 1 if only_best else KEPT
        self._fastest: list[float] = []
        self._fitting: list[tuple[_Engine, float, Candidate]] = []
        self._misses: list[tuple[_Engine, float, _Entry, Switches]] = []

    def fitted(self, engine: _Engine) -> bool:
        """Say whether any plan of an engine is known to fit."""
        return any(other is engine for other, _, _ in self._fitting)

    @property
    def limit_s(self) -> float:
        """Seconds beyond which a plan is neither tied with the fastest one nor among the first."""
        if self._exhaustive or len(self._fastest) < self._kept:
            return math.inf
        return max(self._fastest[0] * TIE, self._fastest[self._kept - 1])

    def drain(self, engines: Sequence[_Engine]) -> None:
        """Weigh what is queued, the lowest bounds of all engines first."""
        # The running number decides between equal bounds: entries have no order.
        queue = [
            (entry.floor_s, number, entry, engine)
            for number, (entry, engine) in enumerate(
                (entry, engine) for engine in engines for entry in engine.queue
            )
        ]
        heapify(queue)
        limit = self.limit_s
        while queue and queue[0][0] <= limit:
            _, number, entry, engine = queue[0]
            if entry.bounds is None:
                entry = engine.tightened(entry)
                heapreplace(queue, (entry.floor_s, number, entry, engine))
                continue
            heappop(queue)
            for switches in entry.switches:
                if entry.bound_s(switches) <= limit:
                    self._weigh(engine, entry, switches)
                    limit = self.limit_s

    def _weigh(self, engine: _Engine, entry: _Entry, switches: Switches) -> None:
        bound = entry.bound_s(switches)
        footprint, reason = engine.look(entry, switches)
        if reason is not None:
            self._misses.append((engine, bound, entry, switches))
            return
        plan = engine.space.plan(entry.layout, entry.batch, switches)
        cost = engine.estimator.cost(plan, footprint)
        self._fitting.append((engine, bound, Candidate(plan=plan, cost=cost)))
        insort(self._fastest, cost.step_s)

    def outcome(self) -> Outcome:
        """Sort out what the last limit excludes, and sum up."""
        limit = self.limit_s
        fitting = tuple(candidate for _, bound, candidate in self._fitting if bound <= limit)
        for engine, bound, entry, switches in self._misses:
            if bound <= limit:
                engine.refuse(entry, switches)
        classes = [
            (engine, stage, group)
            for engine in self._engines
            for stage, group in sorted(engine.classes.items())
        ]
        considered = sum(engine.num_considered for engine in self._engines)
        return Outcome(
            fitting=fitting,
            misses={
                (engine.space.strategy, stage): (group.count, engine.nearest(group))
                for engine, stage, group in classes
                if not (self._only_best and fitting)
            },
            num_slow=considered - len(fitting) - sum(group.count for _, _, group in classes),
            num_considered=considered,
            num_costed=len(self._fitting),
            limit_s=limit,
        )


def _by_states(switches: Sequence[Switches]) -> dict[tuple[int, tuple[bool, bool]], list[Switches]]:
    """Group switches by what they mean for weights, gradients and optimizer states."""
    groups: dict[tuple[int, tuple[bool, bool]], list[Switches]] = {}
    for one in switches:
        groups.setdefault((one.zero_stage, one.on_host), []).append(one)
    return groups
