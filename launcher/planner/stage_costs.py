"""Bytes of every pipeline stage of one plan; the search keeps those of the fullest one only. Pure."""

from __future__ import annotations

from dataclasses import replace

import strategies as adapters
from launcher.planner.calibration import scaled
from launcher.planner.cost import MemoryCost
from launcher.planner.layouts import padded_vocabulary
from launcher.planner.memory import MemoryModel
from launcher.planner.problem import Problem
from launcher.planner.stages import StageShape, stage_kinds, stages_of
from strategies.model_spec import ModelSpec
from strategies.spec import Plan


def memory_by_stage(problem: Problem, plan: Plan) -> list[tuple[int, MemoryCost]]:
    """Return index and bytes on one rank of each stage, in the order of the model."""
    capabilities = adapters.capabilities(plan.strategy)
    rows = padded_vocabulary(problem.model, multiple=capabilities.vocabulary_multiple, tp=plan.tp)
    model = replace(problem.model, vocab_size=rows)
    memory = MemoryModel(model, problem.training, capabilities)
    factor = problem.calibration.memory if problem.calibration else 1.0
    return [(stage.index, scaled(memory.of(plan, stage)[0], factor)) for stage in all_stages(model, plan)]


def all_stages(model: ModelSpec, plan: Plan) -> list[StageShape]:
    """Return every stage, where `stages_of` gives one of each kind."""
    kinds = {stage.kind: stage for stage in stages_of(model, plan)}
    return [replace(kinds[kind], index=index) for index, kind in enumerate(stage_kinds(model, plan))]
