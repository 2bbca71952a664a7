from __future__ import annotations

import json
import subprocess
import sys

from launcher.monitor.system import peak_memory_gib

CHILD = """
import json
from launcher.monitor.system import peak_memory_gib
before = peak_memory_gib()
block = b"x" * (256 * 2**20)
del block
print(json.dumps([before, peak_memory_gib()]))
"""


def test_the_device_counts_where_there_is_one() -> None:
    assert peak_memory_gib(lambda: 3 * 2**30) == 3.0


def test_without_a_device_the_process_counts() -> None:
    assert 0 < peak_memory_gib() < 1024


def test_the_peak_remembers_what_was_freed_and_nothing_of_the_parent() -> None:
    ballast = b"x" * (300 * 2**20)
    result = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    before, peak = json.loads(result.stdout)
    assert len(ballast) == 300 * 2**20
    assert before < 0.25
    assert peak - before > 0.24
