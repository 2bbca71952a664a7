"""What failures cost: runs that are killed, stopped, paused and starved of disk on a schedule drawn from a seed.

Each run is held against the same run left alone: every loss to the last bit, every step once.
Run: python -m benchmarks.recovery --kills 50 --record
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import chaos, record
from benchmarks.chaos import Done, Kind, Outcome
from launcher.monitor.metrics import read
from launcher.run_dir import RunDir

ENGINES = {
    "accelerate": ("strategy=accelerate", "plan.zero_stage=2"),
    "deepspeed": ("strategy=deepspeed", "plan.zero_stage=1"),
    "megatron": ("strategy=megatron", "plan.tp=2"),
}
NUM_STEPS, INTERVAL = 48, 5
SMALL = (
    *("monitor=none", "cluster.gpus_per_node=2", "data.max_bytes=300000", "model.num_layers=2"),
    *("training.sequence_length=64", "training.global_batch_size=8", f"training.num_steps={NUM_STEPS}"),
    *("training.precision=fp32", "training.deterministic=true", "evaluation.num_sequences=8"),
    *(f"checkpoint.interval={INTERVAL}", "supervise.step_timeout_s=20", "supervise.backoff_s=1"),
)
MOST_A_RUN = 6
RESTART_S = 10.0  # about as long as a start takes on two cores; kills inside a start are drawn from it


def main(arguments: Sequence[str]) -> None:
    options = _parse(arguments)
    kinds: dict[Kind, int] = {"stop": options.stops, "pause": options.pauses, "full_disk": options.full_disks}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for index, engine in enumerate(options.engines):
            share = [
                *_kills(options.kills, index, len(options.engines)),
                *_others(kinds, index, len(options.engines)),
            ]
            rows += list(
                _engine_rows(engine, share, seed=options.seed * 1000 + index, folder=Path(folder) / engine)
            )
    figures = summary(rows)
    print(json.dumps({key: value for key, value in figures.items() if key != "rows"}, indent=2))
    if options.record:
        done = record.create("recovery", arguments=arguments, figures=figures)
        print(f"recorded {record.write(done, name='-'.join(['recovery', *options.engines])).name}")


def _kills(number: int, index: int, engines: int) -> list[Kind]:
    """One engine's part of the kills: half of them in a step, the rest in a save or in the restart before."""
    cycle: tuple[Kind, ...] = ("kill", "kill_in_save", "kill", "kill_in_restart")
    mine = [cycle[one % len(cycle)] for one in range(number // engines + (index < number % engines))]
    return mine


def _others(kinds: dict[Kind, int], index: int, engines: int) -> list[Kind]:
    return [kind for kind, number in kinds.items() for one in range(number) if one % engines == index]


def _engine_rows(engine: str, kinds: Sequence[Kind], *, seed: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Train once without faults, then as often as the faults need."""
    words = [*SMALL, *ENGINES[engine]]
    whole = chaos.train(words, [], path=folder / "whole")
    assert whole.code == 0, whole.err
    losses = chaos.trajectory(whole.run)
    step_s = (losses and statistics.median(_step_seconds(whole.run))) or 0.1
    for number, batch in enumerate(_batches(kinds)):
        faults = chaos.schedule(
            batch, num_steps=NUM_STEPS, restart_s=RESTART_S, step_s=step_s, seed=seed + 7 * number
        )
        outcome = chaos.train(words, faults, path=folder / f"run_{number}")
        resumed = outcome.code != 0 and _resume(outcome.run)
        row = {
            "engine": engine,
            "seed": seed + 7 * number,
            "code": outcome.code,
            "resumed_by_hand": resumed,
            "faults": [_fault_row(done, outcome) for done in outcome.done],
            "planned": len(faults),
            "identical": chaos.trajectory(outcome.run) == losses,
            "each_step_once": [step for step, _, _ in chaos.trajectory(outcome.run)]
            == list(range(1, NUM_STEPS + 1)),
            "wall_s": round(outcome.wall_s, 1),
            "undisturbed_s": round(whole.wall_s, 1),
            "goodput": round(sum(_step_seconds(outcome.run)) / outcome.wall_s, 3),
        }
        print(json.dumps(row), flush=True)
        if outcome.code:
            print(outcome.err[-2000:], flush=True)
        yield row


def _batches(kinds: Sequence[Kind]) -> Iterator[list[Kind]]:
    """Deal the faults out to runs; a full disk ends a run, so it gets one of its own."""
    alone: Kind = "full_disk"
    together = [kind for kind in kinds if kind != alone]
    for start in range(0, len(together), MOST_A_RUN):
        yield together[start : start + MOST_A_RUN]
    yield from ([kind] for kind in kinds if kind == alone)


def _resume(run: RunDir) -> bool:
    command = [sys.executable, "-m", "launcher", "resume", str(run.path)]
    return subprocess.run(command, capture_output=True, check=False, timeout=300).returncode == 0


def _fault_row(done: Done, outcome: Outcome) -> dict[str, Any]:
    """What one fault cost: seconds until the workers stood again, steps that were made twice."""
    later = [event for event in outcome.run.events() if event["time"] > done.time]
    started = next((event for event in later if event["event"] == "started"), None)
    failed = next((event for event in later if event["event"] == "failed"), None)
    return {
        "kind": done.fault.kind,
        "rank": done.rank,
        "step": done.step,
        "cause": failed["cause"] if failed else None,
        "named": failed is not None and failed["rank"] == done.rank,
        "noticed_s": round(failed["time"] - done.time, 2) if failed else None,
        "recovered_s": round(started["time"] - done.time, 2) if started else None,
        "lost_steps": max(0, failed["step"] - started["step"]) if failed and started else 0,
    }


def _step_seconds(run: RunDir) -> list[float]:
    return [line["step_time_s"] for line in read(run.metrics_file)]


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Count what recovered by itself, and say what it took."""
    faults = [fault for row in rows for fault in row["faults"]]
    kills = [fault for fault in faults if fault["kind"].startswith("kill")]
    whole = [row for row in rows if row["code"] == 0 and row["identical"] and row["each_step_once"]]
    recovered = [f for row in whole for f in row["faults"] if f["kind"].startswith("kill")]
    seconds = [fault["recovered_s"] for fault in kills if fault["recovered_s"] is not None]
    return {
        "kills": len(kills),
        "kills_recovered": len(recovered),
        "faults_by_kind": dict(Counter(fault["kind"] for fault in faults)),
        "runs": len(rows),
        "runs_identical": sum(row["identical"] for row in rows),
        "runs_each_step_once": sum(row["each_step_once"] for row in rows),
        "recovery_s": _spread(seconds),
        "lost_steps": _spread([float(fault["lost_steps"]) for fault in kills]),
        "goodput": _spread([row["goodput"] for row in rows]),
        "rows": list(rows),
    }


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery", description=__doc__)
    parser.add_argument("--engines", nargs="+", choices=sorted(ENGINES), default=list(ENGINES))
    parser.add_argument("--kills", type=int, default=50, help="over all engines")
    parser.add_argument("--stops", type=int, default=0, help="SIGSTOP for good")
    parser.add_argument("--pauses", type=int, default=0, help="a second of SIGSTOP, which is no failure")
    parser.add_argument("--full-disks", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--record", action="store_true", help="write a record to benchmarks/records")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
