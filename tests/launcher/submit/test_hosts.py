from __future__ import annotations

import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from launcher import compose
from launcher.cluster.spec import Switch
from launcher.config import Job, SubmitConfig
from launcher.errors import ConfigError, TrainingError
from launcher.submit import hosts
from strategies.spec import Plan

PLAN = Plan(strategy="megatron", dp=2, tp=8)


def job(submit: SubmitConfig, *switches: Switch, nodes: int = 2) -> Job:
    (composed,) = compose.jobs(["cluster=h100_sxm", f"cluster.num_nodes={nodes}", "strategy=megatron"])
    return replace(composed, submit=submit, cluster=replace(composed.cluster, switches=switches))


def test_a_hostfile_is_read_as_others_write_it(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# ours\nalpha slots=8\n\nbeta:8 # spare\n")
    assert hosts.read_hostfile(str(file)) == ("alpha", "beta:8")
    with pytest.raises(
        ConfigError, match=r"submit.hostfile=.* cannot be read; give a file with one host a line"
    ):
        hosts.read_hostfile(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (("a",), "submit.hosts names 1 hosts and cluster.num_nodes=2 needs 2; name more"),
        (("a", "a"), "submit.hosts names a host twice"),
        ((), "submit.hosts names 0 hosts"),
    ],
)
def test_hosts_that_do_not_do_are_named(names: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        hosts.given(job(SubmitConfig(name="ssh", hosts=names)))


def test_hosts_follow_their_switches_or_their_owner() -> None:
    submit = SubmitConfig(name="ssh", hosts=("c", "a", "b"))
    assert hosts.named(job(submit), PLAN) == ("c", "a")
    tree = (Switch(name="l", hosts=("a", "b")), Switch(name="m", hosts=("c",)))
    assert hosts.named(job(submit, *tree), PLAN) == ("a", "b")


def test_each_host_gets_the_same_torchrun_with_its_own_rank() -> None:
    submit = SubmitConfig(name="ssh", hosts=("me@a", "b"), prefix=("nice",), port=29500)
    made = [
        hosts.argv(
            Path("/r"),
            job=job(submit),
            hosts=submit.hosts,
            rank=rank,
            python="/v/python",
            environment={"PYTHONPATH": "/m", "SECRET": "x"},
        )
        for rank in (0, 1)
    ]
    assert made[0] == [
        *("env", "PYTHONPATH=/m", "nice", "/v/python", "-m", "torch.distributed.run"),
        *("--nnodes=2", "--node-rank=0", "--nproc-per-node=8", "--master-addr=a", "--master-port=29500"),
        *("-m", "launcher", "resume", "/r"),
    ]
    assert [word for word in made[1] if word not in made[0]] == ["--node-rank=1"]


def test_a_port_that_nobody_names_is_the_same_everywhere() -> None:
    submit = SubmitConfig(name="torchrun", hosts=("a", "b"))

    def made(path: str) -> list[str]:
        told = hosts.argv(Path(path), job=job(submit), hosts=submit.hosts, rank=0, python="p", environment={})
        return [word for word in told if word.startswith("--master-port=")]

    assert made("/r") == made("/r")
    assert 20000 <= int(made("/r")[0].partition("=")[2]) < 30000


@pytest.mark.parametrize("word", ["it's", 'a "b" c', "two\nlines", "$HOME", "*", "é", "--x=1 2"])
def test_words_survive_the_shell_on_the_other_side(word: str, tmp_path: Path) -> None:
    # ssh joins its words with spaces and hands them to a shell; so does this stand-in.
    *_, host, line = hosts.ssh_argv(["ssh"], "h", ["printf", "%s", word])
    assert host == "h"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == word


def test_what_is_shown_can_be_typed() -> None:
    shown = hosts.shown({"a": ["echo", "it's"], "b": ["true"]})
    assert shown.splitlines()[0] == "# on a"
    assert shlex.split(shown.splitlines()[1]) == ["echo", "it's"]


def test_the_first_host_that_fails_is_named_and_the_others_end(tmp_path: Path) -> None:
    commands = {"good": ["sleep", "600"], "bad": ["sh", "-c", "echo no; exit 3"]}
    with pytest.raises(TrainingError, match=r"host bad ended with exit code 3; see .*log"):
        hosts.start(commands, log=tmp_path / "log", stop_file=tmp_path / "stop")
    assert (tmp_path / "log").read_text() == "no\n"


def test_all_that_end_well_are_waited_for(tmp_path: Path) -> None:
    hosts.start({"a": ["true"], "b": ["true"]}, log=tmp_path / "log", stop_file=tmp_path / "stop")
    assert not (tmp_path / "stop").exists()
