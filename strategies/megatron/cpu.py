"""Lets megatron-core run on a CPU with gloo, and mends what breaks without Transformer Engine; torch stays as it is.

    cpu.install()                       # before anything imports megatron.core
    from megatron.core import ...       # from here on as usual, without its warnings about missing packages

megatron-core asks for CUDA by name in some fifty modules. On a machine without CUDA their source text goes through
`CPU_REWRITES` while it is imported, so that these names mean `CudaOnCpu`, and `CPU_REPAIRS` then replace the few
functions that no change of names can help. `LOCAL_REPAIRS` are for upstream faults that show wherever Transformer
Engine is missing, on a GPU as well. Each rule says what breaks without it, and a test leaves each one out to see it
break. Everything else is upstream's own code, unchanged: parallel layers, schedules, optimizers, checkpoints.
"""

from __future__ import annotations

import copy
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import logging
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any

import torch

MEGATRON_VERSION = "0.16.1"
# What the import says about packages that are optional here.
EXPECTED_WARNINGS = (
    "(Transformer Engine and )?Apex (is|are) not installed",
    "The following imports from `dynamic_context.py` will be removed",
    "The 'megatron.core.transformer.custom_layers.transformer_engine'",
)
# What torch 2.13 says to upstream about its collectives, from inside torch at the first use of each.
DEPRECATED_COLLECTIVES = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
_Function = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Rewrite:
    """A change to the source text of every megatron.core module, made while it is imported."""

    name: str
    pattern: str
    replacement: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Repair:
    """A change to one megatron.core module, made once it is imported."""

    name: str
    module: str
    apply: Callable[[Any], None]
    why: str


def install() -> None:
    """Prepare the coming import of megatron.core for this machine; nothing to do with CUDA and Transformer Engine."""
    warnings.filterwarnings("ignore", DEPRECATED_COLLECTIVES, FutureWarning)
    without_cuda = not torch.cuda.is_available()
    if not without_cuda and importlib.util.find_spec("transformer_engine"):
        return
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    _check_version()
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "megatron.core was imported before strategies.megatron.cpu.install() could prepare it; "
            "call install() first, in a fresh process"
        )
    rewrites = CPU_REWRITES if without_cuda else ()
    repairs = (*CPU_REPAIRS, *LOCAL_REPAIRS) if without_cuda else LOCAL_REPAIRS
    sys.meta_path.insert(0, _Finder(rewrites, repairs))


def rewrite(source: str, rewrites: Sequence[Rewrite]) -> tuple[str, tuple[str, ...]]:
    """Return `source` after all `rewrites` in their order, and the names of those that found something."""
    hits = []
    for rule in rewrites:
        source, count = re.subn(rule.pattern, rule.replacement, source)
        if count:
            hits.append(rule.name)
    return source, tuple(hits)


def _check_version() -> None:
    remedy = "pip install 'meshwright[megatron]'"
    try:
        found = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"strategy=megatron needs megatron-core, which is not installed; {remedy}") from None
    if found != MEGATRON_VERSION:
        raise ValueError(
            "strategy=megatron without CUDA or without Transformer Engine was written for megatron-core "
            f"{MEGATRON_VERSION} and found {found}; {remedy}"
        )


# While megatron.core is imported.


