"""The argv of sbatch against golden files; scontrol's answers as they were recorded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher import compose
from launcher.config import Job, SubmitConfig
from launcher.errors import ClusterError, ConfigError
from launcher.submit import slurm
from strategies.spec import Plan

GOLDEN = Path(__file__).parents[2] / "golden" / "slurm"
SUBMITS: dict[str, dict[str, Any]] = {
    "plain": {},
    "site_flags": {
        "sbatch": {"account": "a b", "time": "1-00:00:00", "exclusive": True, "p": "long", "mail-user": None},
        "max_restarts": 10,
        "preflight": True,
        "signal_s": 600,
        "port": 29500,
    },
    "apptainer": {
        "prefix": ("apptainer", "exec", "--nv", "--bind=/data with space", "image.sif"),
        "inside": "/opt/venv/bin/python",
        "modules": ("cuda/12.6", "nccl"),
    },
    "pyxis": {
        "srun": {
            "container-image": "nvcr.io#nvidia/pytorch:25.04-py3",
            "container-mounts": "/shared:/shared,/it's:/x",
        },
        "sbatch": {"comment": "two\nlines", "gres": ["gpu:h100:8", "nvme:1"]},
    },
    "chained": {"requeue": False, "after": "afterok:17"},
    "of_a_sweep": {"after": "afterok:17", "sbatch": {"time": 20}},
}
BEHIND = {"of_a_sweep": "23"}
PATHS = {
    "of_a_sweep": "/shared/a sweep/02-tp-2",
    "plain": "/shared/runs/one",
    "pyxis": '/shared/it\'s "one" run\nof 100%j',
    "apptainer": "/s/a\\b%j",
}
PLAN = Plan(strategy="megatron", dp=4, tp=8, pp=2)


@pytest.fixture
def job() -> Job:
    """Eight nodes of eight GPUs."""
    (composed,) = compose.jobs(["cluster=h100_sxm", "cluster.num_nodes=8", "strategy=megatron"])
    return replace(composed, cluster=replace(composed.cluster, partition="gpu"))


def argv_of(name: str, job: Job) -> list[str]:
    submit = SubmitConfig(name="slurm", **SUBMITS[name])
    return slurm.sbatch_argv(
        Path(PATHS.get(name, "/r")),
        job=replace(job, submit=submit),
        plan=PLAN,
        python="/v/bin/python",
        after=slurm.dependency(submit, before=None, behind=BEHIND.get(name)),
        script=Path("/m/train.sbatch"),
    )


@pytest.mark.parametrize("name", SUBMITS)
def test_golden(name: str, job: Job) -> None:
    assert argv_of(name, job) == json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def test_no_golden_file_is_left_over() -> None:
    assert {file.stem for file in GOLDEN.glob("*.json")} == set(SUBMITS)


def test_processors_ask_for_no_gpus(job: Job) -> None:
    on_cpu = replace(job, cluster=replace(job.cluster, gpu=replace(job.cluster.gpu, device="cpu")))
    argv = slurm.sbatch_argv(Path("/r"), job=on_cpu, plan=PLAN, python="p")
    assert not any(word.startswith("--gpus") for word in argv)


def test_a_later_job_waits_for_the_one_before_it() -> None:
    submit = SubmitConfig(name="slurm", after="afterok:1")
    assert slurm.dependency(submit, before=None) == "afterok:1"
    assert slurm.dependency(submit, before="7") == "afterany:7"
    assert slurm.dependency(submit, before="7", behind="3") == "afterany:7"
    assert slurm.dependency(SubmitConfig(name="slurm"), before=None, behind="3") == "afterany:3"


def test_numbers_of_jobs_are_those_of_all_submissions() -> None:
    events = [{"event": "submitted", "job": "3"}, {"event": "submitted"}, {"event": "started", "job": "4"}]
    assert slurm.numbers([*events, {"event": "submitted", "job": "5"}]) == ["3", "5"]


@pytest.mark.parametrize(
    ("path", "pattern"),
    [("/a b/c", "/a b/c"), ("/100%j/x", "/100%%j/x"), ("/b\\s/%j", "/b\\\\s/%j"), ("/n\nl", "/n\nl")],
)
def test_a_log_has_the_name_it_is_given(path: str, pattern: str) -> None:
    assert slurm.plain_pattern(path) == pattern


@pytest.mark.parametrize("name", ["--partition", "a b", "", "x=y"])
def test_a_flag_is_named_without_dashes(name: str) -> None:
    with pytest.raises(ConfigError, match="is no flag of Slurm; write its name without dashes"):
        slurm.flags({name: "gpu"})


def test_a_job_is_read_as_scontrol_tells_it() -> None:
    text = (
        "JobId=7 JobName=meshwright State=1 Requeue=1 Restarts=2 BatchFlag=1 UserId=root(0) JobState=PENDING "
        "Reason=BeginTime Dependency=(null) NodeList=(null) NumNodes=2"
    )
    job = slurm.parse_job(text)
    assert (job.state, job.reason, job.hosts, job.restarts) == ("PENDING", "BeginTime", "", 2)
    assert not job.has_ended
    assert slurm.parse_job("JobId=7 JobState=NODE_FAIL Restarts=0 NodeList=node[0-1]").has_ended
    assert slurm.parse_job("").has_ended
    assert slurm.parse_job("JobId=7 JobState=FAILED ExitCode=9:0").exit_code == 9
    assert slurm.parse_job("JobId=7").exit_code is None


def tool(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_sbatch_may_name_the_cluster_behind_the_job(tools: Path) -> None:
    tool(tools, "sbatch", "echo 'sbatch: a word of the site'; echo '123;north'")
    assert slurm.queue(["sbatch"], environment=os.environ, directory=tools) == "123"


def test_what_slurm_refuses_is_passed_on(tools: Path) -> None:
    tool(tools, "sbatch", "echo 'sbatch: error: invalid partition specified: x' >&2; exit 1")
    with pytest.raises(ClusterError, match=r"sbatch refused: .*invalid partition specified: x"):
        slurm.queue(["sbatch"], environment=os.environ, directory=tools)


def test_a_job_that_slurm_has_forgotten_has_ended(tools: Path) -> None:
    tool(tools, "scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert slurm.ask("9").state == "UNKNOWN"
    tool(tools, "scontrol", "echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(ClusterError, match="Unable to contact"):
        slurm.ask("9")


def test_a_host_without_slurm_says_so(tools: Path, call: Callable[..., Any]) -> None:
    with pytest.raises(ClusterError, match="submit=slurm needs the command sbatch"):
        slurm.queue(["sbatch"], environment=os.environ, directory=tools)
