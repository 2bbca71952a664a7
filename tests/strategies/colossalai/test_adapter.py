"""ColossalAIStrategy before the engine is asked: refusals in a sentence. Real ranks: tests/integration."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import strategies
from strategies.colossalai import adapter
from strategies.colossalai.adapter import ColossalAIStrategy
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

MODEL = ModelSpec(
    name="tiny",
    model_type="llama",
    num_layers=4,
    hidden_size=16,
    num_attention_heads=2,
    ffn_hidden_size=32,
    vocab_size=32,
    max_position_embeddings=32,
)
TRAINING = TrainingSpec(sequence_length=8, global_batch_size=4, num_steps=10)


def as_plan(**changes: Any) -> Plan:
    return Plan(**{"strategy": "colossalai", "dp": 1, "rank_order": ("tp", "cp", "pp", "dp"), **changes})


def test_it_is_found_by_name() -> None:
    assert strategies.load("colossalai") is ColossalAIStrategy


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"cp": 2}, "does not offer plan.cp=2"),
        ({"pp": 2}, "plan.num_microbatches=1 must be at least plan.pp=2 with colossalai"),
        (
            {"pp": 2, "vp": 2, "num_microbatches": 3},
            "plan.num_microbatches=3 must be a multiple of plan.pp=2",
        ),
        ({"engine": {"gemini": {"tp_size": 2}}}, "is decided by plan.tp"),
    ],
)
def test_impossible_plans_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ColossalAIStrategy().setup(as_plan(**changes), MODEL, TRAINING, Path("nowhere"))


def test_without_the_engine_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(adapter, "version", version)
    with pytest.raises(
        ImportError, match="strategy=colossalai needs ColossalAI, which is not installed here"
    ):
        ColossalAIStrategy().setup(as_plan(), MODEL, TRAINING, Path("nowhere"))


def test_another_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "version", {"colossalai": "0.5.0", "transformers": "5.23.0"}.__getitem__)
    with pytest.raises(
        ImportError, match=r"replaces parts of transformers 4\.51\.3, and 5\.23\.0 is installed"
    ):
        ColossalAIStrategy().setup(as_plan(), MODEL, TRAINING, Path("nowhere"))


def test_chunks_are_walked_as_they_were_made() -> None:
    chunks = [SimpleNamespace(count_id=number) for number in (3, 1, 2)]
    optimizer = SimpleNamespace(chunk16_set=dict.fromkeys(map(_hashable, chunks)))
    adapter._order_chunks(optimizer)
    assert [chunk.count_id for chunk in optimizer.chunk16_set] == [1, 2, 3]


class _hashable:
    def __init__(self, chunk: Any) -> None:
        self.count_id = chunk.count_id
