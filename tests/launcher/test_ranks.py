from __future__ import annotations

import json
import random

import numpy as np
import torch

from launcher import ranks


def test_random_state_round_trips_through_json() -> None:
    np.random.seed(3)
    state = json.loads(json.dumps(ranks.random_state()))
    first = (random.random(), np.random.normal(size=3).tolist(), torch.randn(3).tolist())
    ranks.restore_random_state(state)
    assert (random.random(), np.random.normal(size=3).tolist(), torch.randn(3).tolist()) == first


def test_one_rank_is_alone() -> None:
    alone = ranks.connect({})
    assert (alone.rank, alone.world_size) == (0, 1)
    assert alone.any(True) is True
    assert alone.any(False) is False
    assert alone.broadcast("x") == "x"
    assert alone.gather(5) == [5]
    assert alone.maximum(2.5) == 2.5
    assert not torch.distributed.is_initialized()
