"""What an optimizer is given, whole and in parts. Real engines: tests/integration/test_parity*.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from strategies import histograms
from strategies.bins import BORDERS


@pytest.mark.parametrize("at_once", [3, 2**22])
def test_an_optimizers_tensors_are_counted_before_its_step(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(histograms, "_AT_ONCE", at_once)
    draw = torch.Generator().manual_seed(0)
    moved = torch.nn.Parameter(torch.randn(40, generator=draw))
    still = torch.nn.Parameter(torch.ones(2))  # has no gradient
    optimizer = torch.optim.SGD([moved, still], lr=1.0)
    before, moved.grad = moved.detach().clone(), torch.randn(40, generator=draw) * 1e-3
    with histograms.taking([optimizer], lambda tensor: {"a": (0, 10), "b": (10, 20)}) as found:
        optimizer.step()
    assert set(found) == {"weights/a", "weights/b", "gradients/a", "gradients/b"}
    for values, name, part in (
        (before, "weights/a", slice(0, 10)),
        (moved.grad, "gradients/b", slice(10, 30)),
    ):
        counts, _ = np.histogram(values[part].numpy(), bins=[-np.inf, *BORDERS, np.inf])
        assert found[name] == {place: count for place, count in enumerate(counts) if count}
    optimizer.step()  # nobody counts any more
    assert sum(found["weights/a"].values()) == 10


def test_tensors_are_named_one_by_one() -> None:
    one, other = torch.ones(2, 3), torch.ones(4)
    parts_of = histograms.whole({id(one): "one"})
    assert parts_of(one) == {"one": (0, 6)}
    assert parts_of(other) == {}
