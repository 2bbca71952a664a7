"""A real Prometheus beside a training run: rules checked, series scraped and compared, an alert fired by a killed rank.

Run: python -m benchmarks.prometheus_check --record      (needs prometheus and promtool on the PATH)
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import yaml

from benchmarks import record
from launcher.monitor.metrics import METRICS, read
from launcher.monitor.registry import series

DASHBOARD = record.REPOSITORY / "monitor" / "grafana" / "meshwright.json"
RULES = record.REPOSITORY / "monitor" / "prometheus"
WORDS = (
    *(
        "cluster.gpus_per_node=2",
        "data.max_bytes=200000",
        "training.sequence_length=32",
        "model.num_layers=2",
    ),
    *("training.global_batch_size=8", "training.num_steps=1000000", "checkpoint.interval=20"),
    *(
        "monitor.prometheus=true",
        "monitor.tensorboard=false",
        "monitor.wandb=false",
        "monitor.sample_interval=5",
        "monitor.trace_interval=10",
    ),
)
_PATIENCE_S = 300


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args(arguments)
    figures: dict[str, Any] = {"promtool": promtool()}
    with tempfile.TemporaryDirectory() as folder:
        figures |= scraped(Path(folder))
    print(json.dumps(figures, indent=2))
    if options.record:
        done = record.create("prometheus_check", arguments=arguments, figures=figures)
        print(f"recorded {record.write(done, name='prometheus_check').name}")


def promtool() -> dict[str, str]:
    """Have the rules checked and tried; raise where a rule does not hold."""
    version = subprocess.run(["prometheus", "--version"], capture_output=True, text=True, check=True)
    for words in (["check", "rules", "rules.yml"], ["test", "rules", "rules_test.yml"]):
        subprocess.run(["promtool", *words], cwd=RULES, check=True, stdout=subprocess.DEVNULL)
    return {
        "version": version.stdout.split(",")[1].split("(")[0].strip(),
        "check": "passed",
        "test": "passed",
    }


def scraped(folder: Path) -> dict[str, Any]:
    """Train, scrape, compare, kill a rank and wait for the alert; raise where any of it does not come."""
    run, port, own = folder / "run", _free_port(), _free_port()
    words = [*WORDS, f"monitor.prometheus_port={port}", f"run_dir={run}"]
    train = [sys.executable, "-m", "launcher", "train", *words]
    with _prometheus(folder, port=port, own=own) as ask, _running(train, folder):
        _wait(lambda: ask("query", query="meshwright_step > 60")["result"], "a scraped step", folder)
        compared = _compare(ask, run)
        answered = _answered(ask)
        _kill_rank_1(run)
        _wait(lambda: _firing(ask, "MeshwrightRankLost"), "the alert", folder)
    return {"series_compared": compared, "panel_queries_answered": answered, "fired": "MeshwrightRankLost"}


def _compare(ask: Callable[..., Any], run: Path) -> int:
    """Hold every sample of the newest scrape against metrics.jsonl at the step that it names; return how many."""
    result = ask("query", query='{__name__=~"meshwright_.*"}')["result"]
    found = {
        (sample["metric"]["__name__"], _label(sample["metric"])): float(sample["value"][1])
        for sample in result
    }
    step = int(found["meshwright_step", None])
    newest: dict[str, Any] = {}
    for past in read(run / "metrics" / "metrics.jsonl"):
        newest |= past if past["step"] <= step else {}
    told = {(item.exposed, where): value for item, where, value in series(newest, METRICS)}
    differing = {key: (found.get(key), value) for key, value in told.items() if found.get(key) != value}
    assert not differing, differing
    return len(told)


def _answered(ask: Callable[..., Any]) -> int:
    """Put the dashboard's queries of which the run exposes the series; raise for one that finds nothing."""
    exposed = {
        found["metric"]["__name__"] for found in ask("query", query='{__name__=~"meshwright_.*"}')["result"]
    }
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    asked = [query for query in queries if set(re.findall(r"meshwright_\w+", query)) <= exposed]
    silent = [query for query in asked if not ask("query", query=query.replace("$run", ".*"))["result"]]
    assert not silent, silent
    return len(asked)


def _label(labels: dict[str, str]) -> str | None:
    own = set(labels) - {"__name__", "run", "job", "instance"}
    return labels[own.pop()] if own else None


def _firing(ask: Callable[..., Any], name: str) -> bool:
    return any(a["labels"]["alertname"] == name and a["state"] == "firing" for a in ask("alerts")["alerts"])


@contextmanager
def _prometheus(folder: Path, *, port: int, own: int) -> Iterator[Callable[..., Any]]:
    """Start a server that scrapes every second; yields what asks its API."""
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES / "rules.yml")],
        "scrape_configs": [
            {"job_name": "meshwright", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]

    def ask(what: str, **given: str) -> Any:
        words = "&".join(f"{key}={quote(value)}" for key, value in given.items())
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{own}/api/v1/{what}?{words}", timeout=30
            ) as answer:
                return json.load(answer)["data"]
        except OSError:
            return {"result": [], "alerts": []}

    with _running([*command, f"--web.listen-address=127.0.0.1:{own}"], folder):
        yield ask


@contextmanager
def _running(command: Sequence[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            yield process
        finally:
            # The launcher saves and leaves at the first request, and ends its workers at the second one.
            for _ in range(2):
                process.terminate()
                try:
                    process.wait(timeout=60)
                    break
                except subprocess.TimeoutExpired:
                    continue
            else:
                process.kill()
                process.wait()


def _kill_rank_1(run: Path) -> None:
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "launcher.training.worker" in words and str(run) in words and process.environ().get("RANK") == "1":
            process.kill()


def _wait(condition: Callable[[], Any], what: str, folder: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            log = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(f"waited in vain for {what}:\n{log[-2000:]}")
        time.sleep(0.5)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    missing = [name for name in ("prometheus", "promtool") if shutil.which(name) is None]
    if missing:
        sys.exit(f"{' and '.join(missing)} not found; on Debian: apt-get install prometheus")
    os.environ.pop("MESHWRIGHT_WEBHOOK_URL", None)
    main(sys.argv[1:])
