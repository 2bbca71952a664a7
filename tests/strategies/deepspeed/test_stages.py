"""Pipeline stages: together they are the model, under its names, and compute what it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from strategies import hf
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec


@pytest.mark.parametrize("split", [(2, 2), (3, 1), (4, 0)], ids=str)
def test_stages_in_a_row_are_the_model(
    tiny: tuple[ModelSpec, TrainingSpec], tiny_weights: Path, split: tuple[int, ...]
) -> None:
    from strategies.deepspeed.stages import Stage, keep_stage

    model, _ = tiny
    plan = Plan(strategy="deepspeed", dp=1, pp=2, pipeline_split=split)

    def stage(index: int) -> Stage:
        return Stage(lambda: hf.build_part(tiny_weights, model, lambda whole: keep_stage(whole, plan, index)))

    first, last = stage(0), stage(1)
    whole = hf.build_model(tiny_weights, model)
    tokens = torch.arange(12).reshape(2, 6) % model.vocab_size
    with torch.no_grad():
        torch.testing.assert_close(last(first(tokens)), whole(input_ids=tokens).logits)
    names = [name for part in (first, last) for name, _ in part.network.named_parameters()]
    assert sorted(names) == sorted([*(name for name, _ in whole.named_parameters()), "lm_head.weight"])


def test_each_stage_masks_as_its_own_layers_do(
    tiny: tuple[ModelSpec, TrainingSpec], tiny_weights: Path
) -> None:
    from strategies.deepspeed.stages import keep_stage

    network = hf.build_model(tiny_weights, tiny[0])
    network.config.layer_types = ["full_attention"] * 3 + ["sliding_attention"]
    keep_stage(network, Plan(strategy="deepspeed", dp=1, pp=2, pipeline_split=(3, 1)), 1)
    assert network.config.layer_types == ["sliding_attention"]


def test_a_tied_head_is_summed_and_counted_once(built: dict[str, Any]) -> None:
    assert (built["first"]["tied"], built["last"]["tied"]) == (1, 1)
    assert built["first"]["counted_once"] == []
    assert built["last"]["counted_once"] == ["lm_head.weight"]
    assert built["first"]["shapes"]["model.embed_tokens.weight"] == built["last"]["shapes"]["lm_head.weight"]
