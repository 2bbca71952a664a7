from __future__ import annotations

import json
import shlex
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.run_dir import open_run
from launcher.verbs.submit import Asked, take_flags

SMALL = (
    *("strategy=fake", "monitor=none", "data.max_bytes=200000", "training.sequence_length=32"),
    *("training.global_batch_size=8", "training.num_steps=4"),
)
TWO = ("cluster.num_nodes=2", "cluster.gpus_per_node=1")


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for Slurm's commands, which note what they were given, and tell of a running job."""
    folder = tmp_path / "tools"
    folder.mkdir()
    note = 'for word in "$@"; do printf "%s\\0" "$word"; done >> "$0.said"; printf "\\n" >> "$0.said"'
    scripts = {
        "sbatch": f'{note}; echo $(wc -l < "$0.said")',
        "scancel": note,
        "scontrol": "echo JobId=1 JobState=RUNNING Restarts=1 NodeList=n1",
    }
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def said(tools: Path, name: str) -> list[list[str]]:
    file = tools / f"{name}.said"
    lines = file.read_text().split("\0\n") if file.exists() else []
    return [line.split("\0") for line in lines if line]


@pytest.mark.parametrize(
    ("words", "asked", "left"),
    [
        (["submit=slurm", "--dry-run"], Asked(dry_run=True), ["submit=slurm"]),
        (["submit=slurm"], Asked(), ["submit=slurm"]),
        (["/r", "--node-rank=1"], Asked(node=1), ["/r"]),
        (["--node-rank", "12", "/r", "--dry-run"], Asked(node=12, dry_run=True), ["/r"]),
    ],
)
def test_flags_of_ours_are_taken_out(words: list[str], asked: Asked, left: list[str]) -> None:
    assert take_flags(words) == (asked, left)


def test_a_dry_run_prints_argv_and_script_and_leaves_nothing(
    call: Callable[..., Any], tmp_path: Path, repository: Path
) -> None:
    run = tmp_path / "it's\nmine"
    quoted = str(run).replace("'", "\\'")
    words = (*SMALL, *TWO, "submit=slurm", "submit.chain=2", f"run_dir='{quoted}'", "--dry-run")
    told = call("submit", *words, "--json").json
    first, second = told["commands"]
    assert first[-6:-4] == [str(repository / "launcher" / "submit" / "train.sbatch"), str(run)]
    assert "--dependency=afterany:JOB" in second
    assert told["script"] == (repository / "slurm" / "train.sbatch").read_text()
    text = call("submit", *words).out
    assert shlex.split(text[: text.index("\nsbatch")]) == first
    assert told["script"] in text
    assert not run.exists()


