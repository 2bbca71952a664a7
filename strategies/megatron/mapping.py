"""How Hugging Face's tensors make up Megatron-core's: a pure table of names and runs, without torch.

A whole Megatron tensor is a list of runs of rows (or columns) of Hugging Face tensors, in Megatron's order; a rank
holds an equal, contiguous part of that list. So one table serves loading (cut) and exporting (join).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from strategies.model_spec import MlaSpec, ModelSpec, MoeSpec


@dataclass(frozen=True, kw_only=True)
class Run:
    """Consecutive rows of one Hugging Face tensor, counted along the axis that is cut."""

    source: str | None  # None: padding, zeros
    start: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One whole Megatron tensor. Layers and experts in `name` are counted over the whole model, from 0."""

    name: str  # as the local layer spec names it
    shape: tuple[int, ...]
    runs: tuple[Run, ...]  # one after the other along `dim`
    dim: int = 0
    cut_over: Literal["tp", "etp"] | None = None  # None: every rank holds it whole
    transposed: bool = False  # GPT-2's Conv1D stores (inputs, outputs)
    expert: int | None = None
    may_be_whole: bool = False  # Transformer Engine's spec leaves it uncut, the local one cuts it
    exported: bool = True  # False: a second copy of what another piece exports

    @property
    def layer(self) -> int | None:
        """Layer of the whole model, from 0; None for what comes before and after the layers."""
        match = _LAYER.match(self.name)
        return int(match[1]) if match else None

    def sources(self) -> dict[str, tuple[int, ...]]:
        """Return the Hugging Face tensors this piece is made of, and their shapes."""
        lengths: dict[str, int] = {}
        for run in self.runs:
            if run.source is not None:
                lengths[run.source] = max(lengths.get(run.source, 0), run.start + run.length)
        return {name: self._source_shape(length) for name, length in lengths.items()}

    def _source_shape(self, length: int) -> tuple[int, ...]:
        shape = (*self.shape[: self.dim], length, *self.shape[self.dim + 1 :])
        return shape[::-1] if self.transposed else shape

    @property
    def source_axis(self) -> int:
        """Axis of the Hugging Face tensors along which the runs lie."""
        return 1 - self.dim if self.transposed else self.dim

    def part(self, rank: int, degree: int) -> tuple[Run, ...]:
        """Return the runs that rank `rank` of `degree` holds."""
        size, rest = divmod(self.shape[self.dim], degree)
        if rest:
            raise ValueError(f"{self.name} of size {self.shape[self.dim]} cannot be cut into {degree} parts")
        return tuple(_window(self.runs, rank * size, size))


def _window(runs: Sequence[Run], start: int, length: int) -> Iterator[Run]:
    position, stop = 0, start + length
    for run in runs:
        first, last = max(start, position), min(stop, position + run.length)
        if first < last:
            yield replace(run, start=run.start + first - position, length=last - first)
        position += run.length


def pieces(model: ModelSpec, *, padded_vocab_size: int, tp: int, etp: int) -> Iterator[Piece]:
    """Yield every tensor of the model in Hugging Face's order; the degrees rule how gate and up interleave."""
    names = _GPT2 if model.model_type == "gpt2" else _LLAMA
    yield _vocabulary(model, "embedding.word_embeddings.weight", names.tokens, padded_vocab_size)
    if model.learned_positions:
        shape = (model.max_position_embeddings, model.hidden_size)
        yield _whole("embedding.position_embeddings.weight", names.positions, shape)
    for layer in range(model.num_layers):
        prefix, theirs = f"decoder.layers.{layer}.", names.layer.format(layer)
        if model.model_type == "gpt2":
            yield from _gpt2_layer(model, prefix, theirs)
        else:
            yield from _rotary_layer(model, layer, prefix, theirs, tp, etp)
    yield from _norm(model, "decoder.final_layernorm", names.final_norm)
    head = names.tokens if model.tied_embeddings else names.head
    piece = _vocabulary(model, "output_layer.weight", head, padded_vocab_size)
    yield replace(piece, exported=not model.tied_embeddings)


