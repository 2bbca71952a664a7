"""Tries what each rule of strategies.megatron.cpu is for, once with all rules and once without it.

Started by test_cpu.py: python megatron_cpu_worker.py RESULTS.json. Every trial is a process of its own, since
megatron.core can be imported only once; all of them start from this one, which has imported torch.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.tensor  # these two are most of what an import of megatron.core takes

from strategies.megatron import cpu

# A rank that waits longer for another one that failed outlives the test.
PATIENCE = timedelta(minutes=2)


def main() -> None:
    torch.set_num_threads(1)
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        with_cuda = pool.apply_async(trial_with_cuda)
        whole, *partial = pool.map(trial, [(), *TRIALS], chunksize=1)
        without = {name: failed for outcome in partial for name, failed in outcome["failed"].items()}
        outcomes = {**whole, "without": without, "with_cuda": with_cuda.get()}
    Path(sys.argv[1]).write_text(json.dumps(outcomes), encoding="utf-8")


def trial_with_cuda() -> dict[str, Any]:
    """Import where torch says that there is a GPU, but Transformer Engine is missing."""
    torch.cuda.is_available = lambda: True
    cpu.install()
    from megatron.core import jit

    return {
        "compiled": jit.jit_fuser is torch.compile,
        "rewritten": [
            name
            for name, module in sys.modules.items()
            if name.startswith("megatron.") and hasattr(module, "_cuda_on_cpu")
        ],
        "failed": {
            name: failure(PROBES[name])
            for name in ("sequence_parallel_norms", "router_product", "latent_attention")
        },
    }


def trial(left_out: tuple[str, ...]) -> dict[str, Any]:
    """Run the probes of the rules left out, or all; say what failed, and with all rules which found something."""
    if not left_out:
        warnings.simplefilter("error")
    for rules in ("CPU_REWRITES", "CPU_REPAIRS", "LOCAL_REPAIRS"):
        setattr(cpu, rules, tuple(rule for rule in getattr(cpu, rules) if rule.name not in left_out))
    cpu.install()
    cpu.install()
    probes = left_out or tuple(PROBES)
    ranks = 2 if "uneven_rows" in probes else 1
    store = Path(sys.argv[1]).absolute().with_name("-".join(left_out) or "all")
    rank = 0 if ranks == 1 or os.fork() else 1
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", timeout=PATIENCE, rank=rank, world_size=ranks
    )
    everywhere: list[dict[str, str | None]] = [{}] * ranks
    dist.all_gather_object(everywhere, {name: failure(PROBES[name]) for name in probes})
    if rank == 1:
        os._exit(0)
    failed = {name: next((found[name] for found in everywhere if found[name]), None) for name in probes}
    return {"failed": failed, "hits": [] if left_out else sorted(hits())}


def failure(probe: Callable[[], None]) -> str | None:
    try:
        probe()
    except Exception:
        return traceback.format_exc()
    return None


def hits() -> set[str]:
    """Name the rewrites that change at least one module that is imported by now."""
    files = [module.__file__ for name, module in sys.modules.items() if name.startswith("megatron.core.")]
    return {hit for file in files if file for hit in cpu.rewrite(Path(file).read_text(), cpu.CPU_REWRITES)[1]}


def clips_gradients() -> None:
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    parameter = torch.ones(2, requires_grad=True)
    parameter.grad = torch.ones(2)
    clip_grad_by_total_norm_fp32([parameter], 1.0, 2.0)
    torch.testing.assert_close(parameter.grad, torch.full((2,), 0.5))


def restores_a_loss_scale() -> None:
    from megatron.core.optimizer.grad_scaler import DynamicGradScaler

    options = {"growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 1, "hysteresis": 1}
    saved, other = (DynamicGradScaler(initial_scale=scale, min_scale=1.0, **options) for scale in (8.0, 4.0))
    other.load_state_dict(saved.state_dict())
    assert other.scale.item() == 8.0


def knows_the_device() -> None:
    from megatron.core.utils import GlobalMemoryBuffer

    assert GlobalMemoryBuffer().get_tensor([2], torch.float32, "test").device.type == "cpu"


def masks() -> None:
    from megatron.core.transformer.utils import get_default_causal_mask

    assert get_default_causal_mask(2).tolist() == [[False, True], [False, False]]


def deals_out_positions() -> None:
    from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank

    second_of_two: Any = SimpleNamespace(size=lambda: 2, rank=lambda: 1)
    assert get_pos_emb_on_this_cp_rank(torch.arange(8), 0, second_of_two).tolist() == [2, 3, 4, 5]


def compiles_nothing() -> None:
    from megatron.core.fusions import fused_bias_swiglu

    assert fused_bias_swiglu.swiglu.__module__ == fused_bias_swiglu.__name__
    assert not hasattr(fused_bias_swiglu.swiglu, "_torchdynamo_orig_callable")


def keeps_random_states_apart() -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    torch.manual_seed(1)
    expected = [torch.rand(1).item() for _ in range(2)]
    torch.manual_seed(1)
    tracker = CudaRNGStatesTracker()
    tracker.add("other", 2)
    found = [torch.rand(1).item()]
    inside = []
    for _ in range(2):
        with tracker.fork("other"):
            inside.append(torch.rand(1).item())
    found.append(torch.rand(1).item())
    assert found == expected
    torch.manual_seed(2)
    assert inside == [torch.rand(1).item() for _ in range(2)]


def hands_over_split_sizes() -> None:
    from megatron.core.transformer.moe.moe_utils import maybe_move_tensor_to_cpu

    sizes = maybe_move_tensor_to_cpu(torch.full((dist.get_world_size(),), 2), as_numpy=True)
    sent = torch.arange(2.0 * len(sizes))
    received = torch.zeros_like(sent)
    dist.all_to_all_single(received, sent, sizes, sizes)
    assert received.tolist() == [2.0 * dist.get_rank(), 2.0 * dist.get_rank() + 1] * len(sizes)


def gathers_uneven_rows() -> None:
    from megatron.core.tensor_parallel import mappings

    gather = mappings.gather_from_sequence_parallel_region
    reduce_scatter = mappings.reduce_scatter_to_sequence_parallel_region
    rank, sizes, group = dist.get_rank(), [1, 2], dist.group.WORLD
    rows = torch.full((sizes[rank], 2), rank + 1.0, requires_grad=True)
    gathered = gather(rows, group=group, output_split_sizes=sizes)
    assert gathered.tolist() == [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]
    (gathered * (rank + 1)).sum().backward()  # both ranks ask for every row: 1 + 2
    assert rows.grad is not None
    assert rows.grad.tolist() == [[3.0, 3.0]] * sizes[rank]
    whole = torch.arange(3.0, requires_grad=True)
    mine = reduce_scatter(whole, group=group, input_split_sizes=sizes)
    assert mine.tolist() == [[0.0], [2.0, 4.0]][rank]
    mine.sum().backward()
    assert whole.grad is not None
    assert whole.grad.tolist() == [1.0] * 3


def marks_norms() -> None:
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    for sequence_parallel in (False, True):
        config = TransformerConfig(
            num_layers=1,
            hidden_size=8,
            num_attention_heads=2,
            cuda_graph_scope=[],
            tensor_model_parallel_size=2,
            sequence_parallel=sequence_parallel,
        )
        norm = WrappedTorchNorm(config=config, hidden_size=8)
        assert [p.sequence_parallel for p in norm.parameters()] == [sequence_parallel] * 2
        assert config.sequence_parallel is sequence_parallel


def routes() -> None:
    from megatron.core.transformer.moe.moe_utils import router_gating_linear

    tokens, weight = torch.rand(3, 4), torch.rand(2, 4)
    torch.testing.assert_close(router_gating_linear(tokens, weight, None, torch.float32), tokens @ weight.T)


def tells_its_layers_apart() -> None:
    """What MLASelfAttention does to each of its projections when it is built."""
    from megatron.core.transformer import multi_latent_attention

    projection = torch.nn.Linear(1, 1)
    assert not (multi_latent_attention.HAVE_TE and isinstance(projection, multi_latent_attention.TELinear))


def loads_into_torch_adam() -> None:
    first, second = (sharded_optimizer() for _ in range(2))
    for optimizer in (first, second):
        optimizer.state_dict()  # before the first step
    for count in (1, 2):
        step(first, count)
    second.load_state_dict(first.state_dict())
    steps = [state["step"] for state in second.optimizer.state.values()]
    assert [count.item() for count in steps] == [2.0] * len(steps)
    assert len({count.data_ptr() for count in steps}) == len(steps) >= 2
    for ours, theirs in zip(
        second.model_param_group_index_map, first.model_param_group_index_map, strict=True
    ):
        found = first._get_main_param_and_optimizer_states(theirs)
        second._set_main_param_and_optimizer_states(ours, {k: v for k, v in found.items() if k != "step"})
    step(first, 3)
    step(second, 3)
    for ours, theirs in zip(
        second.model_param_group_index_map, first.model_param_group_index_map, strict=True
    ):
        assert torch.equal(ours, theirs)


def sharded_optimizer() -> Any:
    """Megatron's distributed optimizer over four parameters."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import MegatronModule

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, cuda_graph_scope=[])
    module = MegatronModule(config)
    torch.manual_seed(0)
    module.rows = torch.nn.ParameterList(torch.rand(8) for _ in range(4))
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
    wrapped = DistributedDataParallel(config, ddp, module)
    options = OptimizerConfig(optimizer="adam", lr=0.1, use_distributed_optimizer=True)
    return get_megatron_optimizer(options, [wrapped]).chained_optimizers[0]


def step(optimizer: Any, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in optimizer.model_param_group_index_map:
        parameter.main_grad.copy_(torch.rand_like(parameter))
    optimizer.step()


PROBES = {
    "tensor_types": clips_gradients,
    "tensor_cuda": restores_a_loss_scale,
    "cuda_names": knows_the_device,
    "cuda_devices": masks,
    "pinned_memory": deals_out_positions,
    "compiled_fusions": compiles_nothing,
    "random_states": keeps_random_states_apart,
    "split_sizes": hands_over_split_sizes,
    "uneven_rows": gathers_uneven_rows,
    "sequence_parallel_norms": marks_norms,
    "router_product": routes,
    "latent_attention": tells_its_layers_apart,
    "torch_adam": loads_into_torch_adam,
}
# Rules that may be missing together, as none of them matters to another one's probe.
TRIALS = (
    ("cuda_names",),
    ("tensor_cuda",),
    ("cuda_devices",),
    ("tensor_types", "pinned_memory", "compiled_fusions"),
    tuple(repair.name for repair in (*cpu.CPU_REPAIRS, *cpu.LOCAL_REPAIRS)),
)

if __name__ == "__main__":
    main()
