"""Rankings with made-up costs: what explains them is tested apart from what predicts them. A tiny engine to install."""

from __future__ import annotations

import contextlib
import io
import zipfile
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

import strategies
from launcher import cli
from launcher.cluster.spec import ClusterSpec, GpuSpec, Link
from launcher.environments import catalogue
from launcher.planner.cost import GIB, Candidate, CostBreakdown, MemoryCost, TimeCost
from launcher.planner.search.ranking import PlanRequest, Problem, Ranking, Rejection
from strategies.model_spec import ModelSpec, MoeSpec
from strategies.spec import Plan, TrainingSpec

Cost = TypeVar("Cost", MemoryCost, TimeCost)

MODEL = ModelSpec(
    name="llama_8b",
    model_type="llama",
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    num_kv_heads=8,
    ffn_hidden_size=14336,
    vocab_size=128256,
    max_position_embeddings=8192,
)
CLUSTER = ClusterSpec(
    name="eight",
    num_nodes=1,
    gpus_per_node=8,
    gpu=GpuSpec(
        name="G80", memory_gib=80.0, memory_gb_per_s=3000.0, peak_tflops={"bf16": 900.0, "fp32": 60.0}
    ),
    links=(Link(size=8, gb_per_s=450.0, latency_us=12.0), Link(size=None, gb_per_s=50.0, latency_us=15.0)),
    host_memory_gib=2000.0,
    reserved_gib=4.0,
)
TRAINING = TrainingSpec(sequence_length=4096, global_batch_size=64, num_steps=1000)


def _parts(cls: type[Cost], given: Mapping[str, float], unit: float) -> Cost:
    names = [field.name for field in fields(cls)]
    assert set(given) <= set(names), f"{sorted(set(given) - set(names))} are no parts of {cls.__name__}"
    return cls(**{name: given.get(name, 0.0) * unit for name in names})


def candidate(
    plan: Plan,
    *,
    gib: Mapping[str, float],
    seconds: Mapping[str, float],
    stage: int = 0,
    host_gib: float = 0.0,
    rejected: str | None = None,
) -> Candidate:
    """A plan with made-up bytes and seconds."""
    cost = CostBreakdown(
        memory=_parts(MemoryCost, gib, GIB),
        host_bytes=host_gib * GIB,
        disk_bytes=0.0,
        stage=stage,
        time=_parts(TimeCost, seconds, 1.0),
        tokens_per_step=TRAINING.tokens_per_step,
        num_gpus=plan.world_size,
        model_flops_per_step=1.2e16,
        peak_flops=900e12,
    )
    return Candidate(plan=plan, cost=cost, rejected=rejected)


def _problem(**changes: Any) -> Problem:
    given = {
        "model": MODEL,
        "cluster": CLUSTER,
        "training": TRAINING,
        "request": PlanRequest(),
        "strategies": ("deepspeed", "fake"),
        **changes,
    }
    return Problem(**given)


@pytest.fixture
def dense() -> Ranking:
    """Three data-parallel plans on one node, and one class that does not fit."""
    three = Plan(strategy="fake", dp=8, zero_stage=3, num_microbatches=8)
    states = {"weights": 1.87, "gradients": 3.74, "optimizer": 11.22}
    two = replace(three, zero_stage=2)
    large = replace(three, strategy="deepspeed", micro_batch_size=4, num_microbatches=2, recompute="full")
    too_large = candidate(
        replace(three, zero_stage=0, recompute="full"),
        gib={"weights": 15.0, "gradients": 29.9, "optimizer": 89.7, "activations": 1.8},
        seconds={"compute": 3.4},
        rejected="needs 136.4 GiB per GPU of the 76.0 GiB usable on G80",
    )
    return Ranking(
        problem=_problem(),
        candidates=(
            candidate(
                three,
                gib={**states, "activations": 24.5, "logits": 6.85},
                seconds={"compute": 3.3, "dp": 0.12},
            ),
            candidate(
                two,
                gib={**states, "weights": 14.96, "activations": 24.5, "logits": 6.85},
                seconds={"compute": 3.3, "dp": 0.16},
            ),
            candidate(
                large,
                gib={**states, "activations": 5.1, "logits": 27.4},
                seconds={"compute": 3.1, "recompute": 1.02, "dp": 0.05, "optimizer": 0.015},
            ),
        ),
        rejected=(
            Rejection(
                reason="strategy=fake with plan.zero_stage=0: the nearest needs 136.4 GiB",
                count=8,
                nearest=too_large,
            ),
        ),
    )


