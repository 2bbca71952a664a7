"""The process that is every rank in turn: what it writes down, and whose fault an exception is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

import strategies
from launcher.decode import encode
from launcher.verbs import verify_worker
from strategies.inspection import Inspection
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

FOUND = Inspection(parameters=1, weight_bytes=2, gradient_bytes=4, optimizer_bytes=12)


class Engine:
    """Answers, or refuses from the rank `refused` on."""

    refused: ClassVar[int] = 99

    @classmethod
    def inspect(cls, plan: Plan, model: ModelSpec, training: TrainingSpec, *, rank: int) -> Inspection:
        assert (plan.dp, model.num_layers, training.num_steps) == (4, 2, 7)
        if rank >= cls.refused:
            raise AssertionError("heads must be\n   divisible")
        return FOUND


@pytest.fixture
def request_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(strategies, "load", lambda _: Engine)
    model = ModelSpec(
        name="x",
        model_type="llama",
        num_layers=2,
        hidden_size=8,
        num_attention_heads=2,
        ffn_hidden_size=8,
        vocab_size=8,
        max_position_embeddings=8,
    )
    content = {
        "plan": encode(Plan(strategy="x", dp=4)),
        "model": encode(model),
        "training": encode(TrainingSpec(sequence_length=8, global_batch_size=4, num_steps=7)),
        "ranks": [0, 1, 2],
        "results": str(tmp_path / "results.json"),
    }
    path = tmp_path / "request.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def answers(request_file: Path) -> list[dict[str, Any]]:
    assert verify_worker.main([str(request_file)]) == 0
    found: list[dict[str, Any]] = json.loads(
        request_file.with_name("results.json").read_text(encoding="utf-8")
    )
    return found


def test_every_rank_is_asked(request_file: Path) -> None:
    found = answers(request_file)
    assert [answer["rank"] for answer in found] == [0, 1, 2]
    assert found[2]["inspection"]["optimizer_bytes"] == 12


def test_the_first_refusal_is_the_last_answer(request_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "refused", 1)
    assert answers(request_file)[1:] == [{"rank": 1, "error": "heads must be divisible", "ours": False}]


def test_a_sentence_of_our_own_is_known_by_where_it_was_raised(
    request_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the real `load` raises it, in our own package
    [answer] = answers(request_file)
    assert answer["ours"] is True and "strategy=x is unknown" in answer["error"]
