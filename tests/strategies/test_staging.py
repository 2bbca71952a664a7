from __future__ import annotations

import torch

from strategies import staging


def state() -> dict[str, object]:
    return {
        "model": {"a.weight": torch.arange(6.0), "b.weight": torch.ones(4, 4)},
        "optimizer": {
            "state": {"a.weight": {"step": torch.tensor(3.0), "exp_avg": torch.zeros(6)}},
            "param_groups": [{"lr": 0.1, "params": ["a.weight"]}],
        },
    }


def test_a_copy_stays_as_it_was_and_lies_where_the_last_one_lay() -> None:
    copy, live = staging.HostCopy(), {"w": torch.nn.Parameter(torch.zeros(100))}
    first = copy.take(live)
    where = first["w"].data_ptr()
    with torch.no_grad():
        live["w"].fill_(1.0)
    assert torch.equal(first["w"], torch.zeros(100))
    second = copy.take(live)
    assert torch.equal(second["w"], torch.ones(100))
    assert second["w"].data_ptr() == where, "one copy is all the memory it takes"
    assert copy.group is None


def test_bytes_are_those_of_all_tensors() -> None:
    assert staging.num_bytes(state()) == 4 * (6 + 16 + 1 + 6)
    assert staging.num_bytes({"epoch": 3, "names": ["a"]}) == 0


def test_shares_are_even_whole_and_disjoint() -> None:
    parts = [staging.share_of(state(), rank=rank, world_size=2) for rank in (0, 1)]
    leaves = [dict(staging._leaves(part, ())) for part in parts]
    assert not set(leaves[0]) & set(leaves[1])
    assert set(leaves[0]) | set(leaves[1]) == set(dict(staging._leaves(state(), ())))
    assert ("optimizer", "param_groups") in leaves[0]
    sizes = [staging.num_bytes(part) for part in parts]
    assert abs(sizes[0] - sizes[1]) <= 4 * 16
    assert all(sizes)
