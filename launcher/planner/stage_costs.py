"""Bytes of every pipeline stage of one plan; the search keeps those of the fullest one only. Pure."""

from __future__ import annotations

from dataclasses import replace

import strategies as adapters
from launcher.planner.calibration import scaled_memory
from launcher.planner.cost import MemoryCost
from launcher.planner.layouts import padded_vocabulary
from launcher.planner.memory import MemoryModel
from launcher.planner.problem import Problem
from launcher.planner.stages import StageShape, stage_layers, stages_of
from strategies.model_spec import ModelSpec
from strategies.spec import Plan


def memory_by_stage(problem: Problem, plan: Plan) -> list[tuple[int, MemoryCost]]:
    """Return index and bytes on one rank of each stage, in the order of the model."""
    capabilities = adapters.capabilities(plan.strategy)
    rows = padded_vocabulary(problem.model, multiple=capabilities.vocabulary_multiple, tp=plan.tp)
    model = replace(problem.model, vocab_size=rows)
    memory = MemoryModel(model, problem.training, capabilities)
    factor = problem.calibration.memory if problem.calibration else 1.0
    return [
        (stage.index, scaled_memory(memory.of(plan, stage)[0], factor)) for stage in all_stages(model, plan)
    ]


def all_stages(model: ModelSpec, plan: Plan) -> list[StageShape]:
    """Return every stage, where `stages_of` gives one of each kind."""
    kinds = {
        (stage.dense_layers, stage.moe_layers, stage.has_embedding, stage.has_head): stage
        for stage in stages_of(model, plan)
    }
    ends = plan.pp - 1
    found = []
    for index, (dense, moe) in enumerate(stage_layers(model, plan)):
        found.append(replace(kinds[dense, moe, index == 0, index == ends], index=index))
    return found
