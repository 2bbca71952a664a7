"""Bytes of every pipeline stage of one plan; the search keeps those of the fullest one only. Pure."""

from __future__ import annotations

from dataclasses import replace

import strategies as adapters
from launcher.planner.calibration import scaled
from launcher.planner.cost import MemoryCost
from launcher.planner.price.memory import MemoryModel
from launcher.planner.price.stages import StageShape, stage_kinds, stages_of
from launcher.planner.problem import Problem
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec


def memory_by_stage(problem: Problem, plan: Plan) -> list[tuple[int, MemoryCost]]:
    """Return index and bytes on one rank of each stage, in the order of the model."""
    factor = problem.calibration.memory if problem.calibration else 1.0
    stages = stages_in_memory(problem.model, plan, problem.training)
    return [(stage.index, scaled(cost, factor)) for stage, cost in stages]


def stages_in_memory(
    model: ModelSpec, plan: Plan, training: TrainingSpec
) -> list[tuple[StageShape, MemoryCost]]:
    """Return what each stage holds and costs on one rank, the engine's padding included and nothing calibrated."""
    capabilities = adapters.capabilities(plan.strategy)
    rows = model.padded_vocab_size(capabilities.vocabulary_multiple * plan.tp)
    padded = replace(model, vocab_size=rows)
    memory = MemoryModel(padded, training, capabilities)
    return [(stage, memory.of(plan, stage)[0]) for stage in all_stages(padded, plan)]


def all_stages(model: ModelSpec, plan: Plan) -> list[StageShape]:
    """Return every stage, where `stages_of` gives one of each kind."""
    kinds = {stage.kind: stage for stage in stages_of(model, plan)}
    return [replace(kinds[kind], index=index) for index, kind in enumerate(stage_kinds(model, plan))]
