"""Variables that decide kernels and collectives, set in a worker before it touches a device. Pure but for `apply`."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from strategies.spec import Plan, TrainingSpec


@dataclass(frozen=True, kw_only=True)
class Variable:
    """A value for one variable, what else would do, and what it is for."""

    value: str
    accepted: frozenset[str] | None  # None: whatever a user has set stays
    wanted_by: str


# cuBLAS picks between workspaces of concurrent streams unless told otherwise
# (https://docs.nvidia.com/cuda/cublas/#results-reproducibility); NCCL sums in switches (NVLS) in any order; Transformer
# Engine asks before it uses attention kernels with atomics.
_DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", frozenset({":4096:8", ":16:8"})),
    "NCCL_ALGO": ("Ring", frozenset({"Ring", "Tree", "CollnetDirect", "CollnetChain", "^NVLS"})),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0", frozenset({"0"})),
}


def environment(plan: Plan, training: TrainingSpec) -> dict[str, Variable]:
    """Return what the workers of a run need beyond what they inherit."""
    variables = {}
    if training.deterministic:
        for name, (value, accepted) in _DETERMINISTIC.items():
            variables[name] = Variable(
                value=value, accepted=accepted, wanted_by="training.deterministic=true"
            )
    if plan.strategy == "megatron" and (plan.tp > 1 or plan.cp > 1):
        # One queue to the GPU keeps collectives ahead of the products they hide behind
        # (megatron/core/tensor_parallel/layers.py).
        variables["CUDA_DEVICE_MAX_CONNECTIONS"] = Variable(
            value="1", accepted=None, wanted_by=f"plan.tp={plan.tp}"
        )
    return variables


def apply(variables: Mapping[str, Variable], environ: MutableMapping[str, str]) -> None:
    """Set what is not set; raise ValueError for a value that breaks what it is for."""
    for name, variable in variables.items():
        found = environ.setdefault(name, variable.value)
        if variable.accepted is not None and found not in variable.accepted:
            raise ValueError(
                f"{name}={found} is set where {variable.wanted_by} needs one of "
                f"{', '.join(sorted(variable.accepted))}; unset it, and {variable.value} is used"
            )
