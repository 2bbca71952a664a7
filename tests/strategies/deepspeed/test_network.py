"""What one rank gets of a model: everything, parts, stages, sequences; and which groups DeepSpeed is told of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from strategies.deepspeed.settings import to_deepspeed_config
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec


def test_data_parallel_ranks_hold_everything(
    built: dict[str, Any], tiny: tuple[ModelSpec, TrainingSpec]
) -> None:
    for name in ("data", "sequence"):
        shapes = built[name]["shapes"].values()
        assert sum(torch.Size(shape).numel() for shape in shapes) == tiny[0].num_parameters


def test_deepspeed_is_told_of_groups_where_it_has_none_itself(built: dict[str, Any]) -> None:
    told = {name: found["mpu"] for name, found in built.items()}
    assert told == {"tensor": True, "first": False, "last": False, "sequence": True, "data": False}


def test_a_stage_is_read_from_the_folder(tiny: tuple[ModelSpec, TrainingSpec], tiny_weights: Path) -> None:
    from strategies import hf
    from strategies.deepspeed import network
    from strategies.deepspeed.stages import keep_stage

    model, training = tiny
    plan = Plan(strategy="deepspeed", dp=1, pp=2, pipeline_split=(3, 1), precision="fp32")
    source = network.source_of(tiny_weights, model, plan, to_deepspeed_config(plan, model, training))
    last = source.stage(lambda whole: keep_stage(whole, plan, 1))
    whole = dict(hf.build_model(tiny_weights, model).named_parameters())
    for name, parameter in last.named_parameters():
        expected = whole["model.embed_tokens.weight" if name == "lm_head.weight" else name]
        assert torch.equal(parameter, expected), name
