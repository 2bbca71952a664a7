"""Where a step's numbers go besides metrics.jsonl: TensorBoard and W&B. Neither can stop a run."""

from __future__ import annotations

import hashlib
import logging
import netrc
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from launcher.monitor.config import MonitorConfig
from launcher.monitor.metrics import StepMetrics

_TAGS = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
    "step_time_s": "perf/step_time_s",
    "tokens_per_s_per_gpu": "perf/tokens_per_s_per_gpu",
    "mfu": "perf/mfu",
    "memory_gib": "memory/gib",
    "validation_loss": "validation/loss",
}
_log = logging.getLogger(__name__)


class Writer(Protocol):
    """Takes every finished step, in order."""

    def write(self, metrics: StepMetrics) -> None: ...

    def close(self) -> None: ...


def open_writers(
    config: MonitorConfig, *, directory: Path, settings: Mapping[str, Any], history: Sequence[StepMetrics]
) -> Writers:
    """Open what `config` asks for below `directory` (RUN_DIR/metrics). Rank 0 only.

    `history` is what metrics.jsonl holds after `truncate_after`: the writers continue exactly there.
    """
    found: dict[str, Writer] = {}
    if config.tensorboard:
        try:
            found["TensorBoard"] = TensorBoardWriter(directory / "tensorboard", history=history)
        except Exception as error:
            _give_up("TensorBoard", error, "monitor.tensorboard=false")
    if config.wandb and (mode := wandb_mode(config)) != "disabled":
        try:
            found["W&B"] = _open_wandb(
                config, mode=mode, directory=directory, settings=settings, history=history
            )
        except Exception as error:
            _give_up("W&B", error, "monitor.wandb=false")
    return Writers(found)


def _open_wandb(
    config: MonitorConfig,
    *,
    mode: Literal["online", "offline"],
    directory: Path,
    settings: Mapping[str, Any],
    history: Sequence[StepMetrics],
) -> WandbWriter:
    """Open W&B as asked; compute nodes often have a key and no way out, so online falls back to offline."""
    project = config.wandb_project
    if mode == "online":
        try:
            if not has_wandb_key():  # W&B would ask for one on the terminal, once a start
                raise PermissionError("no key in WANDB_API_KEY or netrc")
            return WandbWriter(directory, project=project, mode=mode, settings=settings, history=history)
        except ModuleNotFoundError:
            raise
        except Exception as error:
            _log.warning(
                "W&B records offline under %s (`wandb sync` uploads it): %s",
                directory / "wandb",
                _sentence(error),
            )
    return WandbWriter(directory, project=project, mode="offline", settings=settings, history=history)


class Writers:
    """Several writers as one. One that fails is dropped with a single line, because training matters more."""

    def __init__(self, writers: Mapping[str, Writer]) -> None:
        self._writers = dict(writers)

    @property
    def names(self) -> tuple[str, ...]:
        """Those still in use."""
        return tuple(self._writers)

    def write(self, metrics: StepMetrics) -> None:
        """Pass one step on."""
        for name, writer in list(self._writers.items()):
            try:
                writer.write(metrics)
            except Exception as error:
                _log.warning("%s is off from step %d on: %s", name, metrics.step, _sentence(error))
                del self._writers[name]

    def close(self) -> None:
        """Flush and close all; closing twice is fine."""
        while self._writers:
            name, writer = self._writers.popitem()
            try:
                writer.close()
            except Exception as error:
                _log.warning("%s could not be closed: %s", name, _sentence(error))


class TensorBoardWriter:
    """One event file a start, written with the tensorboard package alone (neither torch nor TensorFlow)."""

    def __init__(self, directory: Path, *, history: Sequence[StepMetrics]) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        directory.mkdir(parents=True, exist_ok=True)
        # Readers take files in the order of their names: nanoseconds keep quick restarts in order.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter((directory / name).open("wb"))
        self._append(file_version="brain.Event:2")
        # A restart hides all points from this step on. Readers ignore the first mark, so each start makes one.
        first_step = history[-1].step + 1 if history else 1
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._append(step=first_step, session_log=start)

    def write(self, metrics: StepMetrics) -> None:
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars(metrics).items()]
        self._append(step=metrics.step, wall_time=metrics.time, summary=self._summary(value=values))

    def close(self) -> None:
        self._records.close()

    def _append(self, **values: Any) -> None:
        self._records.write(self._event(**{"wall_time": time.time(), **values}).SerializeToString())
        self._records.flush()


