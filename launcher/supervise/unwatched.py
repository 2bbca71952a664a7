"""What a start died of that no launcher of ours watched: Slurm's job script and the ranks of a bare torchrun ask here.

`python -m launcher.supervise.unwatched RUN_DIR CODE LOG FROM`: the workers ended with CODE, and what they and torchrun
said begins at byte FROM of LOG.
"""

from __future__ import annotations

import fcntl
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from launcher import heartbeat, torchrun
from launcher.errors import LostRankError, TrainingError
from launcher.run_dir import RunDir, open_run, state
from launcher.submit import gang, local
from launcher.supervise.failure import Failure, explain, said
from launcher.supervise.start import Ending
from launcher.supervise.told import log_failure
from launcher.supervise.watch import step_reached

# How Slurm says, in the log of a job, that the kernel killed for memory: slurmstepd before and since 22.05.
_KILLED_FOR_MEMORY = re.compile(r"oom[-_]kill event")
_RESTART, _RESTARTS = "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"


# ---- Slurm --------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """Log what the workers of a job died of, and say it."""
    run = open_run(Path(arguments[0]))
    code, log, log_from = int(arguments[1]), Path(arguments[2]), int(arguments[3])
    ending = _ending(run, code=code, log=log, log_from=log_from)
    kills = len(_KILLED_FOR_MEMORY.findall(said(log, log_from)))
    failure = explain(run, ending, out_of_memory_kills=kills)
    log_failure(run, failure, step=step_reached(ending.beats))
    print(f"meshwright: {failure.error}", file=sys.stderr)
    return 0


def _ending(run: RunDir, *, code: int, log: Path, log_from: int) -> Ending:
    world_size = run.plan().world_size
    beats = tuple(heartbeat.read_all(run.heartbeats, world_size=world_size))
    return Ending(code=code, world_size=world_size, log=log, log_from=log_from, beats=beats)


# ---- a bare torchrun ----------------------------------------------------------------------------------------------


def is_ours() -> bool:
    """Tell whether nobody but torchrun looks after this rank: neither our launcher nor Slurm's job script."""
    return torchrun.started_us() and local.LAUNCHER_PID not in os.environ and gang.HOSTS not in os.environ


def tell(run: RunDir) -> None:
    """As a rank that has left its error file: tell what this start dies of, unless another rank does.

    All ranks may raise at once; each of them tells the first cause of all. A rank that lost its peer raises when that
    one has left, which has told its own reason by then.
    """
    _in_turn(run, _tell_failure)


def tell_restart(run: RunDir) -> None:
    """As a rank that torchrun has started again: tell of a start that ended without a word, as killed ranks do."""
    if os.environ.get("LOCAL_RANK") == "0" and _number(_RESTART) > 0:
        _in_turn(run, _tell_silence)


def _in_turn(run: RunDir, act: Callable[[RunDir], None]) -> None:
    """Act, unless another rank is about it; what goes wrong is one line, and changes no rank's end."""
    try:
        with run.events_file.open("ab") as file, suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            act(run)
    except Exception as error:
        print(f"meshwright: the failure could not be told: {error}", file=sys.stderr)


def _tell_failure(run: RunDir) -> None:
    if _is_told(run):
        return
    ending = _ending(run, code=TrainingError.exit_code, log=run.logs, log_from=0)
    failure = explain(run, ending)
    log_failure(run, failure, step=step_reached(ending.beats))
    if _number(_RESTART) < _number(_RESTARTS):
        run.log_event("restarting", cause=failure.cause, rank=failure.rank, host=failure.host)


def _is_told(run: RunDir) -> bool:
    """Tell whether a rank of this start was faster."""
    begun = torchrun.begun()
    own = [event["event"] for event in run.events() if event["time"] >= begun]
    return next((name for name in reversed(own) if name in ("started", "failed")), None) == "failed"


def _tell_silence(run: RunDir) -> None:
    if state(list(run.events())) not in ("created", "running"):
        return
    text = "a rank was killed or lost, and torchrun has started the run again; its output names the rank"
    log_failure(run, Failure(cause="lost_rank", error=LostRankError(text)), step=None)


def _number(variable: str) -> int:
    return int(os.environ.get(variable, "0"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