@pytest.fixture
def mixture() -> Ranking:
    """Plans that use every dimension, of a mixture of experts on four nodes."""
    moe = MoeSpec(num_experts=8, top_k=2, expert_ffn_hidden_size=7168)
    first = Plan(
        strategy="fake",
        dp=4,
        tp=2,
        pp=4,
        vp=2,
        ep=2,
        etp=2,
        zero_stage=1,
        micro_batch_size=2,
        num_microbatches=8,
        recompute="full",
        recompute_num_layers=4,
        sequence_parallel=True,
        offload_optimizer=True,
        pipeline_split=(3, 4, 4, 4, 4, 4, 4, 5),
    )
    second = replace(
        first,
        offload_optimizer=False,
        recompute="selective",
        recompute_num_layers=0,
        recompute_modules=("mlp", "moe"),
        pipeline_split=(),
        vp=1,
        rank_order=("tp", "cp", "pp", "dp"),
    )
    seconds = {"compute": 0.97, "recompute": 0.13, "tp": 0.081, "ep": 0.04, "pp": 0.03, "bubble": 0.25}
    gib = {"weights": 3.43, "gradients": 6.85, "activations": 9.5}
    return Ranking(
        problem=_problem(
            model=replace(MODEL, name="mixture", moe=moe),
            cluster=replace(CLUSTER, num_nodes=4),
            strategies=("fake",),
        ),
        candidates=(
            candidate(first, gib=gib, seconds={**seconds, "offload": 0.69}, stage=3, host_gib=9.08),
            candidate(
                second, gib={**gib, "optimizer": 9.08}, seconds={**seconds, "compute": 1.9, "optimizer": 0.01}
            ),
        ),
        rejected=(),
    )


SWEPT = (
    *("strategy=fake", "cluster.gpus_per_node=1", "data.max_bytes=200000", "training.sequence_length=32"),
    *("training.global_batch_size=8", "monitor=none"),
)


@pytest.fixture(scope="session")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of three points in short trials, and one that was dropped; every test reads it and none changes it."""
    folder = tmp_path_factory.mktemp("swept") / "a sweep"
    words = ("plan.micro_batch_size=1,2,4,3", "sweep.steps=12", f"run_dir='{folder}'")
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.run(["sweep", *SWEPT, *words]) == 0
    return folder


def wheel(folder: Path, name: str, version: str) -> None:
    """Write the least that pip and uv install."""
    about = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": f"__version__ = '{version}'\n",
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
        archive.writestr(f"{about}/RECORD", "".join(f"{path},,\n" for path in [*files, f"{about}/RECORD"]))


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An engine called tinyengine with a lock of two wheels; returns the folder of locks."""
    locks, wheels = tmp_path / "locks", tmp_path / "wheels"
    locks.mkdir()
    wheels.mkdir()
    wheel(wheels, "tinybase", "1.0")
    wheel(wheels, "tinyengine", "2.0")
    wheel(wheels, "tinyengine", "3.0")
    (locks / "base.txt").write_text("tinybase==1.0\n")
    (locks / "tinyengine.txt").write_text("# small\n-r base.txt\ntinyengine==2.0  # the engine\n")
    for key, value in {"FIND_LINKS": str(wheels), "NO_INDEX": "1", "OFFLINE": "1"}.items():
        for tool in ("PIP", "UV"):
            monkeypatch.setenv(f"{tool}_{key}", value)
    monkeypatch.setenv("MESHWRIGHT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MESHWRIGHT_TORCH", "cpu")
    monkeypatch.setattr(catalogue, "LOCKS", locks)
    monkeypatch.setitem(strategies.ENGINE_PACKAGES, "tinyengine", "tinyengine")
    return locks
