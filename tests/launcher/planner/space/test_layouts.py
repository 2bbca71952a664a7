"""How a world can be split: degrees, chunks, experts, and layers by stage."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from launcher.cluster.spec import ClusterSpec, GpuSpec, Link
from launcher.errors import PlanError
from launcher.planner.problem import PlanRequest, Problem
from launcher.planner.space.layouts import Layout, layouts_of, worlds
from strategies.base import Capabilities, Execution, StateBytes
from strategies.model_spec import ModelSpec, MoeSpec
from strategies.spec import TrainingSpec, even_split

MODEL = ModelSpec(
    name="m",
    model_type="llama",
    num_layers=126,
    hidden_size=16384,
    num_attention_heads=128,
    num_kv_heads=8,
    ffn_hidden_size=53248,
    vocab_size=128256,
    max_position_embeddings=131072,
)
CLUSTER = ClusterSpec(
    name="c",
    num_nodes=128,
    gpus_per_node=8,
    gpu=GpuSpec(name="G", memory_gib=80.0, memory_gb_per_s=3000.0, peak_tflops={"bf16": 900.0}),
    links=(Link(size=8, gb_per_s=400.0, latency_us=10.0), Link(size=None, gb_per_s=25.0, latency_us=15.0)),
    host_memory_gib=1000.0,
)
EVEN = Capabilities(
    zero_stages=frozenset({1}),
    precisions=frozenset({"bf16"}),
    recompute=frozenset({"none"}),
    state_bytes={"bf16": StateBytes(weights=2, gradients=4, optimizer=12)},
    degrees=frozenset({"tp", "pp", "vp", "cp", "ep", "etp"}),
    vocabulary_multiple=128,
)
UNEVEN = replace(EVEN, uneven_pipeline=True)


def layouts(
    model: ModelSpec = MODEL, *, capabilities: Capabilities = UNEVEN, sequence: int = 8192, **pins: Any
) -> list[Layout]:
    problem = Problem(
        model=model,
        cluster=CLUSTER,
        training=TrainingSpec(sequence_length=sequence, global_batch_size=1024, num_steps=10),
        request=PlanRequest(**pins),
        strategies=("s",),
    )
    return [
        layout
        for world in worlds(problem, strategy="s", capabilities=capabilities)
        for layout in layouts_of(problem, world, strategy="s", capabilities=capabilities)
    ]


def refused(**arguments: Any) -> str:
    with pytest.raises(PlanError) as error:
        layouts(**arguments)
    return str(error.value)


def test_stages_need_not_be_equal_where_the_engine_allows_it() -> None:
    assert {layout.pp for layout in layouts(capabilities=EVEN)} == {1, 2}
    assert {layout.pp for layout in layouts()} == {1, 2, 4, 8, 16, 32, 64}
    for layout in layouts(capabilities=EVEN):
        assert layout.split == ()
        assert 126 % (layout.pp * layout.vp) == 0


def test_llama_3_has_one_layer_less_on_its_first_and_last_stage() -> None:
    """arXiv 2407.21783, section 3.3.2: 16 stages; without vp, the even split takes the layers from both ends."""
    assert even_split(126, 16) == (7, *(8,) * 14, 7)
    chunks = {layout.vp: layout.split for layout in layouts(pp=16, tp=8)}
    assert chunks[8] == (0, *(1,) * 126, 0)  # single layers: embedding and head have chunks of their own
    assert set(chunks) == {1, 2, 4, 8}


def test_a_heavy_head_takes_layers_from_the_last_stage() -> None:
    small = replace(MODEL, num_layers=32, hidden_size=4096, num_attention_heads=32, ffn_hidden_size=14336)
    found = {layout.split for layout in layouts(small, pp=4, vp=1, tp=1)}
    assert found == {(), (8, 9, 9, 6)}  # the head weighs about two layers
    # Where the head weighs less than a layer in a hundred, no split is better than the even one.
    light = replace(small, vocab_size=1024)
    assert {layout.split for layout in layouts(light, pp=4, vp=1, tp=1)} == {()}


def test_a_pinned_split_gives_stages_and_chunks() -> None:
    split = (20, 22, 22, 22, 20, 20)
    found = layouts(pipeline_split=split)
    assert {(layout.pp, layout.vp) for layout in found} == {(2, 3)}
    assert {layout.split for layout in found} == {split}


def test_experts_are_split_over_what_is_not_pipeline() -> None:
    moe = replace(MODEL, moe=MoeSpec(num_experts=64, top_k=4, expert_ffn_hidden_size=2048))
    found = layouts(moe)
    assert {layout.ep for layout in found} == {1, 2, 4, 8, 16, 32, 64}
    for layout in found:
        assert layout.dp * layout.cp * layout.tp % (layout.ep * layout.etp) == 0
        assert layout.etp in (1, layout.tp)


def test_tensor_parallel_ranks_divide_heads_mlp_and_vocabulary() -> None:
    assert {layout.tp for layout in layouts()} == {1, 2, 4, 8}
    odd = replace(MODEL, ffn_hidden_size=53248 + 2)
    assert {layout.tp for layout in layouts(odd)} == {1, 2}
    unpadded = replace(UNEVEN, vocabulary_multiple=0)
    gpt2 = replace(MODEL, vocab_size=50257)
    assert {layout.tp for layout in layouts(gpt2, capabilities=unpadded)} == {1}
    assert {layout.tp for layout in layouts(gpt2)} == {1, 2, 4, 8}
    assert refused(model=gpt2, capabilities=unpadded, tp=2) == (
        "plan.tp=2 does not divide model.vocab_size=50257; use one of 1"
    )
    assert "plan.tp=4 does not divide model.ffn_hidden_size=53250" in refused(model=odd, tp=4)


def test_an_engine_may_not_copy_key_value_heads() -> None:
    strict = replace(UNEVEN, copies_kv_heads=False)
    assert {layout.tp for layout in layouts(tp=16)} == {16}
    assert refused(capabilities=strict, tp=16) == (
        "plan.tp=16 does not divide model.num_kv_heads=8; use one of 1, 2, 4, 8"
    )


def test_ulysses_deals_out_heads_instead_of_halved_pieces() -> None:
    ulysses = replace(UNEVEN, execution=Execution(heads_over_cp=True))
    assert {layout.cp for layout in layouts(capabilities=ulysses, cp=16)} == {16}  # each key/value head twice
    few = replace(MODEL, num_attention_heads=8)
    assert refused(model=few, capabilities=ulysses, cp=16) == (
        "plan.cp=16 cannot share out model.num_attention_heads=8 and the sequence; use one of 1, 2, 4, 8"
    )
    assert {layout.cp for layout in layouts(capabilities=ulysses, sequence=8192 + 2, cp=2)} == {2}
    assert "plan.cp=2 does not divide half of" in refused(sequence=8192 + 2, cp=2)


def test_a_pinned_degree_may_be_one_that_is_not_tried_unasked() -> None:
    assert {layout.tp for layout in layouts(tp=16)} == {16}
    assert {layout.cp for layout in layouts()} == {1, 2}
    assert {layout.cp for layout in layouts(cp=8)} == {8}
    assert {layout.vp for layout in layouts(pp=4, vp=5)} == {5}
    assert refused(pp=127) == "plan.pp=127 exceeds model.num_layers=126; use one of 1, 2, 4, 8, 16, 32, 64"
