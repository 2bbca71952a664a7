from __future__ import annotations

import json
import subprocess
import sys

from launcher.monitor.system import read_memory

CHILD = """
import json
from launcher.monitor.system import read_memory
before = read_memory()
block = b"x" * (256 * 2**20)
del block
after = read_memory()
print(json.dumps([before.host_peak_gib, after.host_gib, after.host_peak_gib]))
"""


def test_the_device_counts_where_there_is_one() -> None:
    reading = read_memory(lambda: 3 * 2**30)
    assert reading.device_peak_gib == 3.0
    assert reading.peak_gib == 3.0


def test_without_a_device_the_process_counts() -> None:
    reading = read_memory()
    assert reading.device_peak_gib is None
    assert 0 < reading.host_gib <= reading.host_peak_gib == reading.peak_gib


def test_the_peak_remembers_what_was_freed_and_nothing_of_the_parent() -> None:
    ballast = b"x" * (300 * 2**20)
    result = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    before, now, peak = json.loads(result.stdout)
    assert len(ballast) == 300 * 2**20
    assert before < 0.25
    assert peak - before > 0.24
    assert now < peak - 0.2
