"""What one rank trains: the whole model, its part of every layer, or a pipeline stage. Import it late."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from strategies import hf
from strategies.deepspeed import grid as grids
from strategies.deepspeed.settings import partition_words
from strategies.deepspeed.stages import Pipeline, keep_stage
from strategies.model_spec import ModelSpec
from strategies.spec import Plan


def build(weights: Path, model: ModelSpec, plan: Plan, config: Mapping[str, Any]) -> tuple[Any, Any | None]:
    """Return the module that DeepSpeed trains, and the grid of ranks where it has axes beside data parallelism."""
    if plan.pp > 1:
        pipeline = _build_pipeline(weights, model, plan)
        return pipeline, pipeline.mpu()
    if plan.tp > 1:
        grid = grids.open_grid(plan)
        return _finish(hf.build_model(weights, model), plan, grid), grid
    return _finish(_build_whole(weights, model, config), plan, None), None


def loss(network: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over all tokens; with tensor parallelism `logits` are a part of the vocabulary's."""
    head = network.get_output_embeddings()
    if not hasattr(head, "vocab_start_index"):
        return hf.loss(logits, labels)
    from strategies.deepspeed import sharding

    return sharding.loss(logits, labels, head)


def _build_pipeline(weights: Path, model: ModelSpec, plan: Plan) -> Pipeline:
    def build_stage(grid: Any) -> Any:
        part = hf.build_part(weights, model, lambda whole: keep_stage(whole, plan, grid.get_stage_id()))
        return _finish(part, plan, grid)

    return Pipeline(plan, build_stage, loss, tied=model.tied_embeddings)


def _finish(network: Any, plan: Plan, grid: Any | None) -> Any:
    hf.enable_recompute(network, plan)
    if plan.tp > 1:
        from strategies.deepspeed import sharding

        assert grid is not None
        sharding.shard(network, partition_words(), grid.get_slice_parallel_group())
    return network


def _build_whole(weights: Path, model: ModelSpec, config: Mapping[str, Any]) -> Any:
    """Load the weights; under ZeRO-3 straight into shards, so that no rank ever holds the whole model."""
    if config["zero_optimization"]["stage"] < 3:
        return hf.build_model(weights, model)
    from transformers.integrations import HfDeepSpeedConfig

    # transformers keeps only a weak reference: loading is sharded while this name lives.
    sharded_loading = HfDeepSpeedConfig(dict(config))
    network = hf.build_model(weights, model)
    del sharded_loading
    return network