class WandbWriter:
    """One W&B run per run directory, over all its restarts."""

    def __init__(
        self,
        directory: Path,
        *,
        project: str,
        mode: Literal["online", "offline"],
        settings: Mapping[str, Any],
        history: Sequence[StepMetrics],
    ) -> None:
        # Read at import: W&B's own error reports stay here, its greetings off our console.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        self._teardown = wandb.teardown
        directory.mkdir(parents=True, exist_ok=True)
        run_id = _wandb_id(directory)
        excepthook = sys.excepthook
        try:
            self._run = wandb.init(
                project=project,
                id=run_id,
                name=directory.absolute().parent.name,
                dir=str(directory),
                config=dict(settings),
                resume="allow",
                settings=wandb.Settings(mode=mode, **_quiet_settings(wandb.Settings)),
            )
        except Exception:
            self._teardown()  # its service would keep the id of the failed try and refuse it to the next
            raise
        finally:
            sys.excepthook = excepthook  # W&B's own prints tracebacks that the worker already reports
        # Online, the server already has the steps before this one, and refuses to take them twice.
        self._first_step = int(self._run.starting_step)
        self._replay(directory, run_id, history=history, offline=mode == "offline")

    def write(self, metrics: StepMetrics) -> None:
        if metrics.step >= self._first_step:
            self._run.log({**scalars(metrics), "_timestamp": metrics.time}, step=metrics.step, commit=True)

    def close(self) -> None:
        self._run.finish()
        self._teardown()  # waits for the last bytes: `finish` returns before its service has flushed the file

    def _replay(self, directory: Path, run_id: str, *, history: Sequence[StepMetrics], offline: bool) -> None:
        """Log the past again, which also fills what a killed writer had not flushed.

        W&B cannot resume offline: there the new file holds the whole run and replaces earlier ones.
        """
        for past in history:
            self.write(past)
        if offline:
            current = Path(self._run.dir).resolve().parent
            for stale in (directory / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"):
                if stale.parent.resolve() != current:
                    shutil.rmtree(stale.parent, ignore_errors=True)


def scalars(metrics: StepMetrics) -> dict[str, float]:
    """Return the curves of one step by their tag."""
    values = {tag: getattr(metrics, name) for name, tag in _TAGS.items()}
    return {tag: value for tag, value in values.items() if value is not None}


def wandb_mode(config: MonitorConfig) -> Literal["online", "offline", "disabled"]:
    """Resolve `monitor.wandb_mode`: auto follows WANDB_MODE, else goes online only where a key is at hand."""
    if config.wandb_mode != "auto":
        return config.wandb_mode
    asked = os.environ.get("WANDB_MODE")
    if asked == "disabled":
        return "disabled"
    return "online" if asked != "offline" and has_wandb_key() else "offline"


def has_wandb_key() -> bool:
    """Tell whether W&B would find a key, without reading it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        return host is not None and host in netrc.netrc(str(path)).hosts
    except (OSError, netrc.NetrcParseError):
        return False


def _wandb_id(directory: Path) -> str:
    """Return the run's W&B id, made at the first start and kept in a file."""
    file = directory / "wandb_id"
    if file.exists() and (known := file.read_text(encoding="utf-8").strip()):
        return known
    run_dir = directory.absolute().parent
    digest = hashlib.sha256(f"{run_dir} {time.time_ns()}".encode()).hexdigest()[:8]
    label = re.sub(r"[^A-Za-z0-9_-]+", "-", run_dir.name)[:40].strip("-")
    created = f"{label}-{digest}" if label else digest
    file.write_text(created + "\n", encoding="utf-8")
    return created


def _quiet_settings(cls: Any) -> dict[str, Any]:
    """Send numbers only: no console, code, git, host statistics or packages. Names differ by version."""
    wanted = {
        "console": "off",
        "disable_code": True,
        "disable_git": True,
        "disable_job_creation": True,
        "init_timeout": 30,
        "save_code": False,
        "silent": True,
        "symlink": False,
        "x_disable_machine_info": True,
        "x_disable_meta": True,
        "x_disable_stats": True,
        "x_save_requirements": False,
    }
    return {name: value for name, value in wanted.items() if name in cls.model_fields}


def _give_up(name: str, error: Exception, remedy: str) -> None:
    _log.warning(
        "%s is off: %s; metrics.jsonl has every step (silence this with %s)", name, _sentence(error), remedy
    )


def _sentence(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name} is not installed"
    return " ".join(str(error).split()) or type(error).__name__
