"""DeepSpeed's own estimates of model states beside the planner's, and beside what a rank of the engine holds.

Run: python -m benchmarks.deepspeed_estimators --record

DeepSpeed's functions count 16-bit training with 2 bytes of weights and 18 of the rest, the largest layer gathered, no
buckets; without offloading, their host memory is what ranks need to build the model. `held` is counted on the engine's
own tensors (`meshwright verify`), which needs none of the GPUs; it has no offloading.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks import record
from launcher.decode import decode
from launcher.planner.cost import GIB
from launcher.planner.price.memory import MemoryModel
from launcher.planner.price.stages import stages_of
from strategies import hf
from strategies.deepspeed import CAPABILITIES
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

PRESETS = ("gpt2_124m", "qwen3_0.6b", "llama3_8b", "llama3_70b", "llama3_405b")
WORLDS = ((1, 8), (8, 8), (128, 8))  # nodes, GPUs of each
SWITCHES: dict[str, dict[str, Any]] = {
    "zero2": {"zero_stage": 2},
    "zero2 offload": {"zero_stage": 2, "offload_optimizer": True},
    "zero3": {"zero_stage": 3},
    "zero3 offload": {"zero_stage": 3, "offload_optimizer": True},
    "zero3 offload all": {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
}
HELD = (("gpt2_124m", "zero2"), ("gpt2_124m", "zero3"))


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """GiB of model states: of one GPU, and of one host."""

    device_gib: float
    host_gib: float


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--record", action="store_true", help="write the figures to benchmarks/records")
    options = parser.parse_args(arguments)
    figures = {"estimates": estimates(), "held": [held(model, switch) for model, switch in HELD]}
    print(json.dumps(figures, indent=1))
    if options.record:
        done = record.create("deepspeed_estimators", arguments=arguments, figures=figures)
        print(f"recorded {record.write(done, name='deepspeed_estimators').name}")


def estimates() -> list[dict[str, Any]]:
    """Both predictions for every model, cluster and switch."""
    rows = []
    for name in PRESETS:
        model = preset(name)
        for nodes, gpus in WORLDS:
            for switch, words in SWITCHES.items():
                plan = Plan(strategy="deepspeed", dp=nodes * gpus, num_microbatches=2, **words)
                theirs, ours = deepspeeds(model, plan, nodes=nodes), planners(model, plan, gpus_per_node=gpus)
                rows.append(
                    {
                        **{"model": name, "nodes": nodes, "gpus_per_node": gpus, "plan": switch},
                        "deepspeed_gib": [round(theirs.device_gib, 3), round(theirs.host_gib, 3)],
                        "planner_gib": [round(ours.device_gib, 3), round(ours.host_gib, 3)],
                    }
                )
    return rows


def preset(name: str) -> ModelSpec:
    file = record.REPOSITORY / "hydra_configs" / "model" / f"{name}.yaml"
    words = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    return decode(
        ModelSpec, {key: value for key, value in words.items() if key not in ("hf_config", "weights")}
    )


def deepspeeds(model: ModelSpec, plan: Plan, *, nodes: int) -> Estimate:
    """What deepspeed.runtime.zero.stage_1_and_2 and stage3 say."""
    hf.be_quiet()
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    world = {"num_gpus_per_node": plan.dp // nodes, "num_nodes": nodes, "additional_buffer_factor": 1.0}
    if plan.zero_stage == 2:
        host, device = estimate_zero2_model_states_mem_needs(
            model.num_parameters, cpu_offload=plan.offload_optimizer, **world
        )
    else:
        host, device, _ = estimate_zero3_model_states_mem_needs(
            model.num_parameters,
            largest_layer_parameters(model),
            cpu_offload=plan.offload_optimizer,
            cpu_offload_params=plan.offload_parameters,
            zero_init=True,
            **world,
        )
    return Estimate(device_gib=device / GIB, host_gib=host / GIB)


def largest_layer_parameters(model: ModelSpec) -> int:
    """Their largest layer is the largest module with parameters of its own: table of tokens, or a matrix of the MLP."""
    return model.hidden_size * max(model.vocab_size, model.ffn_hidden_size)


def planners(model: ModelSpec, plan: Plan, *, gpus_per_node: int) -> Estimate:
    """Weights, gradients and optimizer of the planner, and the weights that are gathered."""
    training = TrainingSpec(sequence_length=1024, global_batch_size=plan.global_batch_size, num_steps=1)
    bare = replace(CAPABILITIES, buffer_elements=0)
    cost, host = MemoryModel(model, training, bare).of(plan, stages_of(model, plan)[0])
    states = cost.weights + cost.gradients + cost.optimizer + cost.buffers
    return Estimate(device_gib=states / GIB, host_gib=host * min(gpus_per_node, plan.dp) / GIB)


def held(name: str, switch: str) -> dict[str, Any]:
    """GiB of weights, gradients and optimizer that rank 0 of eight holds, beside both predictions."""
    zero_stage = SWITCHES[switch]["zero_stage"]
    words = ["strategy=deepspeed", "cluster=a100_80gb", f"model={name}", "plan.micro_batch_size=1"]
    words += [f"plan.zero_stage={zero_stage}", "training.precision=bf16"]
    words += ["training.global_batch_size=16", "training.sequence_length=128"]
    command = [sys.executable, "-m", "launcher", "verify", *words, "--json"]
    done = subprocess.run(command, cwd=record.REPOSITORY, capture_output=True, text=True, check=True)
    states = json.loads(done.stdout)["ranks"][0]["parts"]["states"]
    plan = Plan(strategy="deepspeed", dp=8, num_microbatches=2, zero_stage=zero_stage)
    return {
        **{"model": name, "plan": switch, "gpus": 8},
        "engine_gib": round(states["engine"] / GIB, 4),
        "planner_gib": round(states["predicted"] / GIB, 4),
        "deepspeed_gib": round(deepspeeds(preset(name), plan, nodes=1).device_gib, 4),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
