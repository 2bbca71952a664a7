"""How long a save stops training when it is written beside it, over a save of the same state that is waited for.

Run: python -m benchmarks.checkpoint_stall --engine accelerate --num-ranks 2 --record
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks import record
from launcher.checkpoint import Manifest
from launcher.config import Job
from launcher.data.loader import BatchLoader
from launcher.monitor.metrics import StepMetrics
from launcher.monitor.observe import Observer
from launcher.ranks import Ranks
from launcher.run_dir import RunDir, open_run
from launcher.submit import local
from launcher.training import worker
from launcher.training.saver import Position
from launcher.training.trainer import Trainer

BAR = 0.10
SMALLEST_GIB = 1.0
ENGINES = {
    "ddp": ("strategy=accelerate", "plan.zero_stage=0"),
    "fsdp2": ("strategy=accelerate", "plan.zero_stage=3"),
    "deepspeed": ("strategy=deepspeed", "plan.zero_stage=2"),
    "megatron": ("strategy=megatron", "plan.tp=1", "plan.pp=1", "plan.zero_stage=0"),
    "megatron-zero": ("strategy=megatron", "plan.tp=1", "plan.pp=1", "plan.zero_stage=1"),
    "megatron-tp": ("strategy=megatron", "plan.tp=2"),
}
# 94 million parameters: 1.05 GiB of fp32 weights and moments. Steps are short, so that a save is met by many.
LARGE = (
    *("model=debug_tiny", "model.num_layers=13", "model.hidden_size=768", "model.ffn_hidden_size=2048"),
    *(
        "model.num_attention_heads=12",
        "model.num_kv_heads=12",
        "training.precision=fp32",
        "plan.recompute=none",
    ),
    *("training.sequence_length=16", "plan.micro_batch_size=1", "plan.num_microbatches=1"),
    *("monitor=none", "data.max_bytes=300000", "evaluation.num_sequences=2", "checkpoint.keep_last=1"),
)


def main(arguments: Sequence[str]) -> None:
    if arguments[:1] == ["--rank"]:
        sys.exit(_be_rank(Path(arguments[1]), rounds=int(arguments[2])))
    options = _parse(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        run = _prepare(Path(folder) / "run", engine=options.engine, num_ranks=options.num_ranks)
        figures = _measure(run, num_ranks=options.num_ranks, rounds=options.rounds)
    figures = {"engine": options.engine, "num_ranks": options.num_ranks, **figures}
    print(json.dumps(figures, indent=2))
    if options.record:
        done = record.create("checkpoint_stall", arguments=arguments, figures=figures)
        name = f"checkpoint_stall-{options.engine}-{options.num_ranks}"
        print(f"recorded {record.write(done, name=name).name}")


def _prepare(path: Path, *, engine: str, num_ranks: int) -> RunDir:
    """Train one step: from then on an optimizer has state."""
    words = [*LARGE, *ENGINES[engine], f"cluster.gpus_per_node={num_ranks}"]
    words += [f"training.global_batch_size={1 if engine == 'megatron-tp' else num_ranks}"]
    words += ["training.num_steps=100000", "stop_at_step=1", f"run_dir={path}"]
    _call([sys.executable, "-m", "launcher", "train", *words])
    return open_run(path)


def _measure(run: RunDir, *, num_ranks: int, rounds: int) -> dict[str, Any]:
    """Resume the run with ranks that measure instead of training on."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    this = ["-m", "benchmarks.checkpoint_stall", "--rank", str(run.path), str(rounds)]
    _call([sys.executable, *(torchrun if num_ranks > 1 else []), *this], num_ranks=num_ranks)
    answer = json.loads((run.path / "stall.json").read_text(encoding="utf-8"))
    return summary(answer["rounds"], state_gib=answer["state_gib"])


