"""The table is complete, and every cut puts each row of each Hugging Face tensor in exactly one place."""

from __future__ import annotations

import math
from typing import Any

import pytest

from strategies.megatron.mapping import Piece, Run, Spelling, global_name, pieces, spellings
from strategies.model_spec import MlaSpec, ModelSpec, MoeSpec

SHAPE: dict[str, Any] = {
    "name": "tiny",
    "model_type": "llama",
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 8,
    "num_kv_heads": 4,
    "ffn_hidden_size": 24,
    "vocab_size": 77,
    "max_position_embeddings": 32,
}
BIASES = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}
EXPERTS = MoeSpec(num_experts=4, top_k=2, expert_ffn_hidden_size=12, num_dense_layers=1)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tied_embeddings": True},
    "llama-biases": BIASES,
    "mistral": {"model_type": "mistral"},
    "qwen2": {"model_type": "qwen2", "attention_bias": True},
    "qwen3": {"model_type": "qwen3", "qk_norm": True, "head_dim": 6},
    "gpt2": {
        **BIASES,
        "model_type": "gpt2",
        "num_kv_heads": None,
        "gated_mlp": False,
        "tied_embeddings": True,
        "learned_positions": True,
        "norm": "layernorm",
    },
    "mixtral": {
        "model_type": "mixtral",
        "moe": MoeSpec(num_experts=4, top_k=2, expert_ffn_hidden_size=24),
    },
    "qwen3-moe": {"model_type": "qwen3_moe", "qk_norm": True, "moe": EXPERTS},
    "deepseek": {
        "model_type": "deepseek_v3",
        "num_kv_heads": None,
        "moe": MoeSpec(num_experts=4, top_k=2, expert_ffn_hidden_size=12, shared_ffn_hidden_size=12),
        "mla": MlaSpec(q_lora_rank=8, kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5),
    },
}


def model_of(family: str, **changes: Any) -> ModelSpec:
    return ModelSpec(**{**SHAPE, **FAMILIES[family], **changes})


def pieces_of(family: str, *, tp: int = 1, etp: int = 1) -> list[Piece]:
    return list(pieces(model_of(family), padded_vocab_size=128, tp=tp, etp=etp))


def piece_named(family: str, name: str, *, tp: int = 1, etp: int = 1) -> Piece:
    return next(piece for piece in pieces_of(family, tp=tp, etp=etp) if piece.name == name)


def as_tuples(runs: tuple[Run, ...]) -> list[tuple[str | None, int, int]]:
    return [(run.source and run.source.split(".")[-2], run.start, run.length) for run in runs]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_holds_every_parameter(family: str) -> None:
    model = model_of(family)
    sources = [shape for piece in pieces_of(family) if piece.exported for shape in piece.sources().values()]
    buffers = model.num_moe_layers * 4 if family == "deepseek" else 0
    assert sum(math.prod(shape) for shape in sources) == model.num_parameters + buffers


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_sources_are_unique(family: str) -> None:
    table = pieces_of(family)
    names = [piece.name for piece in table]
    sources = [source for piece in table if piece.exported for source in piece.sources()]
    assert len(set(names)) == len(names)
    assert len(set(sources)) == len(sources)


