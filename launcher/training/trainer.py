"""The loop: batches in, steps, metrics, evaluations, checkpoints, and a way out when somebody asks."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from launcher import goodput
from launcher.config import Job
from launcher.data.loader import BatchLoader
from launcher.data.tokens import Split, TokenDataset
from launcher.errors import BadLossError
from launcher.heartbeat import Phase
from launcher.monitor.metrics import StepMetrics, read
from launcher.monitor.observe import Looks, Observer, Setting
from launcher.monitor.sinks.writers import Sink
from launcher.monitor.spikes import SpikeRule
from launcher.monitor.system import peak_memory_gib
from launcher.monitor.traces.tracing import Profiler, Tracing
from launcher.run_dir import RunDir
from launcher.training.cadence import Cadence
from launcher.training.saver import Position, RandomState, Saver
from strategies.base import StepResult, Strategy
from strategies.spec import Plan

if TYPE_CHECKING:
    from launcher.ranks import Ranks
    from strategies.base import MicroBatch

STEPS_TO_COMPARE = 5  # measured after warm-up before the prediction is held against them
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Process:
    """What the trainer asks of the process it runs in; the worker supplies torch's answers."""

    device_peak_bytes: Callable[[], int] | None  # None: computing on the CPU
    random: RandomState
    is_abandoned: Callable[[], bool]  # True: nobody waits for this run any more
    beat: Callable[[Phase, int], None]  # a sign of life, where this rank may get stuck next
    device_memory: Callable[[], tuple[int, int]] | None = None  # allocated, reserved
    pulse_s: Callable[[], float] | None = None  # a fixed computation, timed
    open_profiler: Callable[[], Profiler] | None = None


