"""The explanation as text, against golden files, and as the content of plan.json."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

import strategies
from launcher.cluster.spec import ClusterSpec, GpuSpec, Link
from launcher.decode import decode
from launcher.errors import PlanError
from launcher.planner import explain
from launcher.planner.cost import GIB
from launcher.planner.search import PlanRequest, Ranking, rank
from strategies.base import Capabilities, StateBytes
from strategies.model_spec import ModelSpec, MoeSpec
from strategies.spec import Plan, TrainingSpec

STATE = StateBytes(weights=2, gradients=4, optimizer=12)
ENGINES = {
    "plain": Capabilities(
        zero_stages=frozenset({0, 2, 3}),
        precisions=frozenset({"bf16", "fp32"}),
        recompute=frozenset({"none", "full"}),
        state_bytes={"bf16": STATE, "fp32": STATE},
    )
}
ENGINES["keyed"] = replace(ENGINES["plain"], unpriced_engine_keys=frozenset({"zero.prefetch", "host"}))
ENGINES["full"] = replace(
    ENGINES["plain"],
    zero_stages=frozenset({1}),
    degrees=frozenset({"tp", "pp", "vp", "cp", "ep", "etp"}),
    sequence_parallel=True,
    offload_optimizer_stages=frozenset({1}),
)
MODEL = ModelSpec(
    name="llama_8b",
    model_type="llama",
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    num_kv_heads=8,
    ffn_hidden_size=14336,
    vocab_size=128256,
    max_position_embeddings=8192,
)
CLUSTER = ClusterSpec(
    name="eight",
    num_nodes=1,
    gpus_per_node=8,
    gpu=GpuSpec(
        name="G80", memory_gib=80.0, memory_gb_per_s=3000.0, peak_tflops={"bf16": 900.0, "fp32": 60.0}
    ),
    links=(Link(size=8, gb_per_s=450.0, latency_us=12.0), Link(size=None, gb_per_s=50.0, latency_us=15.0)),
    host_memory_gib=2000.0,
    reserved_gib=4.0,
)
TRAINING = TrainingSpec(sequence_length=4096, global_batch_size=64, num_steps=1000)


@pytest.fixture(autouse=True)
def engines(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Any:
        class Adapter:
            capabilities: ClassVar[Capabilities] = ENGINES[name]

        return Adapter

    monkeypatch.setattr(strategies, "load", load)
    monkeypatch.setattr(strategies, "ENGINE_PACKAGES", {"plain": "plain"})


def ranked(engine: str, *, model: ModelSpec = MODEL, cluster: ClusterSpec = CLUSTER, **pins: Any) -> Ranking:
    return rank(model, cluster, TRAINING, PlanRequest(**pins), strategies=[engine])


def mixture() -> Ranking:
    moe = MoeSpec(num_experts=8, top_k=2, expert_ffn_hidden_size=7168)
    return ranked(
        "full",
        model=replace(MODEL, name="mixture", moe=moe),
        cluster=replace(CLUSTER, num_nodes=4),
        tp=2,
        pp=4,
        ep=2,
        recompute="full",
        offload_optimizer=True,
    )


@pytest.mark.parametrize("name", ["explain_dense", "explain_mixture"])
def test_the_text_is_that_of_the_golden_file(name: str, repository: Path) -> None:
    ranking = ranked("plain") if name == "explain_dense" else mixture()
    expected = (repository / "tests" / "golden" / f"{name}.txt").read_text(encoding="utf-8")
    assert explain.table(ranking) + "\n" == expected


def test_a_guessed_peak_is_said_and_gives_no_mfu() -> None:
    guess = replace(CLUSTER, gpu=replace(CLUSTER.gpu, peak_is_nominal=True))
    text = explain.table(ranked("plain", cluster=guess))
    assert "the peak of this device is a guess" in text
    assert "%" not in text


def test_plan_json_holds_the_plan_and_its_predictions() -> None:
    ranking = ranked("plain")
    data = json.loads(json.dumps(explain.to_json(ranking)))
    names = [field.name for field in fields(Plan)]
    assert decode(Plan, {name: data[name] for name in names}) == ranking.choose().plan
    predictions = data["predictions"]
    assert predictions["memory_bytes"] == pytest.approx(
        sum(predictions["memory_bytes_by_part"].values()), abs=6
    )
    assert predictions["step_s"] == pytest.approx(sum(predictions["step_s_by_part"].values()))
    assert predictions["memory_bytes"] <= predictions["usable_bytes"] == 76 * GIB
    assert data["num_candidates"] == len(ranking.candidates)
    assert len(data["runners_up"]) == min(explain.NUM_RUNNERS_UP, len(ranking.candidates) - 1)
    assert [item["count"] for item in data["rejected"]] == [item.count for item in ranking.rejected]


def test_on_a_cpu_the_process_itself_counts() -> None:
    host = replace(CLUSTER, gpu=replace(CLUSTER.gpu, device="cpu"))
    predictions = explain.to_json(ranked("plain", cluster=host))["predictions"]
    tensors = sum(predictions["memory_bytes_by_part"].values())
    assert predictions["memory_bytes"] == pytest.approx(tensors + 4 * GIB, abs=6)


def test_nothing_fits_is_an_error_and_not_a_table() -> None:
    tight = replace(CLUSTER, gpu=replace(CLUSTER.gpu, memory_gib=10.0))
    for write in (explain.table, explain.to_json):
        with pytest.raises(PlanError, match="no plan of llama_8b"):
            write(ranked("plain", cluster=tight))


def test_engine_keys_that_the_estimate_does_not_follow_are_named() -> None:
    engine = {"zero": {"prefetch": 7, "bucket": 1}, "host": {"ratio": 0.5}, "log": True}
    ranking = rank(MODEL, CLUSTER, TRAINING, PlanRequest(), strategies=["keyed"], engine=engine)
    named = [line for line in explain.table(ranking).splitlines() if "priced" in line]
    assert named == [
        "strategy.engine.zero.prefetch is passed on but not priced",
        "strategy.engine.host.ratio is passed on but not priced",
    ]
    assert "priced" not in explain.table(ranked("keyed"))
