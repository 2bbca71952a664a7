"""Under a bare `torchrun -m launcher ...` ranks exist before their run does: rank 0 decides, all become workers."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import psutil

from launcher import run_dir
from launcher.run_dir import RunDir


def started_us() -> bool:
    """Tell whether this process is a rank of somebody's torchrun."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def begun() -> float:
    """When this rank began, rounded up to where none of its start can have imported torch, and so failed, yet.

    The system counts from when it was booted itself, which it tells in whole seconds, rounded down.
    """
    return psutil.Process().create_time() + 1


def take_over(run: RunDir) -> None:
    """Do for a start by torchrun what the supervisor does for ours; the worker we become inherits the lock."""
    run_dir.lock(run)
    run_dir.forget_start(run, before=begun())  # the other ranks may have left something since
    for file in (run.stop_file, run.leave_file):
        file.unlink(missing_ok=True)


def become_worker(arguments: Sequence[str]) -> NoReturn:
    """Run the worker in the place of this process."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "launcher.training.worker", *arguments])
