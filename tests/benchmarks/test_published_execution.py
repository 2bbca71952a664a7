"""How published frameworks ran their layers, from their names and the settings that rows print."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.published_execution import execution_of


@pytest.mark.parametrize(
    ("framework", "extra", "attention", "fused"),
    [
        ("Aleph Alpha Scaling", {"kernel": "flash_attention2 + RMS kernel"}, "flash", True),
        ("Aleph Alpha Scaling", {"kernel": "torch"}, "unfused", False),
        ("Aleph Alpha Scaling", {}, "flash", False),
        ("Megatron-Bridge / Megatron-Core", {}, "flash3", True),
        ("NeMo AutoModel (PyTorch FSDP2)", {}, "flash", False),
        ("HF Transformers Trainer + DeepSpeed", {}, "unfused", False),
        ("torchtitan (FSDP2)", {}, "flash", True),
        ("torchtitan (FSDP2)", {"torch_compile": False}, "flash", False),
        ("torchtitan (FSDP2)", {"variant": "nocompile"}, "flash", False),
        ("LLM Foundry", {}, "flash1", False),
        ("Hugging Face + Liger Kernel", {}, "flash3", True),
    ],
)
def test_kernels(framework: str, extra: dict[str, Any], attention: str, fused: bool) -> None:
    found = execution_of({"framework": framework, "extra": extra, "gpu": "A100-SXM4-80GB"})
    assert (found.attention, found.fused_kernels) == (attention, fused)


def test_megatron_before_and_after_transformer_engine() -> None:
    old = execution_of({"framework": "Megatron-LM", "gpu": "A100-SXM4-80GB", "version": "2021"})
    new = execution_of({"framework": "Megatron-LM", "gpu": "H100-SXM5-80GB", "version": "2025"})
    assert (old.attention, new.attention) == ("fused_softmax", "flash3")
    assert not old.overlap_gradients
    assert new.overlap_gradients


CORE: dict[str, Any] = {"framework": "Megatron-Core", "gpu": "GB200"}


@pytest.mark.parametrize(
    ("extra", "field", "expected"),
    [
        ({}, "cuda_graphs", "none"),
        ({"cuda_graph_impl": "local"}, "cuda_graphs", "partial"),
        ({"cuda_graph_impl": "full_iteration"}, "cuda_graphs", "full"),
        ({"cuda_graph_impl": "full_iteration"}, "overlap_ep", True),
        ({"moe_a2a_overlap": True}, "overlap_ep", True),
        ({"moe_a2a_overlap": False}, "overlap_ep", False),
        ({"moe_flex_dispatcher_backend": "hybridep"}, "deduplicated_dispatch", True),
        ({"dispatcher": "alltoall"}, "deduplicated_dispatch", False),
        ({"routing": "learned, dropless"}, "expert_imbalance", 1.5),
        ({"routing": "forced balance"}, "expert_imbalance", 1.0),
    ],
)
def test_settings_of_megatron_core(extra: dict[str, Any], field: str, expected: Any) -> None:
    assert getattr(execution_of(CORE | {"extra": extra}), field) == expected


def test_layouts_that_overlap() -> None:
    assert execution_of(CORE | {"sequence_parallel": True}).overlap_tp
    assert not execution_of(CORE).overlap_tp
    assert execution_of(CORE | {"vp": 4}).overlap_pp
    assert not execution_of(CORE).overlap_pp


def test_a_row_that_says_nothing_is_read_all_the_same() -> None:
    assert execution_of({}).attention == "flash"
    assert execution_of({"task": "lora"}).frozen_weights
