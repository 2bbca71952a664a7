"""What the builder adds to Megatron-core's own parts: padding that counts for nothing, decay for matrices only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from strategies import process
from strategies.megatron import network
from strategies.megatron.settings import to_settings
from strategies.model_spec import ModelSpec, MoeSpec
from strategies.spec import Plan, TrainingSpec

Tiny = tuple[ModelSpec, TrainingSpec]
# Upstream's advice to itself.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)
PLAN = Plan(strategy="megatron", dp=1, precision="fp32")


@pytest.fixture
def groups(alone: None) -> Iterator[None]:
    """Megatron-core's groups of a single rank."""
    process.join_single_rank_group()
    network.prepare()
    network.join_groups({"tensor_model_parallel_size": 1})
    yield
    network.leave_groups()


def build(model: ModelSpec, training: TrainingSpec, plan: Plan = PLAN) -> tuple[Any, Any, list[Any]]:
    settings = to_settings(plan, model, training)
    config = network.build_config(settings)
    return settings, config, network.build_chunks(settings, config, vocab_size=model.vocab_size)


@pytest.mark.usefixtures("groups")
def test_padding_takes_no_part_in_the_loss(tiny: Tiny) -> None:
    model, training = tiny
    _, _, (chunk,) = build(model, training)
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.normal_(std=0.1)  # padding rows too
    tokens = torch.randint(0, model.vocab_size, (2, 8))
    positions = torch.arange(8).expand(2, 8)
    logits = chunk(tokens, positions, None)
    assert logits.shape == (2, 8, 128)
    least = torch.finfo(torch.float32).min
    assert (logits[..., model.vocab_size :] == least).all()
    assert (logits[..., : model.vocab_size] > least).all()
    chunk(tokens, positions, None, labels=tokens).mean().backward()
    assert chunk.output_layer.weight.grad[model.vocab_size :].abs().max() == 0
    assert chunk.output_layer.weight.grad[: model.vocab_size].abs().max() > 0


@pytest.mark.usefixtures("groups")
def test_norms_and_biases_do_not_decay(tiny: Tiny) -> None:
    model, training = tiny
    settings, config, chunks = build(replace(model, attention_bias=True), training)
    (wrapped,), optimizer = network.wrap(settings, config, chunks)
    decayed = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in wrapped.module.named_parameters():
        expected = 0.0 if parameter.ndim == 1 else training.weight_decay
        assert decayed[id(parameter)] == expected, name


@pytest.mark.usefixtures("groups")
def test_experts_are_reduced_apart_even_without_expert_parallelism(tiny: Tiny) -> None:
    model, training = tiny
    moe = MoeSpec(num_experts=4, top_k=2, expert_ffn_hidden_size=32)
    _, _, (chunk,) = build(replace(model, model_type="mixtral", moe=moe), training)
    apart = {
        name for name, parameter in chunk.named_parameters() if not getattr(parameter, "allreduce", True)
    }
    assert apart == {name for name, _ in chunk.named_parameters() if ".experts." in name}
    assert len(apart) == model.num_layers * 4 * 2


@pytest.mark.usefixtures("groups")
def test_nothing_is_drawn_for_weights_that_a_folder_gives(tiny: Tiny) -> None:
    before = torch.get_rng_state()
    build(*tiny)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("groups")
def test_a_correction_bias_keeps_32_bits(tiny: Tiny) -> None:
    model, training = tiny
    moe = MoeSpec(num_experts=4, top_k=2, expert_ffn_hidden_size=32)
    # The family's router on plain attention.
    grouped = replace(model, model_type="deepseek_v3", moe=moe, norm_eps=1e-6)
    settings, config, chunks = build(grouped, training, replace(PLAN, precision="bf16"))
    (wrapped,), _ = network.wrap(settings, config, chunks)
    biases = [buffer for name, buffer in wrapped.named_buffers() if name.endswith("expert_bias")]
    assert [bias.dtype for bias in biases] == [torch.float32] * model.num_layers
    assert {p.dtype for p in wrapped.module.parameters()} == {torch.bfloat16}
