"""Is a loss a spike? Held against the median of the steps before."""

from __future__ import annotations

import math
import statistics
from collections import deque

_WINDOW = 20  # steps that are remembered
_FEWEST = 5  # steps that a median takes; after a start there are none


class SpikeRule:
    """Remembers the last losses; `factor` None: only what is no number is bad."""

    def __init__(self, factor: float | None) -> None:
        self._factor = factor
        self._losses: deque[float] = deque(maxlen=_WINDOW)

    def fault(self, loss: float) -> str | None:
        """Say in half a sentence what is wrong with the loss of this step, or remember it."""
        if not math.isfinite(loss):
            return f"is {loss}"
        if self._factor is not None and len(self._losses) >= _FEWEST:
            median = statistics.median(self._losses)
            if loss > self._factor * median:
                return (
                    f"is {loss:.4f}, more than supervise.spike_factor={self._factor:g} times "
                    f"the median {median:.4f} of the steps before"
                )
        self._losses.append(loss)
        return None
