"""Weights & Biases: one run for one run directory over all its restarts, online or offline."""

from __future__ import annotations

import hashlib
import logging
import netrc
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from launcher.files import read_records
from launcher.monitor.alerts import Outbox
from launcher.monitor.config import MonitorConfig
from launcher.monitor.metrics import StepMetrics, scalars, sentence
from launcher.monitor.sinks.histograms import drawn

_log = logging.getLogger(__name__)


def open_wandb(
    config: MonitorConfig,
    *,
    mode: Literal["online", "offline"],
    directory: Path,
    settings: Mapping[str, Any],
    history: Sequence[StepMetrics],
) -> WandbWriter:
    """Open W&B as asked; compute nodes often have a key and no way out, so online falls back to offline."""
    project, group = config.wandb_project, config.wandb_group

    def opened(mode: Literal["online", "offline"]) -> WandbWriter:
        return WandbWriter(
            directory, project=project, group=group, mode=mode, settings=settings, history=history
        )

    if mode == "online":
        try:
            if not has_wandb_key():  # W&B would ask for one on the terminal, once a start
                raise PermissionError("no key in WANDB_API_KEY or netrc")
            return opened("online")
        except ModuleNotFoundError:
            raise
        except Exception as error:
            _log.warning(
                "W&B records offline under %s (`wandb sync` uploads it): %s",
                directory / "wandb",
                sentence(error),
            )
    return opened("offline")


class WandbWriter:
    """One W&B run per run directory, over all its restarts."""

    def __init__(
        self,
        directory: Path,
        *,
        project: str,
        group: str | None,
        mode: Literal["online", "offline"],
        settings: Mapping[str, Any],
        history: Sequence[StepMetrics],
    ) -> None:
        # Read at import: W&B's own error reports stay here, its greetings off our console.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        self._teardown, self._artifact, self._picture = wandb.teardown, wandb.Artifact, wandb.Histogram
        directory.mkdir(parents=True, exist_ok=True)
        run_id = _wandb_id(directory)
        excepthook = sys.excepthook
        try:
            self._run = wandb.init(
                project=project,
                group=group,
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
        self._run_dir, self._id = directory.absolute().parent, run_id
        self._refer("plan", [self._run_dir / "plan.json"])
        told, offline = Outbox(directory, repeat_s=0).told(), mode == "offline"
        # With the first steps: a long history takes minutes, in which other ranks would wait for this one.
        self._begin: Callable[[], None] | None = lambda: self._replay(
            directory, history=history, told=told, offline=offline
        )

    def write(self, steps: Sequence[StepMetrics]) -> None:
        self._begun()
        self._log(steps)

    def _begun(self) -> None:
        if self._begin is not None:
            begin, self._begin = self._begin, None  # the history goes with it
            begin()

    def _log(self, steps: Sequence[StepMetrics]) -> None:
        for metrics in steps:
            if metrics.step >= self._first_step:
                drawings = {
                    name: self._histogram(counts) for name, counts in (metrics.histograms or {}).items()
                }
                told = {**scalars(metrics), **drawings, "_timestamp": metrics.time}
                self._run.log(told, step=metrics.step, commit=True)

    def _histogram(self, counts: Mapping[str, int]) -> Any:
        borders, numbers = drawn(counts)
        return self._picture(np_histogram=(numbers, borders))

    def alert(self, title: str, text: str) -> None:
        """Raise an alert there; W&B itself stays quiet about one that it cannot send."""
        self._run.alert(title=title, text=text)

    def close(self) -> None:
        self._begun()
        manifests = sorted(self._run_dir.glob("checkpoints/step_*/manifest.json"))
        self._refer("checkpoints", manifests, lineage=_lineage(self._run_dir / "events.jsonl"))
        self._run.finish()
        self._teardown()  # waits for the last bytes: `finish` returns before its service has flushed the file

    def _refer(self, kind: str, files: Sequence[Path], **metadata: Any) -> None:
        """Name files of the run as an artifact: where they lie and their checksums, none of their content."""
        found = [file for file in files if file.exists()]
        if not found:
            return
        artifact = self._artifact(f"{kind}-{self._id}", type=kind, metadata=metadata or None)
        for file in found:
            artifact.add_reference(file.as_uri(), name=str(file.relative_to(self._run_dir)))
        self._run.log_artifact(artifact)

    def _catch_up(
        self, told: Sequence[Mapping[str, Any]], *, history: Sequence[StepMetrics], offline: bool
    ) -> None:
        """Raise the alerts that came when no run was open here: a failure is told behind the workers' end.

        A file that replaces earlier ones needs all of them.
        """
        heard = history[-1].time if history and not offline else 0.0
        for alert in told:
            if alert["time"] > heard:
                self.alert(alert["cause"], alert["text"])

    def _replay(
        self,
        directory: Path,
        *,
        history: Sequence[StepMetrics],
        told: Sequence[Mapping[str, Any]],
        offline: bool,
    ) -> None:
        """Log the past again, which also fills what a killed writer had not flushed.

        W&B cannot resume offline: there the new file holds the whole run and replaces earlier ones.
        """
        self._log(history)
        if offline:
            current = Path(self._run.dir).resolve().parent
            for stale in (directory / "wandb").glob(f"offline-run-*/run-{self._id}.wandb"):
                if stale.parent.resolve() != current:
                    shutil.rmtree(stale.parent, ignore_errors=True)
        self._catch_up(told, history=history, offline=offline)


def _lineage(events_file: Path) -> list[dict[str, Any]]:
    """Return which checkpoint each checkpoint's start went on from; None is the beginning."""
    origin, found = None, []
    for event in read_records(events_file):
        if event["event"] == "resumed":
            origin = event["checkpoint"]
        elif event["event"] == "checkpoint":
            found.append({"step": event["step"], "from": origin})
    return found


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