@dataclass(frozen=True, kw_only=True)
class _Names:
    tokens: str
    layer: str
    final_norm: str
    positions: str = ""
    head: str = "lm_head.weight"


_LLAMA = _Names(tokens="model.embed_tokens.weight", layer="model.layers.{}.", final_norm="model.norm")
_GPT2 = _Names(
    tokens="transformer.wte.weight",
    positions="transformer.wpe.weight",
    layer="transformer.h.{}.",
    final_norm="transformer.ln_f",
)


def _rotary_layer(
    model: ModelSpec, layer: int, prefix: str, theirs: str, tp: int, etp: int
) -> Iterator[Piece]:
    yield from _norm(model, prefix + "input_layernorm", theirs + "input_layernorm")
    attention = prefix + "self_attention.", theirs + "self_attn."
    yield from _mla(model, model.mla, *attention) if model.mla else _attention(model, *attention)
    yield from _norm(model, prefix + "pre_mlp_layernorm", theirs + "post_attention_layernorm")
    if model.moe and layer >= model.moe.num_dense_layers:
        block = "block_sparse_moe." if model.model_type == "mixtral" else "mlp."
        yield from _mixture(model, model.moe, prefix + "mlp.", theirs + block, tp, etp)
    else:
        yield from _mlp(model, prefix + "mlp.", theirs + "mlp.", model.ffn_hidden_size, tp)


def _attention(model: ModelSpec, ours: str, theirs: str) -> Iterator[Piece]:
    hidden, queries = model.hidden_size, model.num_attention_heads * model.head_size
    rows = queries + 2 * model.kv_heads * model.head_size
    for kind in ("weight", "bias") if model.attention_bias else ("weight",):
        shape = (rows, hidden) if kind == "weight" else (rows,)
        q, k, v = (Run(source=f"{theirs}{part}_proj.{kind}", start=0, length=0) for part in "qkv")
        yield _column(f"{ours}linear_qkv.{kind}", _grouped(model, q, k, v), shape)
    if model.qk_norm:
        for part in "qk":
            yield _whole(f"{ours}{part}_layernorm.weight", f"{theirs}{part}_norm.weight", (model.head_size,))
    yield _row(f"{ours}linear_proj.weight", theirs + "o_proj.weight", (hidden, queries))
    if model.attention_output_bias:
        yield _whole(f"{ours}linear_proj.bias", theirs + "o_proj.bias", (hidden,))


def _grouped(model: ModelSpec, q: Run, k: Run, v: Run) -> tuple[Run, ...]:
    """Order the rows by query group: its queries, its key, its value. Each run comes as where its kind begins."""
    size = model.head_size
    per_group = model.num_attention_heads // model.kv_heads * size
    return tuple(
        replace(run, start=run.start + group * length, length=length)
        for group in range(model.kv_heads)
        for run, length in ((q, per_group), (k, size), (v, size))
    )


def _mla(model: ModelSpec, mla: MlaSpec, ours: str, theirs: str) -> Iterator[Piece]:
    hidden, heads = model.hidden_size, model.num_attention_heads
    query = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    columns = {  # within a head, both sides order the rows alike
        ("linear_q_down_proj", "q_a_proj"): (mla.q_lora_rank, hidden),
        ("linear_q_up_proj", "q_b_proj"): (heads * query, mla.q_lora_rank),
        ("linear_kv_down_proj", "kv_a_proj_with_mqa"): (mla.kv_lora_rank + mla.qk_rope_head_dim, hidden),
        ("linear_kv_up_proj", "kv_b_proj"): (
            heads * (mla.qk_nope_head_dim + mla.v_head_dim),
            mla.kv_lora_rank,
        ),
    }
    for (name, source), shape in columns.items():
        piece = _column(f"{ours}{name}.weight", _all(f"{theirs}{source}.weight", shape[0]), shape)
        yield replace(piece, may_be_whole="_down_" in name)
    for part, width in (("q", mla.q_lora_rank), ("kv", mla.kv_lora_rank)):
        yield _whole(f"{ours}{part}_layernorm.weight", f"{theirs}{part}_a_layernorm.weight", (width,))
    shape = (hidden, heads * mla.v_head_dim)
    yield _row(f"{ours}linear_proj.weight", theirs + "o_proj.weight", shape)


