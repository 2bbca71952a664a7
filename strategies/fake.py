"""A strategy without an engine: for tests, and for trying a launch end to end on any machine. No torch.

The loss is invented: it falls with every step and carries a trace of all data seen, so that a wrong resume
shows. Each rank sees only its own data, hence only its own trace.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from strategies.base import Capabilities, StateBytes, StepResult, Strategy
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

if TYPE_CHECKING:
    from strategies.base import MicroBatch

_STATE = StateBytes(weights=4, gradients=4, optimizer=8)
_ALL_STAGES = frozenset({0, 1, 2, 3})

CAPABILITIES = Capabilities(
    zero_stages=_ALL_STAGES,
    precisions=frozenset({"fp32", "bf16", "fp16"}),
    recompute=frozenset({"none", "selective", "full"}),
    state_bytes={"fp32": _STATE, "bf16": _STATE, "fp16": _STATE},
    degrees=frozenset({"tp", "pp", "vp", "cp", "ep", "etp"}),
    sequence_parallel=True,
    offload_optimizer_stages=_ALL_STAGES,
    offload_parameters_stages=_ALL_STAGES,
    nvme_stages=_ALL_STAGES,
)


class FakeStrategy(Strategy):
    """Counts steps and remembers a checksum of the data."""

    capabilities = CAPABILITIES

    def setup(self, plan: Plan, model: ModelSpec, training: TrainingSpec, weights: Path) -> None:
        """Start at step 0; `weights` is not read."""
        self._plan = plan
        self._first_loss = math.log(model.vocab_size)
        self._rank = int(os.environ.get("RANK", "0"))
        self.dp_rank = plan.coordinate("dp", self._rank)
        self._steps = 0
        self._checksum = training.seed

    def train_step(self, batches: Sequence[MicroBatch], *, learning_rate: float) -> StepResult:
        """Return an invented loss; `learning_rate` moves nothing."""
        assert len(batches) == self._plan.num_microbatches, (
            "the trainer must pass plan.num_microbatches batches"
        )
        for batch in batches:
            self._checksum = zlib.crc32(batch.tobytes(), self._checksum)
        loss = self._loss(self._checksum)
        self._steps += 1
        return StepResult(loss=loss, grad_norm=1.0 / self._steps, rank_loss=loss)

    def evaluate(self, batches: Sequence[MicroBatch]) -> float:
        """Return the loss this step stands at, with a trace of `batches`."""
        checksum = 0
        for batch in batches:
            checksum = zlib.crc32(batch.tobytes(), checksum)
        return self._loss(checksum)

    def save(self, directory: Path) -> None:
        """Write one small JSON file a rank."""
        state = {"steps": self._steps, "checksum": self._checksum}
        self._file(directory).write_text(json.dumps(state), encoding="utf-8")

    def load(self, directory: Path) -> None:
        """Restore this rank's count and checksum."""
        state = json.loads(self._file(directory).read_text(encoding="utf-8"))
        self._steps, self._checksum = state["steps"], state["checksum"]

    def teardown(self) -> None:
        """Nothing is held."""

    def _loss(self, checksum: int) -> float:
        # The trace stays below what one step gains up to some 500 steps.
        return self._first_loss / (1 + 0.1 * self._steps) + 1e-4 * (checksum % 1000) / 1000

    def _file(self, directory: Path) -> Path:
        return directory / f"rank-{self._rank:05d}.json"
