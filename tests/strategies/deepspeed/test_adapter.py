"""DeepSpeedStrategy on one process: a group of one without a network, refusals. Two ranks: tests/integration."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from strategies.deepspeed import DeepSpeedStrategy
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

ROOT = Path(__file__).parents[3]
MODEL = ModelSpec(
    name="tiny",
    model_type="llama",
    num_layers=1,
    hidden_size=16,
    num_attention_heads=2,
    ffn_hidden_size=32,
    vocab_size=32,
    max_position_embeddings=32,
    tied_embeddings=True,
)
TRAINING = TrainingSpec(sequence_length=8, global_batch_size=4, num_steps=10, learning_rate=1e-2)

# In a process of its own: DeepSpeed keeps its groups and hooks until the process ends.
ONE_RANK = """
import json, sys
from pathlib import Path
import numpy as np
from strategies.deepspeed import DeepSpeedStrategy
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

MODEL, TRAINING = ModelSpec(**json.loads(sys.argv[2])), TrainingSpec(**json.loads(sys.argv[3]))
weights = Path(sys.argv[1]) / "weights"
DeepSpeedStrategy.create_weights(MODEL, TRAINING, weights)
batches = [list(np.random.default_rng(seed).integers(0, 32, (2, 2, 9))) for seed in range(6)]

def losses(strategy, part):
    return [strategy.train_step(batch, learning_rate=1e-2).loss for batch in part]

def started(stage):
    strategy = DeepSpeedStrategy()
    plan = Plan(strategy="deepspeed", dp=1, num_microbatches=2, zero_stage=stage, precision="fp32")
    strategy.setup(plan, MODEL, TRAINING, weights)
    return strategy

results = []
for stage in range(4):
    folder = weights.with_name(f"zero{stage}")
    folder.mkdir()
    first = started(stage)
    losses(first, batches[:3])
    first.save(folder)
    unbroken = losses(first, batches[3:])
    first.teardown()
    second = started(stage)
    second.load(folder)
    results.append([unbroken, losses(second, batches[3:])])
    second.teardown()
print(json.dumps(results))
"""


def test_one_rank_resumes_exactly_and_prints_nothing_else(tmp_path: Path) -> None:
    specs = [json.dumps(asdict(spec)) for spec in (MODEL, TRAINING)]
    done = subprocess.run(
        [sys.executable, "-c", ONE_RANK, str(tmp_path), *specs],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for unbroken, resumed in json.loads(done.stdout):
        assert resumed == unbroken
        assert len(set(unbroken)) == 3


def test_a_missing_deepspeed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    plan = Plan(strategy="deepspeed", dp=1, precision="fp32")
    with pytest.raises(ImportError) as caught:
        DeepSpeedStrategy().setup(plan, MODEL, TRAINING, tmp_path)
    assert str(caught.value) == (
        "strategy=deepspeed needs DeepSpeed, which is not installed; pip install 'meshwright[deepspeed]'"
    )


def test_a_typo_in_the_engine_keys_is_refused(tmp_path: Path) -> None:
    plan = Plan(strategy="deepspeed", dp=1, engine={"zero_optimisation": {"overlap_comm": True}})
    with pytest.raises(ValueError, match=r"did you mean 'zero_optimization'\?"):
        DeepSpeedStrategy().setup(plan, MODEL, TRAINING, tmp_path)
