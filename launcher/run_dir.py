"""What lies where in a run directory; freezing one, opening one. A run is one folder of plain files."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from launcher.checkpoint import CheckpointPolicy, Tiers, open_tiers
from launcher.config import Job
from launcher.data.tokens import TokenDataset
from launcher.decode import decode, encode
from launcher.environments.interpreter import Interpreter
from launcher.errors import ConfigError, LauncherError, RunDirError
from launcher.files import append_record, read_records, write_whole
from strategies.spec import Plan

PLAN_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class RunDir:
    """Paths of one run, and the two verbs that make and read it: `create` and `open`."""

    path: Path

    @property
    def config_file(self) -> Path:
        """The resolved configuration, as composed once."""
        return self.path / "config.yaml"

    @property
    def plan_file(self) -> Path:
        """The chosen plan, its predictions and what was rejected."""
        return self.path / "plan.json"

    @property
    def old_plans(self) -> Path:
        """Plans that the run was resumed away from, oldest first."""
        return self.path / "plans"

    @property
    def data_file(self) -> Path:
        """Which prepared token files the run reads."""
        return self.path / "data.json"

    @property
    def env_file(self) -> Path:
        """Versions, the workers' Python, git commit, hosts, hashes, command line."""
        return self.path / "env.json"

    @property
    def events_file(self) -> Path:
        """One line for each thing that happened to the run."""
        return self.path / "events.jsonl"

    @property
    def metrics(self) -> Path:
        """metrics.jsonl and the writers' own files."""
        return self.path / "metrics"

    @property
    def metrics_file(self) -> Path:
        """One JSON object a step."""
        return self.metrics / "metrics.jsonl"

    @property
    def traces(self) -> Path:
        """A Chrome trace a rank of the profiled steps, and their summary."""
        return self.metrics / "trace"

    @property
    def checkpoints(self) -> Path:
        """step_XXXXXXXXXX folders."""
        return self.path / "checkpoints"

    @property
    def weights(self) -> Path:
        """Initial weights in Hugging Face's layout, made once."""
        return self.path / "weights"

    @property
    def logs(self) -> Path:
        """A file for each rank, and everything the engines printed."""
        return self.path / "logs"

    @property
    def errors(self) -> Path:
        """What the ranks of the last start died of."""
        return self.path / "errors"

    @property
    def heartbeats(self) -> Path:
        """Where each rank of the last start stands."""
        return self.path / "heartbeats"

    @property
    def hosts(self) -> Path:
        """What the launchers of several hosts tell each other."""
        return self.path / "hosts"

    @property
    def lock_file(self) -> Path:
        """Locked while a launcher or its workers use the run."""
        return self.path / "lock"

    @property
    def stop_file(self) -> Path:
        """Touch it, and the run leaves with a checkpoint after the current step."""
        return self.path / "stop"

    @property
    def leave_file(self) -> Path:
        """The launcher's own way to ask for the same: it starts the run again, so nobody has asked for an end."""
        return self.path / "leave"

    def job(self) -> Job:
        """Decode config.yaml."""
        return decode(Job, _read(self.config_file, yaml.safe_load))

    def plan(self) -> Plan:
        """Decode the plan out of plan.json."""
        return _plan(self.plan_file)

    def first_plan(self) -> Plan:
        """Decode the plan that the run was frozen with, before any other took its place."""
        return _plan(next(iter(sorted(self.old_plans.glob("plan_*.json"))), self.plan_file))

    def plan_data(self) -> dict[str, Any]:
        """plan.json as it stands: plan, predictions, runners-up, rejections."""
        return _mapping(_read(self.plan_file, json.loads), self.plan_file)

    def dataset(self) -> TokenDataset:
        """Decode data.json."""
        return decode(TokenDataset, _read(self.data_file, json.loads), "data")

    def tiers(self, policy: CheckpointPolicy) -> Tiers:
        """Where this run's checkpoints lie."""
        return open_tiers(policy, checkpoints=self.checkpoints, identity=self.env_file)

    def env(self) -> dict[str, Any]:
        """env.json as it stands."""
        return _mapping(_read(self.env_file, json.loads), self.env_file)

    def trace(self) -> dict[str, Any] | None:
        """The summary of the profiled steps, if there were any."""
        summary = self.traces / "summary.json"
        return _mapping(_read(summary, json.loads), summary) if summary.exists() else None

    def interpreter(self) -> Interpreter | None:
        """Decode the workers' Python out of env.json; None in runs of before it was recorded."""
        found = self.env().get("interpreter")
        return None if found is None else decode(Interpreter, found, "interpreter")

    def log_event(self, event: str, **details: Any) -> None:
        """Append one event; a line is written whole or not at all."""
        append_record(self.events_file, {"time": time.time(), "event": event, **details})

    def events(self) -> Iterator[dict[str, Any]]:
        """All events, oldest first; a torn line is left out."""
        return read_records(self.events_file)


