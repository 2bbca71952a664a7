"""A job becomes a run directory: the plan it holds is the one that was ranked, and a taken folder is refused first."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launcher import compose, freeze
from launcher.config import Job
from launcher.errors import ClusterError, ConfigError, RunDirError
from launcher.output import Output
from launcher.planner.search.goals import Goal

QUIET = Output(as_json=True)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    (found,) = compose.jobs(["strategy=fake", "experiment=smoke", f"run_dir={tmp_path / 'run'}"])
    return found


def test_the_frozen_plan_is_the_ranked_one(job: Job) -> None:
    run = freeze.freeze(job, QUIET)
    assert run.plan() == freeze.rank(job).choose().plan
    assert run.job() == job
    assert json.loads(run.env_file.read_text())["seed"] == job.training.seed
    with pytest.raises(RunDirError, match="already holds a run"):
        freeze.freeze(job, QUIET)


def test_a_plan_may_be_told_on_one_line(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    freeze.freeze(job, Output(as_json=False), in_full=False)
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("chosen    fake dp=1 ")
    assert told[1].startswith("run directory ")
    assert len(told) == 2


def test_a_run_without_a_folder_gets_one_by_time_and_name(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(str(job.run_dir)).parent)
    run = freeze.freeze(replace(job, run_dir=None), QUIET)
    assert run.path.parent == Path.cwd() / "runs"
    assert run.path.name.endswith("-debug_tiny-fake")


def test_a_goal_that_changed_the_cluster_is_not_frozen(job: Job) -> None:
    wide = replace(job, cluster=replace(job.cluster, gpus_per_node=4))
    cheap = replace(wide, goal=Goal(name="cheapest"))
    assert freeze.rank(cheap).problem.cluster.world_size < 4
    with pytest.raises(ConfigError, match="goal=cheapest plans other hardware"):
        freeze.freeze(cheap, QUIET)
    assert not Path(str(job.run_dir)).exists()


def test_what_nccl_was_told_is_kept_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_IB_SL", "1")
    words = ("strategy=fake", "experiment=smoke", "cluster=h100_sxm", "cluster.gpus_per_node=1")
    (planned,) = compose.jobs([*words, f"run_dir={tmp_path}/gpu"])
    kept = json.loads(freeze.freeze(planned, QUIET).env_file.read_text())["nccl"]
    assert kept["fabric"] == "infiniband"
    assert kept["inherited"]["NCCL_IB_SL"] == ["1", "the environment"]
    assert kept["findings"] == []


def test_several_nodes_are_frozen_only_for_somebody_who_starts_them(tmp_path: Path) -> None:
    (planned,) = compose.jobs(["strategy=fake", "cluster.num_nodes=2", f"run_dir={tmp_path}/two"])
    with pytest.raises(ClusterError, match="needs a start on every node"):
        freeze.freeze(planned, QUIET)
    assert freeze.freeze(planned, QUIET, runs_here=False).job().cluster.num_nodes == 2
