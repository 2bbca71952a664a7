"""From a step's result to StepMetrics: what every rank notices about itself, gathered at sampled steps."""

from __future__ import annotations

import math
import statistics
import time
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil

from launcher.cluster.spec import ClusterSpec
from launcher.monitor.config import MonitorConfig
from launcher.monitor.metrics import StepMetrics, flops_utilisation, read
from launcher.monitor.node import NodeSampler, Sample, merged
from launcher.monitor.reliability import Reliability, replanned_at
from launcher.monitor.system import peak_memory_gib
from strategies.base import StepResult
from strategies.bins import Histograms, added
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

_GIB = 2**30
_WINDOW = 1000  # newest steps that percentiles are of
_RECENT = 10
_SMOOTHING = 0.3  # weight of the newest pulse
# Times what a rank took so far, which a pulse counts for at most: one chance among thousands of ranks is no straggler,
# because it makes a score of 1.6 once, and of less than the alert's 1.5 in the sample behind.
_LARGEST = 3.0
_WARM = 3  # first steps of a start, which no percentile should remember

ExpertTokens = Mapping[int, Sequence[int]]  # by layer, of each expert


@dataclass(frozen=True, kw_only=True)
class Looks:
    """What a rank saw inside of one step."""

    expert_tokens: ExpertTokens = field(default_factory=dict)
    histograms: Histograms | None = None  # None: not asked for at this step
    # Of a profiled step: that it is one, and the figures of those that end with it.
    traced: Mapping[str, Any] = field(default_factory=dict)


class Peers(Protocol):
    """What is needed of the other ranks."""

    @property
    def rank(self) -> int: ...

    @property
    def local_rank(self) -> int: ...

    def gather(self, value: Any) -> list[Any]: ...


class Probes(Protocol):
    """What only the worker can ask: the device's memory in bytes (None on a CPU), a fixed computation in seconds."""

    @property
    def device_peak_bytes(self) -> Callable[[], int] | None: ...

    @property
    def device_memory(self) -> Callable[[], tuple[int, int]] | None:
        """Allocated and reserved."""

    @property
    def pulse_s(self) -> Callable[[], float] | None: ...


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a run's figures are computed from."""

    model: ModelSpec
    cluster: ClusterSpec
    training: TrainingSpec
    plan: Plan
    predictions: Mapping[str, Any]


