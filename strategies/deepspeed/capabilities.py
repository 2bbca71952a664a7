"""DeepSpeed 0.19.8 as the planner knows it: what it can do."""

from __future__ import annotations

from strategies.base import Capabilities, StateBytes
from strategies.deepspeed.keys import ACCEPTED, OWNED, UNPRICED, UNUSED
from strategies.deepspeed.settings import BUCKET_ELEMENTS

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
    degrees=frozenset({"tp", "pp", "cp", "ep"}),
    uneven_pipeline=True,
    fills_pipeline=True,
    buffer_elements=BUCKET_ELEMENTS,
    offload_optimizer_stages=frozenset({1, 2, 3}),
    offload_parameters_stages=frozenset({3}),
    engine_keys=ACCEPTED,
    owned_engine_keys=OWNED,
    unused_engine_keys=UNUSED,
    buffer_engine_key="zero_optimization.reduce_bucket_size",
    unpriced_engine_keys=UNPRICED,
)
