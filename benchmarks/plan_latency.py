"""How long a plan takes as a user feels it: the whole process, from the command line to the printed table.

Run: python -m benchmarks.plan_latency
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import record

WORDS = ("plan", "model=llama3_70b", "cluster=h100_sxm", "cluster.num_nodes=8")
FRAMEWORKS = frozenset({"torch", "transformers", "accelerate", "deepspeed", "datasets", "wandb"})
# A line of `python -X importtime`: import time: <self us> | <cumulative us> | <module, indented>
_IMPORTED = re.compile(r"^import time:\s+\d+ \|\s+\d+ \|\s+(?P<module>[\w.]+)$", re.MULTILINE)


def main(arguments: Sequence[str]) -> None:
    options = _parse(arguments)
    _seconds()  # warms the file cache and the bytecode
    seconds = [_seconds() for _ in range(options.runs)]
    imported = _imported_packages()
    assert "launcher" in imported, "the import log was not understood"
    figures: dict[str, Any] = {
        "planned": " ".join(["python", "-m", "launcher", *WORDS]),
        "seconds": {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)},
        "runs": options.runs,
        "frameworks_imported": sorted(FRAMEWORKS & imported),
    }
    print(json.dumps(figures, indent=2))
    if options.record:
        done = record.create("plan_latency", arguments=arguments, figures=figures)
        print(f"recorded {record.write(done, name='plan_latency').name}")


def _seconds() -> float:
    started = time.perf_counter()
    _plan()
    return time.perf_counter() - started


def _imported_packages() -> set[str]:
    """Top-level packages that the same command imports, by the interpreter's own account."""
    modules = _IMPORTED.findall(_plan("-X", "importtime").stderr)
    return {module.partition(".")[0] for module in modules}


def _plan(*interpreter_options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *interpreter_options, "-m", "launcher", *WORDS]
    return subprocess.run(command, cwd=record.REPOSITORY, capture_output=True, text=True, check=True)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_latency", description=__doc__)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--record", action="store_true", help="write a record to benchmarks/records")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
