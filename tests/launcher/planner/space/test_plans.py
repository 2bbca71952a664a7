"""The legal plans and the sentences that name an impossible pin and the values that are possible."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import strategies
from launcher.cluster.spec import ClusterSpec, GpuSpec, Link
from launcher.errors import PlanError
from launcher.planner.space.plans import PlanRequest, Problem, check_problem, divisors, legal_plans, listed
from strategies.base import Capabilities, Execution, StateBytes
from strategies.model_spec import ModelSpec, MoeSpec
from strategies.spec import Plan, TrainingSpec

MODEL = ModelSpec(
    name="m",
    model_type="llama",
    num_layers=12,
    hidden_size=512,
    num_attention_heads=32,
    num_kv_heads=8,
    ffn_hidden_size=1024,
    vocab_size=1024,
    max_position_embeddings=16384,
)
GPU = GpuSpec(name="G", memory_gib=80.0, memory_gb_per_s=2000.0, peak_tflops={"bf16": 300.0, "fp32": 20.0})
CLUSTER = ClusterSpec(
    name="c",
    num_nodes=2,
    gpus_per_node=8,
    gpu=GPU,
    links=(Link(size=8, gb_per_s=300.0, latency_us=10.0), Link(size=None, gb_per_s=25.0, latency_us=15.0)),
    host_memory_gib=1000.0,
)
TRAINING = TrainingSpec(sequence_length=16384, global_batch_size=64, num_steps=10)
CAPABILITIES = Capabilities(
    zero_stages=frozenset({0, 1}),
    precisions=frozenset({"bf16"}),
    recompute=frozenset({"none", "full"}),
    state_bytes={"bf16": StateBytes(weights=2, gradients=4, optimizer=12)},
    degrees=frozenset({"tp", "pp", "vp", "cp", "ep", "etp"}),
    sequence_parallel=True,
)
DATA_PARALLEL = replace(CAPABILITIES, degrees=frozenset(), sequence_parallel=False)


def plans(
    *,
    model: ModelSpec = MODEL,
    cluster: ClusterSpec = CLUSTER,
    training: TrainingSpec = TRAINING,
    capabilities: Capabilities = CAPABILITIES,
    **pins: Any,
) -> list[Plan]:
    problem = Problem(
        model=model, cluster=cluster, training=training, request=PlanRequest(**pins), strategies=("s",)
    )
    check_problem(problem)
    return list(legal_plans(problem, strategy="s", capabilities=capabilities))


def refused(**arguments: Any) -> str:
    with pytest.raises(PlanError) as error:
        plans(**arguments)
    return str(error.value)


def test_every_plan_uses_all_ranks_and_the_whole_batch_once() -> None:
    found = plans()
    assert len(found) == len({repr(plan) for plan in found})
    for plan in found:
        assert plan.world_size == 16
        assert plan.global_batch_size == 64
        assert MODEL.num_attention_heads % plan.tp == 0
        assert MODEL.num_layers % (plan.pp * plan.vp) == 0
        assert TRAINING.sequence_length % (2 * plan.cp) == 0 or plan.cp == 1
        assert CAPABILITIES.why_not(plan) is None


def test_all_degrees_are_tried_where_offered() -> None:
    found = plans()
    for degree in ("tp", "pp", "vp", "cp"):
        assert {getattr(plan, degree) for plan in found} > {1}
    assert {(plan.tp, plan.sequence_parallel) for plan in found} >= {(1, False), (2, True)}
    assert max(plan.tp for plan in found) == 8  # unasked, tensor parallel ranks stay on the fastest links
    assert {plan.tp for plan in plans(tp=16)} == {16}


def test_only_data_parallel_is_tried_where_nothing_else_is_offered() -> None:
    assert {(plan.dp, plan.tp, plan.pp, plan.cp) for plan in plans(capabilities=DATA_PARALLEL)} == {
        (16, 1, 1, 1)
    }


def test_experts_are_split_over_data_parallel_ranks() -> None:
    model = replace(MODEL, moe=MoeSpec(num_experts=8, top_k=2, expert_ffn_hidden_size=64))
    found = plans(model=model)
    assert {plan.ep for plan in found} == {1, 2, 4, 8}
    assert all(plan.dp * plan.cp * plan.tp % (plan.ep * plan.etp) == 0 for plan in found)
    assert {plan.ep for plan in plans()} == {1}


def test_interleaved_schedules_have_whole_rounds() -> None:
    interleaved = [plan for plan in plans() if plan.vp > 1]
    assert interleaved
    assert all(plan.pp > 1 and plan.num_microbatches % plan.pp == 0 for plan in interleaved)


def test_offload_is_an_option_only_beside_a_gpu() -> None:
    capabilities = replace(
        DATA_PARALLEL,
        zero_stages=frozenset({3}),
        offload_optimizer_stages=frozenset({3}),
        offload_parameters_stages=frozenset({3}),
    )
    pairs = {(p.offload_optimizer, p.offload_parameters) for p in plans(capabilities=capabilities)}
    assert pairs == {(False, False), (True, False), (True, True)}
    host = replace(CLUSTER, gpu=replace(GPU, device="cpu"))
    on_cpu = {
        (p.offload_optimizer, p.offload_parameters) for p in plans(capabilities=capabilities, cluster=host)
    }
    assert on_cpu == {(False, False)}
    assert plans(capabilities=capabilities, offload_parameters=True, offload_optimizer=False)


SENTENCES: list[tuple[dict[str, Any], str]] = [
    ({"tp": 3}, "plan.tp=3 does not divide model.num_attention_heads=32; use one of 1, 2, 4, 8, 16"),
    ({"pp": 5}, "plan.pp=5 does not divide model.num_layers=12; use one of 1, 2, 4"),
    ({"pp": 3}, "plan.pp=3 does not divide the 16 ranks of the cluster; use one of 1, 2, 4, 8, 16"),
    ({"dp": 3}, "plan.dp=3 does not divide the 16 ranks of the cluster; use one of 1, 2, 4, 8, 16"),
    ({"dp": 16, "tp": 2}, "plan.dp=16, plan.tp=2 cannot make 16 ranks together; set one to null"),
    (
        {"dp": 2, "tp": 2, "pp": 2, "cp": 1},
        "plan.dp=2 * plan.tp=2 * plan.pp=2 * plan.cp=1 make 8 ranks, but the cluster has 16; "
        "set one of them to null, or change cluster.num_nodes or cluster.gpus_per_node",
    ),
    ({"ep": 3}, "plan.ep=3 does not divide model.moe.num_experts; use another value or null"),
    (
        {"dp": 4, "micro_batch_size": 3},
        "plan.micro_batch_size=3 * plan.dp=4 does not divide training.global_batch_size=64; "
        "use one of 1, 2, 4, 8, 16",
    ),
    (
        {"dp": 4, "micro_batch_size": 2, "num_microbatches": 4},
        "plan.dp=4 * plan.micro_batch_size=2 * plan.num_microbatches=4 make 32 sequences a step, not "
        "training.global_batch_size=64; set one of them to null, or use training.global_batch_size=32",
    ),
    ({"zero_stage": 3}, "s has no plan.zero_stage=3; use one of 0, 1"),
    ({"recompute": "selective"}, "s has no plan.recompute=selective; use one of full, none"),
    (
        {"capabilities": DATA_PARALLEL, "tp": 2},
        "strategy=s does not offer plan.tp=2 here; use plan.tp=1 or null",
    ),
    (
        {"capabilities": DATA_PARALLEL, "dp": 8},
        "plan.dp=8 leaves ranks without work: the cluster has 16; use plan.dp=16",
    ),
    (
        {"capabilities": DATA_PARALLEL, "training": replace(TRAINING, global_batch_size=40)},
        "training.global_batch_size=40 is not a multiple of plan.dp=16; use one of 32, 48, or another number of ranks",
    ),
    (
        {"training": replace(TRAINING, sequence_length=20000)},
        "training.sequence_length=20000 exceeds model.max_position_embeddings=16384; use that or less",
    ),
    (
        {"training": replace(TRAINING, precision="fp16")},
        "training.precision=fp16 is not supported by cluster.gpu.name=G; use one of bf16, fp32",
    ),
    (
        {"training": replace(TRAINING, precision="fp32")},
        "s cannot train in training.precision=fp32; use one of bf16",
    ),
    (
        {"capabilities": replace(CAPABILITIES, model_types=frozenset({"gpt2"}))},
        "strategy=s does not know model.model_type=llama; use one of gpt2",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "sentence"), SENTENCES, ids=[sentence[:60] for _, sentence in SENTENCES]
)
def test_what_cannot_be_is_one_sentence(arguments: dict[str, Any], sentence: str) -> None:
    assert refused(**arguments) == sentence


def test_the_values_that_a_sentence_offers_are_accepted() -> None:
    for tp in (1, 2, 4, 8, 16):
        assert plans(tp=tp)
    for size in (1, 2, 4, 8, 16):
        assert plans(dp=4, micro_batch_size=size)
    for batch in (32, 48):
        assert plans(capabilities=DATA_PARALLEL, training=replace(TRAINING, global_batch_size=batch))


def test_divisors_and_lists() -> None:
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]
    assert divisors(1) == [1]
    assert listed([1, 2, 3], most=2) == "1, 2, ..."


SINGLE = replace(CLUSTER, num_nodes=1, gpus_per_node=1)
OFFLOADING = replace(
    DATA_PARALLEL, zero_stages=frozenset({0, 1, 2, 3}), offload_optimizer_stages=frozenset({1, 2, 3})
)


def test_on_one_rank_higher_stages_only_open_the_way_to_the_host() -> None:
    found = plans(cluster=SINGLE, capabilities=OFFLOADING)
    assert {(plan.zero_stage, plan.offload_optimizer) for plan in found} == {
        (0, False),
        (1, True),
        (2, True),
        (3, True),
    }
    pinned = plans(cluster=SINGLE, capabilities=OFFLOADING, zero_stage=2, offload_optimizer=False)
    assert {plan.zero_stage for plan in pinned} == {2}


def test_an_engine_that_cannot_shard_over_one_rank_refuses_a_pinned_stage() -> None:
    sentence = refused(
        cluster=SINGLE, capabilities=replace(OFFLOADING, shards_single_rank=False), zero_stage=2
    )
    assert sentence == (
        "s cannot shard plan.zero_stage=2 over a single data parallel rank; use plan.zero_stage=0, or more GPUs"
    )


WIDE = replace(
    CAPABILITIES,
    recompute=frozenset({"none", "selective", "full"}),
    uneven_pipeline=True,
    partial_recompute=True,
    recompute_modules=frozenset({"mlp", "moe", "layernorm", "moe_act", "mla_up_proj"}),
    other_rank_orders=(("tp", "cp", "pp", "dp"),),
    vocabulary_multiple=128,
)
MIXTURE = replace(MODEL, moe=MoeSpec(num_experts=8, top_k=2, expert_ffn_hidden_size=64))


def test_part_of_the_layers_may_be_recomputed() -> None:
    found = {plan.recompute_num_layers for plan in plans(capabilities=WIDE, pp=2, vp=1, recompute="full")}
    assert found == {0, 1, 2, 3, 4, 5}  # of six layers, one stage of two
    for plan in plans(capabilities=WIDE, pp=2, vp=3):
        assert plan.recompute_num_layers % 3 == 0  # as many in each chunk
    assert {plan.recompute_num_layers for plan in plans(pp=2)} == {0}
    pinned = plans(capabilities=WIDE, pp=2, recompute_num_layers=5)
    assert {(plan.recompute, plan.recompute_num_layers) for plan in pinned} == {("full", 5)}


def test_selective_recomputation_is_tried_where_it_can_help() -> None:
    def modules(**arguments: Any) -> set[tuple[str, ...]]:
        return {plan.recompute_modules for plan in plans(**arguments) if plan.recompute == "selective"}

    assert modules(capabilities=WIDE) == set()  # fused attention stores no scores
    unfused = replace(WIDE, execution=Execution(attention="unfused"))
    assert modules(capabilities=unfused) == {()}
    assert modules(capabilities=WIDE, model=MIXTURE) == {("layernorm", "moe_act")}
    assert modules(capabilities=WIDE, recompute="selective") == {()}
    assert modules(capabilities=WIDE, recompute_modules=("mlp",)) == {("mlp",)}


def test_another_rank_order_is_tried_where_stages_would_share_fast_links() -> None:
    swapped = [plan for plan in plans(capabilities=WIDE) if plan.rank_order[2] == "pp"]
    assert swapped
    assert all(plan.pp > 1 and plan.dp > 1 and plan.tp * plan.cp < 8 for plan in swapped)
    pinned = plans(capabilities=WIDE, rank_order=("tp", "cp", "pp", "dp"))
    assert {plan.rank_order for plan in pinned} == {("tp", "cp", "pp", "dp")}


def test_micro_batches_are_powers_of_two_and_what_is_left_beyond() -> None:
    short = replace(TRAINING, sequence_length=1024, global_batch_size=16 * 240)
    found = {plan.micro_batch_size for plan in plans(capabilities=DATA_PARALLEL, training=short)}
    assert found == {1, 2, 4, 8, 16, 48}
    long = replace(short, sequence_length=16384)
    most = max(plan.micro_batch_size for plan in plans(capabilities=DATA_PARALLEL, training=long))
    assert most == 8  # 131,072 tokens
    assert plans(capabilities=DATA_PARALLEL, training=long, micro_batch_size=60)


def test_a_split_that_no_world_can_have_is_named() -> None:
    assert refused(capabilities=WIDE, pipeline_split=(6, 4, 2)).startswith(
        "plan.pipeline_split=[6,4,2] does not match the stages that 16 ranks can have"
    )
    assert refused(pipeline_split=(7, 5)) == "s has equal stages only; use plan.pipeline_split=null"


def test_every_plan_of_a_wide_space_is_allowed_and_whole() -> None:
    """The space asks the engine once for all sizes; every single plan must get the same answer."""
    for model in (MODEL, MIXTURE):
        found = plans(capabilities=WIDE, model=model)
        assert len(found) == len({repr(plan) for plan in found})
        for plan in found:
            assert WIDE.why_not(plan) is None
            assert plan.world_size == 16
            assert plan.global_batch_size == 64
            assert sum(plan.pipeline_split) in (0, model.num_layers)


@pytest.mark.parametrize("name", strategies.engines())
@pytest.mark.parametrize("model", [MODEL, MIXTURE], ids=["dense", "mixture"])
def test_the_spaces_of_all_engines_are_allowed_plan_by_plan(name: str, model: ModelSpec) -> None:
    capabilities = strategies.capabilities(name)
    model = replace(model, model_type="qwen3_moe" if model.moe else "llama")
    if name == "colossalai" and model.moe:
        assert "does not know model.model_type=qwen3_moe" in refused(model=model, capabilities=capabilities)
        return
    found = plans(model=model, capabilities=capabilities)
    assert found
    assert [reason for plan in found if (reason := capabilities.why_not(plan))] == []
