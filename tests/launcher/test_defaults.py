from __future__ import annotations

from dataclasses import replace

import pytest

from launcher.cluster.spec import ClusterSpec, GpuSpec, Link
from launcher.defaults import complete_training
from strategies.model_spec import ModelSpec

CLUSTER = ClusterSpec(
    name="c",
    num_nodes=2,
    gpus_per_node=3,
    gpu=GpuSpec(name="g", memory_gib=80, memory_gb_per_s=2000, peak_tflops={"bf16": 300.0, "fp32": 20.0}),
    links=(Link(size=None, gb_per_s=100, latency_us=5),),
    host_memory_gib=1000,
)
EVERYTHING = {
    "sequence_length": 7,
    "global_batch_size": 5,
    "precision": "fp16",
    "learning_rate": 0.1,
    "warmup_steps": 0,
}


def test_given_values_stay(tiny_model: ModelSpec) -> None:
    assert complete_training(EVERYTHING, model=tiny_model, cluster=CLUSTER) == EVERYTHING


def test_batch_is_a_multiple_of_the_ranks(tiny_model: ModelSpec) -> None:
    filled = complete_training({"num_steps": 100}, model=tiny_model, cluster=CLUSTER)
    assert filled["sequence_length"] == 64
    assert filled["global_batch_size"] % 6 == 0
    assert filled["warmup_steps"] == 5
    assert filled["precision"] == "bf16"


def test_precision_follows_the_device(tiny_model: ModelSpec) -> None:
    on_cpu = replace(CLUSTER, gpu=replace(CLUSTER.gpu, device="cpu"))
    assert complete_training({}, model=tiny_model, cluster=on_cpu)["precision"] == "fp32"


@pytest.mark.parametrize(
    ("num_layers", "hidden_size", "tokens", "rate"),
    [
        # GPT-3, arXiv 2005.14165, table 2.1: batch and learning rate fall within a factor of two.
        (12, 768, 0.5e6, 6.0e-4),
        (24, 2048, 1.0e6, 2.0e-4),
        (96, 12288, 3.2e6, 0.6e-4),
    ],
)
def test_follows_gpt3_within_a_factor_of_two(
    tiny_model: ModelSpec, num_layers: int, hidden_size: int, tokens: float, rate: float
) -> None:
    model = replace(
        tiny_model,
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_hidden_size=4 * hidden_size,
        gated_mlp=False,
        vocab_size=50257,
        max_position_embeddings=2048,
        tied_embeddings=True,
    )
    filled = complete_training({}, model=model, cluster=CLUSTER)
    assert tokens / 2 <= filled["global_batch_size"] * filled["sequence_length"] <= tokens * 2
    assert rate / 2 <= filled["learning_rate"] <= rate * 2