def test_a_chain_waits_link_by_link_and_is_noted(
    call: Callable[..., Any], tools: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = (*SMALL, *TWO, "submit=slurm", "submit.chain=3", "submit.requeue=false", f"run_dir={run}")
    outcome = call("submit", *words, "submit.sbatch.account=me")
    assert outcome.code == 0, outcome.err
    queued = said(tools, "sbatch")
    assert [[word for word in words if "dependency" in word] for words in queued] == [
        [],
        ["--dependency=afterany:1"],
        ["--dependency=afterany:2"],
    ]
    assert all("--account=me" in words and "requeue=no" in words for words in queued)
    noted = [event["job"] for event in open_run(run).events() if event["event"] == "submitted"]
    assert noted == ["1", "2", "3"]


def test_status_and_cancel_speak_of_the_jobs(call: Callable[..., Any], tools: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert call("submit", *SMALL, *TWO, "submit=slurm", f"run_dir={run}").code == 0
    assert call("status", str(run)).out == "job 1  running  on n1  restarts 1\nrun    created, step 0 of 4\n"
    assert call("cancel", str(run)).out == "job 1 leaves after this step with a checkpoint\n"
    assert call("cancel", str(run), "--now").out == "job 1 is cancelled\n"
    assert said(tools, "scancel") == [["--batch", "--signal=USR2", "1"], ["1"]]


def test_a_run_is_queued_again_with_its_count_begun_anew(
    call: Callable[..., Any], tools: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert call("submit", *SMALL, *TWO, "submit=slurm", f"run_dir={run}").code == 0
    (run / "logs" / "slurm_starts").write_text("none\nnone\n")
    assert call("submit", str(run)).code == 0
    assert not (run / "logs" / "slurm_starts").exists()
    assert said(tools, "sbatch")[0] == said(tools, "sbatch")[1]


def test_torchrun_prints_what_to_type_on_each_host(call: Callable[..., Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = call(
        "submit", *SMALL, *TWO, "submit=torchrun", "submit.hosts=[a,b]", f"run_dir={run}", "--json"
    )
    assert outcome.code == 0, outcome.err
    commands = outcome.json["commands"]
    assert list(commands) == ["a", "b"]
    assert [words[-2:] for words in commands.values()] == [[str(run), f"--node-rank={n}"] for n in (0, 1)]
    assert open_run(run).job().cluster.num_nodes == 2


def test_a_hostfile_is_read_once_and_frozen(
    call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hosts.txt").write_text("a slots=1\nb slots=1\n")
    run = tmp_path / "run"
    words = ("submit=torchrun", "submit.hostfile=hosts.txt", f"run_dir={run}")
    assert call("submit", *SMALL, *TWO, *words).code == 0
    monkeypatch.chdir("/")  # where ssh would begin on another host
    assert list(call("submit", str(run), "--dry-run", "--json").json["commands"]) == ["a", "b"]


def test_ssh_trains_on_all_hosts_and_waits(call: Callable[..., Any], tmp_path: Path) -> None:
    # What sshd does with the words it gets; localhost and 127.0.0.1 are two names of this host.
    stand_in = tmp_path / "ssh"
    stand_in.write_text('#!/bin/sh\n[ "$1" = -tt ] || exit 255\nexec sh -c "$3"\n')
    stand_in.chmod(0o755)
    run = tmp_path / "a run"
    words = (*SMALL, *TWO, "submit=ssh", "submit.hosts=[localhost,127.0.0.1]", f"submit.ssh=[{stand_in}]")
    outcome = call("submit", *words, f"run_dir={run}", "--json")
    log = run / "logs" / "ssh.log"
    assert outcome.code == 0, outcome.err + (log.read_text() if log.exists() else "")
    assert outcome.json["state"] == "finished"
    assert "finished at step 4" in call("logs", str(run)).out
    late = call("submit", str(run), "--node-rank=1", "--json")
    assert (late.code, late.json["state"]) == (0, "finished")
    assert call("logs", "-f", str(run), "--json").json == {"run_dir": str(run), "log": str(log)}


def test_a_host_of_the_run_starts_its_own_part(call: Callable[..., Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("submit=torchrun", "submit.hosts=[a,b]", "supervise.host_wait_s=1")
    assert call("submit", *SMALL, *TWO, *words, f"run_dir={run}").code == 0
    first = call("submit", str(run), "--node-rank=0")
    assert first.code == 12
    assert "no launcher answers on b, after supervise.host_wait_s=1 s; bring it back" in first.err
    assert "# on b\n" in first.out and "# on a\n" not in first.out
    assert call("show", str(run), "--json").json["state"] == "failed"
    other = call("submit", str(run), "--node-rank=1")
    assert other.code == 12
    assert "the first host of" in other.err
    assert "is none of the 2 hosts" in call("submit", str(run), "--node-rank=2").err
    assert "no launcher answers on b" in call("show", str(run), "--json").json["failure"]
    open_run(run).log_event("started", step=0)  # by Slurm or torchrun, which log nothing before
    assert call("show", str(run), "--json").json["failure"] is None


def test_logs_are_followed_through_a_restart(call: Callable[..., Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert call("submit", *SMALL, *TWO, "submit=torchrun", "submit.hosts=[a,b]", f"run_dir={run}").code == 0
    (log := run / "logs" / "ssh.log").write_text("lost\n")
    open_run(run).log_event("restarting")

    def goes_on() -> None:
        time.sleep(2)
        log.write_text("lost\nback\n")
        open_run(run).log_event("finished")

    (thread := threading.Thread(target=goes_on)).start()
    told = call("logs", "-f", str(run)).out
    thread.join()
    assert told == "lost\nback\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("submit=local",), "submit=local starts a run here, which `meshwright train` does"),
        (("submit=ssh",), "submit.hosts names 0 hosts and cluster.num_nodes=2 needs 2"),
        (
            ("submit=ssh", "submit.hosts=[a,b]", "submit.port=65535"),
            "submit.port=65535 is no port with another one behind it, and hosts need both; use 1 to 65534",
        ),
        (("submit=slurm", "submit.signal_s=0"), "submit.signal_s=0 must be at least 1"),
        (("submit=slurm", "submit.inside=/p"), "submit.inside=/p is a Python inside a container"),
        (("submit=slurm", "submit.sbatc.time=1"), "unknown key 'submit.sbatc'; did you mean 'sbatch'?"),
        (("--why", "tp=1"), "--why is a flag of `meshwright plan`"),
        (("submit=ssh", "--node-rank=b"), "--node-rank b is no host; count the hosts of the run from 0"),
        (
            ("submit=torchrun", "submit.hosts=[a,b]", "supervise.elastic=true"),
            "supervise.elastic=true works on one host, and cluster.num_nodes=2; leave it out",
        ),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(
    call: Callable[..., Any], words: tuple[str, ...], sentence: str
) -> None:
    outcome = call("submit", *SMALL, *TWO, *words, "--dry-run")
    assert outcome.code == 2
    assert sentence in outcome.err


def test_waiting_tells_how_a_job_ended(call: Callable[..., Any], tools: Path, tmp_path: Path) -> None:
    (tools / "scontrol").write_text("#!/bin/sh\necho JobId=1 JobState=TIMEOUT\n")
    run = tmp_path / "run"
    outcome = call("submit", *SMALL, *TWO, "submit=slurm", "submit.wait=true", f"run_dir={run}")
    assert outcome.code == 9
    assert "job 1 ended as TIMEOUT and the run is created" in outcome.err
    file = run / "events.jsonl"
    file.write_text(file.read_text() + json.dumps({"event": "finished"}) + "\n")
    assert call("cancel", str(run)).out == "no job of this run is queued\n"


def test_python_inside_a_container_is_not_asked_for(
    call: Callable[..., Any], tools: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ("submit=slurm", "submit.prefix=[apptainer,exec,image.sif]", "submit.inside=/opt/no/python")
    assert call("submit", *SMALL, *TWO, *words, f"run_dir={run}").code == 0
    found = open_run(run).interpreter()
    assert found is not None
    assert (found.path, dict(found.versions)) == ("/opt/no/python", {})
    assert "python=/opt/no/python" in said(tools, "sbatch")[0]
    assert sys.executable not in " ".join(said(tools, "sbatch")[0])
