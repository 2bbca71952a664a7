"""Where a step's numbers go besides metrics.jsonl: TensorBoard, W&B, MLflow, Prometheus. None can stop a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from launcher.monitor.config import MonitorConfig
from launcher.monitor.metrics import StepMetrics, sentence
from launcher.monitor.sinks.bursts import Bursts, Writer
from launcher.monitor.sinks.mlflow_writer import MlflowWriter
from launcher.monitor.sinks.prometheus_writer import Endpoint, Exposition, Textfile
from launcher.monitor.sinks.tensorboard_writer import TensorBoardWriter
from launcher.monitor.sinks.wandb_writer import WandbWriter, open_wandb, wandb_mode

WANDB = "W&B"
_log = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes every finished step, in order."""

    def write(self, metrics: StepMetrics) -> None: ...

    def flush(self) -> None:
        """Keep what was written: a checkpoint follows, from which the run may have to go on."""

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class About:
    """What the writers tell of a run beside its numbers."""

    directory: Path  # RUN_DIR/metrics
    settings: Mapping[str, Any]  # the whole configuration, which holds no secrets
    plan: Mapping[str, Any]  # plan.json


def open_writers(config: MonitorConfig, *, about: About, history: Sequence[StepMetrics]) -> Writers:
    """Open what `config` asks for below `about.directory`. Rank 0 only.

    `history` is what metrics.jsonl holds after `truncate_after`: the writers continue exactly there.
    """
    found: dict[str, Writer] = {}
    for name, key, make in _wanted(config, about, history):
        try:
            found[name] = make()
        except Exception as error:
            _log.warning(
                "%s is off: %s; metrics.jsonl has every step (silence this with %s)",
                name,
                sentence(error),
                key,
            )
    return Writers(found)


def _wanted(
    config: MonitorConfig, about: About, history: Sequence[StepMetrics]
) -> list[tuple[str, str, Callable[[], Writer]]]:
    """Name, key that turns it off, and maker of each writer that is asked for."""
    wanted: list[tuple[str, str, Callable[[], Writer]]] = []
    if config.tensorboard:
        folder = about.directory / "tensorboard"
        wanted.append(
            (
                "TensorBoard",
                "monitor.tensorboard=false",
                lambda: TensorBoardWriter(folder, history=history, settings=about.settings, plan=about.plan),
            )
        )
    if config.wandb and (mode := wandb_mode(config)) != "disabled":
        wanted.append(
            (
                WANDB,
                "monitor.wandb=false",
                lambda: open_wandb(
                    config, mode=mode, directory=about.directory, settings=about.settings, history=history
                ),
            )
        )
    if config.mlflow:
        wanted.append(
            (
                "MLflow",
                "monitor.mlflow=false",
                lambda: MlflowWriter(
                    about.directory,
                    experiment=config.mlflow_experiment,
                    settings=about.settings,
                    plan=about.plan,
                    history=history,
                ),
            )
        )
    return [*wanted, *_exposed(config, about, history)]


def _exposed(
    config: MonitorConfig, about: About, history: Sequence[StepMetrics]
) -> Iterator[tuple[str, str, Callable[[], Writer]]]:
    """What Prometheus reads, in either way, of one exposition."""
    exposition = Exposition(run=about.directory.absolute().parent.name, history=history)
    if config.prometheus:
        yield (
            "Prometheus",
            "monitor.prometheus=false",
            lambda: Endpoint(
                exposition,
                host=config.prometheus_host,
                port=config.prometheus_port,
                url_file=about.directory / "prometheus.url",
            ),
        )
    if config.prometheus_textfile is not None:
        path = Path(config.prometheus_textfile)
        yield (
            "Prometheus' text file",
            "monitor.prometheus_textfile=null",
            lambda: Textfile(exposition, path=path),
        )


class Writers:
    """Several writers as one sink, each behind a thread of its own."""

    def __init__(self, writers: Mapping[str, Writer]) -> None:
        self._writers = {name: Bursts(name, writer) for name, writer in writers.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """Those still in use."""
        return tuple(name for name, bursts in self._writers.items() if not bursts.is_off)

    def write(self, metrics: StepMetrics) -> None:
        """Pass one step on."""
        for bursts in self._writers.values():
            bursts.write(metrics)

    def flush(self) -> None:
        """Return once all writers have every step."""
        for bursts in self._writers.values():
            bursts.flush()

    def announce(self, title: str, text: str) -> None:
        """Pass an alert on to W&B, which mails it or posts it where its owner said."""
        if WANDB in self.names and isinstance(writer := self._writers[WANDB].writer, WandbWriter):
            writer.alert(title, text)

    def close(self) -> None:
        """Flush and close all; closing twice is fine."""
        for bursts in self._writers.values():
            bursts.close()