@dataclass(kw_only=True)
class StepTimes:
    """Durations of the newest steps, ordered, for percentiles at each step."""

    _newest: deque[float] = field(default_factory=deque)
    _ordered: list[float] = field(default_factory=list)

    def add(self, seconds: float) -> None:
        """Take one more, and forget the oldest beyond the window."""
        self._newest.append(seconds)
        insort(self._ordered, seconds)
        if len(self._newest) > _WINDOW:
            del self._ordered[bisect_left(self._ordered, self._newest.popleft())]

    def figures(self) -> dict[str, Any]:
        """Return median, 99th percentile and recent median, or nothing before there are steps."""
        if not self._ordered:
            return {}
        count = len(self._ordered)
        recent = (
            list(self._newest)[-_RECENT:]
            if count <= _RECENT
            else [self._newest[-i] for i in range(1, _RECENT + 1)]
        )
        return {
            "step_time_p50_s": self._ordered[(count - 1) // 2],
            "step_time_p99_s": self._ordered[min(count - 1, math.ceil(0.99 * count) - 1)],
            "step_time_recent_s": statistics.median_low(recent),
        }


class Observer:
    """One rank's watch over a run. Every rank calls `observe` at each step; rank 0's answer is the whole."""

    def __init__(
        self,
        config: MonitorConfig,
        *,
        setting: Setting,
        peers: Peers,
        probes: Probes,
        metrics_file: Path,
        events_file: Path,
    ) -> None:
        self._config, self._setting, self._peers, self._probes = config, setting, peers, probes
        self._times = StepTimes()
        self._seen = 0
        self._process = psutil.Process()
        self._node = (
            NodeSampler(seconds=config.node_seconds)
            if config.sample_interval and not peers.local_rank
            else None
        )
        self._reliability = Reliability(events_file)
        self._skipped = 0
        self._pulses: list[float] = []  # of each rank, smoothed over samples
        if peers.rank == 0:
            self._remember(read(metrics_file), since=replanned_at(events_file))

    def observe(
        self,
        result: StepResult,
        *,
        step: int,
        learning_rate: float,
        seconds: float,
        waited_s: float,
        consumed_samples: int,
        validation_loss: float | None,
        goodput: float | None,
        looks: Looks,
    ) -> StepMetrics:
        """Return the metrics of a finished step; at sampled steps every rank has to ask."""
        now = time.time()
        own = self._own(result, looks.expert_tokens) if self.is_due(step) else None
        self._skipped += result.skipped
        self._seen += 1
        if self._seen > _WARM and not looks.traced:
            self._times.add(seconds)
        sampled = {} if own is None else self._sample(own, now=now)
        return StepMetrics(
            step=step,
            time=now,
            consumed_samples=consumed_samples,
            skipped=result.skipped,
            loss=result.loss,
            perplexity=_perplexity(result.loss),
            grad_norm=result.grad_norm,
            clip_ratio=_clip_ratio(result.grad_norm, limit=self._setting.training.max_grad_norm),
            learning_rate=learning_rate,
            skipped_steps=self._skipped,
            tokens=consumed_samples * self._setting.training.sequence_length,
            validation_loss=validation_loss,
            goodput=goodput,
            step_time_s=seconds,
            data_wait_share=waited_s / seconds if seconds else None,
            memory_gib=peak_memory_gib(self._probes.device_peak_bytes),
            bubble_share=_bubble_share(self._setting.predictions),
            **({} if looks.traced else self._speed(seconds)),
            **self._times.figures(),
            **sampled,
            histograms=self._gathered(looks.histograms),
            **looks.traced,
        )

    def is_due(self, step: int) -> bool:
        """Tell whether the next step, of this number, is a sampled one: the first of a start is."""
        interval = self._config.sample_interval
        return interval > 0 and (step % interval == 0 or self._seen == 0)

    def wants_histograms(self, step: int) -> bool:
        """Tell whether weights and gradients are looked at in the step of this number."""
        return self._config.histograms > 0 and step % self._config.histograms == 0

    def close(self) -> None:
        """Stop the node's sampler."""
        if self._node is not None:
            self._node.close()

    def _remember(self, history: Sequence[Mapping[str, Any]], *, since: float) -> None:
        """Go on from the steps that a restart kept; those of another plan say nothing of how long one takes now."""
        for past in history:
            self._skipped += bool(past.get("skipped"))
        for past in history[-_WINDOW:]:
            if past["time"] > since and not past.get("traced"):
                self._times.add(past["step_time_s"])

    def _speed(self, seconds: float) -> dict[str, Any]:
        """Speed of one GPU, in tokens, in model FLOPs, and as a share of its peak."""
        setting = self._setting
        gpu, sequence_length = setting.cluster.gpu, setting.training.sequence_length
        tokens_per_s = setting.training.tokens_per_step / seconds / setting.cluster.world_size
        return {
            "tokens_per_s_per_gpu": tokens_per_s,
            "tflops_per_s_per_gpu": tokens_per_s * setting.model.flops_per_token(sequence_length) / 1e12,
            "mfu": flops_utilisation(
                setting.model,
                sequence_length=sequence_length,
                tokens_per_s_per_gpu=tokens_per_s,
                peak_tflops=None if gpu.peak_is_nominal else gpu.peak_tflops.get(setting.training.precision),
            ),
        }

    def _sample(self, own: dict[str, Any], *, now: float) -> dict[str, Any]:
        found = self._peers.gather(own)
        if self._peers.rank != 0:
            return {}
        return {
            **_worst(found),
            **self._stragglers([own["pulse"] for own in found]),
            **imbalance([own["experts"] for own in found]),
            **_plan_error(found, self._setting.predictions),
            **merged([own["node"] for own in found if own["node"]]),
            **self._reliability.update(now=now),
        }

    def _gathered(self, own: Histograms | None) -> dict[str, dict[str, int]] | None:
        """Add up what all ranks counted; every rank asks at the same steps."""
        if own is None:
            return None
        summed = added(self._peers.gather(own))
        return {name: {str(place): n for place, n in counts.items()} for name, counts in summed.items()}

    def _stragglers(self, pulses: Sequence[float | None]) -> dict[str, Any]:
        """How slow each rank is: one pulse may meet any chance, so they are smoothed over samples."""
        seconds = [pulse for pulse in pulses if pulse is not None]
        if len(seconds) < len(pulses):
            return {}
        before = self._pulses or [statistics.median_low(seconds)] * len(seconds)  # nobody is slow yet
        self._pulses = [
            old + _SMOOTHING * (min(new, _LARGEST * old) - old)
            for old, new in zip(before, seconds, strict=True)
        ]
        scores = straggler_scores(self._pulses)
        return {"straggler_score": scores} if scores else {}

    def _own(self, result: StepResult, expert_tokens: ExpertTokens) -> dict[str, Any]:
        memory = self._probes.device_memory
        allocated, reserved = memory() if memory else (None, None)
        return {
            "loss": result.rank_loss,
            "experts": expert_tokens,
            "peak": peak_memory_gib(self._probes.device_peak_bytes),
            "allocated": allocated,
            "reserved": reserved,
            "rss": self._process.memory_info().rss,
            "pulse": self._probes.pulse_s() if self._probes.pulse_s else None,
            "node": _node_sample(self._node),
        }


def straggler_scores(seconds: Sequence[float]) -> dict[str, float]:
    """Return each rank's time over the median of the others', by rank; nothing for a rank alone."""
    if len(seconds) < 2:
        return {}
    ordered, last = sorted(seconds), len(seconds) - 2
    found = {}
    for rank, own in enumerate(seconds):
        place = bisect_left(ordered, own)
        # The middle of the others, counted around the own place instead of making a list for each rank.
        middle = [ordered[index + (index >= place)] for index in (last // 2, (last + 1) // 2)]
        found[str(rank)] = own / statistics.mean(middle)
    return found


def imbalance(found: Sequence[ExpertTokens]) -> dict[str, float]:
    """Return how unevenly the tokens of all ranks fell on experts: 1 is evenly, their number is all on one."""
    layers: dict[int, list[int]] = {}
    for own in found:
        for layer, tokens in own.items():
            before = layers.get(layer, [0] * len(tokens))
            layers[layer] = [old + new for old, new in zip(before, tokens, strict=True)]
    ratios = [max(tokens) / statistics.mean(tokens) for tokens in layers.values() if any(tokens)]
    if not ratios:
        return {}
    return {"expert_imbalance": max(ratios), "expert_imbalance_mean": statistics.mean(ratios)}


def _worst(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The largest figure of all ranks, where ranks have it."""
    scales = {
        "loss_max": ("loss", 1.0),
        "memory_peak_gib": ("peak", 1.0),
        "memory_allocated_gib": ("allocated", _GIB),
        "memory_reserved_gib": ("reserved", _GIB),
        "rss_gib": ("rss", _GIB),
    }
    values: dict[str, Any] = {}
    for name, (key, scale) in scales.items():
        told = [own[key] for own in found if own[key] is not None]  # only a last pipeline stage has a loss
        if told:
            values[name] = max(told) / scale
    return values


def _plan_error(found: Sequence[Mapping[str, Any]], predictions: Mapping[str, Any]) -> dict[str, float]:
    predicted = predictions.get("memory_bytes")
    return {"memory_over_plan": max(own["peak"] for own in found) * _GIB / predicted} if predicted else {}


def _node_sample(sampler: NodeSampler | None) -> Sample:
    return {} if sampler is None else sampler.latest


def _perplexity(loss: float) -> float | None:
    return math.exp(loss) if loss < 700 else None  # e**710 is no float any more


def _clip_ratio(norm: float, *, limit: float) -> float | None:
    if not limit or not math.isfinite(norm):
        return None
    return min(1.0, limit / norm) if norm else 1.0


def _bubble_share(predictions: Mapping[str, Any]) -> float | None:
    bubble = predictions.get("step_s_by_part", {}).get("bubble")
    return bubble / predictions["step_s"] if bubble and predictions.get("step_s") else None
