"""Variables that a run owns: set where they are missing, kept where they do no harm, refused where they would."""

from __future__ import annotations

import pytest

from strategies.environment import apply, environment
from strategies.spec import Plan, TrainingSpec

PLAN = Plan(strategy="accelerate", dp=2)
TRAINING = TrainingSpec(sequence_length=8, global_batch_size=2, num_steps=2)
EXACT = TrainingSpec(sequence_length=8, global_batch_size=2, num_steps=2, deterministic=True)


def test_nothing_is_set_unasked() -> None:
    assert environment(PLAN, TRAINING) == {}


def test_deterministic_runs_own_their_kernels_and_collectives() -> None:
    environ = {"PATH": "/bin"}
    apply(environment(PLAN, EXACT), environ)
    assert environ == {
        "PATH": "/bin",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NCCL_ALGO": "Ring",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    }


def test_a_value_that_does_no_harm_stays() -> None:
    environ = {"NCCL_ALGO": "Tree"}
    apply(environment(PLAN, EXACT), environ)
    assert environ["NCCL_ALGO"] == "Tree"


@pytest.mark.parametrize(
    ("name", "value"), [("NCCL_ALGO", "NVLS"), ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")]
)
def test_a_value_that_breaks_determinism_is_refused(name: str, value: str) -> None:
    with pytest.raises(
        ValueError, match=rf"{name}={value} is set where training\.deterministic=true needs one of"
    ):
        apply(environment(PLAN, EXACT), {name: value})


def test_tensor_parallel_megatron_gets_one_queue_unless_the_user_said_otherwise() -> None:
    plan = Plan(strategy="megatron", dp=1, tp=2)
    environ: dict[str, str] = {}
    apply(environment(plan, TRAINING), environ)
    assert environ == {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    environ = {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    apply(environment(plan, TRAINING), environ)
    assert environ == {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    assert environment(Plan(strategy="megatron", dp=2), TRAINING) == {}
