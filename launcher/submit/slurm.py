"""A frozen run as a job of Slurm: the argv of sbatch, and what scontrol says of a job. No shell is written."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.cluster.placement import hosts_in_a_group
from launcher.config import Job, SubmitConfig
from launcher.errors import ClusterError, ConfigError
from strategies.spec import Plan

SCRIPT = Path(__file__).with_name("train.sbatch")
LOG = Path("logs") / "slurm.log"  # in the run directory: all jobs of a run append to it
# What the script remembers from start to start: their number, and the hosts of one that did not come to its own end.
MEMORY = (Path("logs") / "slurm_starts", Path("logs") / "slurm_hosts")
_TIMEOUT_S = 120
_ENDED = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("BOOT_FAIL", "DEADLINE", "PREEMPTED"),
)


def sbatch_argv(
    path: Path, *, job: Job, plan: Plan, python: str, after: str | None = None, script: Path = SCRIPT
) -> list[str]:
    """Return the command that queues the run in `path`. Flags of the site come last, so they win.

    `after`: the dependency, as sbatch writes it.
    """
    cluster, submit = job.cluster, job.submit
    ours = {
        # A line break would end it early in every listing.
        "job-name": f"meshwright {' '.join(path.name.split())}",
        "partition": cluster.partition,
        "nodes": cluster.num_nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": cluster.gpus_per_node if cluster.gpu.device == "cuda" else None,
        "dependency": after,
        "signal": f"B:USR1@{submit.signal_s}",
        "chdir": str(path),
        "output": plain_pattern(str(path / LOG)),
        "open-mode": "append",
        "requeue": submit.requeue,
        "no-requeue": not submit.requeue,
    }
    words = script_words(job, plan=plan, python=python)
    return ["sbatch", "--parsable", *flags(ours), *flags(submit.sbatch), str(script), str(path), *words]


def script_words(job: Job, *, plan: Plan, python: str) -> list[str]:
    """Return what train.sbatch is told behind RUN_DIR."""
    submit, per_node = job.submit, job.cluster.gpus_per_node
    return [
        f"python={submit.inside or python}",
        f"processes={per_node}",
        f"group={hosts_in_a_group(plan, gpus_per_node=per_node)}",
        f"max_restarts={submit.max_restarts}",
        *([] if submit.port is None else [f"port={submit.port}"]),
        *([] if submit.requeue else ["requeue=no"]),
        *(["preflight=yes"] if submit.preflight else []),
        *(f"module={name}" for name in submit.modules),
        *(f"srun={flag}" for flag in flags(submit.srun)),
        *(f"prefix={word}" for word in submit.prefix),
    ]


def plain_pattern(path: str) -> str:
    r"""Return a file name in which sbatch finds no pattern: %j is a job's number, and \\ anywhere turns that off."""
    return path.replace("\\", "\\\\") if "\\" in path else path.replace("%", "%%")


def flags(named: Mapping[str, Any]) -> list[str]:
    """Return flags by name as words: true is a bare flag, null and false are none, a list is joined with commas."""
    words = []
    for name, value in named.items():
        if not re.fullmatch(r"[A-Za-z][\w-]*", name):
            raise ConfigError(f"'{name}' is no flag of Slurm; write its name without dashes, as in partition")
        if value is None or value is False:
            continue
        dashed = f"--{name}" if len(name) > 1 else f"-{name}"
        text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        if value is True:
            words.append(dashed)
        else:
            words += [f"{dashed}={text}"] if len(name) > 1 else [dashed, text]
    return words


def dependency(submit: SubmitConfig, *, before: str | None, behind: str | None = None) -> str | None:
    """Return what a job waits for: the one before it in the chain, else what the user has named.

    `behind` is a job of another run whose place it takes; a job that is requeued keeps its place.
    """
    if before is not None:
        return f"afterany:{before}"
    return ",".join(filter(None, [submit.after, f"afterany:{behind}" if behind else None])) or None


# ---- what Slurm says ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class JobState:
    """Where a job stands."""

    state: str  # Slurm's word; UNKNOWN where it has forgotten the job
    reason: str = ""
    hosts: str = ""
    restarts: int = 0
    exit_code: int | None = None

    @property
    def has_ended(self) -> bool:
        """Tell whether it will not run again."""
        return self.state in (*_ENDED, "UNKNOWN")


def numbers(events: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the numbers of a run's jobs, of the last submission and all before, oldest first."""
    return [event["job"] for event in events if event["event"] == "submitted" and "job" in event]


def parse_job(text: str) -> JobState:
    """Read `scontrol -o show job ID`."""

    def field(name: str) -> str:
        found = re.search(rf"(?:^|\s){name}=(\S*)", text)
        return found[1] if found and found[1] not in ("(null)", "None") else ""

    return JobState(
        state=field("JobState") or "UNKNOWN",
        reason=field("Reason"),
        hosts=field("NodeList"),
        restarts=int(field("Restarts") or 0),
        exit_code=int(code) if (code := field("ExitCode").partition(":")[0]) else None,
    )


def queue(argv: list[str], *, environment: Mapping[str, str], directory: Path) -> str:
    """Run sbatch; return the number of the job."""
    said = run(argv, environment=environment, directory=directory)
    return said.strip().splitlines()[-1].split(";")[0]  # behind it: the cluster, where there are several


def ask(job_id: str) -> JobState:
    """Return where a job stands."""
    try:
        return parse_job(run(["scontrol", "-o", "show", "job", job_id]))
    except ClusterError as error:
        if "Invalid job id" in str(error):
            return JobState(state="UNKNOWN")
        raise


def run(
    argv: list[str], *, environment: Mapping[str, str] | None = None, directory: Path | None = None
) -> str:
    """Run one of Slurm's commands and return what it prints; raise ClusterError with its own last line."""
    try:
        done = subprocess.run(
            argv,
            env=environment,
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError as error:
        raise ClusterError(
            f"submit=slurm needs the command {argv[0]}, which is not on this host's PATH; run it on a login node, "
            "or see with --dry-run what would be queued"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"{argv[0]} gave no answer for {_TIMEOUT_S} s; is slurmctld up?") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise ClusterError(f"{argv[0]} refused: {lines[-1] if lines else f'exit code {done.returncode}'}")
    return done.stdout
