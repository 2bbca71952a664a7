"""What ColossalAI 0.5.0 lacks to train on processors with gloo; nothing here is touched where CUDA is.

Each function names the upstream lines it stands in for (below `colossalai/`) and why the numbers stay the same.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch

from strategies.spec import Plan

# Private parts of these releases are replaced below: others may mean something else by the same names.
WRITTEN_FOR = {"colossalai": "0.5.0", "torch": "2.13"}


def why_not(plan: Plan) -> str | None:
    """One sentence why a plan that ColossalAI offers cannot run on processors, or None."""
    if plan.zero_stage == 3 and plan.offload_optimizer:
        return (
            "plan.offload_optimizer=true with plan.zero_stage=3 moves Gemini's chunks between a GPU and the host, "
            "and no GPU is here; use plan.offload_optimizer=false"
        )
    return None


@cache
def enable() -> None:
    """Make ColossalAI usable without CUDA, once a process; raise RuntimeError for releases not written for."""
    if torch.cuda.is_available():
        return
    _check_releases()
    _use_accelerator()
    _ask_for_no_nccl()
    _attend_by_torch()
    _accept_cpu_in_zero()
    _provide_adam()
    _keep_chunks_on_compute_side()


def _check_releases() -> None:
    for package, release in WRITTEN_FOR.items():
        found = version(package)
        if found.split("+")[0] != release and not found.startswith(f"{release}."):
            raise RuntimeError(
                f"ColossalAI on processors was made to work with {package} {release}, and {found} is installed; "
                "use the pinned environment of strategy=colossalai, or a GPU"
            )


class _Stream:
    """Work on processors is finished when the call returns: waiting for a stream means nothing."""

    def wait_stream(self, other: _Stream) -> None: ...

    def synchronize(self) -> None: ...


def _use_accelerator() -> None:
    """accelerator/cpu_accelerator.py raises in most methods, and its get_rng_state passes on an argument that
    torch.get_rng_state lacks. There is one device, one stream and one random generator here.
    """
    from colossalai.accelerator import set_accelerator
    from colossalai.accelerator.cpu_accelerator import CpuAccelerator

    class Processors(CpuAccelerator):  # type: ignore[misc]
        def current_device(self) -> torch.device:
            return torch.device("cpu")

        def synchronize(self, device: Any = None) -> None: ...

        def empty_cache(self) -> None: ...

        def Stream(self, *_: Any, **__: Any) -> _Stream:
            return _Stream()

        def current_stream(self, device: Any = None) -> _Stream:
            return _Stream()

        def stream(self, stream_: Any) -> AbstractContextManager[None]:
            return nullcontext()

        def get_rng_state(self, device: Any = None) -> torch.Tensor:
            state: torch.Tensor = torch.get_rng_state()
            return state

        def set_rng_state(self, new_state: torch.Tensor, device: Any = None) -> None:
            torch.set_rng_state(new_state)

        def manual_seed(self, seed: int) -> None:
            torch.manual_seed(seed)

    set_accelerator(Processors())


def _ask_for_no_nccl() -> None:
    """pipeline/p2p.py:159 asks torch for HCCL, which only a vendor's build has; gloo is neither NCCL nor HCCL."""
    from colossalai.pipeline import p2p

    p2p._check_for_nccl_hccl_backend = lambda group: False


def _attend_by_torch() -> None:
    """kernel/extensions/pybind/flash_attention/flash_attention_sdpa_cuda.py is torch's scaled_dot_product_attention,
    which processors have too, and calls itself unavailable without CUDA.
    """
    from colossalai.kernel.extensions import FlashAttentionSdpaCudaExtension

    FlashAttentionSdpaCudaExtension.is_available = lambda self: True


def _accept_cpu_in_zero() -> None:
    """zero/low_level/low_level_optim.py:254 asserts a GPU by name before it compares dtypes; the rest is kept."""
    from colossalai.zero.low_level.low_level_optim import LowLevelZeroOptimizer

    def _sanity_checks(self: Any) -> None:
        parameters = [parameter for group in self.optim.param_groups for parameter in group["params"]]
        checked = [p for p in parameters if not getattr(p, "skip_zero_check", False)]
        assert all(parameter.dtype == self._dtype for parameter in checked)

    LowLevelZeroOptimizer._sanity_checks = _sanity_checks


class _Adam:
    """Adam (Kingma & Ba 2015, algorithm 1) with decoupled decay, called as ColossalAI's compiled kernel is."""

    def __init__(self, *settings: Any) -> None:
        *_, self._decoupled = settings
        assert self._decoupled, "only AdamW is used here"

    def step(self, step: int, *arguments: Any) -> None:
        """Update `parameter` and both moments in place; gradients are first divided by a positive `scale`."""
        lr, beta1, beta2, eps, decay, _, parameter, gradient, mean, square, scale = arguments
        gradient = gradient.float() / scale if scale > 0 else gradient.float()
        parameter.mul_(1 - lr * decay)
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = (square / (1 - beta2**step)).sqrt_().add_(eps)
        parameter.addcdiv_(mean, denominator, value=-lr / (1 - beta1**step))


def _provide_adam() -> None:
    """kernel/extensions/pybind/cpu_adam/cpu_adam_x86.py compiles its host kernel with CUDA's headers; and
    nn/optimizer/hybrid_adam.py (HybridAdam.step) hands bf16 gradients to torch_adam_update, which drops their scale,
    clipping included. Gradients go in as fp32 and through the kernel, which divides by the scale.
    """
    from colossalai.kernel.kernel_loader import CPUAdamLoader
    from colossalai.nn.optimizer import HybridAdam

    class Extension:
        name, priority = "meshwright_adam", 0

        def is_available(self) -> bool:
            return True

        def assert_compatible(self) -> None: ...

        def load(self) -> SimpleNamespace:
            return SimpleNamespace(CPUAdamOptimizer=_Adam)

    # Alone: the loader asks every other extension for its compiler first.
    CPUAdamLoader.REGISTRY = [Extension]
    original: Callable[..., Any] = HybridAdam.step

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self: Any, closure: Any = None, div_scale: float = -1) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.float()
        return original(self, closure, div_scale=div_scale)

    HybridAdam.step = step


def _keep_chunks_on_compute_side() -> None:
    """zero/gemini/chunk/chunk.py tells a GPU's storage from offloaded storage by the device's type, so that every
    chunk on a processor counts as offloaded and is never gathered. All stays where computing happens: one memory.
    """
    from colossalai.zero.gemini.chunk.chunk import Chunk

    original: Callable[..., None] = Chunk.__init__

    def __init__(self: Any, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **{**named, "cpu_shard_init": False, "pin_memory": False})
        self.shard_device = SimpleNamespace(
            type="cuda"
        )  # a label: compared in close_chunk, never allocated on

    Chunk.__init__ = __init__
    Chunk.device_type = property(lambda self: "cuda")
    Chunk.shard_move = lambda self, device, force_copy=False, non_blocking=False: None
