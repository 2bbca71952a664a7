"""The words both packages speak: TrainingSpec (what a run must do) and Plan (how it is split)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

# fp8 and nvfp4: matrix products in that format, under whichever scaling recipe; everything else as in bf16.
Precision = Literal["fp32", "bf16", "fp16", "fp8", "nvfp4"]
Recompute = Literal["none", "selective", "full"]
# How process groups are described whose traffic belongs to no step, as that of checkpoints.
BESIDE = "beside training"


@dataclass(frozen=True, kw_only=True)
class TrainingSpec:
    """What one run must do, however it is split. One step is one optimizer step over one global batch."""

    sequence_length: int  # tokens
    global_batch_size: int  # sequences per step
    num_steps: int
    precision: Precision = "bf16"
    optimizer: Literal["adamw"] = "adamw"
    learning_rate: float = 3e-4
    min_learning_rate: float = 0.0  # where the cosine ends
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.1  # matrices only; norms and biases are never decayed
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    max_grad_norm: float = 1.0  # 0: no clipping
    seed: int = 0
    deterministic: bool = False

    def __post_init__(self) -> None:
        for key in ("sequence_length", "global_batch_size", "num_steps"):
            if getattr(self, key) < 1:
                raise ValueError(f"training.{key}={getattr(self, key)} must be at least 1")
        for key in ("warmup_steps", "weight_decay", "max_grad_norm", "min_learning_rate", "seed"):
            if getattr(self, key) < 0:
                raise ValueError(f"training.{key}={getattr(self, key)} must not be negative")
        if not self.learning_rate > 0:
            raise ValueError(f"training.learning_rate={self.learning_rate} must be above 0")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"training.min_learning_rate={self.min_learning_rate} exceeds "
                f"training.learning_rate={self.learning_rate}"
            )
        for key in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"training.{key}={getattr(self, key)} must lie in [0, 1)")
        if self.warmup_steps >= self.num_steps and self.schedule == "cosine":
            raise ValueError(
                f"training.warmup_steps={self.warmup_steps} leaves nothing of training.num_steps={self.num_steps}; "
                "use fewer warm-up steps"
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step consumes."""
        return self.sequence_length * self.global_batch_size

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of step `step` (0-based): linear warm-up, then a cosine down to `min_learning_rate`."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        progress = (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.min_learning_rate + (self.learning_rate - self.min_learning_rate) * cosine


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One way to split one run. Everything a strategy needs, and nothing that is estimated.

    `dp` counts the ranks that read different data; `world_size` = dp * tp * pp * cp. Expert parallel
    ranks (`ep`) are taken out of `dp * cp`, as in Megatron-core and DeepSpeed.
    """

    strategy: str
    dp: int
    tp: int = 1
    pp: int = 1
    vp: int = 1  # virtual pipeline chunks per stage
    cp: int = 1
    ep: int = 1
    etp: int = 1  # tensor parallel degree inside an expert
    zero_stage: int = 0
    micro_batch_size: int = 1  # sequences per rank per forward
    num_microbatches: int = 1  # per step; DeepSpeed calls it gradient_accumulation_steps
    recompute: Recompute = "none"
    # full: so many layers of each stage, the first ones; 0: all (Megatron-core: recompute_num_layers, method block)
    recompute_num_layers: int = 0
    # selective: Megatron-core's words for the parts (core_attn, mlp, moe, layernorm, moe_act, mla_up_proj);
    # empty: core_attn
    recompute_modules: tuple[str, ...] = ()
    # layers of each stage, or chunk where vp > 1, in the order of the model; empty: the same everywhere
    pipeline_split: tuple[int, ...] = ()
    sequence_parallel: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False
    nvme_path: str | None = None  # folder on a local disk where what is offloaded lies; None: in host memory
    precision: Precision = "bf16"
    rank_order: tuple[str, ...] = ("tp", "cp", "dp", "pp")  # fastest-varying first
    engine: Mapping[str, Any] = field(default_factory=dict)  # engine keys the user passes through, checked

    def __post_init__(self) -> None:
        for key in ("dp", "tp", "pp", "vp", "cp", "ep", "etp", "micro_batch_size", "num_microbatches"):
            if getattr(self, key) < 1:
                raise ValueError(f"plan.{key}={getattr(self, key)} must be at least 1")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"plan.zero_stage={self.zero_stage} is not a ZeRO stage; use one of 0, 1, 2, 3")
        if self.pipeline_split and len(self.pipeline_split) != self.pp * self.vp:
            raise ValueError(
                f"plan.pipeline_split={list(self.pipeline_split)} must name the layers of "
                f"plan.pp={self.pp} * plan.vp={self.vp} chunks, not of {len(self.pipeline_split)}"
            )

        check_nvme_path(self.nvme_path, offloads=self.offload_optimizer or self.offload_parameters)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.dp * self.tp * self.pp * self.cp

    @property
    def global_batch_size(self) -> int:
        """Sequences per optimizer step."""
        return self.micro_batch_size * self.num_microbatches * self.dp

    def stride(self, axis: str) -> int:
        """Return how far apart neighbours along `axis` are, counted in ranks."""
        faster = self.rank_order[: self.rank_order.index(axis)]
        return math.prod(getattr(self, name) for name in faster)

    def coordinate(self, axis: str, rank: int) -> int:
        """Return where `rank` stands along `axis`."""
        degree: int = getattr(self, axis)
        return rank // self.stride(axis) % degree

    def layers_by_chunk(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers of each of the pp * vp chunks, in the order of the model."""
        return self.pipeline_split or even_split(num_layers, self.pp * self.vp)


def check_nvme_path(path: str | None, *, offloads: bool) -> None:
    """Raise ValueError for a folder that is not absolute, or for one that nothing would lie in."""
    if path is None:
        return
    if not path.startswith("/"):
        raise ValueError(f"plan.nvme_path={path} must be an absolute path, the same on every node")
    if not offloads:
        raise ValueError(
            f"plan.nvme_path={path} has no effect without plan.offload_optimizer=true or "
            "plan.offload_parameters=true; set one, or plan.nvme_path=null"
        )


@lru_cache(maxsize=4096)
def even_split(num_layers: int, chunks: int) -> tuple[int, ...]:
    """Return layers by chunk; what does not divide goes to the middle, where neither embedding nor head is."""
    least, over = divmod(num_layers, chunks)
    start = (chunks - over + 1) // 2
    return tuple(least + (start <= chunk < start + over) for chunk in range(chunks))
