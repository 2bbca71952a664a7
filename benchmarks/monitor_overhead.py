"""What watching a run costs a step: all sinks, samples and alerts on and off, block by block inside one run.

Run: python -m benchmarks.monitor_overhead --record
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import record
from launcher import compose
from launcher.freeze import freeze
from launcher.output import Output
from launcher.submit import local

BAR = 1.01
SMALL = (
    *("model=debug_tiny", "model.num_layers=4", "model.hidden_size=288", "model.ffn_hidden_size=768"),
    *("training.sequence_length=128", "training.global_batch_size=8", "monitor.prometheus=true"),
    *("monitor.prometheus_port=0", "checkpoint.save_last=false", "evaluation.num_sequences=8"),
)


def main(arguments: Sequence[str]) -> None:
    options = _parse(arguments)
    words = [*SMALL, f"training.num_steps={(2 * options.pairs + 1) * options.block}", *options.words]
    with tempfile.TemporaryDirectory() as folder:
        steps = _run(words, Path(folder), block=options.block, num_ranks=options.num_ranks)
    figures = summary(steps, block=options.block)
    print(json.dumps({key: value for key, value in figures.items() if key != "pairs"}, indent=2))
    if options.record:
        done = record.create("monitor_overhead", arguments=arguments, figures=figures)
        print(f"recorded {record.write(done, name='monitor_overhead').name}")


def summary(ends: Sequence[float], *, block: int) -> dict[str, Any]:
    """Return the ratio of each pair of neighbouring blocks, on over off, and their median.

    `ends` are the ends of all steps. The first block warms up. Which of the two comes first alternates, so that a
    machine that drifts favours neither. A block counts with its mean, because what samples cost is in few steps.
    """
    seconds = [after - before for before, after in pairwise(ends)]
    blocks = [seconds[start : start + block] for start in range(block - 1, len(seconds) - block + 1, block)]
    pairs = []
    for number in range(len(blocks) // 2):
        two = {is_on(2 * number + 1 + place): blocks[2 * number + place] for place in (0, 1)}
        pairs.append({"on_s": statistics.mean(two[True]), "off_s": statistics.mean(two[False])})
    ratios = sorted(pair["on_s"] / pair["off_s"] for pair in pairs)
    return {
        "median_ratio": statistics.median(ratios),
        "lowest_ratio": ratios[0],
        "highest_ratio": ratios[-1],
        "mean_ratio": sum(p["on_s"] for p in pairs) / sum(p["off_s"] for p in pairs),
        "step_s": statistics.median(pair["off_s"] for pair in pairs),
        "pairs": pairs,
        "bar": BAR,
    }


def is_on(block: int) -> bool:
    """Tell whether a block watches: off on | on off | off on ... behind the first one."""
    pair, second = divmod(block - 1, 2)
    return bool(second) != bool(pair % 2)


def _run(words: Sequence[str], folder: Path, *, block: int, num_ranks: int) -> list[float]:
    """Train once with a worker that turns watching on and off, and return the ends of rank 0's steps."""
    (job,) = compose.jobs([*words, f"cluster.gpus_per_node={num_ranks}", f"run_dir={folder / 'run'}"])
    run = freeze(job, Output(as_json=True))
    python = sys.executable
    command = local.argv(run_dir=run.path, num_processes=num_ranks, port=None, python=python)
    command = [
        "benchmarks.switched_worker" if word == "launcher.training.worker" else word for word in command
    ]
    environment = local.environment(
        os.environ, num_processes=num_ranks, num_cores=len(os.sched_getaffinity(0)), python=python
    )
    ends = folder / "ends.json"
    told = {
        **environment,
        "MESHWRIGHT_BLOCK": str(block),
        "MESHWRIGHT_ENDS": str(ends),
        "WANDB_MODE": "offline",
    }
    subprocess.run(command, env=told, check=True, stdout=subprocess.DEVNULL)
    found: list[float] = json.loads(ends.read_text(encoding="utf-8"))
    return found


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--block", type=int, default=60, help="steps between two turns of the switch")
    parser.add_argument("--num-ranks", type=int, default=2)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("words", nargs="*", help="model and training, in the launcher's words")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
