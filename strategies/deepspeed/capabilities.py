"""DeepSpeed 0.19.8 as the planner knows it: what it can do. Files below are named as they lie in `deepspeed/`."""

from __future__ import annotations

from strategies.base import Capabilities, Execution, StateBytes
from strategies.deepspeed.keys import ACCEPTED, HARMFUL, HARMLESS, OWNED, UNPRICED, UNUSED
from strategies.deepspeed.settings import BUCKET_ELEMENTS, SWAPPED_ELEMENTS
from strategies.model_spec import ModelSpec
from strategies.spec import Plan

# Families whose layers are named and wired as Llama's: those were trained with every degree.
DENSE = frozenset({"llama", "mistral", "qwen2", "qwen3"})
# Families with a preset of AutoEP whose routing is that of transformers (module_inject/auto_ep_presets).
MIXTURES = frozenset({"mixtral", "qwen3_moe"})

# runtime/engine.py and module_inject/auto_ep_folding.py know some of these pairs; none of them was seen training.
_APART = (("cp", "tp"), ("cp", "pp"), ("cp", "ep"), ("ep", "tp"), ("ep", "pp"))


def _degrees_that_do_not_meet(plan: Plan) -> str | None:
    for one, other in _APART:
        if getattr(plan, one) > 1 and getattr(plan, other) > 1:
            return (
                f"{plan.strategy} does not combine plan.{one}={getattr(plan, one)} with "
                f"plan.{other}={getattr(plan, other)} here; use plan.{one}=1 or plan.{other}=1"
            )
    return None


def _pipeline_shards_no_gradients(plan: Plan) -> str | None:
    # runtime/pipe/engine.py asserts it: gradients would be reduced after every micro-batch.
    if plan.pp > 1 and plan.zero_stage >= 2:
        return (
            f"{plan.strategy} cannot combine plan.zero_stage={plan.zero_stage} with plan.pp={plan.pp}; "
            "use plan.zero_stage in 0, 1"
        )
    return None


def _keys_that_do_harm(plan: Plan) -> str | None:
    given = plan.engine.get("zero_optimization", {})
    for key, value in {**given, **given.get("offload_optimizer", {})}.items():
        if key in HARMFUL and value not in HARMLESS.get(key, (None, False)):
            return f"{plan.strategy} cannot have {key}={value} in strategy.engine: {HARMFUL[key]}; remove the key"
    # runtime/zero/stage3.py, __add_grad_to_ipg_bucket: some gradients are summed over parts of a sequence, those of
    # parameters larger than a bucket averaged.
    if plan.cp > 1 and plan.zero_stage == 3 and given.get("reduce_scatter") is False:
        return (
            f"{plan.strategy} cannot combine strategy.engine.zero_optimization.reduce_scatter=false with "
            f"plan.cp={plan.cp} and plan.zero_stage=3; remove the key"
        )
    return None


def _sharded_weights_only(plan: Plan) -> str | None:
    # ZeRO++ (arXiv 2306.10209) is about gathering weights and scattering their gradients.
    given, prefix = plan.engine.get("zero_optimization", {}), "strategy.engine.zero_optimization"
    size = given.get("zero_hpz_partition_size", 1)
    if not isinstance(size, int) or size < 1:
        return (
            f"{prefix}.zero_hpz_partition_size={size} must be a number of ranks, at least 1; 1 turns it off"
        )
    # runtime/zero/partition_parameters.py makes the second copy where the first one lies, and tensors lie on no disk.
    if size > 1 and plan.nvme_path and plan.offload_parameters:
        return (
            f"{plan.strategy} cannot combine {prefix}.zero_hpz_partition_size={size} with "
            f"plan.offload_parameters=true on plan.nvme_path={plan.nvme_path}; "
            "use plan.nvme_path=null, or remove the key"
        )
    for key in ("zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients"):
        if given.get(key) and plan.zero_stage < 3:
            return (
                f"{plan.strategy} has no use for strategy.engine.zero_optimization.{key}={given[key]} with "
                f"plan.zero_stage={plan.zero_stage}; use plan.zero_stage=3, or remove the key"
            )
    # utils/groups.py, _create_zero_param_parallel_group, takes neighbours for ranks with the same parameters.
    if given.get("zero_hpz_partition_size") and (plan.tp > 1 or plan.ep > 1):
        return (
            f"{plan.strategy} combines strategy.engine.zero_optimization.zero_hpz_partition_size="
            f"{given['zero_hpz_partition_size']} with data and sequence parallel ranks only; "
            "use plan.tp=1 and plan.ep=1, or remove the key"
        )
    return None


def _degrees_of_dense_families(plan: Plan, model: ModelSpec) -> str | None:
    for degree in ("tp", "pp", "cp"):
        if getattr(plan, degree) > 1 and model.model_type not in DENSE:
            return (
                f"{plan.strategy} has plan.{degree}={getattr(plan, degree)} for {', '.join(sorted(DENSE))} only, not "
                f"for model.model_type={model.model_type}; use plan.{degree}=1"
            )
    return None


