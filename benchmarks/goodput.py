"""Goodput under failures, beside what Young and Daly expect of it: predicted first, then trained and killed.

Run: python -m benchmarks.goodput --record
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks import record
from launcher.goodput import ledger
from launcher.monitor.metrics import read
from launcher.run_dir import RunDir
from launcher.training import interval

BAR = 0.03
INTERVALS_A_FAILURE = 20
SMALL = (
    *("strategy=accelerate", "monitor=none", "data.max_bytes=300000", "training.global_batch_size=8"),
    *(
        "model.num_layers=2",
        "model.hidden_size=48",
        "model.ffn_hidden_size=96",
        "training.sequence_length=32",
    ),
    *("training.num_steps=10000000", "evaluation.num_sequences=8", "plan.recompute=none"),
)
_PATIENCE_S = 600.0


def main(arguments: Sequence[str]) -> None:
    options = _parse(arguments)
    words = [*SMALL, f"cluster.gpus_per_node={options.num_ranks}"]
    with tempfile.TemporaryDirectory() as folder:
        costs = _calibrate(words, Path(folder) / "calibrate", failures=options.calibrating_failures)
        mttf_s = options.mttf_s
        steps = max(1, round(mttf_s / INTERVALS_A_FAILURE / costs["step_s"]))
        interval_s = steps * costs["step_s"]
        mttf_s = INTERVALS_A_FAILURE * interval_s
        predicted = interval.expected_goodput(
            interval_s=interval_s, save_s=costs["save_s"], restart_s=costs["restart_s"], mttf_s=mttf_s
        )
        expected = {**costs, "interval_steps": steps, "mttf_s": mttf_s, "predicted": predicted}
        print(json.dumps(expected, indent=2), flush=True)
        pauses = draws(options.failures, mean=mttf_s, seed=options.seed)
        found = _suffer([*words, f"checkpoint.interval={steps}"], Path(folder) / "run", pauses=pauses)
    figures = {"bar": BAR, "num_ranks": options.num_ranks, **expected, **found}
    figures["difference"] = figures["goodput"] - predicted
    print(json.dumps(figures, indent=2))
    if options.record:
        done = record.create("goodput", arguments=arguments, figures=figures)
        print(f"recorded {record.write(done, name='goodput').name}")


def draws(number: int, *, mean: float, seed: int) -> list[float]:
    """Times between failures: one from the middle of each of `number` equal parts of the exponential distribution.

    In an order drawn from the seed, and scaled to the exact mean: so few of them drawn freely would have another one.
    """
    middles = [-math.log(1 - (index + 0.5) / number) for index in range(number)]
    scaled = [mean * middle / statistics.fmean(middles) for middle in middles]
    random.Random(seed).shuffle(scaled)
    return scaled


def _calibrate(words: Sequence[str], path: Path, *, failures: int) -> dict[str, float]:
    """What a step, a save and a restart take here: from a run that is killed a few times after some saves."""
    with _training([*words, "checkpoint.interval=50"], path) as run:
        restarts = []
        for number in range(failures):
            _wait_for(lambda saves=2 * (number + 1): len(_events(run, "checkpoint")) >= saves)
            killed = _kill(run)
            _wait_for(lambda starts=number + 2: len(_events(run, "started")) >= starts)
            restarts.append(_events(run, "started")[-1]["time"] - killed)
        _wait_for(lambda: len(_events(run, "checkpoint")) >= 2 * failures + 3)
        run.stop_file.touch()
    beside = [event["stall_s"] for event in _events(run, "checkpoint")[1:-1]]
    times = [line["step_time_s"] for line in read(run.metrics_file)[10:]]
    return {
        "step_s": statistics.fmean(times),
        "save_s": statistics.fmean(beside),
        "restart_s": statistics.fmean(restarts),
    }


def _suffer(words: Sequence[str], path: Path, *, pauses: Sequence[float]) -> dict[str, Any]:
    """Kill a rank after each of `pauses`, measured from the kill before; count from start to start, whole cycles."""
    with _training(words, path) as run:
        last = _events(run, "started")[0]["time"]
        for pause in pauses:
            time.sleep(max(0.0, last + pause - time.time()))
            starts = len(_events(run, "started"))
            last = _kill(run)
            print(f"killed after {pause:.1f} s", flush=True)
        _wait_for(lambda: len(_events(run, "started")) > starts)
        run.stop_file.touch()
    first, final = _events(run, "started")[0], _events(run, "started")[-1]
    counted = [line for line in read(run.metrics_file) if line["step"] <= final["step"]]
    wall_s = final["time"] - first["time"]
    spent = ledger(list(run.events()), read(run.metrics_file), now=time.time())
    assert spent is not None
    return {
        "goodput": sum(line["step_time_s"] for line in counted) / wall_s,
        "wall_s": wall_s,
        "failures": len(pauses),
        "ledger": spent.record(),
    }


@contextmanager
def _training(words: Sequence[str], path: Path) -> Iterator[RunDir]:
    """A supervised run from its first step until its end, which whoever asks for it touches the stop file for."""
    command = [sys.executable, "-m", "launcher", "train", *words, f"run_dir={path}"]
    with subprocess.Popen(
        command, cwd=record.REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as launcher:
        run = RunDir(path=path)
        try:
            _wait_for(lambda: bool(_events(run, "started")) or launcher.poll() is not None)
            yield run
            _, err = launcher.communicate(timeout=_PATIENCE_S)
        finally:
            if launcher.poll() is None:
                launcher.terminate()
    if launcher.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {launcher.returncode}:\n{err[-4000:]}")


def _kill(run: RunDir) -> float:
    """Kill one rank, as soon as there is one; return when."""
    found: list[psutil.Process] = []
    _wait_for(lambda: found.extend(_workers(run)) or bool(found))
    found[-1].kill()
    return time.time()


def _workers(run: RunDir) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if (
            "launcher.training.worker" in words
            and str(run.path) in words
            and "torch.distributed.run" not in words
        ):
            found.append(process)
    return found


def _events(run: RunDir, name: str) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["event"] == name]


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("waited in vain: the run does not go on")
        time.sleep(0.05)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.goodput", description=__doc__)
    parser.add_argument("--mttf-s", type=float, default=200.0, help="about: it becomes 20 whole intervals")
    parser.add_argument("--failures", type=int, default=6)
    parser.add_argument("--calibrating-failures", type=int, default=2)
    parser.add_argument("--num-ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--record", action="store_true", help="write a record to benchmarks/records")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
