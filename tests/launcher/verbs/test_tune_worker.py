from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from launcher.cluster.nccl_trial import OPERATIONS, cells
from launcher.verbs.tune_worker import Rank, serve

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


@pytest.fixture
def rank() -> Iterator[Rank]:
    """A group of one."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    dist.init_process_group("gloo", store=dist.PrefixStore("group", store), rank=0, world_size=1)
    yield Rank(store=store, rank=0, world_size=1, device=torch.device("cpu"), answers=io.StringIO())
    dist.destroy_process_group()


def test_rank_0_takes_turns_until_it_is_told_to_end(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("go\ngo\nend\n"))
    rank.serve()
    assert isinstance(rank.answers, io.StringIO)
    ready, *turns = (json.loads(line) for line in rank.answers.getvalue().splitlines())
    assert ready == "ready" and len(turns) == 2
    assert all(len(turn) == len(cells("cpu")) and min(turn) > 0 for turn in turns)


def test_a_launcher_that_is_gone_is_an_end(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    rank.serve()


def test_what_a_library_prints_is_no_answer() -> None:
    code = (
        "import os\nfrom launcher.verbs.tune_worker import take_standard_output\n"
        "answers = take_standard_output()\nos.write(1, b'NCCL version 2.27.5+cuda12.9\\n')\n"
        "print('[1.0]', file=answers, flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[1.0]\n" and "NCCL version" in done.stderr


def test_no_group_is_opened_before_all_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    opened = threading.Event()
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: opened.set())
    monkeypatch.setattr(Rank, "serve", lambda rank: None)
    where = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    first = threading.Thread(
        target=serve,
        args=(
            {"device": "cpu", "start_s": 30.0, "turn_s": 0.1},
            3,
            {**where, "RANK": "0", "WORLD_SIZE": "2"},
        ),
        kwargs={"answers": io.StringIO()},
        daemon=True,
    )
    first.start()
    assert not opened.wait(0.5)
    dist.PrefixStore("setting/3", store).set("here/1", "")
    first.join(30)
    assert opened.is_set()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_more_bytes_take_longer(rank: Rank, operation: str) -> None:
    assert 0 < rank._seconds(operation, 2**10) < rank._seconds(operation, 2**26)
