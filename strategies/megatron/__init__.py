"""Megatron-core: tensor, sequence, pipeline, context and expert parallelism, and the distributed optimizer."""

from __future__ import annotations

from strategies.megatron.adapter import MegatronStrategy
from strategies.megatron.capabilities import CAPABILITIES

__all__ = ["CAPABILITIES", "MegatronStrategy"]
