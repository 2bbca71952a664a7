"""What share of its data sheet a device reaches, by kind of work. Data: fitted to published runs, or probed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from strategies.spec import Precision

_DIVISORS = (
    *("memory", "attention_backward", "grouped_matmul", "grouped_narrow"),
    *("misaligned_matmul", "ring_attention"),
)


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Shares of the data sheet and fixed costs of one kind of device.

    A product of m x k by k x n elements takes its FLOPs at `matmul` of the peak, times
    1 + `matmul_half_size` * (1/m + 1/n + 1/k), plus `matmul_us`.
    """

    # Share of the peak that large matrix products reach, by precision; one missing reaches that of bf16.
    matmul: Mapping[Precision, float] = field(default_factory=lambda: {"bf16": 0.7})
    matmul_half_size: float = 64.0  # elements: a product with one such side runs at half its rate
    matmul_us: float = 4.0  # filling and draining the device, once a product
    # Tensor cores want sides in multiples of 64 elements (NVIDIA, Matrix Multiplication Background, section 3.1).
    misaligned_matmul: float = 0.8
    grouped_matmul: float = 0.9  # experts' products, beside one product of the same FLOPs
    grouped_narrow: float = 0.7  # the same in fp8 and nvfp4, where each expert's rows are quantised apart
    # Share of the 16-bit peak that attention reaches forward, over the FLOPs that the causal mask leaves, by kernel
    # (strategies.base.Execution.attention), with heads of 128 elements.
    attention: Mapping[str, float] = field(
        default_factory=lambda: {"flash3": 0.6, "flash": 0.5, "flash1": 0.3, "unfused": 0.25}
    )
    attention_backward: float = (
        0.8  # of the forward share, by the 2.5 times as many FLOPs of the backward pass
    )
    # Tiles of 128 queries: attention over so few of them (heads of one rank * tiles of its sequences) leaves half of
    # the device idle.
    attention_half_tiles: float = 60.0
    ring_attention: float = 0.9  # of its rate, for each doubling of the context parallel ranks that share it
    memory: float = 0.8  # of the memory bandwidth, by element-wise kernels
    unfused_norm: float = (
        20.0  # 16-bit elements moved for each one that an RMSNorm of several kernels normalises
    )
    kernel_us: float = 4.0  # launching one kernel from the host
    sharding_us: float = (
        100.0  # hooks, bucket copies and waits: for each layer and collective that shards its state
    )
    # Routing tells the host how many tokens go where before it can launch the experts: once a layer with experts,
    # forward and backward together, unless one graph holds the whole step.
    moe_stall_ms: float = 3.0
    skew_us: float = 25.0  # ranks of a tensor parallel group wait for the last one, at each all-reduce
    overlap: float = 0.9  # of computation that communication can hide beside
    interference: float = 0.2  # of hidden communication, by which it slows the computation that hides it
    tp_overlap: float = 0.5  # the same for tensor parallel collectives, where the engine tries
    step_ms: float = 5.0  # host work once a step: data, clipping, logging
    source: str = "defaults"  # where these figures come from

    def __post_init__(self) -> None:
        for key in _DIVISORS:
            if not getattr(self, key) > 0:
                raise ValueError(f"cluster.gpu.efficiency.{key}={getattr(self, key)} must be above 0")
        for key in ("matmul", "attention"):
            if not getattr(self, key):
                raise ValueError(f"cluster.gpu.efficiency.{key}={{}} must hold one share at least")
        for kernel, share in self.attention.items():
            if not share > 0:
                raise ValueError(f"cluster.gpu.efficiency.attention.{kernel}={share} must be above 0")
        for precision, share in self.matmul.items():
            if not 0 < share <= 1:
                raise ValueError(
                    f"cluster.gpu.efficiency.matmul.{precision}={share} must lie between 0 and 1"
                )

    def matmul_share(self, precision: Precision) -> float:
        """Share of the peak of `precision` that large products reach."""
        return self.matmul.get(precision) or self.matmul.get("bf16") or max(self.matmul.values())

    def attention_share(self, kernel: str) -> float:
        """Share of the 16-bit peak that attention reaches by `kernel`; one missing reaches that of the slowest."""
        return self.attention.get(kernel) or min(self.attention.values())
