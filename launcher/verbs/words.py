"""What the words behind a verb stand for: jobs to compose, or a run directory to open."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from launcher import compose, run_dir
from launcher.cluster import nccl
from launcher.config import Job, SweepConfig
from launcher.errors import ConfigError
from launcher.output import Output, print_line
from launcher.run_dir import RunDir
from strategies.names import suggest

WHY, SENSITIVITY = "--why", "--sensitivity"  # flags of `plan` alone
_ASKING = {"--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i"}


def jobs(verb: str, arguments: Sequence[str], output: Output) -> list[Job]:
    """Compose the jobs that a verb is about; raise ConfigError for words that are another verb's."""
    check(verb, arguments, output)
    found = compose.jobs(arguments)
    several = next((job.strategies for job in found if job.strategies is not None), None)
    if several is not None and verb != "compare":
        raise ConfigError(
            f"strategies=[{','.join(several)}] is a key of `meshwright compare`; name one engine with strategy=NAME"
        )
    if any(job.sweep != SweepConfig() for job in found):
        raise ConfigError("top_k and sweep.* are keys of `meshwright sweep`; leave them out")
    for job in found:
        warn(job)
    return found


def check(verb: str, arguments: Sequence[str], output: Output) -> None:
    """Raise ConfigError for words that are another verb's, before any is composed."""
    _refuse_questions(verb, arguments)
    if output.as_json and only_asks(arguments):
        raise ConfigError(f"--json has no document for {' '.join(arguments)}; leave --json out")


def warn(job: Job) -> None:
    """Tell what NCCL would inherit and should not."""
    told = nccl.report(job.cluster, deterministic=job.training.deterministic)
    for sentence in nccl.warnings(told):
        print_line(f"meshwright: {sentence}", sys.stderr)


def only_asks(arguments: Sequence[str]) -> bool:
    """Tell whether Hydra is asked for help or for the configuration, and nothing is to run."""
    return any(word.split("=")[0] in _ASKING for word in arguments)


def open_run(verb: str, arguments: Sequence[str]) -> RunDir:
    """Open the run directory that is the verb's only word."""
    flags = [word for word in arguments if word.startswith("-")]
    if flags:
        raise ConfigError(
            f"'{flags[0]}' is not a flag of `meshwright {verb} RUN_DIR`; --json is the only one"
        )
    if len(arguments) != 1:
        raise ConfigError(f"`meshwright {verb}` takes one run directory, not {len(arguments)} words")
    return run_dir.open_run(Path(arguments[0]).expanduser())


def of_cluster(
    verb: str, arguments: Sequence[str], *, own: Sequence[str], known: Sequence[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Return the values of a verb's own keys, and the words that describe the cluster; `known` are other good words."""
    values: dict[str, Any] = {}
    described = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key in own and equals:
            values[key] = yaml.safe_load(value)
        elif key == "cluster" or key.startswith("cluster."):
            described.append(argument)
        else:
            hint = suggest(key, [*own, *known, "cluster"])
            raise ConfigError(f"'{argument}' is not a word of `{verb}`; {hint}")
    return values, described


def names_a_run(arguments: Sequence[str]) -> bool:
    """Tell whether the words are a run directory rather than a job."""
    return len(arguments) == 1 and "=" not in arguments[0] and not arguments[0].startswith("-")


def _refuse_questions(verb: str, arguments: Sequence[str]) -> None:
    flag = next((word.split("=")[0] for word in arguments if word.split("=")[0] in (WHY, SENSITIVITY)), None)
    if flag is not None and verb != "plan":
        raise ConfigError(f"{flag} is a flag of `meshwright plan`; leave it out of `meshwright {verb}`")
