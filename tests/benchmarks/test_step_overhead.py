"""Both sides of the comparison train the same thing: the plan, the options, and Megatron-core's own settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import record, step_overhead
from benchmarks.step_overhead import ENGINES, SMALL, Case, launcher_words
from launcher import compose
from launcher.submit import local

BENCHMARKS = record.REPOSITORY / "benchmarks"
MEGATRON = Case(
    engine="megatron",
    num_ranks=4,
    tp=2,
    micro_batch_size=3,
    num_microbatches=5,
    num_steps=7,
    warmup=1,
    words=SMALL,
)
CONFIG = {
    **{
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "head_dim": 8,
    },
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 60, "max_position_embeddings": 32},
}
# Names of settings in which Meshwright's translation and the bare script's differ, by family, tp and precision.
DIFFERENCES = """
import dataclasses, json, sys, warnings
from argparse import Namespace
warnings.simplefilter("ignore")
import torch
from transformers import AutoConfig
from benchmarks import bare_megatron as bare
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from strategies.hf_config import to_hf_config
from strategies.megatron import network
from strategies.megatron.settings import to_settings
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

def differ(ours, theirs):
    return [f.name for f in dataclasses.fields(ours) if getattr(ours, f.name) != getattr(theirs, f.name)]

def compare(family, tp, precision):
    model = ModelSpec(
        name="x", model_type=family, qk_norm=family == "qwen3", head_dim=8, num_layers=2, hidden_size=32,
        num_attention_heads=4, num_kv_heads=2, ffn_hidden_size=64, vocab_size=60, max_position_embeddings=32,
    )
    plan = Plan(
        strategy="megatron", dp=2 // tp, tp=tp, zero_stage=1, sequence_parallel=tp > 1, precision=precision
    )
    training = TrainingSpec(
        sequence_length=16, global_batch_size=2, num_steps=3, precision=precision, learning_rate=1e-3
    )
    settings = to_settings(plan, model, training, extensions=network.prepare())
    args = Namespace(tensor_parallel=tp, precision=precision)
    config = AutoConfig.for_model(**to_hf_config(model))
    words = {**settings.optimizer, "params_dtype": getattr(torch, settings.optimizer["params_dtype"])}
    return {
        "transformer": differ(network.build_config(settings), bare.transformer_config(args, config)),
        "ddp": differ(DistributedDataParallelConfig(**settings.ddp), bare.ddp_config()),
        "optimizer": differ(OptimizerConfig(**words), bare.optimizer_config(args)),
    }

cases = [("llama", 1, "fp32"), ("llama", 2, "bf16"), ("qwen3", 1, "bf16")]
print("\\n" + json.dumps([compare(*case) for case in cases]))
"""


def test_the_plan_is_the_one_that_the_bare_script_has_built_in() -> None:
    [job] = compose.jobs(launcher_words(MEGATRON))
    plan, engine = job.plan, ENGINES["megatron"]
    assert (plan.tp, plan.sequence_parallel, plan.zero_stage, plan.recompute) == (2, True, 1, "none")
    assert (plan.micro_batch_size, plan.num_microbatches, job.cluster.world_size) == (3, 5, 4)
    assert job.training.global_batch_size == 2 * 3 * 5  # two data parallel ranks
    assert "use_distributed_optimizer=True" in (BENCHMARKS / engine.script).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(ENGINES))
def test_every_engine_composes(name: str) -> None:
    case = replace(MEGATRON, engine=name, num_ranks=2, tp=1)
    [job] = compose.jobs(launcher_words(case))
    assert job.strategy.name == ENGINES[name].strategy
    assert (job.plan.zero_stage, job.plan.sequence_parallel) == (ENGINES[name].zero_stage, False)


def test_records_of_different_splits_have_different_names() -> None:
    assert MEGATRON.name == "step_overhead-megatron-tp2-5x3"
    assert replace(MEGATRON, tp=1).name == "step_overhead-megatron-5x3"


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--engine=fsdp2", "--tp=2"], "not in the bare script of --engine=fsdp2"),
        (["--engine=megatron", "--tp=2", "--num-ranks=3"], "does not divide --num-ranks=3"),
    ],
)
def test_impossible_splits_are_refused(
    words: list[str], fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        step_overhead.main(words)
    assert fault in capsys.readouterr().err


def test_megatron_is_told_the_same_on_both_sides() -> None:
    done = subprocess.run(
        [sys.executable, "-c", DIFFERENCES],
        cwd=record.REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for found in json.loads(done.stdout.splitlines()[-1]):
        # Weights come from elsewhere, there are no stages and no experts, and only fp16 scales its loss.
        assert set(found["transformer"]) <= {
            *("init_method", "output_layer_init_method", "embedding_init_method"),
            *("pipeline_dtype", "expert_tensor_parallel_size"),
        }
        assert found["ddp"] == []
        assert set(found["optimizer"]) <= {"initial_loss_scale"}


def test_bare_megatron_learns(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    np.tile(np.arange(60, dtype=np.uint16), 100).tofile(tmp_path / "tokens.bin")
    log = tmp_path / "steps.jsonl"
    options = [
        *(f"--config={tmp_path}", f"--tokens={tmp_path / 'tokens.bin'}", f"--out={log}", "--num-steps=12"),
        *("--sequence-length=16", "--micro-batch-size=4", "--num-microbatches=2", "--precision=bf16"),
        "--tensor-parallel=2",
    ]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *torchrun, str(BENCHMARKS / ENGINES["megatron"].script), *options],
        env=local.environment(os.environ, num_processes=2, num_cores=2),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    losses = [row["loss"] for row in rows]
    assert losses[0] == pytest.approx(np.log(256), abs=0.3)  # 60 tokens, padded to 128 a rank
    assert losses[-1] < losses[0] - 0.3
