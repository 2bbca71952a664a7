"""Files are written by this process alone, and a fault in writing is the fault of who writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from strategies.megatron import MegatronStrategy

# Upstream's advice to itself.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)
Start = Callable[..., MegatronStrategy]


def test_a_save_leaves_no_process_behind(start: Start, tmp_path: Path) -> None:
    strategy = start()
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    strategy.save(tmp_path)
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    strategy.teardown()


def test_a_file_that_cannot_be_written_is_raised_by_the_write(start: Start, tmp_path: Path) -> None:
    strategy = start()
    (tmp_path / "gone").mkdir()
    write = strategy.snapshot(tmp_path / "gone")
    (tmp_path / "gone" / "common.pt").unlink()
    (tmp_path / "gone").rmdir()
    (tmp_path / "gone").write_text("no folder")
    with pytest.raises(FileExistsError):
        write()
    strategy.teardown()