def _mixture(model: ModelSpec, moe: MoeSpec, ours: str, theirs: str, tp: int, etp: int) -> Iterator[Piece]:
    yield _whole(ours + "router.weight", theirs + "gate.weight", (moe.num_experts, model.hidden_size))
    if model.model_type == "deepseek_v3":
        bias = theirs + "gate.e_score_correction_bias"
        yield _whole(ours + "router.expert_bias", bias, (moe.num_experts,))
    for expert in range(moe.num_experts):
        block = f"{ours}experts.{expert}.", f"{theirs}experts.{expert}."
        for piece in _mlp(model, *block, moe.expert_ffn_hidden_size, etp):
            yield replace(piece, cut_over="etp", expert=expert)
    if moe.shared_ffn_hidden_size:
        block = ours + "shared_experts.", theirs + "shared_experts."
        yield from _mlp(model, *block, moe.shared_ffn_hidden_size, tp)


def _mlp(model: ModelSpec, ours: str, theirs: str, ffn: int, degree: int) -> Iterator[Piece]:
    if ffn % degree:
        raise ValueError(f"{ours}linear_fc1 of width {ffn} cannot be cut into {degree} parts")
    hidden = model.hidden_size
    mixtral = "block_sparse_moe" in theirs
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    for kind in ("weight", "bias") if model.mlp_bias else ("weight",):
        shape = (2 * ffn, hidden) if kind == "weight" else (2 * ffn,)
        width = ffn // degree  # each rank holds its rows of gate, then its rows of up
        runs = tuple(
            Run(source=f"{theirs}{part}.{kind}", start=rank * width, length=width)
            for rank in range(degree)
            for part in (gate, up)
        )
        yield _column(f"{ours}linear_fc1.{kind}", runs, shape)
    yield _row(f"{ours}linear_fc2.weight", f"{theirs}{down}.weight", (hidden, ffn))
    if model.mlp_bias:
        yield _whole(f"{ours}linear_fc2.bias", f"{theirs}{down}.bias", (hidden,))


