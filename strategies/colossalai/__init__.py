"""ColossalAI 0.5.0 through its Booster: tensor, sequence and pipeline parallelism, ZeRO 1 and 2, Gemini."""

from __future__ import annotations

from strategies.colossalai.adapter import ColossalAIStrategy
from strategies.colossalai.capabilities import CAPABILITIES

__all__ = ["CAPABILITIES", "ColossalAIStrategy"]
