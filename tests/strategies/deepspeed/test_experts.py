"""Groups of parameters with experts apart, and the words of transformers that AutoEP does not know."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def test_experts_keep_their_decay_in_groups_of_their_own() -> None:
    from strategies.deepspeed import experts

    matrix, expert, norm = (torch.nn.Parameter(torch.zeros(3)) for _ in range(3))
    expert.allreduce, expert.group_name = False, "ep_size_2"
    groups = experts.split_groups(
        [{"params": [matrix, expert], "weight_decay": 0.1}, {"params": [norm], "weight_decay": 0.0}]
    )
    found = [(group["params"], group["weight_decay"], group.get("moe", False)) for group in groups]
    assert [
        (params[0] is one, decay, moe)
        for (params, decay, moe), one in zip(found, (matrix, norm, expert), strict=True)
    ] == [
        (True, 0.1, False),
        (True, 0.0, False),
        (True, 0.1, True),
    ]


def test_the_registry_knows_classes_by_name_while_autoep_runs() -> None:
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

    from strategies.deepspeed import experts

    registry: Any = _CAN_RECORD_REGISTRY
    missing = object()
    with experts.router_logits_found():
        registry["<class 'a'>"] = {"router_logits": 1}
        assert registry.get("<class 'a'>", missing) == {"router_logits": 1}
        assert registry.get("<class 'b'>", missing) is missing
        registry.pop("<class 'a'>")
    with pytest.raises(TypeError):
        registry.get("<class 'a'>", missing)
