"""What `null` means in the training section: values chosen from the size of the model and the cluster."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from launcher.cluster.spec import ClusterSpec
from strategies.model_spec import ModelSpec

LONGEST_DEFAULT_SEQUENCE = 8192


def complete_training(config: Mapping[str, Any], *, model: ModelSpec, cluster: ClusterSpec) -> dict[str, Any]:
    """Return the training section with every null filled in; values that were given stay."""
    filled = dict(config)
    sequence_length = filled.get("sequence_length")
    if sequence_length is None:
        sequence_length = min(model.max_position_embeddings, LONGEST_DEFAULT_SEQUENCE)
    choices = {
        "sequence_length": sequence_length,
        "precision": _precision(cluster),
        "learning_rate": _learning_rate(model.num_parameters),
        "warmup_steps": _twentieth(filled.get("num_steps")),
    }
    if isinstance(sequence_length, int) and sequence_length > 0:
        choices["global_batch_size"] = _global_batch_size(model, sequence_length, cluster.world_size)
    for key, value in choices.items():
        if filled.get(key) is None:
            filled[key] = value
    return filled


def _precision(cluster: ClusterSpec) -> str:
    """bf16 where an accelerator has it; a CPU computes it slower than fp32."""
    return "bf16" if cluster.gpu.device == "cuda" and "bf16" in cluster.gpu.peak_tflops else "fp32"


def _learning_rate(num_parameters: int) -> float:
    """6e-4 at 124M parameters, falling with the cube root of size: follows GPT-3's table 2.1 within a factor 2."""
    rate = 6e-4 * (124e6 / num_parameters) ** (1 / 3)
    return float(f"{min(1.5e-3, max(6e-5, rate)):.1e}")


def _global_batch_size(model: ModelSpec, sequence_length: int, world_size: int) -> int:
    """Sequences per step: GPT-3's half million tokens at 124M parameters and four million from 60B on.

    Below 124M the batch shrinks in proportion, so that a toy model makes progress on a laptop.
    A power of two for each rank, so that every number of data-parallel ranks and many micro-batches divide it.
    """
    size = model.num_parameters / 124e6
    tokens = min(2**22, 2**19 * (size if size < 1 else size ** (1 / 3)))
    per_rank = max(4096, tokens) / sequence_length / world_size
    return world_size * (1 << max(0, round(math.log2(per_rank))))


def _twentieth(num_steps: Any) -> int:
    return num_steps // 20 if isinstance(num_steps, int) else 0
