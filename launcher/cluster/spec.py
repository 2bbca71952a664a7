"""Hardware as data: GPU, links as tiers, cluster. Units stand in the names; GiB = 2^30 bytes, GB = 10^9."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from strategies.spec import Precision


@dataclass(frozen=True, kw_only=True)
class GpuSpec:
    """One accelerator, or one process' share of a CPU host (`device: cpu`)."""

    name: str
    memory_gib: float  # what an allocation can use, not the vendor's decimal figure
    memory_gb_per_s: float
    peak_tflops: Mapping[
        Precision, float
    ]  # dense, per precision; a missing precision is not supported in hardware
    device: str = "cuda"  # "cuda" (ROCm too) or "cpu"
    peak_is_nominal: bool = False  # True: a guess for ranking only, so no MFU is reported
    matmul_efficiency: float = 0.7  # best share of the peak that large matrix products reach

    def __post_init__(self) -> None:
        if self.memory_gib <= 0:
            raise ValueError(f"cluster.gpu.memory_gib={self.memory_gib} must be above 0")
        if self.device not in ("cuda", "cpu"):
            raise ValueError(f"cluster.gpu.device={self.device} is not accepted; use one of cpu, cuda")


@dataclass(frozen=True, kw_only=True)
class Link:
    """One network tier: groups of `size` neighbouring ranks reach each other at this speed."""

    size: int | None  # ranks it joins; null: the whole cluster
    gb_per_s: float  # per GPU and direction
    latency_us: float
    efficiency: float = 0.8


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """Equal nodes of equal GPUs, joined by tiers of links, fastest first."""

    name: str
    num_nodes: int
    gpus_per_node: int  # on a CPU cluster: processes per node
    gpu: GpuSpec
    links: tuple[Link, ...]
    host_memory_gib: float  # per node
    reserved_gib: float = 1.0  # per GPU, kept free: context, communicator buffers, fragmentation

    def __post_init__(self) -> None:
        for key in ("num_nodes", "gpus_per_node"):
            if getattr(self, key) < 1:
                raise ValueError(f"cluster.{key}={getattr(self, key)} must be at least 1")
        if not self.links:
            raise ValueError("cluster.links=[] must name at least one tier of links")
        if not 0 <= self.reserved_gib < self.gpu.memory_gib:
            raise ValueError(
                f"cluster.reserved_gib={self.reserved_gib} must be below "
                f"cluster.gpu.memory_gib={self.gpu.memory_gib} and not negative"
            )

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.num_nodes * self.gpus_per_node

    def link_for(self, num_ranks: int) -> Link:
        """The fastest tier that still joins `num_ranks` neighbouring ranks."""
        for link in self.links:
            if link.size is None or num_ranks <= link.size:
                return link
        return self.links[-1]
