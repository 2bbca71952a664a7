"""DeepSpeed 0.19.8: ZeRO 0 to 3 with optimizer and parameter offload, data parallel."""

from __future__ import annotations

from strategies.deepspeed.adapter import DeepSpeedStrategy
from strategies.deepspeed.capabilities import CAPABILITIES

__all__ = ["CAPABILITIES", "DeepSpeedStrategy"]
