from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher import compose
from launcher.cluster.spec import Switch
from launcher.config import Job, SubmitConfig
from launcher.errors import ConfigError, RunDirError, TrainingError
from launcher.run_dir import open_run, refreeze
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
        (("a", "me@a"), "submit.hosts names a host twice"),
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
    submit = SubmitConfig(name="ssh", hosts=("me@c", "me@d", "b", "me@a"))
    assert hosts.named(job(submit, *tree), PLAN) == ("me@a", "b")


def test_another_plan_leaves_the_order_of_the_hosts(
    call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("strategy=fake", "monitor=none", "data.max_bytes=200000", "training.sequence_length=32")
    size = ("cluster.num_nodes=2", "cluster.gpus_per_node=1", "training.global_batch_size=8")
    assert (
        call(
            "submit", *words, *size, "submit=torchrun", "submit.hosts=[x,y]", f"run_dir={tmp_path / 'r'}"
        ).code
        == 0
    )
    run = open_run(tmp_path / "r")
    refreeze(run, job=run.job(), plan={**run.plan_data(), "num_microbatches": 2, "micro_batch_size": 2})
    planned: list[int] = []

    def named(job: Job, plan: Plan) -> tuple[str, ...]:
        planned.append(plan.num_microbatches)
        return ("x", "y")

    monkeypatch.setattr(hosts, "named", named)
    assert hosts.of_run(run) == ("x", "y")
    assert planned == [1] != [run.plan().num_microbatches]


def test_each_host_gets_a_launcher_with_its_own_rank() -> None:
    submit = SubmitConfig(name="ssh", hosts=("me@a", "b"), prefix=("nice",))
    environment = {"PYTHONPATH": "/m", "SECRET": "x"}
    made = [
        hosts.argv(Path("/r"), job=job(submit), node=node, python="/v/python", environment=environment)
        for node in (0, 1)
    ]
    assert made[0] == [
        *("env", "PYTHONPATH=/m", "nice", "/v/python", "-m", "launcher", "submit", "/r", "--node-rank=0")
    ]
    assert [word for word in made[1] if word not in made[0]] == ["--node-rank=1"]


def test_workers_meet_at_the_first_host_on_a_port_that_all_come_to() -> None:
    submit = SubmitConfig(name="ssh", hosts=("me@a", "b"), port=29500)
    made = [
        hosts.torchrun_argv(Path("/r"), job=job(submit), hosts=submit.hosts, node=node, python="p")
        for node in (0, 1)
    ]
    assert made[0] == [
        *("p", "-m", "torch.distributed.run", "--nnodes=2", "--node-rank=0", "--nproc-per-node=8"),
        *("--master-addr=a", "--master-port=29500", "-m", "launcher.training.worker", "/r"),
    ]
    assert [word for word in made[1] if word not in made[0]] == ["--node-rank=1"]
    unnamed = job(SubmitConfig(name="torchrun", hosts=("a", "b")))
    assert hosts.port_of(Path("/r"), unnamed) == hosts.port_of(Path("/r"), unnamed)
    assert 20000 <= hosts.port_of(Path("/r"), unnamed) < 30000


def test_a_host_finds_itself_among_the_names() -> None:
    assert hosts.node_here(["192.0.2.1", "me@127.0.0.1"]) == 1
    assert hosts.node_here(["192.0.2.1", "no-such-host.invalid"]) is None


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


def test_the_first_host_decides_and_the_others_end(tmp_path: Path) -> None:
    commands = {"first": ["sh", "-c", "echo no; exit 3"], "good": ["sleep", "600"]}
    with pytest.raises(TrainingError, match=r"host first ended with exit code 3; see .*log"):
        hosts.start(commands, log=tmp_path / "log", stop_file=tmp_path / "stop", patience_s=60)
    assert (tmp_path / "log").read_text() == "no\n"


def test_another_host_that_fails_for_itself_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "_PATIENCE_S", 1.0)
    with pytest.raises(TrainingError, match=r"host bad ended with exit code 5"):
        hosts.start(
            {"first": ["sleep", "600"], "bad": ["sh", "-c", "exit 5"]},
            log=tmp_path / "log",
            stop_file=tmp_path / "stop",
            patience_s=60,
        )


def test_a_host_that_was_cut_off_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "_AGAIN_S", 0.1)
    back = tmp_path / "back"
    commands = {
        "first": ["sh", "-c", f"while [ ! -e {back}.3 ]; do sleep 0.05; done"],
        # As ssh says it, as a shell says it of a command that was killed, and as we see it ourselves.
        "cut": [
            *("sh", "-c"),
            f"for n in 1 2 3; do [ -e {back}.$n ] || break; done; touch {back}.$n; "
            "case $n in 1) exit 255;; 2) kill -9 $$;; esac",
        ],
    }
    hosts.start(commands, log=tmp_path / "log", stop_file=tmp_path / "stop", patience_s=60)
    assert Path(f"{back}.3").exists()


def test_a_host_that_was_cut_off_is_waited_for_while_its_launcher_has_not_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "_AGAIN_S", 0.1)
    held = f"exit {RunDirError.exit_code}"
    once = tmp_path / "once"
    twice = tmp_path / "twice"
    first = f"[ -e {once} ] || {{ touch {once}; exit 255; }}; [ -e {twice} ] || {{ touch {twice}; {held}; }}"
    hosts.start(
        {"first": ["sh", "-c", first]}, log=tmp_path / "log", stop_file=tmp_path / "stop", patience_s=60
    )
    assert twice.exists()
    with pytest.raises(TrainingError, match=f"host first ended with exit code {RunDirError.exit_code}"):
        hosts.start(
            {"first": ["sh", "-c", held]}, log=tmp_path / "log", stop_file=tmp_path / "stop", patience_s=60
        )


def test_hosts_that_nobody_can_enter_are_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hosts, "_AGAIN_S", 0.1)
    denied = ["sh", "-c", "echo denied; exit 255"]
    with pytest.raises(TrainingError, match=r"no host could be entered for supervise.host_wait_s=2 s; see "):
        hosts.start(
            {"a": denied, "b": denied}, log=tmp_path / "log", stop_file=tmp_path / "stop", patience_s=2
        )
    assert (tmp_path / "log").read_text().count("denied") > 2
    assert capsys.readouterr().err.count("host a is cut off") == 1


def test_all_that_end_well_are_waited_for(tmp_path: Path) -> None:
    hosts.start(
        {"a": ["true"], "b": ["true"]}, log=tmp_path / "log", stop_file=tmp_path / "stop", patience_s=60
    )
    assert not (tmp_path / "stop").exists()