def _tied_stages_keep_gradients(plan: Plan, model: ModelSpec) -> str | None:
    # With offload runtime/zero/stage_1_and_2.py moves 16-bit gradients to `grad_accum`, where the sum over the first
    # and the last stage (runtime/pipe/engine.py, _exec_reduce_tied_grads) does not look.
    if plan.pp > 1 and plan.offload_optimizer and plan.precision != "fp32" and model.tied_embeddings:
        return (
            f"{plan.strategy} lets the two copies of tied embeddings drift apart with plan.pp={plan.pp}, "
            f"plan.offload_optimizer=true and training.precision={plan.precision}; "
            "use plan.offload_optimizer=false or plan.pp=1"
        )
    return None


def _experts_of_known_families(plan: Plan, model: ModelSpec) -> str | None:
    if plan.ep > 1 and model.model_type not in MIXTURES:
        return (
            f"{plan.strategy} has plan.ep={plan.ep} for {', '.join(sorted(MIXTURES))} only, not "
            f"for model.model_type={model.model_type}; use plan.ep=1"
        )
    return None


def _ulysses_sees_the_whole_sequence(plan: Plan, model: ModelSpec) -> str | None:
    # runtime/sequence_parallel/ulysses_sp.py, uattn_wrapper, drops the mask that holds the window.
    if plan.cp > 1 and model.sliding_window:
        return (
            f"{plan.strategy} forgets model.sliding_window={model.sliding_window} with plan.cp={plan.cp}; "
            "use plan.cp=1"
        )
    return None


CAPABILITIES = Capabilities(
    zero_stages=frozenset({0, 1, 2, 3}),
    precisions=frozenset({"fp32", "bf16"}),
    recompute=frozenset({"none", "full"}),
    # ZeRO keeps a flat master copy of the weights even in fp32.
    state_bytes={
        "fp32": StateBytes(weights=4, gradients=4, optimizer=12),
        "bf16": StateBytes(weights=2, gradients=4, optimizer=12),
    },
    # Without ZeRO: torch's own state; in bf16, autocast keeps its cast weights until the backward pass.
    stage_state_bytes={
        ("fp32", 0): StateBytes(weights=4, gradients=4, optimizer=8),
        ("bf16", 0): StateBytes(weights=4, gradients=4, optimizer=8, gathered=2, keep_gathered=True),
        ("fp32", 3): StateBytes(weights=4, gradients=4, optimizer=12, gathered=4),
        ("bf16", 3): StateBytes(weights=2, gradients=4, optimizer=12, gathered=2),
    },
    # On the host beside the optimizer: its gradients once more in fp32 and, below stage 3, the weights on their way to
    # the device. There, stage 1 keeps the 16-bit gradients as well.
    offload_state_bytes={
        ("fp32", 1): StateBytes(weights=4, gradients=4, optimizer=12, host=8),
        ("bf16", 1): StateBytes(weights=2, gradients=4, optimizer=12, gradient_copies=2, host=6),
        ("fp32", 2): StateBytes(weights=4, gradients=4, optimizer=12, host=8),
        ("bf16", 2): StateBytes(weights=2, gradients=4, optimizer=12, host=6),
        ("fp32", 3): StateBytes(weights=4, gradients=4, optimizer=12, gathered=4, host=4),
        ("bf16", 3): StateBytes(weights=2, gradients=4, optimizer=12, gathered=2, host=4),
    },
    degrees=frozenset({"tp", "pp", "cp", "ep"}),
    uneven_pipeline=True,
    copies_kv_heads=False,  # AutoTP gives the ranks beyond them no heads at all
    execution=Execution(reduces_after_pipeline=True, heads_over_cp=True),
    rules=(
        _degrees_that_do_not_meet,
        _pipeline_shards_no_gradients,
        _keys_that_do_harm,
        _sharded_weights_only,
    ),
    model_rules=(
        _degrees_of_dense_families,
        _tied_stages_keep_gradients,
        _experts_of_known_families,
        _ulysses_sees_the_whole_sequence,
    ),
    buffer_elements=BUCKET_ELEMENTS,
    offload_optimizer_stages=frozenset({1, 2, 3}),
    offload_parameters_stages=frozenset({3}),
    # Stages 1 and 2 take `nvme` for `cpu` (runtime/zero/stage_1_and_2.py).
    nvme_stages=frozenset({3}),
    swapped_elements=SWAPPED_ELEMENTS,
    # Checkpoints name the tensors of the model and their places in them.
    reshardable=frozenset(
        {"dp", "tp", "pp", "cp", "ep", "zero_stage", "rank_order", "offload_optimizer", "offload_parameters"}
    ),
    engine_keys=ACCEPTED,
    owned_engine_keys=OWNED,
    unused_engine_keys=UNUSED,
    buffer_engine_key="zero_optimization.reduce_bucket_size",
    unpriced_engine_keys=UNPRICED,
)