def summary(rounds: Sequence[Mapping[str, float]], *, state_gib: float) -> dict[str, Any]:
    """Ratios of saves of the same round. The first round allocates the copy's memory, and stands apart."""
    ratios = [each["stall_s"] / each["waited_s"] for each in rounds]
    later = ratios[1:]
    return {
        "state_gib": state_gib,
        "bar": BAR,
        "ratio": {"median": statistics.median(later), "min": min(later), "max": max(later)},
        "ratio_first": ratios[0],
        # Beside a save, the ranks of a CPU share their cores and their memory's bandwidth with its writing.
        "step_beside_a_save_over_step_alone": statistics.median(
            each["step_beside_s"] / each["step_s"] for each in rounds
        ),
        "rounds": [dict(each) for each in rounds],
    }


def _be_rank(path: Path, *, rounds: int) -> int:
    """Be a worker of the run that saves in turns, waited for and beside the training."""

    def measure(trainer: Trainer, run: RunDir, job: Job, ranks: Ranks) -> None:
        microbatches = trainer.plan.num_microbatches
        loader = trainer._loader(
            "train", start_sample=trainer.consumed_samples, num_microbatches=microbatches
        )
        with loader, closing(trainer._observer()) as observer:
            found = [_round(trainer, loader, observer) for _ in range(rounds)]
        if ranks.rank == 0:
            newest = trainer._saver.tiers.committed()[0]
            manifest: Manifest = trainer._saver.tiers.verify(newest)
            size = sum(entry.size for entry in manifest.files) / 2**30
            (run.path / "stall.json").write_text(json.dumps({"rounds": found, "state_gib": size}))

    worker._train = measure
    return worker.main([str(path)])


def _round(trainer: Trainer, loader: BatchLoader, observer: Observer) -> dict[str, float]:
    """Save and wait; save beside the training and step until it is done. Seconds of the slowest rank."""
    alone = [_step(trainer, loader, observer).step_time_s for _ in range(2)]
    waited_s = _save(trainer, last=True)
    _step(trainer, loader, observer)
    stall_s = _save(trainer, last=False)
    beside = []
    while trainer.ranks.any(trainer._saver._background.is_busy):
        beside.append(_step(trainer, loader, observer).step_time_s)
    started = time.perf_counter()
    trainer._saver.settle()
    return {
        "waited_s": trainer.ranks.maximum(waited_s),
        "stall_s": trainer.ranks.maximum(stall_s + time.perf_counter() - started),
        "step_s": statistics.median(alone),
        "step_beside_s": statistics.median(beside or alone),
        "num_steps_beside": len(beside),
    }


def _step(trainer: Trainer, loader: BatchLoader, observer: Observer) -> StepMetrics:
    return trainer._one_step(loader, observer)


def _save(trainer: Trainer, *, last: bool) -> float:
    trainer.ranks.barrier()
    position = Position(step=trainer.step, consumed_samples=trainer.consumed_samples)
    started = time.perf_counter()
    trainer._saver.save(position, last=last)
    return time.perf_counter() - started


def _call(command: Sequence[str], *, num_ranks: int = 1) -> None:
    environment = local.environment(
        os.environ, num_processes=num_ranks, num_cores=len(os.sched_getaffinity(0))
    )
    done = subprocess.run(
        command, env=environment, cwd=record.REPOSITORY, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-4000:]}")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint_stall", description=__doc__)
    parser.add_argument("--engine", choices=sorted(ENGINES), required=True)
    parser.add_argument("--num-ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--folder", help="on the disk that is to be measured; by default the temporary one")
    parser.add_argument("--record", action="store_true", help="write a record to benchmarks/records")
    options = parser.parse_args(arguments)
    if options.engine == "megatron-tp" and options.num_ranks != 2:
        parser.error("--engine=megatron-tp has two ranks")
    if options.engine == "fsdp2" and options.num_ranks == 1:
        parser.error("--engine=fsdp2 needs two ranks: a plan for one does not shard")
    return options


if __name__ == "__main__":
    main(sys.argv[1:])
