"""How many devices of this host can be trained on, as the operator's own command or the driver tells."""

from __future__ import annotations

import os
import shlex
import subprocess

from launcher.cluster import detect
from launcher.config import Job
from launcher.errors import ClusterError, ConfigError
from launcher.preflight import gpus

_PATIENCE_S = 60.0


def devices(job: Job, *, given: str | None = None) -> int | None:
    """Return the number of sound devices; None where nobody can tell: processors without a command.

    With submit.preflight=true those that the driver knows to be sick are hidden from the workers; `given` is
    CUDA_VISIBLE_DEVICES as it was before any was.
    """
    command = job.supervise.health_command
    if command is not None:
        return _ask(command, planned=job.cluster.gpus_per_node)
    if job.cluster.gpu.device != "cuda":
        return None
    try:
        if job.submit.preflight:
            return _hide_sick(job, given)
        return len(detect.visible_gpus())
    except ClusterError:  # CUDA_VISIBLE_DEVICES names only devices that are lost
        return 0


def _hide_sick(job: Job, given: str | None) -> int:
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if given is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = given
    found = detect.visible_gpus()
    faults = {int(reading["index"]): gpus.sickness(reading) for reading in gpus.readings()}
    sound = [gpu.uuid for gpu in found if faults.get(gpu.index) is None]
    if len(sound) < len(found):
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(sound)
    return len(sound)


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
