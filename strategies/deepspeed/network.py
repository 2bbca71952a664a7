"""What one rank trains: the whole model, its part of every layer, or a pipeline stage. Import it late."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from strategies import hf
from strategies.deepspeed import grid as grids
from strategies.deepspeed import sequences, sharding
from strategies.deepspeed.settings import partition_words
from strategies.deepspeed.stages import Pipeline, keep_stage
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec


@dataclass(frozen=True, kw_only=True)
class Part:
    """What DeepSpeed gets of one rank."""

    plan: Plan
    module: Any  # what it trains
    model: Any  # transformers' model in there
    grid: Any | None = (
        None  # of stages, data and tensor parallel ranks, where there are any of these but data
    )
    mpu: Any | None = None  # what DeepSpeed asks for its groups; None: it has all it needs

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy over this rank's tokens, all data parallel ranks' of which are equally many."""
        if self.plan.cp > 1:
            labels = sequences.part(labels, self.plan)
        if self.plan.tp > 1:
            return sharding.loss(logits, labels, self.model.get_output_embeddings())
        return hf.loss(logits, labels)

    def close(self) -> None:
        """Undo what the whole process sees."""
        if self.plan.cp > 1:
            sequences.restore_attention(self.model)
        grids.forget_groups()


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where transformers' models come from: `whole` makes one, `stage` one that a function has pruned."""

    whole: Callable[[], Any]
    stage: Callable[[Callable[[Any], None]], Any]


def source_of(weights: Path, model: ModelSpec, plan: Plan, config: Mapping[str, Any]) -> Source:
    """Read the folder `weights`."""
    return Source(
        whole=lambda: _load_whole(weights, model, plan, config),
        stage=lambda keep: hf.build_part(weights, model, keep),
    )


def build(source: Source, model: ModelSpec, plan: Plan, training: TrainingSpec) -> Part:
    """Build this rank's part of the model."""
    if plan.pp > 1:
        return _build_stage(source, model, plan)
    whole = source.whole()
    hf.enable_recompute(whole, plan)
    words: dict[str, Any] = {"plan": plan, "module": whole, "model": whole}
    if plan.cp > 1:
        return Part(**words, mpu=sequences.split(whole, plan, training))
    if plan.tp > 1:
        grid = grids.open_grid(plan)
        sharding.shard(whole, partition_words(), grid.get_slice_parallel_group())
        return Part(**words, grid=grid, mpu=grid)
    return Part(**words)


def _build_stage(source: Source, model: ModelSpec, plan: Plan) -> Part:
    def build_stage(grid: Any) -> Any:
        stage = source.stage(lambda whole: keep_stage(whole, plan, grid.get_stage_id()))
        hf.enable_recompute(stage, plan)
        if plan.tp > 1:
            sharding.shard(stage, partition_words(), grid.get_slice_parallel_group())
        return stage

    pipeline = Pipeline(plan, build_stage, tied=model.tied_embeddings)
    part = Part(plan=plan, module=pipeline, model=pipeline.network, grid=pipeline.mpu())
    pipeline.loss_fn = part.loss
    return part


def _load_whole(weights: Path, model: ModelSpec, plan: Plan, config: Mapping[str, Any]) -> Any:
    """Load the weights; under ZeRO-3 straight into shards, so that no rank ever holds the whole model."""
    if plan.zero_stage < 3 or plan.tp > 1:  # what tensor parallelism cuts up must be there
        return hf.build_model(weights, model)
    from transformers.integrations import HfDeepSpeedConfig

    # transformers keeps only a weak reference: loading is sharded while this name lives.
    sharded_loading = HfDeepSpeedConfig(dict(config))
    network = hf.build_model(weights, model)
    del sharded_loading
    return network
