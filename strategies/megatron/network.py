"""Settings -> process groups, GPTModel chunks, gradient buffers and optimizer, all of them Megatron-core's own.

Training and `verify` build through the same functions. Import nothing of Megatron-core before `prepare` has run.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from strategies.megatron import cpu
from strategies.megatron.settings import Extensions, Settings

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.transformer import TransformerConfig

_TYPE_KEYS = ("params_dtype", "pipeline_dtype")


def prepare() -> Extensions:
    """Make Megatron-core importable on this machine; say which optional kernels are here."""
    cpu.install()
    logging.getLogger("megatron").setLevel(logging.WARNING)  # it tells every configuration and bucket
    on_gpu = torch.cuda.is_available()
    return Extensions(
        transformer_engine=on_gpu and importlib.util.find_spec("transformer_engine") is not None,
        fused_accumulation=on_gpu and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
    )


def join_groups(parallel: Mapping[str, Any]) -> None:
    """Make Megatron-core's process groups inside the open one."""
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(**parallel, create_gloo_process_groups=False)
    # Dropout is off, but layers ask for the random states of their group all the same.
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def leave_groups() -> None:
    """Undo `join_groups`."""
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.destroy_model_parallel()
    tensor_parallel.get_cuda_rng_tracker().reset()


def build_config(settings: Settings) -> TransformerConfig:
    """Turn names of types and activations into objects; Megatron-core checks what it is told here."""
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    words = dict(settings.transformer)
    for key in _TYPE_KEYS:
        words[key] = getattr(torch, words[key])
    activation = {"silu": functional.silu, "gelu_tanh": partial(functional.gelu, approximate="tanh")}
    words["activation_func"] = activation[words["activation_func"]]
    words["init_method"] = words["output_layer_init_method"] = _leave_empty
    words["embedding_init_method"] = _leave_empty
    kind = MLATransformerConfig if words.get("multi_latent_attention") else TransformerConfig
    with warnings.catch_warnings():
        # Said to everybody who recomputes attention, fused or not; the planner knows which it is.
        warnings.filterwarnings(
            "ignore", "If you are using transformer_engine as the transformer implementation"
        )
        return kind(**words)


def build_chunks(settings: Settings, config: TransformerConfig, *, vocab_size: int) -> list[GPTModel]:
    """Build this rank's part of the model: one GPTModel for each chunk of its pipeline stage, without weights.

    Rows of the token table from `vocab_size` on are padding: their logits are kept out of the loss.
    """
    count = config.virtual_pipeline_model_parallel_size
    return [_build_chunk(settings, config, stage=stage, vocab_size=vocab_size) for stage in range(count or 1)]


def _build_chunk(settings: Settings, config: TransformerConfig, *, stage: int, vocab_size: int) -> GPTModel:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from strategies.megatron.attention import with_own_attention

    vp_stage = stage if config.virtual_pipeline_model_parallel_size else None
    engine = config.transformer_impl == "transformer_engine"
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=engine, normalization=config.normalization, vp_stage=vp_stage
    )
    if not engine:
        spec = with_own_attention(spec)
    chunk = GPTModel(
        config,
        spec,
        **settings.model,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        vp_stage=vp_stage,
    )
    _mark_experts(chunk)
    if torch.cuda.is_available():
        chunk.cuda(torch.cuda.current_device())  # upstream makes norms, positions and routers on the host
    if chunk.post_process:
        _mask_padding(chunk, vocab_size=vocab_size)
    return chunk


def wrap(
    settings: Settings, config: TransformerConfig, chunks: list[GPTModel]
) -> tuple[list[DistributedDataParallel], MegatronOptimizer]:
    """Give the chunks their gradient buffers, and the optimizer its (sharded) states."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    ddp_config = DistributedDataParallelConfig(**settings.ddp)
    # Later chunks are reduced beside the backward pass of earlier ones as a whole.
    wrapped = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(_narrow(config, chunks))
    ]
    words = dict(settings.optimizer)
    words["params_dtype"] = getattr(torch, words["params_dtype"])
    optimizer = get_megatron_optimizer(OptimizerConfig(**words), wrapped, use_gloo_process_groups=False)
    for group in optimizer.param_groups:
        # Upstream leaves this to its scheduler, which is not used here: norms and biases do not decay.
        group["weight_decay"] = settings.optimizer["weight_decay"] * group["wd_mult"]
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    if ddp_config.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return wrapped, optimizer


def _narrow(config: TransformerConfig, chunks: list[GPTModel]) -> list[Any]:
    """Give 16-bit chunks the casts at their borders; a router's correction bias decides between near equals: fp32."""
    from megatron.core.transformer.module import Float16Module

    if config.params_dtype.itemsize == 4:
        return list(chunks)
    modules = [module for chunk in chunks for module in chunk.modules()]
    biases = [(module, module.expert_bias) for module in modules if hasattr(module, "expert_bias")]
    narrow = [Float16Module(config, chunk) for chunk in chunks]
    for module, bias in biases:
        module.expert_bias = bias
    return narrow


def _leave_empty(tensor: torch.Tensor) -> torch.Tensor:
    """Draw nothing: the weights come from a folder."""
    return tensor


def _mark_experts(chunk: GPTModel) -> None:
    """Have experts' gradients reduced over all ranks that hold them.

    Upstream does so only with expert parallelism. Without it, tensor parallel ranks that hold whole experts (etp below
    tp) would each keep the gradients of their own tokens: wrong and silent.
    """
    for name, parameter in chunk.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False


def _mask_padding(chunk: GPTModel, *, vocab_size: int) -> None:
    """Fill logits of padding rows with the least value, so that loss and gradients are those without padding."""
    from megatron.core import parallel_state

    rows = chunk.output_layer.output_size_per_partition
    first = max(0, vocab_size - parallel_state.get_tensor_model_parallel_rank() * rows)
    if first >= rows:
        return

    def fill(
        _module: torch.nn.Module, _inputs: Any, output: tuple[torch.Tensor, Any]
    ) -> tuple[torch.Tensor, Any]:
        logits, bias = output
        # Past autograd, which would copy the gradient of all logits to find zeros in these.
        logits.detach()[..., first:] = torch.finfo(logits.dtype).min
        return logits, bias

    chunk.output_layer.register_forward_hook(fill)
