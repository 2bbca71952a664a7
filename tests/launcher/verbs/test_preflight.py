"""The verb `probe preflight`: its words, its table, its exit code, and three real nodes' worth of processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher import compose, freeze
from launcher.errors import ClusterError, UnsoundNodeError
from launcher.output import Output
from launcher.run_dir import RunDir
from launcher.submit import gang
from launcher.verbs import preflight

Call = Callable[..., Any]
# How fast processes are that share two cores says nothing.
LAX = ("preflight.min_product=0", "preflight.min_bandwidth=0")


@pytest.fixture
def frozen(tmp_path: Path) -> RunDir:
    """A run of one process that looks before it starts."""
    words = ["strategy=fake", "monitor=none", "data.max_bytes=200000", "training.num_steps=2", *LAX]
    words += ["cluster.gpus_per_node=1", "submit.preflight=true", f"run_dir={tmp_path / 'run'}"]
    (job,) = compose.jobs(words)
    return freeze.freeze(job, Output(as_json=True))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["model=llama3_8b"], "'model=llama3_8b' is not a word of `probe preflight`"),
        (["--fast"], "'--fast' is not a word of `probe preflight`"),
        (["preflight.min_prduct=1"], "unknown key 'preflight.min_prduct'; did you mean 'min_product'?"),
        (["preflight.min_memory=2"], "preflight.min_memory=2.0 must lie between 0 and 1"),
        (["preflight.rounds=-1"], "preflight.rounds=-1 must not be negative"),
        (["preflight.check_timeout_s=0"], "preflight.check_timeout_s=0.0 must be above 0 seconds"),
    ],
)
def test_a_wrong_word_is_one_sentence(call: Call, words: list[str], sentence: str) -> None:
    outcome = call("probe", "preflight", *words)
    assert (outcome.code, outcome.out) == (2, "") and sentence in outcome.err


def test_several_nodes_are_not_started_from_here(call: Call) -> None:
    outcome = call("probe", "preflight", "cluster.num_nodes=2")
    assert outcome.code == 8 and "`srun --ntasks-per-node=1 meshwright probe preflight`" in outcome.err


def test_a_sound_host_passes_and_the_run_keeps_what_it_showed(call: Call, frozen: RunDir) -> None:
    outcome = call("probe", "preflight", str(frozen.path))
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("PASS  ") and "1 of 1 nodes passed" in outcome.out
    assert "no GPU is planned" in outcome.out and "the run directory has" in outcome.out
    kept = json.loads((frozen.path / "preflight.json").read_text())
    assert kept["passed"] and kept["measured"]["ranks"][0]["product_tflops"] > 0
    assert (frozen.logs / "preflight_failed").read_text() == ""


def test_an_unsound_host_fails_and_nothing_starts_there(
    call: Call, frozen: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", "/nowhere")
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")  # as in a process that was started with it
    outcome = call("probe", "preflight", str(frozen.path), "--json")
    assert outcome.code == UnsoundNodeError.exit_code == 15
    assert "did not pass its preflight: the folder for temporary files (/nowhere) cannot be" in outcome.err
    [told] = outcome.json["nodes"]
    assert outcome.json["failed"] == [told["host"]]
    assert (frozen.logs / "preflight_failed").read_text() == f"{told['host']}\n"
    resumed = call("resume", str(frozen.path))
    assert resumed.code == 15 and "cannot be written: No such file or directory" in resumed.err
    assert not any(event["event"] == "launched" for event in frozen.events())


def test_the_folder_for_temporary_files_is_the_one_that_may_be_full(
    frozen: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(frozen.path))  # as Python falls back to
    subject = preflight.read([str(frozen.path)])
    assert list(subject.folders.values()) == [frozen.path, Path("/tmp")]


def test_a_host_that_looked_and_passed_trains(call: Call, frozen: RunDir) -> None:
    outcome = call("resume", str(frozen.path))
    assert outcome.code == 0, outcome.err
    assert (frozen.path / "preflight.json").exists()


def node(index: int, *words: str, folder: Path, **environment: str) -> subprocess.Popen[str]:
    """Start what srun would start on one of three nodes."""
    slurm = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_NUM_TASKS": "3"}
    slurm |= {
        "SLURM_STEP_NODELIST": "a,b,c",
        "SLURMD_NODENAME": "abc"[index],
        "SLURM_JOB_ID": str(os.getpid()),
    }
    words = ("cluster.num_nodes=3", "cluster.gpus_per_node=1", "cluster.gpu.device=cpu", *LAX, *words)
    code = (
        "import sys\nfrom launcher import cli\nfrom launcher.submit import gang\nimport dataclasses\n"
        "found = gang.find\n"
        "gang.find = lambda *a, **k: dataclasses.replace(found(*a, **k), address='127.0.0.1')\n"
        f"sys.exit(cli.run(['probe', 'preflight', *{words!r}]))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **slurm, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )


def test_of_three_nodes_the_one_that_never_came_is_named(tmp_path: Path, repository: Path) -> None:
    words = ("preflight.nodes_timeout_s=25", "preflight.exchange_timeout_s=20")
    path = {"PYTHONPATH": str(repository)}
    started = [node(index, *words, folder=tmp_path, **path) for index in (0, 1)]
    (out, err), (_, other) = (process.communicate(timeout=200) for process in started)
    assert [process.returncode for process in started] == [15, 0], err + other
    assert "PASS  a" in out and "PASS  b" in out and "FAIL  c" in out and "2 of 3 nodes passed" in out
    assert "c did not pass its preflight: it gave no answer within preflight.nodes_timeout_s=25" in err
    assert "GB/s a rank and direction in the best of 1 exchanges" in out


def test_where_the_collector_cannot_be_reached_and_has_not_told_the_second_node_says_so(
    frozen: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = preflight.read([str(frozen.path)])
    place = gang.Place(
        node=1,
        num_nodes=2,
        ranks=(1,),
        ranks_per_node=1,
        address="127.0.0.1",
        port=gang._free_port(),
        hosts=("lost", "me"),
    )
    impatient = replace(subject, bounds=replace(subject.bounds, nodes_timeout_s=1.0))
    with pytest.raises(ClusterError, match="lost, where the preflight is collected, left me alone: "):
        preflight.check(impatient, place)
    assert (frozen.logs / "preflight_failed").read_text() == "lost\n"
    assert "me could not reach it" in (frozen.path / "preflight.json").read_text()
    told = "the collector's own\n"  # it has heard the others, and need not have been the one that was lost
    (frozen.logs / "preflight_failed").write_text(told)
    (frozen.path / "preflight.json").write_text(told)
    with pytest.raises(ClusterError, match="left me alone"):
        preflight.check(impatient, place)
    assert (frozen.logs / "preflight_failed").read_text() == told
    assert (frozen.path / "preflight.json").read_text() == told
