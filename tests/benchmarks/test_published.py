"""Published rows as planning problems: what each field becomes, and the sentence where nothing comes of a row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.published import PRESETS, Case, case_of
from strategies.model_spec import MlaSpec, MoeSpec

SHAPE: dict[str, Any] = {
    "name": "toy-1b",
    "layers": 8,
    "hidden": 2048,
    "heads": 16,
    "kv_heads": 4,
    "ffn": 5632,
    "vocab": 32000,
    "gated_mlp": True,
    "tied_embeddings": False,
    "seq_len": 4096,
}
ROW: dict[str, Any] = {
    "id": "mill-0001",
    "task": "pretrain",
    "gpu": "H100-SXM5-80GB",
    "gpus_per_node": 8,
    "num_gpus": 16,
    "interconnect": None,
    "model": SHAPE,
    "framework": "Megatron-Core",
    "version": "2025",
    "tp": 2,
    "pp": 2,
    "vp": None,
    "cp": 1,
    "ep": None,
    "etp": None,
    "dp": 4,
    "zero_stage": 1,
    "fsdp": False,
    "mbs": 2,
    "gbs": 64,
    "recompute": "none",
    "recompute_detail": None,
    "precision": "bf16",
    "sequence_parallel": True,
    "offload": "none",
    "step_time_s": 3.5,
    "memory_gib_peak": None,
    "oom": False,
    "extra": {},
    "flags": [],
}


def row(shape: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return {**ROW, "model": {**SHAPE, **(shape or {})}, **changes}


def case(shape: dict[str, Any] | None = None, **changes: Any) -> Case:
    found = case_of(row(shape, **changes))
    assert isinstance(found, Case), found
    return found


def test_a_dense_row() -> None:
    found = case()
    model, plan, training, cluster = found.model, found.plan, found.training, found.cluster
    assert (found.id, found.source, found.measured_step_s, found.measured_memory_gib) == (
        *("mill-0001", "mill"),
        *(3.5, None),
    )
    assert (model.num_layers, model.hidden_size, model.num_attention_heads, model.kv_heads) == (
        8,
        2048,
        16,
        4,
    )
    assert (model.ffn_hidden_size, model.vocab_size, model.gated_mlp) == (5632, 32000, True)
    assert (model.norm, model.tied_embeddings, model.moe, model.mla) == ("rmsnorm", False, None, None)
    assert (plan.dp, plan.tp, plan.pp, plan.vp, plan.cp, plan.ep, plan.etp) == (4, 2, 2, 1, 1, 1, 1)
    assert (plan.micro_batch_size, plan.num_microbatches, plan.zero_stage) == (2, 8, 1)
    assert (plan.recompute, plan.sequence_parallel, plan.precision) == ("none", True, "bf16")
    assert plan.world_size == cluster.world_size == 16
    assert (cluster.num_nodes, cluster.gpus_per_node, cluster.gpu.name) == (2, 8, "H100-SXM5-80GB")
    assert (training.sequence_length, training.global_batch_size) == (4096, 64)


def test_figures_may_be_words() -> None:
    found = case({"layers": "8", "seq_len": "4096"}, num_gpus="16", mbs="2", gbs="64", step_time_s="3.5")
    expected = case()
    assert (found.plan, found.model, found.measured_step_s) == (expected.plan, expected.model, 3.5)


def test_experts() -> None:
    moe = {"experts": 32, "topk": 4, "ffn": 1024, "shared_ffn": 512, "dense_layers": 1}
    found = case({"moe": moe}, ep=4, dp=4)
    assert found.model.moe == MoeSpec(
        num_experts=32,
        top_k=4,
        expert_ffn_hidden_size=1024,
        shared_ffn_hidden_size=512,
        num_dense_layers=1,
    )
    # Where a row does not say: experts that are spread are not split as well.
    assert (found.plan.ep, found.plan.etp) == (4, 1)
    assert case({"moe": moe}).plan.etp == 2
    assert case({"moe": moe}, ep=4, etp=2).plan.etp == 2
    assert case(ep=4).plan.ep == 1  # a dense model has none


def test_latent_attention() -> None:
    mla = {"q_lora_rank": None, "kv_lora_rank": 256, "qk_head_dim": 64, "qk_rope_dim": 32, "v_head_dim": 64}
    assert case({"mla": mla}).model.mla == MlaSpec(
        q_lora_rank=0, kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64
    )


def test_adapters_leave_the_weights_alone() -> None:
    assert not case().capabilities.execution.frozen_weights
    assert case(task="lora").capabilities.execution.frozen_weights
    assert case(task="qlora").capabilities.execution.frozen_weights


def test_what_a_shape_leaves_out() -> None:
    open_shape = {"gated_mlp": None, "tied_embeddings": None, "ffn": None, "kv_heads": None, "head_dim": None}
    old, new = case({**open_shape, "name": "gpt-toy"}).model, case({**open_shape, "name": "llama-toy"}).model
    assert (old.gated_mlp, old.tied_embeddings, old.norm, old.model_type) == (
        *(False, True),
        "layernorm",
        "gpt2",
    )
    assert (new.gated_mlp, new.tied_embeddings, new.norm, new.model_type) == (
        *(True, False),
        "rmsnorm",
        "llama",
    )
    assert (old.ffn_hidden_size, old.kv_heads, old.head_size) == (8192, 16, 128)
    assert case({"swa": 512}).model.sliding_window == 512
    assert case({"swa": {"window": 128, "fraction_of_layers": 0.5}}).model.sliding_window is None


def test_what_a_layout_leaves_out() -> None:
    assert case(dp=None).plan.dp == 4
    assert case(tp=None, pp=None, dp=None).plan.dp == 16
    assert case(fsdp=True, zero_stage=None).plan.zero_stage == 3
    assert case(zero_stage=None).plan.zero_stage == 0
    assert case(vp=4).plan.vp == 4
    assert case(vp=4, pp=1, dp=8).plan.vp == 1
    assert not case(tp=1, dp=8).plan.sequence_parallel
    assert case(offload="optimizer, params").plan.offload_optimizer
    assert case(offload="optimizer, params").plan.offload_parameters


@pytest.mark.parametrize(
    ("printed", "gpu", "expected"),
    [
        ("mxfp8", "H100-SXM5-80GB", "fp8"),
        ("fp8-cs", "H100-SXM5-80GB", "fp8"),
        ("nvfp4", "GB200", "nvfp4"),
        (None, "H100-SXM5-80GB", "bf16"),
        (None, "V100-SXM2-32GB", "fp16"),
    ],
)
def test_precisions(printed: str | None, gpu: str, expected: str) -> None:
    assert case(precision=printed, gpu=gpu).plan.precision == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"recompute": "full"}, ("full", 0, ())),
        ({"recompute": "selective"}, ("selective", 0, ())),
        (
            {"recompute": "selective", "recompute_detail": "modules moe_act,layernorm"},
            ("selective", 0, ("moe_act", "layernorm")),
        ),
        (
            {"recompute": "selective", "recompute_detail": "norm, act"},
            ("selective", 0, ("layernorm", "moe_act")),
        ),
        (
            {"recompute": "selective", "recompute_detail": "every other layer"},
            ("full", 2, ()),
        ),  # of four a stage
        ({"recompute": "full", "recompute_detail": "modules mlp"}, ("full", 0, ())),
    ],
)
def test_recomputation(changes: dict[str, Any], expected: tuple[Any, ...]) -> None:
    plan = case(**changes).plan
    assert (plan.recompute, plan.recompute_num_layers, plan.recompute_modules) == expected


def test_a_row_that_ran_fitted() -> None:
    assert case(recompute=None).plan.recompute == "none"
    long = {"hidden": 8192, "heads": 64, "ffn": 28672, "layers": 16, "seq_len": 32768}
    assert case(long, recompute=None).plan.recompute != "none"


def test_machines() -> None:
    small = case(num_gpus=4, tp=2, pp=1, dp=2)
    assert (small.cluster.num_nodes, small.cluster.gpus_per_node, small.cluster.links[0].size) == (1, 4, 4)
    assert case(gpus_per_node=None).cluster.gpus_per_node == 8
    old = case(gpu="V100-SXM2-16GB").cluster
    assert old.gpu.memory_gib < 16 < case(gpu="V100-SXM2-32GB").cluster.gpu.memory_gib
    links = case(interconnect="Vela, two cards").cluster.links
    assert [link.gb_per_s for link in links] == [case().cluster.links[0].gb_per_s, 3.1]
    # A package that nobody listed is the chip that it holds.
    assert case(gpu="H200-NVL-141GB").cluster.gpu == case(gpu="H200-SXM").cluster.gpu
    assert case(gpu="A100-PCIE-80GB").cluster.gpu == case(gpu="A100-SXM4-80GB").cluster.gpu


@pytest.mark.parametrize("gpu", PRESETS)
def test_every_known_gpu_has_a_preset(gpu: str) -> None:
    assert case(gpu=gpu).cluster.gpu.peak_tflops


def test_megatron_pads_the_words_of_gpt2() -> None:
    words = {"name": "gpt-toy", "vocab": None, "gated_mlp": False}
    assert case(words, framework="Megatron-LM fork").model.vocab_size == 50304
    assert case_of(row(words, framework="other")) == "the row lacks vocab"
    assert case_of(row({"vocab": None}, framework="Megatron-LM fork")) == "the row lacks vocab"


@pytest.mark.parametrize("schedule", ["1F1B", "1f1b", "1F1B-I", "Interleaved 1F1B", None, ""])
def test_known_schedules(schedule: str | None) -> None:
    assert case(extra={"pp_schedule": schedule}).plan.pp == 2


@pytest.mark.parametrize("schedule", ["ZB-1p", "zbv", "v-half", "DualPipe"])
def test_other_schedules_are_not_planned_for(schedule: str) -> None:
    assert case_of(row(extra={"pp_schedule": schedule})) == f"schedule={schedule} is not planned for"
    assert case(extra={"pp_schedule": schedule}, pp=1, dp=8).plan.pp == 1  # nothing to schedule


@pytest.mark.parametrize(
    ("shape", "changes", "sentence"),
    [
        ({"heads": None}, {}, "the row lacks heads"),
        ({"layers": None, "vocab": 0}, {"mbs": 0}, "the row lacks layers, vocab, mbs"),
        ({"seq_len": None}, {"gbs": None, "num_gpus": None}, "the row lacks seq_len, num_gpus, gbs"),
        ({"hybrid": "mamba"}, {}, "model.hybrid=mamba is not a transformer of one kind of layer"),
        ({}, {"gpu": "Abacus 9000"}, "gpu=Abacus 9000 has no preset"),
        ({}, {"precision": "int8"}, "precision=int8 is not planned for"),
        ({}, {"gbs": 60}, "gbs=60 is not a multiple of dp=4 * mbs=2"),
        ({}, {"dp": 8}, "dp * tp * pp * cp=32 is not num_gpus=16"),
        (
            {"moe": {"experts": 64, "topk": 2, "ffn": 64}},
            {"ep": 16},
            "ep=16 * etp=1 does not divide the 8 ranks of a pipeline stage",
        ),
    ],
)
def test_the_reason_names_what_is_wrong(
    shape: dict[str, Any], changes: dict[str, Any], sentence: str
) -> None:
    assert case_of(row(shape, **changes)) == sentence


@pytest.mark.parametrize(
    "odd", [None, 0, -1, "x", "", [], {}, [1], {"a": 1}, True, float("nan"), float("inf")]
)
def test_nothing_that_a_row_holds_raises(odd: Any) -> None:
    for key in ROW:
        assert isinstance(case_of(row(**{key: odd})), Case | str), key
        assert isinstance(case_of({name: value for name, value in ROW.items() if name != key}), Case | str)
    for key in (*SHAPE, "moe", "mla", "swa", "hybrid", "head_dim"):
        assert isinstance(case_of(row({key: odd})), Case | str), key
    assert isinstance(case_of(odd), str)


def test_a_sentence_for_what_cannot_be_read() -> None:
    assert case_of([]) == "the row, or its model, is not an object with keys"
    assert case_of(row(tp="many")) == (
        "the row cannot be read: ValueError: invalid literal for int() with base 10: 'many'"
    )
    found = case_of(row(zero_stage=7))
    assert isinstance(found, str)
    assert found.startswith("the row cannot be read: ValueError: plan.zero_stage=7")


TOKENS = 64 * 4096
NO_TIME: dict[str, Any] = {"step_time_s": None}


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ({"step_time_s": 2.5, "tokens_per_s_per_gpu": 1.0}, 2.5),
        ({"derived": {"step_time_s": 2.5}, "samples_per_s": 1.0}, 2.5),
        ({"tokens_per_s_per_gpu": 1024}, TOKENS / 1024 / 16),
        ({"derived": {"tokens_per_s_per_gpu": 1024}}, TOKENS / 1024 / 16),
        ({"samples_per_s": 32}, 2.0),
        ({"tflops_per_gpu": 400, "flop_formula": "of its own"}, None),
        ({"tflops_per_gpu": 400}, None),
        ({"step_time_s": float("nan"), "samples_per_s": 32}, 2.0),
        ({"step_time_s": "unknown"}, None),
        ({"step_time_s": -1}, None),
        ({}, None),
    ],
)
def test_seconds_of_one_step(printed: dict[str, Any], expected: float | None) -> None:
    found = case(**(NO_TIME | printed)).measured_step_s
    assert found == (None if expected is None else pytest.approx(expected))


# 8 layers of 2048 x (2048 + 2 * 512 + 2048) + 3 * 2048 * 5632 and two norms, a final norm, head and token table.
LAYER = 2048 * (2 * 2048 + 2 * 512) + 3 * 2048 * 5632 + 2 * 2048
TABLE = 32000 * 2048
OUTSIDE_TABLE = 8 * LAYER + 2048 + TABLE
SCORES = 12 * 8 * 2048 * 4096


@pytest.mark.parametrize(
    ("formula", "flops"),
    [
        ("model_full", 6 * OUTSIDE_TABLE + SCORES),
        ("korthikanti_model_full", 6 * OUTSIDE_TABLE + SCORES),
        ("model_megatron_unspecified", 6 * OUTSIDE_TABLE + SCORES),
        ("model_causal", 6 * OUTSIDE_TABLE + SCORES / 2),
        ("6N_total+12Lhs", 6 * (OUTSIDE_TABLE + TABLE) + SCORES),
        ("6N", 6 * (OUTSIDE_TABLE + TABLE)),
        ("8N_hw", 8 * (OUTSIDE_TABLE + TABLE)),
        ("6N_noattn", 6 * OUTSIDE_TABLE),
        ("lora_4N_noattn", 4 * OUTSIDE_TABLE),
        ("lora_causal", 4 * OUTSIDE_TABLE + SCORES / 3),
        # Narayanan et al. 2021, equation 3, for one token: 96 l h^2 (1 + s / 6h + V / 16lh)
        ("narayanan_hw", 96 * 8 * 2048**2 * (1 + 4096 / (6 * 2048) + 32000 / (16 * 8 * 2048))),
    ],
)
def test_seconds_from_each_count_of_flops(formula: str, flops: float) -> None:
    found = case(step_time_s=None, tflops_per_gpu=400, flop_formula=formula)
    assert found.measured_step_s == pytest.approx(flops * TOKENS / (400e12 * 16))


def test_a_tied_head_is_counted_all_the_same() -> None:
    figures: dict[str, Any] = {"step_time_s": None, "tflops_per_gpu": 400, "flop_formula": "model_full"}
    tied, open_head = case({"tied_embeddings": True}, **figures), case(**figures)
    assert tied.measured_step_s == pytest.approx(open_head.measured_step_s)
    assert replace(tied.model, tied_embeddings=False) == open_head.model


def test_sources_are_the_first_part_of_an_id() -> None:
    assert case(id="two-words-0007").source == "two-words"
    assert case(id="alone").source == "alone"
    assert case(id=7).source == "7"
