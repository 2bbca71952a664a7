"""DeepSpeed ZeRO-2 as a researcher writes it by hand: what `step_overhead` compares with.

Imports nothing of Meshwright, and shares nothing with the other bare script, on purpose.
Run: torchrun --nproc-per-node=2 benchmarks/bare_deepspeed.py --help
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from itertools import count

import deepspeed
import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM


def main() -> None:
    args = parse_arguments()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    # DeepSpeed would compile an all-reduce of its own on CPUs; both sides use gloo.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(args.config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    bucket = min(200_000_000, sum(p.numel() for p in model.parameters()))
    ds_config = {
        "train_micro_batch_size_per_gpu": args.micro_batch_size,
        "gradient_accumulation_steps": args.num_microbatches,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket},
        "zero_force_ds_cpu_optimizer": False,
        "timers": {"throughput": {"enabled": False}},
        "steps_per_print": None,
    }
    if args.precision == "bf16":
        ds_config.update({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}})
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=on_gpu or None)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    engine.train()

    data = batches(args, rank=rank, world_size=world_size)
    with open(args.out if rank == 0 else os.devnull, "w", buffering=1) as log:
        for step in range(1, args.num_steps + 1):
            losses = []
            for _ in range(args.num_microbatches):
                batch = torch.from_numpy(next(data)).to(device)
                logits = engine(input_ids=batch[:, :-1], use_cache=False).logits
                loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
                engine.backward(loss)
                engine.step()
                losses.append(loss.detach())
            mean = torch.stack(losses).mean().item()
            log.write(json.dumps({"step": step, "loss": mean, "time": time.time()}) + "\n")
    torch.distributed.destroy_process_group()


def batches(args: argparse.Namespace, *, rank: int, world_size: int) -> Iterator[np.ndarray]:
    """This rank's sequences in a shuffled order, (micro_batch_size, sequence_length + 1), without end."""
    tokens = np.memmap(args.tokens, dtype=args.dtype, mode="r")
    num_sequences = (len(tokens) - 1) // args.sequence_length
    order = np.random.default_rng(0).permutation(num_sequences)
    for position in count(rank * args.micro_batch_size, world_size * args.micro_batch_size):
        rows = order[np.arange(position, position + args.micro_batch_size) % num_sequences]
        starts = rows * args.sequence_length
        yield np.stack([tokens[i : i + args.sequence_length + 1] for i in starts]).astype(np.int64)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True, help="folder of a Hugging Face config.json")
    parser.add_argument("--tokens", required=True, help="file of bare token ids")
    parser.add_argument("--dtype", default="uint16")
    parser.add_argument("--sequence-length", type=int, required=True)
    parser.add_argument("--micro-batch-size", type=int, required=True)
    parser.add_argument("--num-microbatches", type=int, required=True)
    parser.add_argument("--num-steps", type=int, required=True)
    parser.add_argument("--precision", choices=["fp32", "bf16"], required=True)
    parser.add_argument("--out", required=True, help="file of one JSON line a step")
    return parser.parse_args()


if __name__ == "__main__":
    main()
