"""What every checkpoint here is of, and ranks that are threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from launcher.checkpoint import Manifest, manifest
from strategies.model_spec import ModelSpec, MoeSpec
from strategies.spec import Plan, TrainingSpec


@pytest.fixture
def content() -> Manifest:
    """A manifest without files: step 20 of a run on four ranks."""
    return Manifest(
        format=manifest.FORMAT,
        step=20,
        consumed_samples=160,
        plan=Plan(
            strategy="fake",
            dp=2,
            tp=2,
            micro_batch_size=2,
            num_microbatches=2,
            engine={"zero": {"x": 1}},
        ),
        model=ModelSpec(
            name="tiny",
            model_type="llama",
            num_layers=2,
            hidden_size=64,
            num_attention_heads=4,
            ffn_hidden_size=128,
            vocab_size=256,
            max_position_embeddings=128,
            moe=MoeSpec(num_experts=4, top_k=2, expert_ffn_hidden_size=64),
        ),
        training=TrainingSpec(sequence_length=128, global_batch_size=8, num_steps=20),
        versions={"torch": "2.13.0"},
        files=(),
        created="2026-01-02T03:04:05+00:00",
        data="abc123",
    )


class _Threads:
    """One of several threads that meet as ranks do."""

    def __init__(self, rank: int, meeting: threading.Barrier, table: list[Any]) -> None:
        self.rank, self.world_size = rank, len(table)
        self._meeting, self._table = meeting, table

    def gather(self, value: Any) -> list[Any]:
        self._table[self.rank] = value
        self._meeting.wait(timeout=60)
        found = list(self._table)
        self._meeting.wait(timeout=60)
        return found

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]


@pytest.fixture
def on_ranks() -> Callable[..., list[Any]]:
    """Call `work(ranks)` on so many ranks at once; return what each returned or raised."""

    def run(work: Callable[[Any], Any], *, world_size: int) -> list[Any]:
        meeting, table = threading.Barrier(world_size), [None] * world_size

        def one(rank: int) -> Any:
            try:
                return work(_Threads(rank, meeting, table))
            except Exception as error:
                return error

        with ThreadPoolExecutor(max_workers=world_size) as pool:
            return list(pool.map(one, range(world_size)))

    return run