@dataclass(kw_only=True)
class Trainer:
    """One run on one rank. `step` and `consumed_samples` follow from the checkpoint that `restore` loads."""

    run: RunDir
    job: Job
    plan: Plan
    dataset: TokenDataset
    strategy: Strategy
    ranks: Ranks
    process: Process
    versions: dict[str, str]
    sinks: Sequence[Sink] = ()  # where finished steps go; empty on all ranks but 0
    step: int = 0
    consumed_samples: int = 0
    _step_times: list[float] = field(default_factory=list)
    _warm_times: list[float] = field(default_factory=list)  # without warm-up and traced steps
    _last_validation: float | None = None
    _clock: goodput.Clock | None = None  # on rank 0, once training

    def __post_init__(self) -> None:
        self._spikes = SpikeRule(self.job.supervise.spike_factor)
        self._saver = Saver(
            run=self.run,
            job=self.job,
            plan=self.plan,
            dataset=self.dataset,
            strategy=self.strategy,
            ranks=self.ranks,
            random=self.process.random,
            versions=self.versions,
        )
        self._cadence = Cadence(run=self.run, job=self.job, plan=self.plan, ranks=self.ranks)
        self._tracing = Tracing(
            self.job.monitor,
            plan=self.plan,
            directory=self.run.traces,
            team=self.ranks,
            open_profiler=self.process.open_profiler,
        )

    def restore(self) -> None:
        """Go on from the newest good checkpoint, if there is one."""
        position = self._saver.restore()
        self.step, self.consumed_samples = position.step, position.consumed_samples

    def log_restored(self) -> None:
        """Rank 0, where training begins: record what this start goes on from."""
        self._saver.log_restored(step=self.step)

    # ---- the loop ----------------------------------------------------------------------------------------------

    def train(self) -> str:
        """Run to the last step or to a stop request. Return "finished" or "stopped"."""
        try:
            self._cadence.begin()
            if self.ranks.rank == 0:
                self._clock = goodput.clock(
                    list(self.run.events()), read(self.run.metrics_file), now=time.time()
                )
            self._loop()
            self.process.beat("saving", self.step)
            self._saver.settle(last=True)
        except BaseException:
            self.process.beat("saving", self.step)  # waiting is no hang
            self._saver.leave()
            raise
        state = "finished" if self.step >= self.job.training.num_steps else "stopped"
        self._conclude(state)
        return state

    def _loop(self) -> None:
        first_step, num_steps = self.step, self.job.training.num_steps
        stopping = False
        microbatches = self.plan.num_microbatches
        with (
            self._loader(
                "train", start_sample=self.consumed_samples, num_microbatches=microbatches
            ) as loader,
            closing(self._observer()) as observer,
        ):
            while self.step < num_steps and not stopping:
                metrics = self._one_step(loader, observer)
                for sink in self.sinks:
                    sink.write(metrics)
                self._compare_with_plan(metrics)
                stopping = self._stop_requested(first_step)
                if self._checkpoint_due(stopping=stopping):
                    self._save(stopping=stopping)

    def _save(self, *, stopping: bool) -> None:
        self.process.beat("saving", self.step)
        last = stopping or self.step == self.job.training.num_steps
        if stopping:
            self._saver.warn_of_grace()
        for sink in self.sinks:  # a start that goes on from here finds every step before it in all of them
            sink.flush()
        position = Position(step=self.step, consumed_samples=self.consumed_samples)
        stall_s = self._saver.save(position, last=last)
        self._cadence.measured(save_s=stall_s, step_s=statistics.median(self._step_times))

    def _one_step(self, loader: BatchLoader, observer: Observer) -> StepMetrics:
        learning_rate = self.job.training.learning_rate_at(self.step)
        with self._tracing.step(self.step + 1):
            started = time.perf_counter()
            while loader.consumed_samples in self.job.data.skip_samples:
                loader.next()
            batches = loader.next()
            waited_s = time.perf_counter() - started
            # Behind the reading: a rank that waits for its data is one beat behind those that wait for it.
            self.process.beat("stepping" if self._step_times else "warming", self.step)
            result, looks = self._train_step(batches, observer, learning_rate=learning_rate)
            seconds = time.perf_counter() - started
        traced = self._tracing.after(self.step + 1)
        self._check(result)
        self.step += 1
        self.consumed_samples = loader.consumed_samples
        self._step_times.append(seconds)
        if len(self._step_times) > self.job.monitor.warmup_steps and not traced:
            self._warm_times.append(seconds)
        validation_loss = self._evaluate() if self._evaluation_due() else None
        return observer.observe(
            result,
            step=self.step,
            learning_rate=learning_rate,
            seconds=seconds,
            waited_s=waited_s,
            looks=replace(looks, traced=traced),
            consumed_samples=self.consumed_samples,
            validation_loss=validation_loss,
            goodput=None if self._clock is None else self._clock.tick(seconds, now=time.time()),
        )

    def _train_step(
        self, batches: Sequence[MicroBatch], observer: Observer, *, learning_rate: float
    ) -> tuple[StepResult, Looks]:
        """Have the engine make one step, and look inside where the observer asks for it."""
        step, asked = self.step + 1, ExitStack()
        with asked:
            strategy, seen = self.strategy, Looks()
            if observer.is_due(step):
                seen = replace(seen, expert_tokens=asked.enter_context(strategy.counting_experts()))
            if observer.wants_histograms(step):
                seen = replace(seen, histograms=asked.enter_context(strategy.taking_histograms()))
            result = strategy.train_step(batches, learning_rate=learning_rate)
        return result, seen

    def _check(self, result: StepResult) -> None:
        """Raise where a step spoiled the weights, before a checkpoint or a beat takes it for completed."""
        if result.skipped:
            return
        subject, fault = "loss", self._spikes.fault(result.loss)
        if fault is None and not math.isfinite(result.grad_norm):
            # The loss was computed before the update, which has ruined the weights.
            subject, fault = "gradient norm", f"is {result.grad_norm}"
        if fault is not None:
            raise BadLossError(
                f"the {subject} of step {self.step + 1} {fault}; the last checkpoint is kept, "
                f"lower training.learning_rate={self.job.training.learning_rate} or look at the data"
            )

    def _observer(self) -> Observer:
        setting = Setting(
            model=self.job.model,
            cluster=self.job.cluster,
            training=self.job.training,
            plan=self.plan,
            predictions=self.run.plan_data()["predictions"],
        )
        return Observer(
            self.job.monitor,
            setting=setting,
            peers=self.ranks,
            probes=self.process,
            metrics_file=self.run.metrics_file,
            events_file=self.run.events_file,
        )

    # ---- questions asked after each step -----------------------------------------------------------------------

    def _evaluation_due(self) -> bool:
        asked = self.job.evaluation
        last = self.step == self.job.training.num_steps
        return asked.num_sequences > 0 and (last or (asked.interval > 0 and self.step % asked.interval == 0))

    def _checkpoint_due(self, *, stopping: bool) -> bool:
        if self.step == self.job.training.num_steps and self.job.checkpoint.save_last:
            return True
        return stopping or self._cadence.is_due(self.step)

    def _stop_requested(self, first_step: int) -> bool:
        stop_at = self.job.stop_at_step
        if stop_at is not None and first_step < stop_at <= self.step:
            return True
        return self.ranks.any(self.ranks.rank == 0 and self._is_asked_to_leave())

    def _is_asked_to_leave(self) -> bool:
        files = (self.run.stop_file, self.run.leave_file)
        return any(f.exists() for f in files) or self.process.is_abandoned() or self._saver.has_failed

    # ---- helpers -----------------------------------------------------------------------------------------------

    def _loader(self, split: Split, *, start_sample: int, num_microbatches: int) -> BatchLoader:
        plan, training = self.plan, self.job.training
        return BatchLoader(
            self.dataset,
            split=split,
            sequence_length=training.sequence_length,
            global_batch_size=plan.micro_batch_size * num_microbatches * plan.dp,
            micro_batch_size=plan.micro_batch_size,
            num_microbatches=num_microbatches,
            dp=plan.dp,
            dp_rank=self.strategy.dp_rank,
            seed=training.seed,
            shuffle=self.job.data.shuffle,
            num_workers=self.job.data.num_workers if split == "train" else 0,
            start_sample=start_sample,
        )

    def _evaluate(self) -> float:
        """Read at least `num_sequences` of the validation split, one micro-batch a rank at a time."""
        self.process.beat("evaluating", self.step)
        per_round = self.plan.micro_batch_size * self.plan.dp
        rounds = -(-self.job.evaluation.num_sequences // per_round)
        with self._loader("validation", start_sample=0, num_microbatches=1) as loader:
            batches = [batch for _ in range(rounds) for batch in loader.next()]
        self._last_validation = self.strategy.evaluate(batches)
        return self._last_validation

    def _compare_with_plan(self, newest: StepMetrics) -> None:
        """Once the steps are warm, hold the plan's prediction against them."""
        if newest.traced or len(self._warm_times) != STEPS_TO_COMPARE:
            return
        measured = self._measure()
        if self.ranks.rank != 0:
            return
        predicted = self.run.plan_data()["predictions"]
        self.run.log_event("compared", step=self.step, measured=measured)
        logger.info(
            "after warm-up: %.3f s a step (predicted %.3f), %.2f GiB (predicted %.2f)",
            measured["step_s"],
            predicted["step_s"],
            measured["memory_bytes"] / 2**30,
            predicted["memory_bytes"] / 2**30,
        )

    def _measure(self) -> dict[str, Any]:
        """Peak memory of the worst rank and the median step; every rank has to ask."""
        peak_gib = self.ranks.maximum(peak_memory_gib(self.process.device_peak_bytes))
        warm = self._warm_times or self._step_times
        return {
            "memory_bytes": round(peak_gib * 2**30),
            "step_s": statistics.median(warm) if warm else None,
        }

    def _conclude(self, state: str) -> None:
        measured = self._measure()
        if self.ranks.rank != 0:
            return
        self.run.log_event(state, step=self.step, validation_loss=self._last_validation, measured=measured)
        logger.info("%s at step %d%s", state, self.step, _validation_text(self._last_validation))


def _validation_text(loss: float | None) -> str:
    return "" if loss is None else f", validation loss {loss:.4f} nats per token"
