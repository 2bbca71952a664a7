"""A real Slurm: the one that answers, or slurm/test_cluster's, started and stopped for the session."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "slurm" / "test_cluster"
# Set by continuous integration: a machine without Slurm is a fault there, and no reason to skip.
REQUIRED = "MESHWRIGHT_TEST_SLURM"


@pytest.fixture(scope="session")
def slurm() -> Iterator[None]:
    """Slurm's commands work, and four idle nodes of two switches answer."""
    if _answers():
        yield
        return
    if REQUIRED not in os.environ:
        if shutil.which("slurmctld") is None:
            pytest.skip(
                f"Slurm is not installed; {REQUIRED}=1 lets {FOLDER}/start.sh install Debian's packages"
            )
        if os.geteuid() != 0:
            pytest.skip("Slurm's daemons are started by root")
    started = subprocess.run([str(FOLDER / "start.sh")], capture_output=True, text=True, check=False)
    assert started.returncode == 0, started.stderr
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = started.stdout.strip().splitlines()[-1].partition("=")[2].strip("'")
    yield
    if before is None:
        del os.environ["SLURM_CONF"]
    else:
        os.environ["SLURM_CONF"] = before
    subprocess.run([str(FOLDER / "stop.sh"), "--purge"], check=True)


def _answers() -> bool:
    if shutil.which("sinfo") is None or "SLURM_CONF" not in os.environ:
        return False
    done = subprocess.run(["sinfo", "-h", "-N", "-o", "%T"], capture_output=True, text=True, check=False)
    return done.returncode == 0 and len(done.stdout.split()) >= 4
