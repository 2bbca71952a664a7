"""ModelSpec: the shape of a decoder-only transformer, and everything that follows from the shape alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class MoeSpec:
    """Mixture-of-experts part of a model: which layers have experts, and how wide they are."""

    num_experts: int
    top_k: int
    expert_ffn_hidden_size: int
    shared_ffn_hidden_size: int = 0  # 0: no shared expert
    num_dense_layers: int = 0  # leading layers that keep a dense MLP
    num_groups: int = 1  # DeepSeek-V3 picks groups of experts first, experts inside them second
    num_active_groups: int = 1
    routed_scaling_factor: float = 1.0
    normalize_top_k: bool = True  # the weights of the chosen experts sum to 1
    # Weight of the load-balancing loss over the experts, in Hugging Face's convention: the loss of a balanced router
    # is top_k times this. 0: none.
    router_aux_loss_coef: float = 0.0

    def __post_init__(self) -> None:
        for key in ("num_experts", "expert_ffn_hidden_size", "num_groups", "num_active_groups"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.moe.{key}={getattr(self, key)} must be at least 1")
        if self.num_experts % self.num_groups:
            raise ValueError(
                f"model.moe.num_groups={self.num_groups} does not divide "
                f"model.moe.num_experts={self.num_experts}"
            )
        if self.router_aux_loss_coef < 0:
            raise ValueError(
                f"model.moe.router_aux_loss_coef={self.router_aux_loss_coef} must not be negative; 0 turns it off"
            )
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"model.moe.top_k={self.top_k} must lie between 1 and "
                f"model.moe.num_experts={self.num_experts}"
            )


@dataclass(frozen=True, kw_only=True)
class MlaSpec:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer, by its shape alone.

    `model_type` is Hugging Face's word for the family; it decides which class an engine builds.
    All sizes are counts of elements; `None` fields fall back to the value that the comment names.
    """

    name: str
    model_type: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    ffn_hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    num_kv_heads: int | None = None  # None: multi-head attention, one per head
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    gated_mlp: bool = True  # SwiGLU: three matrices instead of two
    tied_embeddings: bool = False
    learned_positions: bool = False  # GPT-2: a table of positions instead of rotary embeddings
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    attention_bias: bool = False  # biases on the query, key and value projections
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # Qwen3: one norm over the head dimension for queries, one for keys
    sliding_window: int | None = None
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] = field(default_factory=dict)  # Hugging Face's keys; empty: none
    norm_eps: float = 1e-5
    moe: MoeSpec | None = None
    mla: MlaSpec | None = None

    def __post_init__(self) -> None:
        sizes = {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "ffn_hidden_size": self.ffn_hidden_size,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
        }
        for key, value in sizes.items():
            if value is not None and value < 1:
                raise ValueError(f"model.{key}={value} must be at least 1")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"model.hidden_size={self.hidden_size} is not a multiple of "
                f"model.num_attention_heads={self.num_attention_heads}; change one, or set model.head_dim"
            )
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"model.num_kv_heads={self.kv_heads} does not divide "
                f"model.num_attention_heads={self.num_attention_heads}"
            )
        if self.moe and self.moe.num_dense_layers > self.num_layers:
            raise ValueError(
                f"model.moe.num_dense_layers={self.moe.num_dense_layers} exceeds "
                f"model.num_layers={self.num_layers}"
            )

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads, grouped-query attention resolved."""
        return self.num_attention_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        """Elements of one attention head."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def num_moe_layers(self) -> int:
        """Layers with experts."""
        return self.num_layers - self.moe.num_dense_layers if self.moe else 0

    def padded_vocab_size(self, multiple: int) -> int:
        """Return the rows of the token table where an engine pads it to a multiple; 0: it does not."""
        return -(-self.vocab_size // multiple) * multiple if multiple else self.vocab_size

    @property
    def norm_parameters(self) -> int:
        """One norm over the hidden dimension."""
        return self.hidden_size * (2 if self.norm == "layernorm" else 1)

    @property
    def embedding_parameters(self) -> int:
        """Token table, and the position table where positions are learned."""
        positions = self.max_position_embeddings if self.learned_positions else 0
        return (self.vocab_size + positions) * self.hidden_size

    @property
    def head_parameters(self) -> int:
        """Output projection: nothing when it is tied to the token table."""
        return 0 if self.tied_embeddings else self.vocab_size * self.hidden_size

    @property
    def attention_parameters(self) -> int:
        """Projections, biases and head norms of one attention block."""
        if self.mla:
            return _mla_parameters(self, self.mla)
        q = self.num_attention_heads * self.head_size
        kv = self.kv_heads * self.head_size
        weights = self.hidden_size * (q + 2 * kv) + q * self.hidden_size
        biases = q + 2 * kv if self.attention_bias else 0
        output_bias = self.hidden_size if self.attention_output_bias else 0
        return weights + biases + output_bias + (2 * self.head_size if self.qk_norm else 0)

    def mlp_parameters(self, ffn_hidden_size: int) -> int:
        """One feed-forward block of the given width."""
        up_matrices = 2 if self.gated_mlp else 1
        biases = up_matrices * ffn_hidden_size + self.hidden_size if self.mlp_bias else 0
        return (up_matrices + 1) * self.hidden_size * ffn_hidden_size + biases

    @property
    def dense_layer_parameters(self) -> int:
        """One transformer layer with a dense MLP, its two norms included."""
        return (
            self.attention_parameters + self.mlp_parameters(self.ffn_hidden_size) + 2 * self.norm_parameters
        )

    @property
    def expert_parameters(self) -> int:
        """One expert."""
        return self.mlp_parameters(self.moe.expert_ffn_hidden_size) if self.moe else 0

    def moe_layer_parameters(self, num_experts: int) -> int:
        """One layer counting `num_experts` of its experts: all, the active ones, or a rank's share."""
        if self.moe is None:
            return self.dense_layer_parameters
        shared = self.moe.shared_ffn_hidden_size
        # DeepSeek-V3's correction bias of the router is a buffer, not a parameter.
        router = self.moe.num_experts * self.hidden_size
        return (
            self.attention_parameters
            + 2 * self.norm_parameters
            + router
            + num_experts * self.expert_parameters
            + (self.mlp_parameters(shared) if shared else 0)
        )

    def _count(self, num_experts: int) -> int:
        dense = (self.num_layers - self.num_moe_layers) * self.dense_layer_parameters
        moe = self.num_moe_layers * self.moe_layer_parameters(num_experts)
        return self.embedding_parameters + dense + moe + self.norm_parameters + self.head_parameters

    @property
    def num_parameters(self) -> int:
        """All parameters, exactly as Hugging Face's class of this `model_type` has them."""
        return self._count(self.moe.num_experts if self.moe else 0)

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token passes through."""
        return self._count(self.moe.top_k if self.moe else 0)

    def flops_per_token(self, sequence_length: int) -> float:
        """Model FLOPs of forward plus backward for one token, without recomputation.

        6 per active matrix parameter (Kaplan et al. 2020, eq. 2.2; the output head counts also when tied,
        the embedding look-up does not), plus causal attention 6 * layers * sequence * heads * head size
        (PaLM, appendix B, halved for the causal mask). A sliding window caps the attended length.
        """
        lookup = self.embedding_parameters
        head = self.vocab_size * self.hidden_size
        matmul_parameters = self.num_active_parameters - lookup - self.head_parameters + head
        return 6.0 * matmul_parameters + 3 * self.num_layers * self.attention_flops_per_token(sequence_length)

    def attention_flops_per_token(self, sequence_length: int) -> float:
        """Return the forward FLOPs of one layer's scores and weighted sum for one token, causally masked."""
        # A causal window w attends w tokens once past it; the full mask attends s / 2 on average.
        window = self.sliding_window or sequence_length
        attended = min(sequence_length / 2, float(window))
        qk_size, v_size = self.head_size, self.head_size
        if self.mla:
            qk_size = self.mla.qk_nope_head_dim + self.mla.qk_rope_head_dim
            v_size = self.mla.v_head_dim
        return 2 * attended * self.num_attention_heads * (qk_size + v_size)


def _mla_parameters(model: ModelSpec, mla: MlaSpec) -> int:
    """Down and up projections of queries and keys/values, their two norms, and the output projection."""
    heads, hidden = model.num_attention_heads, model.hidden_size
    qk = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    queries = hidden * mla.q_lora_rank + mla.q_lora_rank + mla.q_lora_rank * heads * qk
    down = hidden * (mla.kv_lora_rank + mla.qk_rope_head_dim) + mla.kv_lora_rank
    up = mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    return queries + down + up + heads * mla.v_head_dim * hidden
