"""What Meshwright costs a step: an engine through Meshwright and in a bare script, turn by turn.

Run: python -m benchmarks.step_overhead --engine deepspeed
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
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import record
from launcher.run_dir import RunDir, open_run
from launcher.submit import local

BAR = 1.02
MONITORS = ("default", "none")
# 0.15 to 0.3 s a step on two desktop cores.
SMALL = (
    "model=debug_tiny",
    "model.num_layers=4",
    "model.hidden_size=288",
    "model.ffn_hidden_size=768",
    "training.sequence_length=128",
)


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How Meshwright and the bare script run an engine; `zero_stage` is what the script has built in."""

    strategy: str
    script: str
    zero_stage: int
    takes_tp: bool = False


ENGINES = {
    "deepspeed": Engine(strategy="deepspeed", script="bare_deepspeed.py", zero_stage=2),
    "fsdp2": Engine(strategy="accelerate", script="bare_fsdp2.py", zero_stage=2),
    "megatron": Engine(strategy="megatron", script="bare_megatron.py", zero_stage=1, takes_tp=True),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One engine and one shape, the same on both sides."""

    engine: str
    num_ranks: int
    tp: int
    micro_batch_size: int
    num_microbatches: int
    num_steps: int
    warmup: int
    words: tuple[str, ...]  # model and training, in the launcher's words

    @property
    def name(self) -> str:
        """What the record is called."""
        split = f"-tp{self.tp}" if self.tp > 1 else ""
        return f"step_overhead-{self.engine}{split}-{self.num_microbatches}x{self.micro_batch_size}"


def main(arguments: Sequence[str]) -> None:
    options = _parse(arguments)
    case = Case(
        engine=options.engine,
        num_ranks=options.num_ranks,
        tp=options.tp,
        micro_batch_size=options.micro_batch_size,
        num_microbatches=options.num_microbatches,
        num_steps=options.num_steps,
        warmup=options.warmup,
        words=tuple(options.words) or SMALL,
    )
    with tempfile.TemporaryDirectory() as folder:
        rounds = [_round(case, Path(folder) / str(index)) for index in range(options.pairs)]
    figures = {**_summary(rounds), "rounds": rounds}
    print(json.dumps(_summary(rounds), indent=2))
    if options.record:
        done = record.create("step_overhead", arguments=arguments, figures=figures)
        print(f"recorded {record.write(done, name=case.name).name}")


def _round(case: Case, folder: Path) -> dict[str, float]:
    """Median step seconds of Meshwright, the bare script, and Meshwright without writers, in this order."""
    run = _run_meshwright(case, folder / "default", monitor="default")
    medians = {
        "default": median_step_s(run.metrics_file, warmup=case.warmup),
        "bare": median_step_s(_run_bare(case, run, folder / "bare.jsonl"), warmup=case.warmup),
    }
    quiet = _run_meshwright(case, folder / "none", monitor="none")
    medians["none"] = median_step_s(quiet.metrics_file, warmup=case.warmup)
    print(" ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in medians.items()), flush=True)
    return medians


def median_step_s(log: Path, *, warmup: int) -> float:
    """Median seconds from the end of one step to the end of the next, without warm-up and the last step.

    The last one is left out because Meshwright evaluates in it.
    """
    ends: list[float] = [json.loads(line)["time"] for line in log.read_text(encoding="utf-8").splitlines()]
    return statistics.median(later - earlier for earlier, later in pairwise(ends[warmup:-1]))


def _summary(rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Ratios to the bare script of the same round: their median, lowest and highest."""
    ratios = {name: [r[name] / r["bare"] for r in rounds] for name in MONITORS}
    steps = {f"step_s_{name}": statistics.median(r[name] for r in rounds) for name in (*MONITORS, "bare")}
    spread = {f"ratio_monitor_{name}": _spread(values) for name, values in ratios.items()}
    return {**spread, "bar": BAR, **steps}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _run_meshwright(case: Case, path: Path, *, monitor: str) -> RunDir:
    words = [*launcher_words(case), f"monitor={monitor}", f"run_dir={path}"]
    _call([sys.executable, "-m", "launcher", "train", *words], environment=dict(os.environ))
    return open_run(path)


def launcher_words(case: Case) -> list[str]:
    """Pin all of the plan that the bare script has built in; the rest are its options."""
    engine = ENGINES[case.engine]
    num_sequences = case.num_ranks // case.tp * case.micro_batch_size * case.num_microbatches
    return [
        *case.words,
        f"strategy={engine.strategy}",
        "cluster.num_nodes=1",
        f"cluster.gpus_per_node={case.num_ranks}",
        f"plan.tp={case.tp}",
        f"plan.sequence_parallel={'true' if case.tp > 1 else 'false'}",
        f"plan.zero_stage={engine.zero_stage}",
        "plan.recompute=none",
        f"plan.micro_batch_size={case.micro_batch_size}",
        f"plan.num_microbatches={case.num_microbatches}",
        f"training.global_batch_size={num_sequences}",
        f"training.num_steps={case.num_steps}",
        "checkpoint.interval=0",
        "checkpoint.save_last=false",
        f"evaluation.num_sequences={num_sequences}",
    ]


def _run_bare(case: Case, run: RunDir, log: Path) -> Path:
    """Run the bare script on the model shape, the tokens and the precision of `run`."""
    environment = local.environment(
        os.environ, num_processes=case.num_ranks, num_cores=len(os.sched_getaffinity(0))
    )
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.num_ranks}"]
    script = record.REPOSITORY / "benchmarks" / ENGINES[case.engine].script
    _call([sys.executable, *torchrun, str(script), *bare_words(case, run, log)], environment=environment)
    return log


def bare_words(case: Case, run: RunDir, log: Path) -> list[str]:
    """Tell the bare script what it shares with `run`, and where to write its steps."""
    job, plan, dataset = run.job(), run.plan(), run.dataset()
    options = {
        "config": run.weights,
        "tokens": dataset.path("train"),
        "dtype": dataset.dtype,
        "sequence-length": job.training.sequence_length,
        "micro-batch-size": plan.micro_batch_size,
        "num-microbatches": plan.num_microbatches,
        "num-steps": job.training.num_steps,
        "precision": plan.precision,
        "out": log,
    }
    if ENGINES[case.engine].takes_tp:
        options["tensor-parallel"] = plan.tp
    return [f"--{name}={value}" for name, value in options.items()]


def _call(command: Sequence[str], *, environment: dict[str, str]) -> None:
    done = subprocess.run(
        command, env=environment, cwd=record.REPOSITORY, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-4000:]}")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_overhead", description=__doc__)
    parser.add_argument("--engine", choices=sorted(ENGINES), required=True)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--num-steps", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--num-ranks", type=int, default=2)
    parser.add_argument("--tp", type=int, default=1, help="tensor and sequence parallel; with megatron only")
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--num-microbatches", type=int, default=1)
    parser.add_argument("--record", action="store_true", help="write a record to benchmarks/records")
    parser.add_argument("words", nargs="*", help="key=value for both sides, instead of a small model")
    options = parser.parse_args(arguments)
    if options.tp > 1 and not ENGINES[options.engine].takes_tp:
        parser.error(
            f"--tp={options.tp} is not in the bare script of --engine={options.engine}; use megatron"
        )
    if options.num_ranks % options.tp:
        parser.error(f"--tp={options.tp} does not divide --num-ranks={options.num_ranks}")
    return options


if __name__ == "__main__":
    main(sys.argv[1:])
