"""MLflow: one run for one run directory, in the server of MLFLOW_TRACKING_URI or in a folder beside the metrics."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from launcher.monitor.metrics import StepMetrics, scalars
from launcher.monitor.sinks.hyper_parameters import hyper_parameters

_AT_ONCE = 1000  # points in a request; MLflow takes no more
_PARAMETERS_AT_ONCE = 100
_LONGEST = 300  # letters of a fault


class MlflowWriter:
    """MLflow takes nothing back.

    So a run that was not closed behind the newest step that counts is told anew from metrics.jsonl, with its tags,
    and the old one is deleted (MLflow keeps those in its bin). All of that waits for the first steps: a server that
    does not answer is asked for many minutes, and a start must not wait for it.
    """

    def __init__(
        self,
        directory: Path,
        *,
        experiment: str,
        settings: Mapping[str, Any],
        plan: Mapping[str, Any],
        history: Sequence[StepMetrics],
    ) -> None:
        # Read at import: no reports of use, and the folder that upstream would rather see replaced by a database.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        import mlflow
        from mlflow.entities import Metric, Param

        # It says a line a try; ours comes at the end.
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)

        self._metric, self._param = Metric, Param
        directory.mkdir(parents=True, exist_ok=True)
        uri = os.environ.get("MLFLOW_TRACKING_URI") or (directory / "mlflow").absolute().as_uri()
        self._client, self._uri = mlflow.MlflowClient(tracking_uri=uri), uri
        self._id_file = directory / "mlflow_id"
        name = directory.absolute().parent.name
        self._begin = partial(self._open, experiment, name, settings, plan, history)
        self._run_id: str | None = None  # once there are steps

    def write(self, steps: Sequence[StepMetrics]) -> None:
        with self._speaking():
            if self._run_id is None:
                self._run_id = self._begin()
                del self._begin  # and with it the history
            self._log(self._run_id, steps)

    def close(self) -> None:
        if self._run_id is not None:
            with self._speaking():
                self._client.set_terminated(self._run_id)

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        """Turn what goes wrong into a line without the name and password that an address may hold."""
        try:
            yield
        except Exception as error:
            text = " ".join(str(error).split()) or type(error).__name__
            user, at, _ = urlsplit(self._uri).netloc.rpartition("@")
            raise RuntimeError(text.replace(user + at, "")[:_LONGEST] if at else text[:_LONGEST]) from None

    def _open(
        self,
        experiment: str,
        name: str,
        settings: Mapping[str, Any],
        plan: Mapping[str, Any],
        history: Sequence[StepMetrics],
    ) -> str:
        old = self._earlier()
        if old is not None and self._is_whole(old, history):
            self._client.update_run(old.info.run_id, status="RUNNING")
            return str(old.info.run_id)
        found = self._client.get_experiment_by_name(experiment)
        place = self._client.create_experiment(experiment) if found is None else found.experiment_id
        run_id = str(self._client.create_run(place, run_name=name).info.run_id)
        flat = [self._param(key, str(value)) for key, value in hyper_parameters(settings, plan).items()]
        for start in range(0, len(flat), _PARAMETERS_AT_ONCE):
            self._client.log_batch(run_id, params=flat[start : start + _PARAMETERS_AT_ONCE])
        self._log(run_id, history)
        self._id_file.write_text(f"{run_id}\n")
        if old is not None:
            for key, value in old.data.tags.items():
                if key != "mlflow.runName":
                    self._client.set_tag(run_id, key, value)
            self._client.delete_run(old.info.run_id)
        return run_id

    def _earlier(self) -> Any:
        """Return the run of earlier starts; None before the first one, and in a place that does not know it."""
        from mlflow.exceptions import MlflowException

        if not self._id_file.exists():
            return None
        try:
            return self._client.get_run(self._id_file.read_text().strip())
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def _is_whole(self, run: Any, history: Sequence[StepMetrics]) -> bool:
        """Tell whether a run was closed behind the newest step of `history`, and nobody has deleted it."""
        if run.info.status != "FINISHED" or run.info.lifecycle_stage != "active" or not history:
            return False
        told = self._client.get_metric_history(run.info.run_id, "train/loss")
        return max((point.step for point in told), default=0) == history[-1].step

    def _log(self, run_id: str, steps: Sequence[StepMetrics]) -> None:
        points = list(self._points(steps))
        for start in range(0, len(points), _AT_ONCE):
            self._client.log_batch(run_id, metrics=points[start : start + _AT_ONCE])

    def _points(self, steps: Sequence[StepMetrics]) -> Iterator[Any]:
        for metrics in steps:
            moment = int(metrics.time * 1000)
            for tag, value in scalars(metrics).items():
                yield self._metric(tag, value, moment, metrics.step)