_STATES = {
    "created": "created",
    "launched": "starting",
    "started": "running",
    "stopped": "stopped",
    "interrupted": "interrupted",
    "failed": "failed",
    "restarting": "restarting",
    "paused": "waiting for devices or hosts",
    "finished": "finished",
}


OVER = ("stopped", "interrupted", "failed", "finished")  # states behind which nothing comes by itself


def state(events: Sequence[dict[str, Any]]) -> str:
    """The word for where the run stands, from its last telling event."""
    return next((_STATES[e["event"]] for e in reversed(events) if e["event"] in _STATES), "unknown")


def _plan(file: Path) -> Plan:
    data = _mapping(_read(file, json.loads), file)
    if data.get("format") != PLAN_FORMAT:
        raise RunDirError(f"{file} has format {data.get('format')}; this version reads {PLAN_FORMAT}")
    return decode(Plan, {f.name: data[f.name] for f in fields(Plan) if f.name in data}, "plan")


def since_replanned(events: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """Leave out what happened under plans that were replaced."""
    last = max((index for index, event in enumerate(events) if event["event"] == "replanned"), default=-1)
    return events[last + 1 :]


def create(
    path: Path, *, job: Job, plan: Mapping[str, Any], dataset: TokenDataset, provenance: Mapping[str, Any]
) -> RunDir:
    """Freeze a run: all files are written aside and appear together, or not at all."""
    check_free(path)
    aside = path.parent / f".{path.name}.{os.getpid()}"
    try:
        aside.mkdir(parents=True)
        run = RunDir(path=aside)
        run.config_file.write_text(yaml.safe_dump(encode(job), sort_keys=False), encoding="utf-8")
        _write_json(run.plan_file, {"format": PLAN_FORMAT, **plan})
        _write_json(run.data_file, encode(dataset))
        _write_json(run.env_file, _env(job, dataset, provenance))
        for folder in (run.metrics, run.checkpoints, run.logs):
            folder.mkdir()
        if job.hf_config is not None:
            run.weights.mkdir()
            shutil.copy(job.hf_config, run.weights / "config.json")
        run.log_event("created", strategy=plan["strategy"], world_size=job.cluster.world_size)
        if path.exists():
            path.rmdir()  # an empty folder, as check_free saw
        os.replace(aside, path)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        if (path / "plan.json").exists():
            check_free(path)  # somebody else was faster; say so
        raise RunDirError(
            f"run_dir={path} cannot be written: {error.strerror}; choose a writable folder"
        ) from error
    return RunDir(path=path.resolve())


def refreeze(run: RunDir, *, job: Job, plan: Mapping[str, Any]) -> None:
    """Put another plan in place of the frozen one, which stays in plans/; plan.json counts from the last rename on."""
    try:
        run.old_plans.mkdir(exist_ok=True)
        shutil.copy(run.plan_file, run.old_plans / f"plan_{len(list(run.old_plans.iterdir())) + 1:04d}.json")
        config, frozen = (file.with_name(f"{file.name}.part") for file in (run.config_file, run.plan_file))
        config.write_text(yaml.safe_dump(encode(job), sort_keys=False), encoding="utf-8")
        _write_json(frozen, {"format": PLAN_FORMAT, **plan})
        config.replace(run.config_file)
        frozen.replace(run.plan_file)
    except OSError as error:
        raise RunDirError(
            f"{run.path} cannot be written: {error.strerror}; the plan stays as it was, make the folder writable"
        ) from error


def reconfigure(run: RunDir, *, job: Job) -> None:
    """Put another configuration in place of the frozen one, under the same plan."""
    try:
        write_whole(run.config_file, yaml.safe_dump(encode(job), sort_keys=False))
    except OSError as error:
        raise RunDirError(
            f"{run.config_file} cannot be written: {error.strerror}; make the folder writable"
        ) from error


def check_free(path: Path) -> None:
    """Raise unless `path` is free for a new run."""
    if (path / "plan.json").exists():
        raise RunDirError(
            f"run_dir={path} already holds a run; continue it with `meshwright resume {path}`, or choose another"
        )
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RunDirError(f"run_dir={path} exists and is not an empty folder; choose another")
    ancestor = next(parent for parent in path.absolute().parents if parent.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
        raise RunDirError(
            f"run_dir={path} cannot be written: {ancestor} is not a writable folder; choose another"
        )


def open_run(path: Path) -> RunDir:
    """Open an existing run directory, or say in one sentence why it is none."""
    run = RunDir(path=path.absolute())
    if not path.exists():
        raise RunDirError(f"run directory {path} does not exist; `meshwright train` makes one")
    missing = [f.name for f in (run.config_file, run.plan_file, run.data_file) if not f.is_file()]
    if missing:
        raise RunDirError(
            f"{path} is not a run directory: {missing[0]} is missing; give the folder that `train` printed"
        )
    try:
        run.job(), run.plan(), run.dataset()
    except ConfigError as error:
        raise RunDirError(f"{path} is damaged: {error}") from error
    return run


def lock(run: RunDir, *, node: int = 0) -> int:
    """Take the run, on host number `node`, for this process and those that inherit the returned descriptor.

    The lock goes with the last of them, so workers that outlive a killed launcher still hold it.
    """
    file = run.lock_file if node == 0 else run.hosts / f"host_{node:05d}.lock"
    try:
        file.parent.mkdir(exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunDirError(f"{file} cannot be written: {error.strerror}; make it writable") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise RunDirError(
            f"run_dir={run.path} is in use by another launcher or its workers; "
            f"stop that one first: touch {run.stop_file}"
        ) from error
    os.set_inheritable(descriptor, True)
    return descriptor


def default_path(*, model: str, strategy: str, root: Path, started: float | None = None) -> Path:
    """runs/<time>-<model>-<strategy>, with a number behind it when two start in one second."""
    moment = datetime.fromtimestamp(started if started is not None else time.time(), tz=timezone.utc)
    base = root / "runs" / f"{moment:%Y%m%d-%H%M%S}-{model}-{strategy}"
    if started is not None:
        return base  # the same start has to find the same folder again
    candidates = (base if n == 1 else base.with_name(f"{base.name}-{n}") for n in range(1, 10_000))
    return next(path for path in candidates if not path.exists())


def _env(job: Job, dataset: TokenDataset, provenance: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **provenance,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seed": job.training.seed,
        "dataset_hash": dataset.content_hash,
        "tokenizer_hash": dataset.tokenizer_hash,
        "config": encode(job),
    }


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _mapping(data: Any, path: Path) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise RunDirError(f"{path} does not hold a JSON object; the run directory is damaged")
    return data


def _read(path: Path, parse: Any) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunDirError(f"{path} is missing; the run directory is damaged") from error
    except OSError as error:
        raise RunDirError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise RunDirError(f"{path} cannot be parsed; the run directory is damaged") from error


def forget_start(run: RunDir, *, before: float = math.inf) -> None:
    """Take away what ranks left until then: where they stood, and what they died of."""
    for path in (*run.heartbeats.glob("rank_*.json"), *run.errors.glob("rank_*")):
        if path.stat().st_mtime < before:
            path.unlink()


def write_error(
    run: RunDir, *, rank: int, host: str, error: BaseException, frame: str | None, trace: str
) -> None:
    """Leave what a rank died of, for the launcher to explain; the full traceback lies beside it."""
    run.errors.mkdir(exist_ok=True)
    trace_file = run.errors / f"rank_{rank:05d}.txt"
    trace_file.write_text(trace, encoding="utf-8")
    code = error.exit_code if isinstance(error, LauncherError) else 1
    record = {
        "time": time.time(),
        "rank": rank,
        "host": host,
        "type": type(error).__name__,
        "message": str(error),
        "exit_code": code,
        "frame": frame,
        "traceback": str(trace_file),
    }
    _write_json(run.errors / f"rank_{rank:05d}.json", record)
