"""How long a full search over every known engine takes, how many plans it costs, and how both grow with the cluster.

Run: python -m benchmarks.search_speed [--record]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import record
from launcher import compose
from launcher.planner import Problem, Ranking, achieve
from launcher.planner.words.tables import describe

CASES = {
    "llama3_405b on 16,384 H100": (
        "model=llama3_405b",
        "cluster=h100_sxm",
        "cluster.num_nodes=2048",
        "training.sequence_length=8192",
        "training.global_batch_size=2048",
    ),
    "deepseek_v3 on 2,048 H800": (
        "model=deepseek_v3",
        "cluster=h800_sxm",
        "cluster.num_nodes=256",
        "training.sequence_length=4096",
        "training.global_batch_size=15360",
    ),
}
# The batch grows with the cluster, from 1,024 sequences on 1,024 GPUs.
GROWTH = (1024, 4096, 16384, 65536, 131072)


def main(arguments: Sequence[str]) -> None:
    options = _parse(arguments)
    figures: dict[str, Any] = {
        "cases": {name: _case(words, options.runs) for name, words in CASES.items()},
        "growth": {
            name: [_grown(words, gpus, options.runs) for gpus in GROWTH] for name, words in CASES.items()
        },
    }
    print(json.dumps(figures, indent=2))
    if options.record:
        done = record.create("search_speed", arguments=arguments, figures=figures)
        print(f"recorded {record.write(done, name='search_speed').name}")


def _case(words: Sequence[str], runs: int) -> dict[str, Any]:
    """Measure the search in this process and the command as a user feels it."""
    ranking, seconds, cpu_seconds = _search(words, runs)
    return {
        "planned": " ".join(["python", "-m", "launcher", "plan", "strategy=any", *words]),
        "search_s": _spread(seconds),
        "search_cpu_s": _spread(cpu_seconds),
        "command_s": _spread([_command(words) for _ in range(runs)]),
        "chosen": describe(ranking.choose().plan),
        **_counts(ranking),
    }


def _grown(words: Sequence[str], gpus: int, runs: int) -> dict[str, Any]:
    grown = [
        word for word in words if not word.startswith(("cluster.num_nodes", "training.global_batch_size"))
    ]
    grown += [f"cluster.num_nodes={gpus // 8}", f"training.global_batch_size={gpus}"]
    ranking, seconds, cpu_seconds = _search(grown, runs)
    return {
        "gpus": gpus,
        "search_s": _spread(seconds),
        "search_cpu_s": _spread(cpu_seconds),
        **_counts(ranking),
    }


def _search(words: Sequence[str], runs: int) -> tuple[Ranking, list[float], list[float]]:
    """Return a ranking, and the seconds and the CPU seconds of each search; a shared machine shows in the first."""
    job = compose.jobs(["strategy=any", *words])[0]
    problem = Problem(
        model=job.model,
        cluster=job.cluster,
        training=job.training,
        request=job.plan,
        strategies=tuple(compose.strategies_of(job)),
    )
    ranking = achieve(job.goal, problem)  # warms
    seconds, cpu_seconds = [], []
    for _ in range(runs):
        started, cpu_started = time.perf_counter(), time.process_time()
        ranking = achieve(job.goal, problem)
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu_started)
    return ranking, seconds, cpu_seconds


def _counts(ranking: Ranking) -> dict[str, int]:
    return {
        "plans_considered": ranking.num_considered,
        "plans_costed": ranking.num_costed,
        "plans_bounded_by_time": ranking.num_slow,
        "plans_too_large": sum(r.count for r in ranking.rejected if r.nearest),
    }


def _command(words: Sequence[str]) -> float:
    started = time.perf_counter()
    command = [sys.executable, "-m", "launcher", "plan", "strategy=any", *words]
    subprocess.run(command, cwd=record.REPOSITORY, capture_output=True, check=True)
    return time.perf_counter() - started


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(seconds), 4),
        "min": round(min(seconds), 4),
        "max": round(max(seconds), 4),
    }


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search_speed", description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--record", action="store_true", help="write a record to benchmarks/records")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