def _gpt2_layer(model: ModelSpec, ours: str, theirs: str) -> Iterator[Piece]:
    """GPT-2 keeps queries, keys and values in one tensor, and stores its matrices (inputs, outputs)."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    yield from _norm(model, ours + "input_layernorm", theirs + "ln_1")
    for kind, shape in (("weight", (3 * hidden, hidden)), ("bias", (3 * hidden,))):
        source = f"{theirs}attn.c_attn.{kind}"
        q, k, v = (Run(source=source, start=part * hidden, length=0) for part in range(3))
        piece = _column(f"{ours}self_attention.linear_qkv.{kind}", _grouped(model, q, k, v), shape)
        yield replace(piece, transposed=kind == "weight")
    yield _row(
        ours + "self_attention.linear_proj.weight",
        theirs + "attn.c_proj.weight",
        (hidden, hidden),
        transposed=True,
    )
    yield _whole(ours + "self_attention.linear_proj.bias", theirs + "attn.c_proj.bias", (hidden,))
    yield from _norm(model, ours + "pre_mlp_layernorm", theirs + "ln_2")
    weight = _column(ours + "mlp.linear_fc1.weight", _all(theirs + "mlp.c_fc.weight", ffn), (ffn, hidden))
    yield replace(weight, transposed=True)
    yield _column(ours + "mlp.linear_fc1.bias", _all(theirs + "mlp.c_fc.bias", ffn), (ffn,))
    yield _row(ours + "mlp.linear_fc2.weight", theirs + "mlp.c_proj.weight", (hidden, ffn), transposed=True)
    yield _whole(ours + "mlp.linear_fc2.bias", theirs + "mlp.c_proj.bias", (hidden,))


def _norm(model: ModelSpec, ours: str, theirs: str) -> Iterator[Piece]:
    for kind in ("weight", "bias") if model.norm == "layernorm" else ("weight",):
        yield _whole(f"{ours}.{kind}", f"{theirs}.{kind}", (model.hidden_size,))


def _all(source: str, length: int) -> tuple[Run, ...]:
    return (Run(source=source, start=0, length=length),)


def _whole(name: str, source: str, shape: tuple[int, ...]) -> Piece:
    return Piece(name=name, shape=shape, runs=_all(source, shape[0]))


def _column(name: str, runs: tuple[Run, ...], shape: tuple[int, ...]) -> Piece:
    return Piece(name=name, shape=shape, runs=runs, cut_over="tp")


def _row(name: str, source: str, shape: tuple[int, int], *, transposed: bool = False) -> Piece:
    runs = _all(source, shape[1])
    return Piece(name=name, shape=shape, runs=runs, dim=1, cut_over="tp", transposed=transposed)


def _vocabulary(model: ModelSpec, name: str, source: str, padded: int) -> Piece:
    padding = Run(source=None, start=0, length=padded - model.vocab_size)
    runs = (*_all(source, model.vocab_size), padding)
    return _column(name, runs, (padded, model.hidden_size))


# Transformer Engine's spec fuses a norm into the linear layer behind it, and numbers grouped experts at the end.
_FUSED = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "self_attention.linear_q_up_proj.layer_norm_": "self_attention.q_layernorm.",
    "self_attention.linear_kv_up_proj.layer_norm_": "self_attention.kv_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.*)$")
_GROUPED_EXPERT = re.compile(r"^(.*\.experts)\.(linear_fc[12]\.\w+?)(\d+)$")
_LOCAL_EXPERT = re.compile(r"^(.*\.experts)\.local_experts\.(\d+)\.(.*)$")


def global_name(name: str, *, layers: Sequence[int], first_expert: int) -> str:
    """Translate a parameter name of one chunk: `layers` holds the layers it owns, counted from 0."""
    for fused, alone in _FUSED.items():
        name = name.replace(fused, alone)
    name = _GROUPED_EXPERT.sub(r"\1.local_experts.\3.\2", name)
    if match := _LAYER.match(name):
        name = f"decoder.layers.{layers[int(match[1])]}.{match[2]}"
    if match := _LOCAL_EXPERT.match(name):
        name = f"{match[1]}.{first_expert + int(match[2])}.{match[3]}"
    return name


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """Where a tensor may lie in a folder: under another name, or as a part of one tensor of all experts."""

    name: str
    expert: int | None = None  # index into the first dimension
    half: int | None = None  # 0: gate, 1: up, stacked in the second dimension


_EXPERT_SOURCE = re.compile(r"^(.*\.experts)\.(\d+)\.(\w+)\.weight$")
_FUSED_EXPERTS: dict[str, tuple[str, int | None]] = {
    "gate_proj": ("gate_up_proj", 0),
    "w1": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "w3": ("gate_up_proj", 1),
    "down_proj": ("down_proj", None),
    "w2": ("down_proj", None),
}


def spellings(source: str) -> Iterator[Spelling]:
    """Yield the names under which a folder may hold `source`, likeliest first.

    Folders of transformers list experts one by one; its modules hold them in one tensor (experts, rows, columns). A
    folder of the bare model, such as OpenAI's GPT-2, lacks the first word.
    """
    for name in (source, source.split(".", 1)[1]):
        yield Spelling(name=name)
        plain = name.replace("block_sparse_moe", "mlp")
        if plain != name:
            yield Spelling(name=plain)
        if match := _EXPERT_SOURCE.match(plain):
            fused, half = _FUSED_EXPERTS[match[3]]
            yield Spelling(name=f"{match[1]}.{fused}", expert=int(match[2]), half=half)
