"""Prometheus: a scrape over the wire, read with the client's own parser; the text file; restarts and ports."""

from __future__ import annotations

import socket
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from launcher.monitor.config import MonitorConfig
from launcher.monitor.sinks import prometheus_writer
from launcher.monitor.sinks.prometheus_writer import Endpoint, Exposition, Textfile
from launcher.monitor.sinks.writers import open_writers


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(url_file: Path) -> str:
    with urllib.request.urlopen(url_file.read_text().strip(), timeout=10) as answer:
        return str(answer.read().decode())


@pytest.fixture
def endpoint(tmp_path: Path) -> Any:
    opened = Endpoint(
        Exposition(run="one", history=[]), host="127.0.0.1", port=0, url_file=tmp_path / "prometheus.url"
    )
    yield opened
    opened.close()


def test_a_scrape_has_the_newest_step_and_what_was_sampled_before(
    tmp_path: Path, endpoint: Endpoint, steps: SimpleNamespace
) -> None:
    assert samples(scrape(tmp_path / "prometheus.url")) == {}
    endpoint.write([steps.at(1, straggler_score={"0": 0.5, "1": 2.0}, restarts=1), steps.at(2, loss=1.25)])
    text = scrape(tmp_path / "prometheus.url")
    found = samples(text)
    run = ("run", "one")
    assert found["meshwright_step", (run,)] == 2
    assert found["meshwright_loss", (run,)] == 1.25
    assert found["meshwright_straggler_score", (("rank", "1"), run)] == 2.0
    assert found["meshwright_restarts_total", (run,)] == 1
    assert "# HELP meshwright_loss Mean loss over the global batch (nats)" in text
    assert "# TYPE meshwright_restarts_total counter" in text


def test_the_endpoint_goes_with_the_run(tmp_path: Path) -> None:
    url_file = tmp_path / "prometheus.url"
    endpoint = Endpoint(Exposition(run="one", history=[]), host="127.0.0.1", port=0, url_file=url_file)
    port = int(url_file.read_text().rsplit(":", 1)[1].split("/")[0])
    endpoint.close()
    assert not url_file.exists()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))


def test_a_restart_shows_what_was_kept_before_its_first_step(tmp_path: Path, steps: SimpleNamespace) -> None:
    exposition = Exposition(run="one", history=[steps.at(4, goodput=0.5), steps.at(5, loss=2.0)])
    path = tmp_path / "folder" / "meshwright.prom"
    writer = Textfile(exposition, path=path)
    writer.write([])
    found = samples(path.read_text())
    assert found["meshwright_step", (("run", "one"),)] == 5
    assert found["meshwright_goodput", (("run", "one"),)] == 0.5


def test_the_text_file_follows_and_leaves_with_the_run(
    tmp_path: Path, steps: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prometheus_writer, "_FILE_EVERY_S", 0.0)
    path = tmp_path / "meshwright.prom"
    writer = Textfile(Exposition(run="one", history=[]), path=path)
    writer.write([steps.at(1)])
    assert samples(path.read_text())["meshwright_step", (("run", "one"),)] == 1
    writer.write([steps.at(2)])
    assert samples(path.read_text())["meshwright_step", (("run", "one"),)] == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["meshwright.prom"]
    writer.close()
    assert list(tmp_path.iterdir()) == [], "figures of the dead would be scraped for ever"
    writer.close()


def test_a_port_in_use_is_one_line_and_no_fault(
    tmp_path: Path, steps: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = MonitorConfig(tensorboard=False, wandb=False, prometheus=True, prometheus_port=port)
        writers = open_writers(config, about=steps.about(tmp_path), history=[])
    assert writers.names == ()
    (line,) = caplog.messages
    assert line.startswith(f"Prometheus is off: monitor.prometheus_port={port} on 127.0.0.1 cannot be opened")
