"""Four ranks of test_attention.py: own attention, split in several ways, against PyTorch's on the whole sequence.

Started as: python megatron_attention_worker.py CASES.json RESULTS.json. The results are the largest differences over
all ranks, of outputs and of gradients, relative to the largest element.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

from strategies.megatron import cpu

RANKS = 4
PATIENCE = timedelta(minutes=2)  # a rank that waits longer for one that failed outlives the test
LENGTH, BATCH, HEADS, GROUPS, SIZE = 16, 2, 4, 2, 8


def main() -> None:
    torch.set_num_threads(1)
    cpu.install()
    from strategies.megatron import attention  # noqa: F401  (once, and not in every rank)

    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run, args=(rank,)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(process.exitcode or 0 for process in ranks))


def run(rank: int) -> None:
    cases, results = (Path(argument) for argument in sys.argv[1:])
    store = f"file://{results.absolute().with_name('store')}"
    dist.init_process_group("gloo", init_method=store, timeout=PATIENCE, rank=rank, world_size=RANKS)
    found = {name: compare(**case) for name, case in json.loads(cases.read_text()).items()}
    if rank == 0:
        results.write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()


def compare(
    *,
    tp: int = 1,
    cp: int = 1,
    layer: int = 1,
    dtype: str = "float32",
    value_size: int | None = None,
    against: str = "torch",
    **options: Any,
) -> dict[str, float]:
    """Attend with own attention and with the other one; say how far outputs and gradients are apart at most."""
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, context_parallel_size=cp)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    groups = HEADS if value_size else GROUPS
    config = configuration(tp, cp, groups=groups, dtype=dtype, **options)
    torch.manual_seed(0)
    sizes = [(HEADS, SIZE), (groups, SIZE), (groups, value_size or SIZE)]
    whole = [torch.randn(LENGTH, BATCH, *size, dtype=getattr(torch, dtype)) for size in sizes]
    weight = torch.randn(LENGTH, BATCH, HEADS, value_size or SIZE, dtype=whole[0].dtype)
    latent = {"k_channels": SIZE, "v_channels": value_size} if value_size else {}
    own = derivatives(
        lambda *parts: built("own", config, layer, **latent)(*parts, None),
        [own_part(tensor, tp, cp) for tensor in whole],
        own_part(weight, tp, cp),
    )
    if against == "torch":
        expected = derivatives(
            lambda *parts: plain(*parts, window=config.window_size if layer % 2 else None),
            [tensor.double() for tensor in whole],
            weight.double(),
        )
    else:
        expected = derivatives(lambda *parts: built(against, config, layer)(*parts, None), whole, weight)
    names = ("output", "query", "key", "value")
    found = {
        name: farthest(mine, own_part(theirs, tp, cp))
        for name, mine, theirs in zip(names, own, expected, strict=True)
    }
    parallel_state.destroy_model_parallel()
    tensor_parallel.get_cuda_rng_tracker().reset()
    return found


def configuration(tp: int, cp: int, *, groups: int, dtype: str, **options: Any) -> Any:
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        num_layers=2,
        hidden_size=HEADS * SIZE,
        num_attention_heads=HEADS,
        num_query_groups=groups,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        params_dtype=getattr(torch, dtype),
        bf16=dtype == "bfloat16",
        cuda_graph_scope=[],
        **options,
    )


def built(kind: str, config: Any, layer: int, **options: Any) -> Any:
    """Build the core attention of a layer spec as SelfAttention does."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.enums import AttnMaskType

    from strategies.megatron.attention import with_own_attention

    spec = get_gpt_layer_local_spec()
    spec = with_own_attention(spec) if kind == "own" else spec
    return spec.submodules.self_attention.submodules.core_attention(
        config=config,
        layer_number=layer,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        cp_comm_type=None,
        softmax_scale=None,
        **options,
    )


def plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, window: list[int] | None
) -> torch.Tensor:
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)[None, :]
    seen = distance.ge(0) & distance.le(window[0] if window else LENGTH)
    query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
    context = functional.scaled_dot_product_attention(query, key, value, seen, enable_gqa=True)
    return context.permute(2, 0, 1, 3).flatten(2)


def derivatives(attend: Any, parts: list[torch.Tensor], weight: torch.Tensor) -> list[torch.Tensor]:
    """Return the output, as heads, and the gradients of its weighted sum for query, key and value."""
    parts = [part.clone().requires_grad_() for part in parts]
    output = attend(*parts).view(weight.shape)
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), parts)]


def own_part(tensor: torch.Tensor, tp: int, cp: int) -> torch.Tensor:
    """This rank's chunks of the sequence, as upstream deals them out, and its heads."""
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    dealt = get_batch_on_this_cp_rank({"part": tensor.transpose(0, 1)})["part"].transpose(0, 1)
    return dealt.chunk(tp, dim=2)[parallel_state.get_tensor_model_parallel_rank()].contiguous()


def farthest(found: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    dist.all_reduce(difference, op=dist.ReduceOp.MAX)
    return float(difference)


if __name__ == "__main__":
    main()
