"""Files are written by this process alone, and a fault in writing is the fault of who writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from strategies.megatron import MegatronStrategy
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

Tiny = tuple[ModelSpec, TrainingSpec]
# Upstream's advice to itself.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)
PLAN = Plan(strategy="megatron", dp=1, micro_batch_size=2, num_microbatches=2, precision="fp32")


def batches() -> list[Any]:
    draw = np.random.default_rng(5)
    return [draw.integers(0, 60, (2, 9)) for _ in range(2)]


@pytest.mark.usefixtures("alone")
def test_a_save_leaves_no_process_behind(tiny: Tiny, tiny_weights: Path, tmp_path: Path) -> None:
    strategy = MegatronStrategy()
    strategy.setup(PLAN, *tiny, tiny_weights)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    strategy.save(tmp_path)
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    strategy.teardown()


@pytest.mark.usefixtures("alone")
def test_a_file_that_cannot_be_written_is_raised_by_the_write(
    tiny: Tiny, tiny_weights: Path, tmp_path: Path
) -> None:
    strategy = MegatronStrategy()
    strategy.setup(PLAN, *tiny, tiny_weights)
    (tmp_path / "gone").mkdir()
    write = strategy.snapshot(tmp_path / "gone")
    (tmp_path / "gone" / "common.pt").unlink()
    (tmp_path / "gone").rmdir()
    (tmp_path / "gone").write_text("no folder")
    with pytest.raises(FileExistsError):
        write()
    strategy.teardown()
