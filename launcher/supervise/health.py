"""How many devices of this host can be trained on, as the operator's own command or the driver tells."""

from __future__ import annotations

import shlex
import subprocess

from launcher.cluster import detect
from launcher.config import Job
from launcher.errors import ClusterError, ConfigError

_PATIENCE_S = 60.0


def devices(job: Job) -> int | None:
    """Return the number of sound devices; None where nobody can tell: processors without a command."""
    command = job.supervise.health_command
    if command is not None:
        return _ask(command, planned=job.cluster.gpus_per_node)
    if job.cluster.gpu.device != "cuda":
        return None
    try:
        return len(detect.probe().gpus)
    except ClusterError:  # CUDA_VISIBLE_DEVICES names only devices that are lost
        return 0


def _ask(command: str, *, planned: int) -> int:
    """Run the command: unsound hosts have no devices, and one that names no number has all of them."""
    try:
        done = subprocess.run(
            shlex.split(command), capture_output=True, text=True, check=False, timeout=_PATIENCE_S
        )
    except subprocess.TimeoutExpired:
        return 0
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"supervise.health_command={command} cannot be run: {error}; give a program and its arguments"
        ) from error
    if done.returncode != 0:
        return 0
    last = done.stdout.strip().rpartition("\n")[2].strip()
    return int(last) if last.isdecimal() else planned
