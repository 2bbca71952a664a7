"""What nodes have shown, as data to change one thing in; and a driver that answers as NVML does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from launcher.cluster.spec import ClusterSpec, GpuSpec, Link
from launcher.config import PreflightConfig
from launcher.preflight.gathered import Exchange, Gathered, RankFacts, pairs, rounds_of
from launcher.preflight.judge import NodeVerdict, judge
from launcher.preflight.look import NodeFacts, Port, Volume

H100 = "NVIDIA H100 80GB HBM3"
CLUSTER = ClusterSpec(
    name="four",
    num_nodes=4,
    gpus_per_node=2,
    gpu=GpuSpec(name=H100, memory_gib=79.0, memory_gb_per_s=3350.0, peak_tflops={"bf16": 989.0}),
    links=(
        Link(size=2, gb_per_s=450.0, latency_us=3.0, efficiency=0.8),
        Link(size=None, gb_per_s=50.0, latency_us=10.0, efficiency=0.8),
    ),
    host_memory_gib=1000.0,
    fabric="infiniband",
)
FACTS = NodeFacts(
    host="n0",
    gpu_names=(H100, H100),
    gpu_readings=({"index": 0.0, "ecc_errors": 0.0, "used_gib": 0.5}, {"index": 1.0, "slowdown": 4.0}),
    versions={"driver": "570.1", "python": "3.11.7"},
    memory_gib=900.0,
    volumes=(Volume(path="/shared/run", use="the run directory", free_gib=500.0, free_inodes=10**6),),
    ports=(Port(name="mlx5_0/1", state="ACTIVE", physical="LinkUp", rate="400 Gb/sec (4X NDR)", layer="IB"),),
)


def gathered(num_nodes: int = 4) -> Gathered:
    """Sound nodes of two GPUs each, all alike."""
    ranks = tuple(
        RankFacts(
            rank=rank,
            node=rank // 2,
            facts=replace(FACTS, host=f"n{rank // 2}") if rank % 2 == 0 else None,
            versions={"torch": "2.9"},
            precision="bf16",
            side=8192,
            product_tflops=650.0,
            inside_gb_per_s=350.0,
        )
        for rank in range(2 * num_nodes)
    )
    met = [pair for number in range(rounds_of(num_nodes)) for pair in pairs(range(num_nodes), number=number)]
    return Gathered(
        world_size=2 * num_nodes,
        num_nodes=num_nodes,
        ranks=ranks,
        clocks_s={str(node): 0.001 * node for node in range(num_nodes)},
        exchanges=tuple(Exchange(a=a, b=b, gb_per_s=40.0) for a, b in met),
    )


@pytest.fixture
def sound() -> Gathered:
    """Four sound nodes."""
    return gathered()


@pytest.fixture
def node() -> Callable[..., Gathered]:
    """Four sound nodes with one thing changed about what node 2 shows."""

    def change(**changes: Any) -> Gathered:
        found = gathered()
        ranks = tuple(
            replace(rank, facts=replace(rank.facts, **changes)) if rank.rank == 4 and rank.facts else rank
            for rank in found.ranks
        )
        return replace(found, ranks=ranks)

    return change


@pytest.fixture
def verdicts() -> Callable[..., dict[str, NodeVerdict]]:
    """Judge, by host; keys of the bounds may be given."""

    def run(found: Gathered, *, cluster: ClusterSpec = CLUSTER, **bounds: Any) -> dict[str, NodeVerdict]:
        told = judge(found, cluster=cluster, bounds=PreflightConfig(**bounds), hosts=("n0", "n1", "n2", "n3"))
        return {verdict.host: verdict for verdict in told}

    return run


@pytest.fixture
def processors() -> ClusterSpec:
    """The same cluster, planned for processors."""
    gpu = replace(CLUSTER.gpu, device="cpu", peak_is_nominal=True, peak_tflops={"fp32": 0.1})
    return replace(CLUSTER, gpu=gpu)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """NVML of two GPUs, one of them too old for most questions; `rows` and `reasons` may be set."""
    told = SimpleNamespace(rows=(0, 0, 0, 0), reasons=4, errors=0)

    def modern(gpu: int, value: Any) -> Any:
        if gpu == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return value

    memory = SimpleNamespace(used=2**29, total=80 * 2**30, reserved=2**29)
    answers: dict[str, Any] = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetIndex": lambda gpu: gpu,
        "nvmlDeviceGetUUID": lambda gpu: f"GPU-{gpu}",
        "nvmlDeviceGetName": lambda gpu: H100,
        "nvmlDeviceGetCudaComputeCapability": lambda gpu: (9, 0),
        "nvmlDeviceGetMemoryInfo": lambda gpu, version: memory,
        "nvmlDeviceGetTotalEccErrors": lambda gpu, kind, counter: modern(gpu, told.errors),
        "nvmlDeviceGetRemappedRows": lambda gpu: modern(gpu, told.rows),
        "nvmlDeviceGetRetiredPagesPendingStatus": lambda gpu: modern(1 - gpu, 0),
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda gpu: told.reasons,
        "nvmlSystemGetCudaDriverVersion": lambda: 12080,
        "nvmlSystemGetDriverVersion": lambda: b"570.124.06",
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return told
