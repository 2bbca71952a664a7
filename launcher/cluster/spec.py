"""Hardware as data: GPU, links as tiers, cluster. Units stand in the names; GiB = 2^30 bytes, GB = 10^9."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from launcher.cluster.efficiency import Efficiency
from launcher.cluster.nccl_variables import Fabric
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
    efficiency: Efficiency = field(default_factory=Efficiency)

    def __post_init__(self) -> None:
        if self.memory_gib <= 0:
            raise ValueError(f"cluster.gpu.memory_gib={self.memory_gib} must be above 0")
        if self.device not in ("cuda", "cpu"):
            raise ValueError(f"cluster.gpu.device={self.device} is not accepted; use one of cpu, cuda")


@dataclass(frozen=True, kw_only=True)
class Link:
    """One tier of links: a node, a rack, the ranks under one switch, the whole network.

    Groups of `size` neighbouring ranks reach each other at this speed. What leaves such a group crosses the next
    tier: oversubscribed uplinks, or fewer network cards than GPUs, are a lower `gb_per_s` there.
    """

    size: int | None  # ranks it joins; null: the whole cluster
    gb_per_s: float  # per GPU and direction, while all GPUs send
    latency_us: float  # one step of a ring or tree
    efficiency: float = 0.8  # share of gb_per_s that a large collective reaches
    name: str = ""  # for the reader: NVLink, InfiniBand, spine
    within_node: bool = False  # ends at the node, however few GPUs that has
    # GPUs that share a network card, or oversubscription of uplinks: one GPU alone reaches so many times gb_per_s.
    shared_by: float = 1.0
    start_us: float = 0.0  # lost once a collective: launch, waiting for each other, filling pipelines
    small_latency: float = 1.0  # share of that and of all steps that a few KiB pay (NCCL's LL protocols)
    # All-reduces in the switch (NVLink SHARP): bytes of the buffer per second, as a share of what the links
    # reach; a ring of many moves half of it. null: the switch cannot.
    switch_reduction: float | None = None
    mesh: bool = False  # every pair of GPUs has links of its own: few of them reach a part of gb_per_s

    def __post_init__(self) -> None:
        for key in ("gb_per_s", "efficiency", "small_latency"):
            if not getattr(self, key) > 0:
                raise ValueError(f"cluster.links.{key}={getattr(self, key)} must be above 0")
        if not self.shared_by >= 1:
            raise ValueError(f"cluster.links.shared_by={self.shared_by} must be at least 1")
        for key in ("latency_us", "start_us"):
            if getattr(self, key) < 0:
                raise ValueError(f"cluster.links.{key}={getattr(self, key)} must not be negative")
        if self.switch_reduction is not None and not self.switch_reduction > 0:
            raise ValueError(
                f"cluster.links.switch_reduction={self.switch_reduction} must be above 0, or null"
            )
        if self.size is not None and self.size < 1:
            raise ValueError(
                f"cluster.links.size={self.size} must be at least 1, or null for the whole cluster"
            )


@dataclass(frozen=True, kw_only=True)
class Switch:
    """A switch of the network between nodes: it joins hosts, or switches below it."""

    name: str
    hosts: tuple[str, ...] = ()
    switches: tuple[str, ...] = ()
    oversubscription: float = 1.0  # bandwidth below it by bandwidth above it: 2 where uplinks carry half

    def __post_init__(self) -> None:
        if not self.oversubscription >= 1:
            raise ValueError(f"cluster.switches.oversubscription={self.oversubscription} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """When and where `meshwright probe` measured the figures of a cluster."""

    date: str  # UTC, ISO 8601
    host: str
    torch: str  # its version


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """Variables of communication that `meshwright probe nccl` found faster than what the nodes had, and by how much."""

    date: str  # UTC, ISO 8601
    host: str
    environment: Mapping[str, str]
    speedup: float  # over all operations and sizes
    p: float  # that it is chance
    rounds: int

    def __post_init__(self) -> None:
        if not self.environment:
            raise ValueError(
                "cluster.tuned.environment={} must hold a variable; use cluster.tuned=null for none"
            )

    @property
    def source(self) -> str:
        """Where the values come from, for env.json."""
        gain = f"{self.speedup - 1:.1%} faster in {self.rounds} rounds"
        return f"meshwright probe nccl on {self.host}, {self.date}: {gain}"


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
    price_per_gpu_hour: float | None = None  # in any currency
    mttf_hours_per_gpu: float | None = (
        None  # mean time to a failure that ends the run, of one GPU and its share
    )
    storage_gb_per_s: float | None = None  # what all nodes together write checkpoints at
    measured: Measured | None = None  # null: from data sheets, fits to published runs, or guesses
    tuned: Tuned | None = None  # null: communication is left to NCCL
    fabric: Fabric | None = None  # what NCCL meets between nodes; null: read out of the last link's name
    partition: str | None = None  # of Slurm, that the nodes are in; null: the default one
    switches: tuple[Switch, ...] = ()  # between the nodes; they add tiers to `links` and order the hosts

    def __post_init__(self) -> None:
        for key in ("num_nodes", "gpus_per_node"):
            if getattr(self, key) < 1:
                raise ValueError(f"cluster.{key}={getattr(self, key)} must be at least 1")
        for key in ("price_per_gpu_hour", "mttf_hours_per_gpu", "storage_gb_per_s"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise ValueError(f"cluster.{key}={value} must be above 0, or null")
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

    def reach_of(self, link: Link) -> int | None:
        """Ranks that `link` joins in this cluster; None: all."""
        if link.within_node:
            return min(link.size or self.gpus_per_node, self.gpus_per_node)
        return link.size

    def link_for(self, num_ranks: int) -> Link:
        """The fastest tier that still joins `num_ranks` neighbouring ranks."""
        for link in self.links:
            reach = self.reach_of(link)
            if reach is None or num_ranks <= reach:
                return link
        return self.links[-1]
