"""What a plan costs, by part: memory of the fullest rank, seconds of one step; and a plan with its cost."""

from __future__ import annotations

from dataclasses import dataclass, fields

from strategies.spec import Plan

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class MemoryCost:
    """Bytes on one rank of the fullest pipeline stage, at the fullest moment of a step."""

    weights: float  # the copy that the forward pass reads
    gradients: float
    optimizer: float
    activations: float
    logits: float  # the loss' workspace over the vocabulary
    buffers: float  # gathered weights, gradients on their way, communication buckets, pipeline messages
    slack: float = 0.0  # held by the allocator, and too small or too scattered for what was asked

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return self.allocated + self.slack

    @property
    def allocated(self) -> float:
        """Bytes in use: what PyTorch reports as its largest allocation."""
        states = self.weights + self.gradients + self.optimizer
        return states + self.activations + self.logits + self.buffers


@dataclass(frozen=True, kw_only=True)
class TimeCost:
    """Seconds of one step on the critical path. Communication counts only where nothing hides it."""

    compute: float
    recompute: float
    tp: float
    cp: float
    ep: float
    pp: float
    dp: float
    bubble: float  # waiting for the first and last micro-batches of a pipeline
    optimizer: float
    offload: float  # between device and host

    @property
    def total(self) -> float:
        """Seconds of all parts."""
        return sum(parts(self).values())


@dataclass(frozen=True, kw_only=True)
class CostBreakdown:
    """Predicted cost of one plan."""

    memory: MemoryCost
    host_bytes: float  # per rank, for what is offloaded
    disk_bytes: float  # per rank, of that what lies in plan.nvme_path
    stage: int  # the pipeline stage that `memory` describes
    time: TimeCost
    tokens_per_step: int
    num_gpus: int
    model_flops_per_step: float
    peak_flops: float | None  # one GPU, per second; None where the peak is a guess

    @property
    def step_s(self) -> float:
        """Seconds of one optimizer step."""
        return self.time.total

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Training speed per rank."""
        return self.tokens_per_step / self.step_s / self.num_gpus

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation (PaLM, appendix B): without recomputation; None without a known peak."""
        if self.peak_flops is None:
            return None
        return self.model_flops_per_step / (self.step_s * self.num_gpus * self.peak_flops)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A plan with its predicted cost, or with one sentence why it is rejected. Too large a plan has both."""

    plan: Plan
    cost: CostBreakdown | None
    rejected: str | None = None


def parts(cost: MemoryCost | TimeCost) -> dict[str, float]:
    """Return the parts of a cost by name, in the order of declaration."""
    return {field.name: getattr(cost, field.name) for field in fields(cost)}
