from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from launcher import ranks
from launcher.errors import ClusterError


def test_random_state_round_trips_through_json() -> None:
    np.random.seed(3)
    state = json.loads(json.dumps(ranks.random_state()))
    first = (random.random(), np.random.normal(size=3).tolist(), torch.randn(3).tolist())
    ranks.restore_random_state(state)
    assert (random.random(), np.random.normal(size=3).tolist(), torch.randn(3).tolist()) == first


def test_one_rank_is_alone() -> None:
    alone = ranks.connect({}, on_device=False)
    assert (alone.rank, alone.world_size) == (0, 1)
    assert alone.any(True) is True
    assert alone.any(False) is False
    assert alone.broadcast("x") == "x"
    assert alone.gather(5) == [5]
    assert alone.maximum(2.5) == 2.5
    assert not torch.distributed.is_initialized()


TOGETHER = """
import json, os, sys
from launcher import ranks
mine = ranks.connect(os.environ, on_device=False)
answers = {
    "any": [mine.any(mine.rank == 1), mine.any(False)],
    "maximum": mine.maximum(float(mine.rank)),
    "broadcast": mine.broadcast({"from": mine.rank}),
    "gather": mine.gather(mine.rank * 10),
    "hidden": os.environ["CUDA_VISIBLE_DEVICES"],
}
mine.barrier()
open(os.path.join(sys.argv[1], f"{mine.rank}.json"), "w").write(json.dumps(answers))
ranks.disconnect()
"""


def test_two_ranks_agree(tmp_path: Path, repository: Path) -> None:
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    meet = (
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0",
        "--local-addr=127.0.0.1",
        "--nproc-per-node=2",
    )
    command = [sys.executable, "-m", "torch.distributed.run", *meet, str(script), str(tmp_path)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(repository),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {
            "any": [True, False],
            "maximum": 1.0,
            "broadcast": {"from": 0},
            "gather": [0, 10],
            "hidden": "",
        }


def test_the_pulse_leaves_random_numbers_alone() -> None:
    state = torch.get_rng_state()
    assert 0 < ranks.pulse_s() < 60
    assert torch.equal(torch.get_rng_state(), state)


def test_a_cpu_has_no_device_memory() -> None:
    assert ranks.device_memory() is None


def test_a_gpu_tells_what_is_in_tensors_and_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 5)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 9)
    memory = ranks.device_memory()
    assert memory is not None
    assert memory() == (5, 9)


def test_a_rank_without_a_gpu_of_its_own_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ClusterError, match="local rank 2 needs a GPU of its own and this host shows 2"):
        ranks.connect({"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "2"}, on_device=True)
