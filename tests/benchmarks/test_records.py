"""Every record that is kept decodes, says when and on what it was measured, and names no host."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from benchmarks import record
from benchmarks.cpu_plans import BAR as CPU_BAR
from benchmarks.cpu_plans import spearman
from benchmarks.plan_latency import FRAMEWORKS
from benchmarks.step_overhead import BAR, median_step_s
from launcher.decode import decode, encode
from launcher.errors import ConfigError

KEPT = sorted(record.RECORDS.glob("*.json"))
ABSOLUTE = re.compile(r"(^|[\s=:'\"])(/|~/|[A-Za-z]:\\)\w")


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from (key, *texts(inner))
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner)
    elif isinstance(value, str):
        yield value


def test_records_are_kept_of_benchmarks_that_are_here() -> None:
    kept = {json.loads(path.read_text(encoding="utf-8"))["benchmark"] for path in KEPT}
    assert {"plan_latency", "step_overhead"} <= kept
    assert kept <= {path.stem for path in (record.REPOSITORY / "benchmarks").glob("*.py")}


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.name)
def test_record_decodes(path: Path) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    found = decode(record.Record, data)
    assert encode(found) == data  # nothing left to a default
    when = datetime.fromisoformat(found.date)
    assert when.utcoffset() == timedelta(0) and when < datetime.now(timezone.utc)
    assert path.name.startswith(when.strftime("%Y%m%d-%H%M%S-") + found.benchmark)
    assert re.fullmatch(r"[0-9a-f]{40}", found.code.commit)
    assert found.hardware.cpu and found.hardware.cores > 0 and found.hardware.memory_gib > 0
    assert {"python", "torch"} <= set(found.versions)
    assert found.command.startswith(f"python -m benchmarks.{found.benchmark}")


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.name)
def test_record_tells_no_path(path: Path) -> None:
    for text in texts(json.loads(path.read_text(encoding="utf-8"))):
        assert not ABSOLUTE.search(text), text


def kept_of(benchmark: str) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text(encoding="utf-8")) for path in KEPT]
    return [each["figures"] for each in found if each["benchmark"] == benchmark]


def test_figures_of_costs_hold_together() -> None:
    for figures in (*kept_of("plan_latency"), *kept_of("step_overhead")):
        spreads = [value for value in figures.values() if isinstance(value, dict)]
        assert spreads
        assert all(0 < s["min"] <= s["median"] <= s["max"] for s in spreads)
    for figures in kept_of("plan_latency"):
        assert not FRAMEWORKS & set(figures["frameworks_imported"])
    for figures in kept_of("step_overhead"):
        assert figures["bar"] == BAR
        ratios = [r["default"] / r["bare"] for r in figures["rounds"]]
        assert figures["ratio_monitor_default"]["max"] == pytest.approx(max(ratios))


def test_figures_of_plans_on_a_cpu_hold_together() -> None:
    for figures in kept_of("cpu_plans"):
        rows = figures["rows"]
        assert len(rows) == figures["plans"] >= 100
        again = spearman([row["predicted_s"] for row in rows], [row["measured_s"] for row in rows])
        assert figures["spearman"] == pytest.approx(again, abs=2e-3)  # rows are rounded
        assert figures["bar"] == CPU_BAR


def test_a_new_record_reads_back_and_names_no_host(tmp_path: Path) -> None:
    new = record.create("plan_latency", arguments=["--runs", "3"], figures={"seconds": {"median": 0.5}})
    path = record.write(new, name="plan_latency", directory=tmp_path)
    data = json.loads(path.read_text(encoding="utf-8"))
    assert decode(record.Record, data) == new
    assert new.command == "python -m benchmarks.plan_latency --runs 3"
    assert socket.gethostname() not in texts(data)


def test_a_record_without_hardware_is_refused() -> None:
    data = encode(record.create("plan_latency", arguments=[], figures={}))
    del data["hardware"]
    with pytest.raises(ConfigError, match="missing key 'hardware'"):
        decode(record.Record, data)


def test_step_time_leaves_out_warm_up_and_the_last_step(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    ends = [0.0, 50.0, 51.0, 52.0, 54.0, 99.0]  # slow start, three steps, an evaluation
    log.write_text("".join(json.dumps({"time": end}) + "\n" for end in ends), encoding="utf-8")
    assert median_step_s(log, warmup=1) == 1.0
    assert median_step_s(log, warmup=3) == 2.0


def test_two_hosts_kept_their_bars() -> None:
    for figures in kept_of("two_hosts"):
        assert all(0.8 <= link["ratio"] <= 1.2 for link in figures["links"])
        assert [fault["cause"] for fault in figures["faults"]] == ["lost_node", "hang", "lost_node"]
        assert figures["losses_bit_identical"]
