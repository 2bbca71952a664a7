"""Prometheus: the newest step under GET /metrics on loopback, or in a file for node-exporter."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from launcher.files import write_whole
from launcher.monitor.metrics import METRICS, StepMetrics
from launcher.monitor.registry import Metric, series

_FILE_EVERY_S = 5.0  # node-exporter is asked every 15 s or so


class Exposition:
    """What a scrape gets: one step whole with the newest sampled figures, never half of one and half of the next."""

    def __init__(self, *, run: str, history: Sequence[StepMetrics]) -> None:
        self._run = run
        self._newest: dict[str, Any] = {}
        self.take(history[-1000:])

    def take(self, steps: Sequence[StepMetrics]) -> None:
        """Show the last of these steps from now on."""
        newest = dict(self._newest)  # a new one: a scrape may be reading the old one
        for metrics in steps:
            newest.update(metrics.record())
        self._newest = newest

    def registry(self) -> Any:
        """Return a registry of prometheus_client that holds nothing but this run."""
        from prometheus_client import CollectorRegistry

        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return registry

    def collect(self) -> Iterator[Any]:
        """Yield the families of one scrape."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        newest = self._newest
        if not newest:
            return
        found: dict[Metric, Any] = {}
        for item, where, value in series(newest, METRICS):
            if item not in found:
                family = CounterMetricFamily if item.counter else GaugeMetricFamily
                labels = ["run"] if item.label is None else ["run", item.label]
                found[item] = family(item.exposed, item.help, labels=labels)
            found[item].add_metric([self._run] if where is None else [self._run, where], value)
        yield from found.values()
        for name, text, value in (
            ("meshwright_step", "Steps completed", newest["step"]),
            ("meshwright_last_step_timestamp_seconds", "When that was (unix seconds)", newest["time"]),
        ):
            single = GaugeMetricFamily(name, text, labels=["run"])
            single.add_metric([self._run], value)
            yield single


class Endpoint:
    """GET /metrics, on loopback unless asked otherwise."""

    def __init__(self, exposition: Exposition, *, host: str, port: int, url_file: Path) -> None:
        from prometheus_client import start_http_server

        self._exposition, self._url_file = exposition, url_file
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=exposition.registry())
        except OSError as error:
            raise RuntimeError(
                f"monitor.prometheus_port={port} on {host} cannot be opened ({error.strerror}); use a free one, or 0"
            ) from error
        url_file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(url_file, f"http://{host}:{self._server.server_port}/metrics\n")

    def write(self, steps: Sequence[StepMetrics]) -> None:
        self._exposition.take(steps)

    def close(self) -> None:
        self._url_file.unlink(missing_ok=True)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)


class Textfile:
    """A .prom file that node-exporter's textfile collector reads, replaced whole every few seconds.

    It goes with the workers: figures that nobody renews would be scraped for ever, and look like a run that stalled.
    """

    def __init__(self, exposition: Exposition, *, path: Path) -> None:
        from prometheus_client import write_to_textfile

        self._exposition, self._path, self._save = exposition, path, write_to_textfile
        self._registry = exposition.registry()
        self._written = 0.0
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, steps: Sequence[StepMetrics]) -> None:
        self._exposition.take(steps)
        if time.monotonic() - self._written >= _FILE_EVERY_S:
            self._save(str(self._path), self._registry)
            self._written = time.monotonic()

    def close(self) -> None:
        self._path.unlink(missing_ok=True)
