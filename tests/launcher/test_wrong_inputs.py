"""Wrong inputs: each is one sentence on stderr, its documented exit code, no traceback, and nothing half-written."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher.cluster.detect import Machine

CONFIG, PLAN, DATA, RUN_DIR, CHECKPOINT, ENGINE, CLUSTER = 2, 3, 4, 5, 6, 7, 8
H100 = ("cluster=h100_sxm", "model=llama3_8b")


@dataclass(frozen=True)
class Case:
    words: tuple[str, ...]
    code: int
    sentence: str  # has to be in the message


def case(*words: str, code: int, says: str) -> Any:
    return pytest.param(Case(words, code, says), id=" ".join(words)[:80])


COMMAND_LINE = [
    case("trian", code=CONFIG, says="'trian' is not a verb; did you mean 'train'?"),
    case("plan", "--multi-run", code=CONFIG, says="'--multi-run' is not a flag; did you mean '--multirun'?"),
    case("plan", "--cfg", "jab", code=CONFIG, says="invalid choice: 'jab'"),
    case("plan", "--config-dir", code=CONFIG, says="expected one argument"),
    case("plan", "modle=llama3_8b", code=CONFIG, says="modle"),
    case(
        "plan", "model=llama3_9b", code=CONFIG, says="model=llama3_9b is unknown; did you mean 'llama3_8b'?"
    ),
    case("plan", "cluster=h100", code=CONFIG, says="did you mean 'h100_sxm'?"),
    case("plan", "strategy=deepsped", code=CONFIG, says="did you mean 'deepspeed'?"),
    case("plan", "data=jsonlines", code=CONFIG, says="did you mean 'jsonl'?"),
    case("plan", "experiment=smok", code=CONFIG, says="did you mean 'smoke'?"),
    case(
        "plan",
        "model.num_layer=4",
        code=CONFIG,
        says="unknown key 'model.num_layer'; did you mean 'num_layers'?",
    ),
    case("plan", "training.num_step=4", code=CONFIG, says="did you mean 'num_steps'?"),
    case("plan", "plan.zero=4", code=CONFIG, says="did you mean 'zero_stage'?"),
    case("plan", "cluster.gpu.memory=4", code=CONFIG, says="unknown key 'cluster.gpu.memory'"),
    case("plan", "chekpoint.interval=4", code=CONFIG, says="chekpoint"),
    case("plan", "+training.lr=4", code=CONFIG, says="unknown key 'training.lr'"),
    case("plan", "training.num_steps", code=CONFIG, says="training.num_steps"),
    case(
        "plan", "training.num_steps=many", code=CONFIG, says="training.num_steps=many is not a whole number"
    ),
    case("plan", "training.num_steps=0", code=CONFIG, says="training.num_steps=0 must be at least 1"),
    case("plan", "training.global_batch_size=-8", code=CONFIG, says="training.global_batch_size=-8"),
    case("plan", "training.precision=bf61", code=CONFIG, says="did you mean 'bf16'?"),
    case("plan", "training.learning_rate=0", code=CONFIG, says="training.learning_rate=0.0 must be above 0"),
    case("plan", "training.warmup_steps=999", code=CONFIG, says="leaves nothing of training.num_steps=300"),
    case("plan", "training.deterministic=perhaps", code=CONFIG, says="is not true or false"),
    case(
        "plan",
        "model.hidden_size=100",
        "model.num_attention_heads=7",
        code=CONFIG,
        says="model.hidden_size=100",
    ),
    case("plan", "cluster.gpus_per_node=0", code=CONFIG, says="cluster.gpus_per_node=0 must be at least 1"),
    case("plan", "checkpoint.keep_last=0", code=CONFIG, says="checkpoint.keep_last=0"),
    case("plan", "monitor.log_interval=0", code=CONFIG, says="monitor.log_interval=0"),
    case("plan", "data.validation_fraction=1.5", code=CONFIG, says="data.validation_fraction=1.5"),
    case("plan", "evaluation.interval=-1", code=CONFIG, says="evaluation.interval=-1"),
    case("plan", "checks.resume_is_exact=true", code=CONFIG, says="set checkpoint.interval"),
    case("plan", "stop_at_step=0", code=CONFIG, says="stop_at_step=0 must be at least 1"),
    case(
        "plan",
        "model.hf_config=/no/such/config.json",
        code=CONFIG,
        says="model.hf_config=/no/such/config.json",
    ),
    case(
        "plan",
        "model.weights=/no/such/folder",
        code=CONFIG,
        says="model.weights=/no/such/folder is not a folder",
    ),
    case("plan", "--json", "--cfg", "job", code=CONFIG, says="--json has no document"),
    case("plan", "run_dir=${nowhere}", code=CONFIG, says="nowhere"),
    case("plan", "run_dir=a/b=c", code=CONFIG, says="put special characters between quotes"),
    case("show", "--all", code=CONFIG, says="'--all' is not a flag"),
    case("resume", code=CONFIG, says="takes one run directory"),
    case("resume", "a", "training.num_steps=3", code=CONFIG, says="cannot be changed when a run is resumed"),
]
ENGINE_KEYS = [
    case(
        "plan",
        "strategy=deepspeed",
        "strategy.engine.zero_optimisation.stage=3",
        code=CONFIG,
        says="unknown key 'strategy.engine.zero_optimisation'; did you mean 'zero_optimization'?",
    ),
    case(
        "plan",
        "strategy=deepspeed",
        "strategy.engine.zero_optimization.overlap_com=true",
        code=CONFIG,
        says="did you mean 'overlap_comm'?",
    ),
    case(
        "plan",
        "strategy=deepspeed",
        "strategy.engine.zero_optimization.stage=3",
        code=CONFIG,
        says="plan.zero_stage",
    ),
    case("plan", "strategy.engine.ddp.bucket_cap=3", code=CONFIG, says="did you mean 'bucket_cap_mb'?"),
    case(
        "plan", "strategy=auto", "strategy.engine.ddp.bucket_cap_mb=3", code=CONFIG, says="needs one engine"
    ),
]
IMPOSSIBLE_PLANS = [
    case("plan", *H100, "plan.tp=3", code=PLAN, says="plan.tp=3"),
    case("plan", *H100, "plan.dp=3", code=PLAN, says="plan.dp=3"),
    case("plan", *H100, "plan.zero_stage=4", code=CONFIG, says="plan.zero_stage=4 is not a ZeRO stage"),
    case("plan", *H100, "plan.pp=2", code=PLAN, says="plan.pp=2"),
    case("plan", *H100, "plan.ep=2", code=PLAN, says="plan.ep=2"),
    case(
        "plan",
        *H100,
        "plan.micro_batch_size=7",
        "training.global_batch_size=64",
        code=PLAN,
        says="micro_batch_size=7",
    ),
    case("plan", *H100, "training.sequence_length=99999", code=PLAN, says="training.sequence_length=99999"),
    case("plan", "model=llama3_405b", "cluster=l40s_pcie", code=PLAN, says="llama3_405b"),
    case(
        "plan",
        "model=llama3_70b",
        "cluster=h100_sxm",
        "plan.zero_stage=0",
        code=PLAN,
        says="plan.zero_stage=0",
    ),
    case("plan", *H100, "training.global_batch_size=3", code=PLAN, says="training.global_batch_size=3"),
]


def check(outcome: Any, case: Case) -> None:
    assert outcome.code == case.code, outcome.err
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("meshwright: ")
    assert case.sentence in lines[0]
    assert "Traceback" not in outcome.err + outcome.out


@pytest.fixture(autouse=True)
def nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every case runs in an empty folder that has to be empty afterwards."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield
    assert sorted(folder.rglob("*")) == []


@pytest.mark.parametrize("case", [*COMMAND_LINE, *ENGINE_KEYS, *IMPOSSIBLE_PLANS])
def test_wrong_words(call: Callable[..., Any], case: Case) -> None:
    check(call(*case.words), case)


def test_as_json_the_fault_is_a_document(call: Callable[..., Any]) -> None:
    outcome = call("plan", "model=llama3_9b", "--json")
    assert outcome.json["error"]["exit_code"] == outcome.code == CONFIG
    assert outcome.json["error"]["type"] == "ConfigError"


# ---- files ------------------------------------------------------------------------------------------------------

TINY = (
    *("strategy=fake", "monitor=none", "cluster.gpus_per_node=1", "data.max_bytes=200000"),
    *("training.sequence_length=32", "training.global_batch_size=8", "training.num_steps=4"),
)


@pytest.mark.parametrize(
    ("name", "content", "words", "code", "says"),
    [
        ("empty.txt", b"", ("data=text", "data.paths=[{file}]"), DATA, "holds no text"),
        ("a.jsonl", b'{"txt": "x"}\n', ("data=jsonl", "data.paths=[{file}]"), DATA, "txt"),
        ("b.jsonl", b'{"text": "x"}\n{"text": \n', ("data=jsonl", "data.paths=[{file}]"), DATA, "b.jsonl"),
        ("c.txt", b"\xff\xfe\x00bad", ("data=text", "data.paths=[{file}]"), DATA, "c.txt"),
        ("short.txt", b"four words are here", ("data=text", "data.paths=[{file}]"), DATA, "sequence_length"),
        ("d.parquet", b"not parquet", ("data=parquet", "data.paths=[{file}]"), DATA, "d.parquet"),
        ("tokenizer.json", b"{}", ("data.tokenizer={file}",), DATA, "tokenizer.json"),
        ("config.json", b"{not json", ("model.hf_config={file}",), CONFIG, "model.hf_config"),
        ("config.json", b'{"model_type": "bert"}', ("model.hf_config={file}",), CONFIG, "bert"),
        ("config.json", b'{"model_type": "llama"}', ("model.hf_config={file}",), CONFIG, "model.hf_config"),
    ],
)
def test_wrong_files(
    call: Callable[..., Any],
    tmp_path: Path,
    name: str,
    content: bytes,
    words: tuple[str, ...],
    code: int,
    says: str,
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    filled = [word.format(file=file) for word in words]
    check(call("train", *TINY, *filled, "run_dir=run"), Case((), code, says))


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("data=text", "data.paths=[/no/such/file.txt]"), DATA, "/no/such/file.txt"),
        (("data=text",), CONFIG, "data.paths"),
        (("data.tokenizer=/no/such/tokenizer",), DATA, "/no/such/tokenizer"),
        (("model.vocab_size=200",), DATA, "model.vocab_size=200"),
        (("data.cache_dir=/proc/cannot",), DATA, "data.cache_dir=/proc/cannot"),
        (("run_dir=/proc/cannot/run",), RUN_DIR, "run_dir=/proc/cannot/run cannot be written"),
    ],
)
def test_missing_or_impossible_paths(
    call: Callable[..., Any], words: tuple[str, ...], code: int, says: str
) -> None:
    extra = () if any(word.startswith("run_dir") for word in words) else ("run_dir=run",)
    check(call("train", *TINY, *words, *extra), Case((), code, says))


def test_a_port_in_use(call: Callable[..., Any], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = (*TINY, f"submit.port={port}", f"run_dir={tmp_path / 'run'}")
        outcome = call("train", *words, "--json")
    assert outcome.code == CLUSTER
    assert f"submit.port={port} cannot be used" in outcome.json["error"]["message"]


# ---- run directories --------------------------------------------------------------------------------------------


@pytest.fixture
def finished(call: Callable[..., Any], tmp_path: Path) -> Path:
    run = tmp_path / "run"
    outcome = call("train", *TINY, f"run_dir={run}", "stop_at_step=2", "--json")
    assert outcome.code == 0, outcome.err
    return run


def test_an_occupied_run_directory(call: Callable[..., Any], finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    says = f"run_dir={finished} already holds a run; continue it with `meshwright resume"
    check(call("train", *TINY, f"run_dir={finished}"), Case((), RUN_DIR, says))
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_a_folder_that_is_not_ours(call: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    says = "exists and is not an empty folder"
    check(call("train", *TINY, f"run_dir={tmp_path / 'mine'}"), Case((), RUN_DIR, says))
    check(call("show", str(tmp_path / "mine")), Case((), RUN_DIR, "is not a run directory"))
    check(call("resume", str(tmp_path / "none")), Case((), RUN_DIR, "does not exist"))


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("plan.json", "{", "cannot be parsed"),
        ("plan.json", "[]", "does not hold a JSON object"),
        ("config.yaml", "model: {name: x}", "is damaged"),
        ("data.json", "{}", "is damaged"),
    ],
)
def test_a_damaged_run_directory(
    call: Callable[..., Any], finished: Path, file: str, content: str, says: str
) -> None:
    (finished / file).write_text(content)
    check(call("resume", str(finished)), Case((), RUN_DIR, says))


def damage(run: Path, how: str) -> None:
    checkpoint = next((run / "checkpoints").glob("step_*"))
    manifest = checkpoint / "manifest.json"
    data = json.loads(manifest.read_text())
    victim = checkpoint / data["files"][0]["path"]
    if how == "truncated manifest":
        manifest.write_text(manifest.read_text()[:50])
    elif how == "newer format":
        manifest.write_text(json.dumps({**data, "format": 99}))
    elif how == "missing file":
        victim.unlink()
    elif how == "flipped bit":
        content = bytearray(victim.read_bytes())
        content[0] ^= 1
        victim.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated manifest", "newer format", "missing file", "flipped bit"])
def test_a_damaged_checkpoint_is_refused(call: Callable[..., Any], finished: Path, how: str) -> None:
    damage(finished, how)
    outcome = call("resume", str(finished), "--json")
    assert outcome.code == CHECKPOINT
    assert "none of the 1 checkpoints" in outcome.json["error"]["message"]


def test_a_world_size_that_does_not_match_the_plan(
    call: Callable[..., Any], finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = json.loads((finished / "plan.json").read_text())
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert plan["dp"] == 1
    outcome = call("resume", str(finished), "--json")
    assert outcome.code == CLUSTER
    assert "WORLD_SIZE=3 does not match the frozen plan of 1 ranks" in outcome.json["error"]["message"]


def test_torchrun_with_another_size_than_the_cluster(
    call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {
        "TORCHELASTIC_RUN_ID": "x",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "RANK": "0",
    }.items():
        monkeypatch.setenv(key, value)
    says = "cluster.gpus_per_node=5 does not match torchrun"
    check(call("train", *TINY[:2], "cluster.gpus_per_node=5", "run_dir=run"), Case((), CLUSTER, says))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ("cluster=h100_sxm",),
            "cluster.gpus_per_node=8 of H100-SXM5-80GB are planned and this host shows 0 GPUs",
        ),
        (("cluster=h100_sxm", "cluster.num_nodes=2"), "cluster.num_nodes=2 needs a start on every node"),
    ],
)
def test_a_plan_for_hardware_that_is_not_here(
    call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], says: str
) -> None:
    monkeypatch.setattr("launcher.cluster.detect.probe", lambda: Machine(gpus=(), num_cores=1, memory_gib=1))
    monkeypatch.setattr("launcher.cluster.detect.visible_gpus", lambda: ())
    check(call("train", "model=llama3_8b", *words, "run_dir=run"), Case((), CLUSTER, says))


def test_an_engine_that_is_not_installed(call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.environments.catalogue.has_package", lambda strategy: False)
    says = "deepspeed: not installed here; meshwright env create deepspeed"
    check(call("train", "strategy=deepspeed", "run_dir=run"), Case((), ENGINE, says))


def test_a_read_only_folder(shell: Callable[..., Any], tmp_path: Path) -> None:
    """Root writes anywhere, so as root an unprivileged user asks."""
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    if os.geteuid() == 0:
        # /proc refuses root as well; the sentence is the same.
        locked = Path("/proc/1")
    outcome = shell("train", *TINY, f"run_dir={locked / 'run'}")
    check(outcome, Case((), RUN_DIR, "cannot be written"))
