"""What stands in for a GPU's kernels while a schedule is followed; whole ranks: tests/integration/test_verify.py."""

from __future__ import annotations

import pytest
import torch

from strategies.megatron import inspect as subject
from strategies.spec import Plan


@pytest.mark.parametrize(
    ("degrees", "num_microbatches", "expected"),
    [
        ({"pp": 8}, 64, 2),
        ({"pp": 8}, 1, 1),
        ({"pp": 4, "vp": 2}, 64, 8),
        ({"pp": 4, "vp": 2}, 4, 4),
    ],
)
def test_a_short_schedule_tells_enough(degrees: dict[str, int], num_microbatches: int, expected: int) -> None:
    plan = Plan(strategy="megatron", dp=1, num_microbatches=num_microbatches, **degrees)
    assert subject._enough(plan) == expected


def test_fused_attention_keeps_inputs_result_and_a_number_a_query() -> None:
    query = torch.zeros(6, 2, 4, 8, requires_grad=True)
    key, value = (torch.zeros(6, 2, 2, size, requires_grad=True) for size in (8, 5))
    kept: list[tuple[int, ...]] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        context = subject._attend(None, query, key, value, None)
    assert context.shape == (6, 2, 4 * 5)
    assert sorted(kept) == sorted([(6, 2, 4, 8), (6, 2, 2, 8), (6, 2, 2, 5), (6, 2, 20), (2, 4, 6)])
    context.sum().backward()
    assert value.grad is not None and value.grad.shape == value.shape


def test_one_expert_works_for_all_and_every_weight_gets_a_gradient() -> None:
    class Expert(torch.nn.Linear):
        def forward(self, tokens: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, None]:
            return super().forward(tokens) * weights[:, None], None

    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.local_experts = torch.nn.ModuleList(Expert(4, 4, bias=False) for _ in range(3))

    experts = Experts()
    output, bias = subject._run_as_one(experts, torch.ones(9, 4), torch.tensor([3, 3, 3]), torch.ones(9))
    assert (output.shape, bias) == ((9, 4), None)
    output.sum().backward()
    assert [p.grad is not None and p.grad.shape for p in experts.parameters()] == [(4, 4)] * 3
