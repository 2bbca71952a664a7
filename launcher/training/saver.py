"""What one rank does to save and to restore: copy, have the rest done beside the training, commit, fall back."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import goodput
from launcher.checkpoint.background import Background
from launcher.checkpoint.completion import Completion, failure
from launcher.checkpoint.manifest import FORMAT, Manifest, check_belongs
from launcher.checkpoint.verification import attempt, latest_good
from launcher.cluster import detect
from launcher.config import Job
from launcher.data.tokens import TokenDataset
from launcher.errors import CheckpointError
from launcher.monitor.metrics import read
from launcher.run_dir import RunDir
from strategies.base import Strategy
from strategies.spec import Plan

if TYPE_CHECKING:
    from launcher.ranks import Ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RandomState:
    """The random number generators of this process, as JSON."""

    get: Callable[[], dict[str, Any]]
    set: Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a run has come."""

    step: int = 0
    consumed_samples: int = 0


@dataclass(kw_only=True)
class Saver:
    """The checkpoints of one run, on one rank. Every rank makes the same calls in the same order."""

    run: RunDir
    job: Job
    plan: Plan
    dataset: TokenDataset
    strategy: Strategy
    ranks: Ranks
    random: RandomState
    versions: dict[str, str]
    _background: Background = field(default_factory=Background)
    _under_way: int | None = None  # step
    _peers: Ranks | None = None
    _snapshots: bool | None = None  # None: not asked yet
    _restored: Path | None = None  # the checkpoint that this start goes on from
    _last_seconds: float = 0.0  # from the copy to the commit

    def __post_init__(self) -> None:
        self._policy = self.job.checkpoint
        self.tiers = self.run.tiers(self._policy)

    # ---- restoring ---------------------------------------------------------------------------------------------

    def restore(self) -> Position:
        """Load the newest good checkpoint, if there is one; say what was skipped and why."""
        belongs = partial(
            check_belongs, plan=self.plan, model=self.job.model, dataset_hash=self.dataset.content_hash
        )
        found = latest_good(self.ranks, self.tiers, logger.warning, belongs=belongs)
        if found is None:
            self._check_nothing_lost()
            return Position()
        path, manifest = found
        belongs(manifest)
        self.strategy.load(path / "engine")
        self._restore_random_state(path)
        self._restored = path
        if self.ranks.rank == 0:
            logger.info("resumed from %s at step %d", path, manifest.step)
        return Position(step=manifest.step, consumed_samples=manifest.consumed_samples)

    def log_restored(self, *, step: int) -> None:
        """Rank 0, where training begins at `step`: record what it has to repeat, and what it goes on from.

        An export restores as well and repeats nothing. The later steps still have to be in metrics.jsonl.
        """
        again = goodput.lost(read(self.run.metrics_file), step=step)
        if again is not None:
            self.run.log_event("lost", **again)
        if self._restored is not None:
            tier = self._tier(self._restored)
            self.run.log_event("resumed", step=step, checkpoint=self._restored.name, tier=tier)

    def _tier(self, path: Path) -> str:
        return "shared" if path.parent == self.tiers.shared.root else "fast"

    def _check_nothing_lost(self) -> None:
        """A run that has saved once must not begin again as if it had not."""
        found = len(self.tiers.committed())
        if found or any(event["event"] == "checkpoint" for event in self.run.events()):
            raise CheckpointError(
                f"none of the {found} checkpoints in {self.run.checkpoints} is good; "
                f"see {self.run.logs} for each reason, or start in a new run directory"
            )

    def _restore_random_state(self, path: Path) -> None:
        state_file = path / "rng" / f"rank_{self.ranks.rank:05d}.json"
        if state_file.exists():  # a resharded run may have more ranks than the one that saved
            self.random.set(json.loads(state_file.read_text(encoding="utf-8")))

    # ---- saving ------------------------------------------------------------------------------------------------

    def save(self, position: Position, *, last: bool) -> float | None:
        """Save, after waiting for the save before; return the seconds that training stood still.

        The last save of a run is waited for, and its failure is always a fault. None where those seconds tell nothing
        about saves to come: this one failed, or was waited for where they are not.
        """
        started = time.perf_counter()
        self.settle()
        beside = self._policy.asynchronous and not last
        self._under_way = position.step
        try:
            write = self._copy(self._begin(position.step), snapshot=beside and self._takes_snapshots())
        except CheckpointError as error:
            self._give_up(error, last=last, stall_s=time.perf_counter() - started)
            return None
        work = partial(self._complete, self._manifest(position), write, started=started)
        if beside:
            self._background.start(partial(work, stall_s=time.perf_counter() - started))
        else:
            self._background.start(work)
            if not self.settle(last=last) or self._policy.asynchronous:
                return None
        return time.perf_counter() - started

    def settle(self, *, last: bool = False) -> bool:
        """Wait for the save under way, if there is one; tell whether all is well.

        On a failure do as `checkpoint.on_failed_save` says.
        """
        started = time.perf_counter()
        failed = self._background.wait()
        if failed is not None:
            self._give_up(failed, last=last, stall_s=time.perf_counter() - started)
        return failed is None

    def leave(self) -> None:
        """Give the save under way what is left of the grace time, on the way out after a fault."""
        self._background.wait(timeout_s=self._policy.grace_s)

    @property
    def has_failed(self) -> bool:
        """True when training should stop because a save beside it failed."""
        return self._background.has_failed and self._policy.on_failed_save == "stop"

    def warn_of_grace(self) -> None:
        """Before the save that a request to stop asks for: say where the time may not do."""
        needed = self._last_seconds * (2 if self._background.is_busy else 1)
        if self.ranks.rank == 0 and needed > self._policy.grace_s:
            logger.warning(
                "saving takes about %.0f s, longer than checkpoint.grace_s=%g: if a kill comes first, the run goes on "
                "from the checkpoint before; have it warned earlier, or use checkpoint.fast_dir",
                needed,
                self._policy.grace_s,
            )

    def _begin(self, step: int) -> Path:
        """Have the folder on every node; raise the same error on every rank."""
        first = self.tiers.first
        sentence = None
        if self.ranks.rank == 0:
            sentence = attempt(lambda: first.begin(step))[1]
        elif first is not self.tiers.shared and self.ranks.local_rank == 0:
            first.discard(step)  # what a killed start left on this node's own disk
        found = self.ranks.gather(sentence)
        if not any(found):
            found = self.ranks.gather(attempt(lambda: first.join(step))[1])
        if any(found):
            raise CheckpointError(next(each for each in found if each))
        return first.aside_of(step)

    def _copy(self, directory: Path, *, snapshot: bool) -> Callable[[], None]:
        """Copy or write the engine's part; return what writes the rest."""
        state = json.dumps(self.random.get())
        state_file = directory / "rng" / f"rank_{self.ranks.rank:05d}.json"
        try:
            if snapshot:
                engine = self.strategy.snapshot(directory / "engine")
            else:
                self.strategy.save(directory / "engine")
                engine = None
        except BaseException as error:  # a full disk has many types, not all of them Exceptions
            assert self._under_way is not None
            self.tiers.first.discard(self._under_way)
            found = failure(self._under_way, self.tiers, error)
            if self.ranks.world_size > 1:
                raise _Unshared(str(found)) from error
            raise found from error

        def write() -> None:
            if engine is not None:
                engine()
            state_file.write_text(state, encoding="utf-8")

        return write

    def _takes_snapshots(self) -> bool:
        """Tell whether the engine copies its state and every host has the memory; asked once, answered by all ranks."""
        if self._snapshots is None:
            needed = self.strategy.snapshot_bytes()
            # All ranks of this host copy at once. Two tenths stay free: the engine's own loads and gathers.
            free = detect.free_memory_bytes()
            short = needed * self.job.cluster.gpus_per_node > 0.8 * free
            lacking = self.ranks.any(short)
            self._snapshots = self.ranks.any(needed > 0) and not lacking
            if self.ranks.rank == 0:
                logger.info(
                    _snapshot_words(
                        self._snapshots, needed=needed, lacking=lacking, strategy=self.plan.strategy
                    )
                )
        return self._snapshots

    def _complete(
        self, content: Manifest, write: Callable[[], None], *, started: float, stall_s: float | None = None
    ) -> None:
        """All that is left after the copy, in the thread."""
        assert self._peers is not None
        Completion(peers=self._peers, tiers=self.tiers, content=content)(write)
        self._last_seconds = seconds = time.perf_counter() - started
        if self.ranks.rank == 0:
            stall_s = seconds if stall_s is None else stall_s
            logger.info(
                "checkpoint at step %d written in %.1f s, training stood still for %.2f s",
                content.step,
                seconds,
                stall_s,
            )
            self._note("checkpoint", step=content.step, seconds=seconds, stall_s=stall_s)

    def _note(self, event: str, **facts: Any) -> None:
        """Keep what became of a save; on a full disk without, as the peers would know of no fault."""
        with suppress(OSError):
            self.run.log_event(event, **facts)

    def _give_up(self, error: CheckpointError, *, last: bool, stall_s: float) -> None:
        """Stop, or say that training goes on without this checkpoint."""
        step, self._under_way = self._under_way, None
        if self.ranks.rank == 0:
            self._note("checkpoint_failed", step=step, stall_s=stall_s, message=str(error))
        if last or self._policy.on_failed_save == "stop" or isinstance(error, _Unshared):
            raise error
        if self.ranks.rank == 0:
            logger.warning("%s; training goes on (checkpoint.on_failed_save=continue)", error)

    def _manifest(self, position: Position) -> Manifest:
        if self._peers is None:
            self._peers = self.ranks.separate()
        return Manifest(
            format=FORMAT,
            step=position.step,
            consumed_samples=position.consumed_samples,
            plan=self.plan,
            model=self.job.model,
            training=self.job.training,
            versions=self.versions,
            files=(),
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            data=self.dataset.content_hash,
            reshardable=tuple(sorted(self.strategy.capabilities.reshardable)),
        )


class _Unshared(CheckpointError):
    """A failure that the other ranks may not know of: they may wait inside the engine for this one."""


def _snapshot_words(snapshots: bool, *, needed: int, lacking: bool, strategy: str) -> str:
    if snapshots:
        return (
            f"checkpoints are copied to host memory, {needed / 2**30:.2f} GiB on rank 0 and one at a time, "
            "and written while training goes on; a save waits for the one before"
        )
    if lacking:
        return (
            f"checkpoints stop training until they are written: a copy takes {needed / 2**30:.2f} GiB a rank, "
            "more than a host has to spare"
        )
    return (
        f"checkpoints stop training until they are written: strategy={strategy} cannot write a copy; "
        "only checksums and copies are made beside the training"
    )
