"""The loop: batches in, steps, metrics, evaluations, checkpoints, and a way out when somebody asks."""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.checkpoint import CheckpointStore
from launcher.config import Job
from launcher.data.loader import BatchLoader
from launcher.data.tokens import TokenDataset
from launcher.errors import CheckpointError
from launcher.monitor.metrics import StepMetrics, flops_utilisation
from launcher.monitor.system import read_memory
from launcher.monitor.writers import Writer
from launcher.run_dir import RunDir
from strategies.base import StepResult, Strategy
from strategies.spec import Plan

if TYPE_CHECKING:
    from launcher.ranks import Ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the trainer asks of the process it runs in; the worker supplies torch's answers."""

    device_peak_bytes: Callable[[], int] | None  # None: computing on the CPU
    random_state: Callable[[], dict[str, Any]]
    restore_random_state: Callable[[dict[str, Any]], None]


@dataclass(kw_only=True)
class Trainer:
    """One run on one rank. `start_step` and the data position follow from the checkpoint that was loaded."""

    run: RunDir
    job: Job
    plan: Plan
    dataset: TokenDataset
    strategy: Strategy
    ranks: Ranks
    machine: Machine
    versions: dict[str, str]
    sinks: Sequence[Writer] = ()  # where finished steps go; empty on all ranks but 0
    step: int = 0
    consumed_samples: int = 0
    _step_times: list[float] = field(default_factory=list)
    _last_validation: float | None = None

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Load the newest good checkpoint, if there is one; say what was skipped and why."""
        found = self._store.latest_good(logger.warning) if self.ranks.rank == 0 else None
        found = self.ranks.broadcast(found)
        if found is None:
            if self._store.committed():
                raise CheckpointError(
                    f"none of the {len(self._store.committed())} checkpoints in {self.run.checkpoints} is good; "
                    f"see {self.run.logs} for each reason, or start in a new run directory"
                )
            return
        path, manifest = found
        self._store.check_belongs(
            manifest,
            plan=self.plan,
            model=self.job.model,
            dataset_hash=self.dataset.content_hash,
            reshardable=self.strategy.capabilities.reshardable,
        )
        self.strategy.load(path / "engine")
        self._restore_random_state(path)
        self.step, self.consumed_samples = manifest.step, manifest.consumed_samples
        if self.ranks.rank == 0:
            logger.info("resumed from %s at step %d", path.name, self.step)
            self.run.log_event("resumed", step=self.step, checkpoint=path.name)

    def save(self) -> None:
        """Write a checkpoint with all ranks; it counts from the moment its manifest is in place."""
        started = time.perf_counter()
        directory = self.ranks.broadcast(self._store.begin(self.step) if self.ranks.rank == 0 else None)
        self.strategy.save(directory / "engine")
        state_file = directory / "rng" / f"rank_{self.ranks.rank:05d}.json"
        state_file.write_text(json.dumps(self.machine.random_state()), encoding="utf-8")
        self.ranks.barrier()
        if self.ranks.rank == 0:
            self._store.commit(
                self.step,
                consumed_samples=self.consumed_samples,
                plan=self.plan,
                model=self.job.model,
                training=self.job.training,
                versions=self.versions,
                data=self.dataset.content_hash,
            )
            seconds = time.perf_counter() - started
            logger.info("checkpoint at step %d written in %.1f s", self.step, seconds)
            self.run.log_event("checkpoint", step=self.step, seconds=seconds)
        self.ranks.barrier()

    def _restore_random_state(self, path: Path) -> None:
        state_file = path / "rng" / f"rank_{self.ranks.rank:05d}.json"
        if state_file.exists():  # a resharded run may have more ranks than the one that saved
            self.machine.restore_random_state(json.loads(state_file.read_text(encoding="utf-8")))

    @property
    def _store(self) -> CheckpointStore:
        return CheckpointStore(self.run.checkpoints, self.job.checkpoint)

    # ---- the loop ----------------------------------------------------------------------------------------------

    def train(self) -> str:
        """Run to the last step or to a stop request. Return "finished" or "stopped"."""
        first_step, num_steps = self.step, self.job.training.num_steps
        stopping = False
        with self._loader("train", self.consumed_samples) as loader:
            while self.step < num_steps and not stopping:
                metrics = self._one_step(loader)
                for sink in self.sinks:
                    sink.write(metrics)
                stopping = self._stop_requested(first_step)
                if self._checkpoint_due(stopping=stopping):
                    self.save()
        state = "finished" if self.step >= num_steps else "stopped"
        self._conclude(state)
        return state

    def _one_step(self, loader: BatchLoader) -> StepMetrics:
        started = time.perf_counter()
        learning_rate = self.job.training.learning_rate_at(self.step)
        result = self.strategy.train_step(loader.next(), learning_rate=learning_rate)
        seconds = time.perf_counter() - started
        self.step += 1
        self.consumed_samples += self.job.training.global_batch_size
        self._step_times.append(seconds)
        validation_loss = self._evaluate() if self._evaluation_due() else None
        return self._record(
            result, learning_rate=learning_rate, seconds=seconds, validation_loss=validation_loss
        )

    def _record(
        self, result: StepResult, *, learning_rate: float, seconds: float, validation_loss: float | None
    ) -> StepMetrics:
        training, cluster = self.job.training, self.job.cluster
        tokens_per_s = training.tokens_per_step / seconds / cluster.world_size
        return StepMetrics(
            step=self.step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            learning_rate=learning_rate,
            step_time_s=seconds,
            tokens_per_s_per_gpu=tokens_per_s,
            mfu=flops_utilisation(
                self.job.model,
                sequence_length=training.sequence_length,
                tokens_per_s_per_gpu=tokens_per_s,
                peak_tflops=None
                if cluster.gpu.peak_is_nominal
                else cluster.gpu.peak_tflops.get(training.precision),
            ),
            memory_gib=read_memory(self.machine.device_peak_bytes).peak_gib,
            consumed_samples=self.consumed_samples,
            skipped=result.skipped,
            validation_loss=validation_loss,
            time=time.time(),
        )

    # ---- questions asked after each step -----------------------------------------------------------------------

    def _evaluation_due(self) -> bool:
        interval = self.job.evaluation.interval
        last = self.step == self.job.training.num_steps
        return last or (interval > 0 and self.step % interval == 0)

    def _checkpoint_due(self, *, stopping: bool) -> bool:
        policy = self.job.checkpoint
        if self.step == self.job.training.num_steps and policy.save_last:
            return True
        return stopping or (policy.interval > 0 and self.step % policy.interval == 0)

    def _stop_requested(self, first_step: int) -> bool:
        stop_at = self.job.stop_at_step
        if stop_at is not None and first_step < stop_at <= self.step:
            return True
        return self.ranks.any(self.ranks.rank == 0 and self.run.stop_file.exists())

    # ---- helpers -----------------------------------------------------------------------------------------------

    def _loader(self, split: str, start_sample: int) -> BatchLoader:
        validation = split == "validation"
        return BatchLoader(
            self.dataset,
            split="validation" if validation else "train",
            sequence_length=self.job.training.sequence_length,
            global_batch_size=self.job.training.global_batch_size,
            micro_batch_size=self.plan.micro_batch_size,
            num_microbatches=self.plan.num_microbatches,
            dp=self.plan.dp,
            dp_rank=self.strategy.dp_rank,
            seed=self.job.training.seed,
            shuffle=self.job.data.shuffle and not validation,
            num_workers=0 if validation else self.job.data.num_workers,
            start_sample=start_sample,
        )

    def _evaluate(self) -> float:
        rounds = -(-self.job.evaluation.num_sequences // self.job.training.global_batch_size)
        with self._loader("validation", 0) as loader:
            batches = [batch for _ in range(max(1, rounds)) for batch in loader.next()]
        self._last_validation = self.strategy.evaluate(batches)
        return self._last_validation

    def _conclude(self, state: str) -> None:
        peak_gib = self.ranks.maximum(read_memory(self.machine.device_peak_bytes).peak_gib)
        if self.ranks.rank != 0:
            return
        warm = self._step_times[self.job.monitor.warmup_steps :] or self._step_times
        step_s = statistics.median(warm) if warm else None
        measured = {"memory_bytes": round(peak_gib * 2**30), "step_s": step_s}
        self.run.log_event(state, step=self.step, validation_loss=self._last_validation, measured=measured)
        logger.info("%s at step %d%s", state, self.step, _validation_text(self._last_validation))


def _validation_text(loss: float | None) -> str:
    return "" if loss is None else f", validation loss {loss:.4f} nats per token"
