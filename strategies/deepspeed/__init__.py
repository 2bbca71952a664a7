"""DeepSpeed 0.19.8: ZeRO 0 to 3 with offload; AutoTP, the pipeline engine, Ulysses, AutoEP."""

from __future__ import annotations

from strategies.deepspeed.adapter import DeepSpeedStrategy
from strategies.deepspeed.capabilities import CAPABILITIES

__all__ = ["CAPABILITIES", "DeepSpeedStrategy"]