@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_together_hold_each_row_once(family: str, degree: int) -> None:
    for piece in pieces_of(family, tp=degree, etp=degree):
        count = degree if piece.cut_over else 1
        parts = [piece.part(rank, count) for rank in range(count)]
        sizes = {sum(run.length for run in runs) for runs in parts}
        rows = [
            (run.source, row)
            for runs in parts
            for run in runs
            if run.source is not None
            for row in range(run.start, run.start + run.length)
        ]
        axis = piece.source_axis
        wanted = {(source, row) for source, shape in piece.sources().items() for row in range(shape[axis])}
        assert sizes == {piece.shape[piece.dim] // count}
        assert len(rows) == len(wanted)
        assert set(rows) == wanted


def test_queries_keys_and_values_interleave_by_group() -> None:
    piece = piece_named("llama", "decoder.layers.1.self_attention.linear_qkv.weight", tp=2)
    assert as_tuples(piece.part(1, 2)) == [
        ("q_proj", 8, 4),
        ("k_proj", 4, 2),
        ("v_proj", 4, 2),
        ("q_proj", 12, 4),
        ("k_proj", 6, 2),
        ("v_proj", 6, 2),
    ]


def test_more_ranks_than_groups_cut_a_group() -> None:
    piece = piece_named("llama", "decoder.layers.0.self_attention.linear_qkv.weight", tp=8)
    assert as_tuples(piece.part(0, 8)) == [("q_proj", 0, 4)]
    assert as_tuples(piece.part(1, 8)) == [("k_proj", 0, 2), ("v_proj", 0, 2)]


def test_each_rank_holds_its_gate_above_its_up() -> None:
    piece = piece_named("llama", "decoder.layers.0.mlp.linear_fc1.weight", tp=2)
    assert as_tuples(piece.part(1, 2)) == [("gate_proj", 12, 12), ("up_proj", 12, 12)]


def test_experts_are_cut_by_their_own_degree() -> None:
    piece = piece_named("mixtral", "decoder.layers.0.mlp.experts.3.linear_fc1.weight", tp=4, etp=2)
    assert (piece.cut_over, piece.expert, piece.layer) == ("etp", 3, 0)
    assert as_tuples(piece.part(0, 2)) == [("w1", 0, 12), ("w3", 0, 12)]


def test_gpt2_reads_columns_of_one_tensor() -> None:
    piece = piece_named("gpt2", "decoder.layers.0.self_attention.linear_qkv.weight", tp=2)
    assert (piece.source_axis, piece.shape) == (1, (48, 16))
    assert piece.sources() == {"transformer.h.0.attn.c_attn.weight": (16, 48)}
    starts = [run.start for run in piece.part(1, 2)]
    assert starts[:6] == [8, 24, 40, 10, 26, 42]


def test_gpt2_rows_become_columns() -> None:
    piece = piece_named("gpt2", "decoder.layers.0.mlp.linear_fc2.weight")
    assert (piece.dim, piece.source_axis) == (1, 0)
    assert piece.sources() == {"transformer.h.0.mlp.c_proj.weight": (24, 16)}


def test_padding_belongs_to_the_last_ranks() -> None:
    piece = piece_named("llama", "output_layer.weight", tp=2)
    assert piece.part(1, 2) == (
        Run(source="lm_head.weight", start=64, length=13),
        Run(source=None, start=0, length=51),
    )


def test_a_tied_head_is_a_second_copy() -> None:
    piece = piece_named("llama-tied", "output_layer.weight")
    assert list(piece.sources()) == ["model.embed_tokens.weight"]
    assert not piece.exported


def test_only_deepseek_has_the_correction_bias() -> None:
    owners = {
        family for family in FAMILIES for it in pieces_of(family) if it.name.endswith("router.expert_bias")
    }
    assert owners == {"deepseek"}


def test_dense_layers_come_first_in_a_mixture() -> None:
    names = [piece.name for piece in pieces_of("qwen3-moe")]
    assert "decoder.layers.0.mlp.linear_fc1.weight" in names
    assert "decoder.layers.1.mlp.router.weight" in names
    assert "decoder.layers.1.mlp.linear_fc1.weight" not in names


def test_a_degree_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="width 24 cannot be cut into 5 parts"):
        pieces_of("llama", tp=5)
    with pytest.raises(ValueError, match=r"linear_proj.weight of size 16 cannot be cut into 3 parts"):
        piece_named("llama", "decoder.layers.0.self_attention.linear_proj.weight").part(0, 3)


@pytest.mark.parametrize(
    ("local", "wanted"),
    [
        ("embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
        ("decoder.layers.1.input_layernorm.weight", "decoder.layers.6.input_layernorm.weight"),
        (
            "decoder.layers.0.self_attention.linear_qkv.layer_norm_bias",
            "decoder.layers.2.input_layernorm.bias",
        ),
        ("decoder.layers.0.mlp.linear_fc1.layer_norm_weight", "decoder.layers.2.pre_mlp_layernorm.weight"),
        (
            "decoder.layers.0.self_attention.linear_kv_up_proj.layer_norm_weight",
            "decoder.layers.2.self_attention.kv_layernorm.weight",
        ),
        (
            "decoder.layers.1.mlp.experts.local_experts.1.linear_fc2.weight",
            "decoder.layers.6.mlp.experts.5.linear_fc2.weight",
        ),
        (
            "decoder.layers.1.mlp.experts.linear_fc1.weight3",
            "decoder.layers.6.mlp.experts.7.linear_fc1.weight",
        ),
        (
            "decoder.layers.1.mlp.shared_experts.linear_fc1.weight",
            "decoder.layers.6.mlp.shared_experts.linear_fc1.weight",
        ),
    ],
)
def test_local_names_become_global_names(local: str, wanted: str) -> None:
    assert global_name(local, layers=[2, 6], first_expert=4) == wanted


def test_spellings_of_a_plain_tensor() -> None:
    assert [it.name for it in spellings("transformer.wte.weight")] == [
        "transformer.wte.weight",
        "wte.weight",
    ]


def test_spellings_of_an_expert() -> None:
    found = list(spellings("model.layers.3.block_sparse_moe.experts.2.w3.weight"))
    assert found[0] == Spelling(name="model.layers.3.block_sparse_moe.experts.2.w3.weight")
    assert Spelling(name="model.layers.3.mlp.experts.gate_up_proj", expert=2, half=1) in found
    down = list(spellings("model.layers.0.mlp.experts.1.down_proj.weight"))
    assert Spelling(name="model.layers.0.mlp.experts.down_proj", expert=1) in down
