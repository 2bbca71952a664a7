"""Fixtures every test may use: a tiny model, a shared token cache, and the command line in process or as one."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher import cli
from strategies.model_spec import ModelSpec
from strategies.spec import TrainingSpec

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be one JSON document."""
        return json.loads(self.out)


@pytest.fixture(scope="session", autouse=True)
def _no_network_no_colour(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests never look outside this machine and never write to the caller's folders."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["WANDB_MODE"] = "offline"
    os.environ.pop("WANDB_API_KEY", None)
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["MESHWRIGHT_HOME"] = str(tmp_path_factory.mktemp("home"))


@pytest.fixture
def repository() -> Path:
    """The checkout."""
    return REPOSITORY


@pytest.fixture
def tiny_model() -> ModelSpec:
    """A model that trains in milliseconds."""
    return ModelSpec(
        name="tiny",
        model_type="llama",
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=64,
        vocab_size=264,
        max_position_embeddings=64,
    )


@pytest.fixture
def training() -> TrainingSpec:
    """A short run."""
    return TrainingSpec(
        sequence_length=32, global_batch_size=8, num_steps=10, precision="fp32", learning_rate=1e-3
    )


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run one command line inside this process."""

    def run(*words: str) -> Outcome:
        capsys.readouterr()
        code = cli.run(words)
        captured = capsys.readouterr()
        return Outcome(code=code, out=captured.out, err=captured.err)

    return run


@pytest.fixture(scope="session")
def shell() -> Callable[..., Outcome]:
    """Run `python -m launcher` as a process of its own."""

    def run(*words: str, cwd: Path | None = None, timeout: float = 300, **environment: str) -> Outcome:
        done = subprocess.run(
            [sys.executable, "-m", "launcher", *words],
            cwd=cwd or REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return Outcome(code=done.returncode, out=done.stdout, err=done.stderr)

    return run


@pytest.fixture
def wandb_reader() -> SimpleNamespace:
    """Read an offline W&B file: `records(file)` and `history(file)`; the package itself has no reader any more."""
    return SimpleNamespace(records=_wandb_records, history=_wandb_history)


@pytest.fixture(scope="session")
def mlflow_environment() -> dict[str, str]:
    """Variables under which Python finds MLflow, which `make test` keeps apart: it brings a web server along."""
    found = os.environ.get("MESHWRIGHT_MLFLOW")
    if found is None:
        pytest.fail(
            "MESHWRIGHT_MLFLOW must name the folder that MLflow was installed into; `make test` makes one"
        )
    return {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{found}"}


@pytest.fixture
def mlflow_reader(mlflow_environment: dict[str, str]) -> Callable[[Path], list[Any]]:
    """Read a folder of MLflow's with its own client: the runs that are not deleted, with every point of theirs."""

    def read(folder: Path) -> list[Any]:
        environment = {**os.environ, **mlflow_environment, "MLFLOW_ALLOW_FILE_STORE": "true"}
        done = subprocess.run(
            [sys.executable, "-c", _MLFLOW_READER, folder.as_uri()],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        runs: list[Any] = json.loads(done.stdout)
        return runs

    return read


_MLFLOW_READER = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient(tracking_uri=sys.argv[1])
told = []
for run in client.search_runs([place.experiment_id for place in client.search_experiments()]):
    points = [(tag, p.step, p.value) for tag in run.data.metrics
              for p in client.get_metric_history(run.info.run_id, tag)]
    told.append({"name": run.info.run_name, "id": run.info.run_id, "status": run.info.status,
                 "tags": run.data.tags, "params": run.data.params, "points": points})
print(json.dumps(told))
"""


def _wandb_records(file: Path) -> Iterator[Any]:
    """Records of a W&B file: LevelDB's log format (32 KiB blocks of framed fragments) after a 7-byte head."""
    from wandb.proto import wandb_internal_pb2

    content, position, whole = file.read_bytes(), 7, b""
    assert content.startswith(b":W&B")
    while position + 7 <= len(content):
        room = 32768 - position % 32768
        if room < 7:
            position += room
            continue
        size, kind = struct.unpack_from("<HB", content, position + 4)
        whole += content[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole in one fragment, or the last one
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def _wandb_history(file: Path) -> list[dict[str, Any]]:
    rows = []
    for record in _wandb_records(file):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append(
                {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            )
    return rows


class Webhook(HTTPServer):
    """Keeps what is posted to it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.taken: list[dict[str, Any]] = []
        self.answer = 200
        self.url = f"http://127.0.0.1:{self.server_port}/services/secret-path"

    def told(self) -> Counter[str]:
        """How often each cause came."""
        return Counter(record["cause"] for record in self.taken)


class _Handler(BaseHTTPRequestHandler):
    server: Webhook

    def do_POST(self) -> None:
        self.server.taken.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(self.server.answer)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Webhook]:
    """A server that alerts of this process, and of those that it starts, go to: `taken`, `told()`, `answer`, `url`."""
    server = Webhook()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("MESHWRIGHT_WEBHOOK_URL", server.url)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
