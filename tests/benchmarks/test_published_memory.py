"""What published rows say about memory: units, kinds of peaks, and how frameworks keep states and activations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.published import Case, case_of
from benchmarks.published_memory import (
    bucket_elements,
    figure,
    least_recompute,
    measured_memory_gib,
    memory_kind,
    pipeline_split,
    predicted_memory_gib,
    recompute_of,
    state_bytes,
    with_memory,
)
from launcher.planner.cost import GIB, MemoryCost
from strategies.base import Execution
from strategies.model_spec import ModelSpec

MODEL = ModelSpec(
    name="m",
    model_type="llama",
    num_layers=16,
    hidden_size=1024,
    num_attention_heads=8,
    ffn_hidden_size=4096,
    vocab_size=32000,
    max_position_embeddings=4096,
)
ROW: dict[str, Any] = {
    "id": "mill-0002",
    "gpu": "A100-SXM4-80GB",
    "num_gpus": 8,
    "model": {
        "name": "llama-toy",
        "layers": 16,
        "hidden": 1024,
        "heads": 8,
        "ffn": 4096,
        "vocab": 32000,
        "seq_len": 4096,
    },
    "framework": "torchtitan (FSDP2)",
    "mbs": 1,
    "gbs": 8,
    "fsdp": True,
    "precision": "bf16",
}


@pytest.mark.parametrize(
    ("printed", "expected"),
    [(3, 3.0), ("2.5", 2.5), (None, None), (0, None), (-1, None), ("much", None), ([], None)],
)
def test_figures_are_positive_numbers(printed: Any, expected: float | None) -> None:
    assert figure(printed) == expected
    assert figure(float("nan")) is figure(float("inf")) is None


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"memory_unit": "MiB by nvidia-smi", "framework": "torchtitan"}, "device"),
        ({"memory_kind": "max reserved"}, "reserved"),
        ({"framework": "torchtitan (FSDP2)"}, "reserved"),
        ({"memory_kind": "max allocated"}, "allocated"),
        ({}, "allocated"),
    ],
)
def test_which_peak_a_row_prints(row: dict[str, Any], kind: str) -> None:
    assert memory_kind(row) == kind


def test_each_kind_has_its_prediction() -> None:
    found = case_of(ROW)
    assert isinstance(found, Case)
    memory = MemoryCost(
        weights=GIB, gradients=GIB, optimizer=GIB, activations=GIB, logits=GIB, buffers=GIB, slack=2 * GIB
    )
    cluster = replace(found.cluster, reserved_gib=3.0)
    assert predicted_memory_gib(memory, cluster, "allocated") == 6
    assert predicted_memory_gib(memory, cluster, "reserved") == 8
    assert predicted_memory_gib(memory, cluster, "device") == 11


def test_only_programs_that_divide_by_a_billion_are_converted() -> None:
    row = {"memory_gib_peak": 60, "memory_unit": "GB as printed"}
    assert measured_memory_gib(row) == 60
    bridge = row | {"framework": "Megatron-Bridge"}
    assert measured_memory_gib(bridge) == pytest.approx(60e9 / GIB)
    assert measured_memory_gib(bridge | {"memory_unit": "GiB"}) == 60
    assert measured_memory_gib({}) is None
    assert measured_memory_gib({"memory_gib_peak": "most"}) is None


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"recompute": "full"}, ("full", 0)),
        ({"recompute": "none"}, ("none", 0)),
        ({"recompute": "?"}, ("none", 0)),
        ({}, ("none", 0)),
        ({"framework": "torchtitan"}, ("selective", 0)),
        ({"framework": "torchtitan", "recompute": "none"}, ("none", 0)),
        ({"recompute_detail": "every 2nd layer"}, ("full", 8)),
        ({"recompute_detail": "every 2nd layer", "pp": 4}, ("full", 2)),
    ],
)
def test_recomputation_of_a_stage(row: dict[str, Any], expected: tuple[str, int]) -> None:
    assert recompute_of(row, MODEL) == expected


def test_no_more_is_recomputed_than_has_to_be() -> None:
    found = case_of(ROW | {"recompute": "none"})
    assert isinstance(found, Case)
    chosen = []
    for memory_gib in (79.0, 9.0, 7.0, 1.5):
        cluster = replace(
            found.cluster, gpu=replace(found.cluster.gpu, memory_gib=memory_gib), reserved_gib=1.0
        )
        plan = least_recompute(
            found.plan,
            model=found.model,
            training=found.training,
            capabilities=found.capabilities,
            cluster=cluster,
        )
        chosen.append(("none", "selective", "full").index(plan.recompute))
    assert chosen == sorted(chosen)
    assert (chosen[0], chosen[-1]) == (0, 2)


@pytest.mark.parametrize(
    ("row", "weights", "gradients", "optimizer"),
    [
        ({"framework": "torchtitan (FSDP2)"}, 4, 4, 8),
        ({"framework": "torchtitan (FSDP2)", "task": "lora"}, 2, 4, 8),
        ({"framework": "Megatron-DeepSpeed", "precision": "bf16"}, 2, 4, 12),
        ({"framework": "Megatron-DeepSpeed", "precision": "fp16"}, 2, 2, 12),
        ({"framework": "NeMo / Megatron-Core"}, 2, 2, 12),
        ({"framework": "NeMo / Megatron-Core", "model": {"name": "deepseek-v9"}}, 2, 2, 8),
        ({"framework": "Megatron-LM", "model": {"name": "deepseek-v9"}}, 2, 4, 12),
        ({}, 2, 4, 12),
    ],
)
def test_bytes_of_a_parameter(row: dict[str, Any], weights: int, gradients: int, optimizer: int) -> None:
    state = state_bytes(row)
    assert (state.weights, state.gradients, state.optimizer) == (weights, gradients, optimizer)


def test_buckets_are_those_of_deepspeed() -> None:
    model = {"model": {"hidden": 1024}}
    assert bucket_elements({"framework": "Megatron-DeepSpeed", "precision": "fp16"}) == 10**9
    assert bucket_elements({"framework": "Megatron-DeepSpeed", "precision": "bf16"}) == 0
    assert bucket_elements({"framework": "HF Trainer + DeepSpeed"} | model) == 1024**2
    assert bucket_elements({"framework": "torchtitan"}) == 0


def test_nanotron_fills_stages_by_parameters() -> None:
    row = {"framework": "nanotron"}
    assert pipeline_split(row, MODEL, 1) == pipeline_split({}, MODEL, 4) == ()
    even, heavy = (
        pipeline_split(row, replace(MODEL, vocab_size=words), 4) for words in (1, MODEL.vocab_size * 4)
    )
    assert sum(even) == sum(heavy) == 16
    assert even == (4, 4, 4, 4) or max(even) - min(even) <= 2
    assert heavy[-1] < even[-1]  # the head takes its part of the last stage


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"framework": "torchtitan", "version": "2024-12"}, 14),
        ({"framework": "torchtitan", "version": "2025-06"}, 6),
        ({"framework": "LLM Foundry"}, 4),
        ({"framework": "Liger Kernel"}, 0),
        ({"framework": "Megatron-LM (TE 2.11)"}, 2),
        ({"framework": "Megatron-LM"}, 10),
        ({"framework": "LitGPT"}, None),
    ],
)
def test_bytes_of_a_logit(row: dict[str, Any], expected: float | None) -> None:
    assert with_memory(Execution(), row).bytes_per_logit == expected


def test_what_only_memory_depends_on() -> None:
    stored = Execution(attention="fused_softmax")
    assert with_memory(stored, {"framework": "Megatron-LM"}).dropout
    assert not with_memory(stored, {"framework": "Aleph Alpha"}).dropout
    assert not with_memory(Execution(), {"framework": "Megatron-LM"}).dropout
    assert with_memory(Execution(), {"framework": "Aleph Alpha"}).gathered_logits
    assert with_memory(Execution(), {"framework": "torchtitan"}).selective_operators
    assert with_memory(Execution(), {"offload": "activations of 12 layers"}).offloaded_layers == 12
    assert with_memory(Execution(), {"offload": "optimizer 12"}).offloaded_layers == 0
    assert with_memory(Execution(), {"framework": "DeepSpeed, old branch"}).checkpoints == "host"