class _Finder(importlib.abc.MetaPathFinder):
    """Finds megatron.core's modules where they are, and loads them with the rules."""

    def __init__(self, rewrites: Sequence[Rewrite], repairs: Sequence[Repair]) -> None:
        self.rewrites, self.repairs = rewrites, repairs

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not f"{fullname}.".startswith("megatron.core."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            repairs = [repair for repair in self.repairs if repair.module == fullname]
            spec.loader = _Loader(fullname, spec.loader.path, self.rewrites, repairs)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(
        self, fullname: str, path: str, rewrites: Sequence[Rewrite], repairs: Sequence[Repair]
    ) -> None:
        super().__init__(fullname, path)
        self.rewrites, self.repairs = rewrites, repairs

    def get_code(self, fullname: str) -> CodeType | None:
        source = importlib.util.decode_source(self.get_data(self.path))
        changed, hits = rewrite(source, self.rewrites)
        if not hits:
            return super().get_code(fullname)
        # Compiled here and not by the base class, whose __pycache__ other programs read too.
        code: CodeType = self.source_to_code(changed, self.path)
        return code

    def exec_module(self, module: ModuleType) -> None:
        if self.rewrites:
            vars(module)["_cuda_on_cpu"] = CUDA_ON_CPU
        with warnings.catch_warnings():
            for message in EXPECTED_WARNINGS:
                warnings.filterwarnings("ignore", message)
            super().exec_module(module)
        for repair in self.repairs:
            repair.apply(module)


# Only without CUDA.


class _Idle:
    """A stream or an event of a device that has finished when a call returns."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def wait_stream(self, stream: _Idle) -> None: ...

    def record_event(self) -> _Idle:
        return self

    def synchronize(self) -> None: ...


class CudaOnCpu:
    """What `torch.cuda` means inside megatron.core; any other name is still torch.cuda's, and so fails aloud."""

    Stream = _Idle

    def __init__(self) -> None:
        self._stream = _Idle()
        self.random = SimpleNamespace(get_rng_state=self.get_rng_state)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def current_stream(self) -> _Idle:
        return self._stream

    def synchronize(self) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def get_rng_state(self, device: object = None) -> torch.Tensor:
        return torch.get_rng_state()


CUDA_ON_CPU = CudaOnCpu()

# In this order: the first two have to see the names that the third one replaces.
CPU_REWRITES = (
    Rewrite(
        name="tensor_types",
        pattern=r"""(['"])torch\.cuda\.(Float|Half|BFloat16)Tensor""",
        replacement=r"\1torch.\2Tensor",
        why="optimizers compare Tensor.type() with 'torch.cuda.FloatTensor' and refuse any other",
    ),
    Rewrite(
        name="tensor_cuda",
        pattern=r"\.cuda\((?:non_blocking=True|torch\.cuda\.current_device\(\))?\)",
        replacement=".cpu()",
        why="tied embeddings across stages, loss scales and context parallel positions are moved with Tensor.cuda()",
    ),
    Rewrite(
        name="cuda_names",
        pattern=r"(?<!from )(?<!import )\btorch\.cuda\.(?=[A-Za-z_])",
        replacement="_cuda_on_cpu.",
        why="devices, streams and random states are those of torch.cuda",
    ),
    Rewrite(
        name="cuda_devices",
        pattern=r"""(["'])cuda\1""",
        replacement=r"\1cpu\1",
        why="token counts, loss scales and attention masks are created with device='cuda'",
    ),
    Rewrite(
        name="pinned_memory",
        pattern=r"\bpin_memory=True\b",
        replacement="pin_memory=False",
        why="context parallel positions are pinned, which needs an accelerator",
    ),
    Rewrite(
        name="compiled_fusions",
        pattern=r"(?m)^enable_jit_fuser\(\)",
        replacement="disable_jit_fuser()",
        why="activations go through torch.compile, which needs a C++ compiler and half a minute for the first step",
    ),
)


def _random_states(module: Any) -> None:
    module._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    # The tracked generator and the one that must not move are the same here.
    log = logging.getLogger(module.__name__)
    log.addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _split_sizes(module: Any) -> None:
    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    module.maybe_move_tensor_to_cpu = to_host


def _uneven_rows(module: Any) -> None:
    even_gather, even_scatter = module._gather_along_first_dim, module._reduce_scatter_along_first_dim

    def gather(rows: Any, group: Any, sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if sizes is None:
            return even_gather(rows, group, None, use_global_buffer)
        longest = int(max(sizes))
        parts = even_gather(_lengthened(rows, longest), group).split(longest)
        return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])

    def reduce_scatter(rows: Any, group: Any, sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if sizes is None:
            return even_scatter(rows, group, None, use_global_buffer)
        longest, parts = int(max(sizes)), rows.split([int(size) for size in sizes])
        mine = even_scatter(torch.cat([_lengthened(part, longest) for part in parts]), group)
        return mine[: int(sizes[group.rank()])]

    module._gather_along_first_dim, module._reduce_scatter_along_first_dim = gather, reduce_scatter


def _lengthened(rows: torch.Tensor, length: int) -> torch.Tensor:
    """Append rows of zeros until there are `length`."""
    return torch.cat([rows, rows.new_zeros(length - rows.size(0), *rows.shape[1:])])


CPU_REPAIRS = (
    Repair(
        name="random_states",
        module="megatron.core.tensor_parallel.random",
        apply=_random_states,
        why="a state is restored once CUDA starts, which it never does: restoring does nothing, and the queue grows",
    ),
    Repair(
        name="split_sizes",
        module="megatron.core.transformer.moe.moe_utils",
        apply=_split_sizes,
        why="split sizes of the all-to-all dispatcher become numbers only if they lay on a GPU; tensors are refused",
    ),
    Repair(
        name="uneven_rows",
        module="megatron.core.tensor_parallel.mappings",
        apply=_uneven_rows,
        why="experts with tensor parallelism gather different numbers of rows from each rank, which gloo refuses",
    ),
)


# Wherever Transformer Engine is missing: these faults are upstream's, and no device's.


def _sequence_parallel_norms(module: Any) -> None:
    create: _Function = module.WrappedTorchNorm.__new__

    def create_marked(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        whole = copy.copy(config)
        whole.sequence_parallel = False
        norm = create(cls, whole, *args, **kwargs)
        for parameter in norm.parameters():
            # As the fused norms do: it makes upstream add up these gradients over tensor parallel ranks.
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    module.WrappedTorchNorm.__new__ = staticmethod(create_marked)


def _router_product(module: Any) -> None:
    if not hasattr(module, "te_general_gemm"):
        module.te_general_gemm = None


def _latent_attention(module: Any) -> None:
    module.HAVE_TE = isinstance(module.TELinear, type)


def _torch_adam(module: Any) -> None:
    if not module.HAVE_APEX_OR_TE:
        _repair_torch_adam(module.DistributedOptimizer)


def _repair_torch_adam(cls: Any) -> None:
    save: _Function = cls.state_dict
    load: _Function = cls.load_state_dict
    put: _Function = cls._set_main_param_and_optimizer_states

    def state_dict(self: Any) -> Any:
        _create_adam_state(self.optimizer)
        return save(self)

    def load_state_dict(self: Any, state_dict: Any) -> None:
        load(self, state_dict)
        for state in self.optimizer.state.values():
            # All were given the same tensor, and each parameter would count its own step in it.
            state["step"] = state["step"].clone()

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def put_state(self: Any, model_param: Any, tensors: Any) -> None:
        group, index = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][index]]
        # Upstream keeps the step apart, and yet asks for it here: this copies it onto itself.
        put(self, model_param, {"step": state["step"], **tensors})

    cls.state_dict, cls.load_state_dict = state_dict, load_state_dict
    cls._set_main_param_and_optimizer_states = put_state


def _create_adam_state(optimizer: Any) -> None:
    """Give every parameter that has none yet the state that its first step would create."""
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        if not optimizer.state.get(parameter):
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}


LOCAL_REPAIRS = (
    Repair(
        name="sequence_parallel_norms",
        module="megatron.core.transformer.torch_norm",
        apply=_sequence_parallel_norms,
        why="norms refuse sequence parallelism, as nothing marks their gradients for the sum over ranks",
    ),
    Repair(
        name="router_product",
        module="megatron.core.transformer.moe.moe_utils",
        apply=_router_product,
        why="a router asks whether te_general_gemm is None, a name that the failed import never bound",
    ),
    Repair(
        name="latent_attention",
        module="megatron.core.transformer.multi_latent_attention",
        apply=_latent_attention,
        why="latent attention takes a missing package for there, and asks None whether a layer is an instance of it",
    ),
    Repair(
        name="torch_adam",
        module="megatron.core.optimizer.distrib_optimizer",
        apply=_torch_adam,
        why="loading into torch's Adam stops before the first step and on the key 'step', and would share one counter",
    ),
)
