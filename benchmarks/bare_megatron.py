"""Megatron-core as a researcher writes it by hand: what `step_overhead` compares with.

Trains dense models of the llama and qwen3 families. Shares nothing with the other bare scripts, on purpose, and nothing
with Meshwright except what lets Megatron-core start without CUDA or Transformer Engine (strategies/megatron/cpu.py).
Run: torchrun --nproc-per-node=2 benchmarks/bare_megatron.py --help
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator
from itertools import count

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import AutoConfig, PretrainedConfig

from strategies.megatron import cpu

cpu.install()  # before the first import of megatron.core

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: E402
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ON_GPU = torch.cuda.is_available()
HAS_TE = ON_GPU and importlib.util.find_spec("transformer_engine") is not None
HAS_FUSED_WGRAD = ON_GPU and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def main() -> None:
    args = parse_arguments()
    if args.tensor_parallel > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if ON_GPU else torch.device("cpu")
    if ON_GPU:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if ON_GPU else "gloo")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_parallel, create_gloo_process_groups=False
    )
    tensor_parallel.model_parallel_cuda_manual_seed(0)

    config = AutoConfig.from_pretrained(args.config)
    transformer = transformer_config(args, config)
    model = gpt_model(config, transformer, device, padding=128 * args.tensor_parallel)
    model = DistributedDataParallel(transformer, ddp_config(), model)
    model.train()
    optimizer = get_megatron_optimizer(optimizer_config(args), [model], use_gloo_process_groups=False)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.1 * group["wd_mult"]  # otherwise the scheduler's work
    transformer.no_sync_func = model.no_sync
    transformer.finalize_model_grads_func = finalize_model_grads
    transformer.grad_scale_func = optimizer.scale_loss

    schedule = get_forward_backward_func()
    data = batches(args, device)
    with open(args.out if dist.get_rank() == 0 else os.devnull, "w", buffering=1) as log:
        for step in range(1, args.num_steps + 1):
            model.zero_grad_buffer()
            optimizer.zero_grad()
            losses = schedule(
                forward_step_func=forward_step,
                data_iterator=data,
                model=model,
                num_microbatches=args.num_microbatches,
                seq_length=args.sequence_length,
                micro_batch_size=args.micro_batch_size,
                forward_only=False,
            )
            optimizer.step()
            mean = torch.stack(losses).mean().item()
            log.write(json.dumps({"step": step, "loss": mean, "time": time.time()}) + "\n")
    dist.destroy_process_group()


def transformer_config(args: argparse.Namespace, config: PretrainedConfig) -> TransformerConfig:
    return TransformerConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=config.head_dim,
        qk_layernorm=config.model_type == "qwen3",
        normalization="RMSNorm",
        layernorm_epsilon=config.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=DTYPES[args.precision],
        bf16=args.precision == "bf16",
        tensor_model_parallel_size=args.tensor_parallel,
        sequence_parallel=args.tensor_parallel > 1,
        gradient_accumulation_fusion=HAS_FUSED_WGRAD,
        transformer_impl="transformer_engine" if HAS_TE else "local",
        cross_entropy_loss_fusion=HAS_TE,
        cross_entropy_fusion_impl="te" if HAS_TE else "native",
        bias_dropout_fusion=HAS_TE,
        masked_softmax_fusion=False,
    )


def ddp_config() -> DistributedDataParallelConfig:
    return DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
    )


def optimizer_config(args: argparse.Namespace) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=1e-3,
        weight_decay=0.1,
        adam_beta1=0.9,
        adam_beta2=0.95,
        clip_grad=1.0,
        params_dtype=DTYPES[args.precision],
        bf16=args.precision == "bf16",
        use_distributed_optimizer=True,
        overlap_param_gather=True,
    )


def gpt_model(
    config: PretrainedConfig, transformer: TransformerConfig, device: torch.device, *, padding: int
) -> torch.nn.Module:
    """The model with its own random weights; the vocabulary is padded to a multiple of `padding`."""
    if HAS_TE:
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=transformer.qk_layernorm)
    else:
        spec = get_gpt_layer_local_spec(qk_layernorm=transformer.qk_layernorm, normalization="RMSNorm")
    model = GPTModel(
        transformer,
        spec,
        vocab_size=-(-config.vocab_size // padding) * padding,
        max_sequence_length=config.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=config.rope_parameters["rope_theta"],
        share_embeddings_and_output_weights=config.tie_word_embeddings,
    ).to(device)
    return Float16Module(transformer, model) if transformer.bf16 else model


def forward_step(
    data: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module
) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]]:
    per_token = model(**next(data), attention_mask=None)
    return per_token, mean_loss


def mean_loss(per_token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    loss = per_token.float().mean()
    return loss, loss.detach().clone()  # the schedule divides the first in place


def batches(args: argparse.Namespace, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's sequences in a shuffled order, without end: each tensor is (micro_batch_size, sequence_length)."""
    rank = parallel_state.get_data_parallel_rank()
    world_size = parallel_state.get_data_parallel_world_size()
    tokens = np.memmap(args.tokens, dtype=args.dtype, mode="r")
    num_sequences = (len(tokens) - 1) // args.sequence_length
    order = np.random.default_rng(0).permutation(num_sequences)
    positions = torch.arange(args.sequence_length, device=device).repeat(args.micro_batch_size, 1)
    for position in count(rank * args.micro_batch_size, world_size * args.micro_batch_size):
        rows = order[np.arange(position, position + args.micro_batch_size) % num_sequences]
        starts = rows * args.sequence_length
        batch = np.stack([tokens[i : i + args.sequence_length + 1] for i in starts]).astype(np.int64)
        batch = torch.from_numpy(batch).to(device)
        yield {"input_ids": batch[:, :-1], "labels": batch[:, 1:], "position_ids": positions}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True, help="folder of a Hugging Face config.json")
    parser.add_argument("--tokens", required=True, help="file of bare token ids")
    parser.add_argument("--dtype", default="uint16")
    parser.add_argument("--sequence-length", type=int, required=True)
    parser.add_argument("--micro-batch-size", type=int, required=True)
    parser.add_argument("--num-microbatches", type=int, required=True)
    parser.add_argument("--num-steps", type=int, required=True)
    parser.add_argument("--precision", choices=sorted(DTYPES), required=True)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--out", required=True, help="file of one JSON line a step")
    return parser.parse_args()


if __name__ == "__main__":
    main()
