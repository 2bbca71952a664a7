"""parity_worker.py with Gemini's 16 bits made 32: so its arithmetic can be held against plain PyTorch to 1e-5.

Upstream only asserts that nobody asks for fp32. Started with PYTHONOPTIMIZE=1, which drops assertions.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import torch
from colossalai.booster.plugin import gemini_plugin
from colossalai.zero.gemini.gemini_optimizer import GeminiOptimizer


def compute_in_fp32() -> None:
    gemini_plugin.PRECISION_STR_TO_DTYPE["bf16"] = torch.float32
    create = GeminiOptimizer.__init__

    def __init__(self: Any, optim: Any, module: Any, *arguments: Any, **named: Any) -> None:
        module.mixed_precision = torch.bfloat16  # it knows what to do without a loss scale for no other type
        create(self, optim, module, *arguments, **named)
        module.mixed_precision = torch.float32

    GeminiOptimizer.__init__ = __init__


if __name__ == "__main__":
    compute_in_fp32()
    runpy.run_path(str(Path(__file__).with_name("parity_worker.py")), run_name="__main__")
