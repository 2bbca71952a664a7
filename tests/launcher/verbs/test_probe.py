"""The verb `probe`: its words, the file it writes, and what it says when it cannot."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import compose
from launcher.cluster.spec import ClusterSpec, Measured
from launcher.decode import decode
from launcher.errors import ClusterError, ConfigError
from launcher.verbs import probe

Call = Callable[..., Any]
ROW = {"s": 1e-3}
FIGURES: dict[str, Any] = {
    "torch": "2.9",
    "memory": [{"name": name, "bytes": 1e7, **ROW} for name in ("copy", "elementwise")],
    "host": {"layers": 4, "whole_s": 4e-3, "sharded_s": 5e-3},
    "products": [
        {"precision": "fp32", "m": n, "n": n, "k": n, "s": 2 * n**3 / 1e11 + 1e-6} for n in (64, 512)
    ],
    "attention": [
        {
            **{"precision": "fp32", "length": length, "heads": 8, "head_size": 64},
            **{"flops": 1024 * length**2, "forward_s": length**2 * 1e-8, "backward_s": length**2 * 3e-8},
        }
        for length in (64, 512)
    ],
    "collectives": [
        {"tier": 0, "name": "all_gather", "size": 2, "bytes": size, "s": 1e-4 + size / 2e9}
        for size in (1000, 1_000_000)
    ],
}
MEASURED = Measured(date="2026-01-02T03:04:05+00:00", host="here", torch="2.9")


@pytest.fixture
def measured_at_once(monkeypatch: pytest.MonkeyPatch) -> list[ClusterSpec]:
    """Nothing is started; the clusters that were to be measured."""
    asked: list[ClusterSpec] = []

    def measure(cluster: ClusterSpec, *, seconds: float) -> dict[str, Any]:
        asked.append(cluster)
        return FIGURES

    monkeypatch.setattr(probe, "measure", measure)
    return asked


def test_words_are_split_between_the_verb_and_the_cluster() -> None:
    request, cluster = probe.read(["out=x.yaml", "num_processes=4", "cluster.gpu.device=cpu", "seconds=9"])
    assert (request.out, request.seconds, request.force) == ("x.yaml", 9.0, False)
    assert (cluster.gpu.device, cluster.gpus_per_node) == ("cpu", 4)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("ot=x.yaml", "'ot=x.yaml' is not a word of `probe`; did you mean 'out'?"),
        ("model=llama3_8b", "is not a word of `probe`"),
        ("out=x.json", "out=x.json must end in .yaml"),
        ("seconds=0", "seconds=0.0 must lie between 1 and 600"),
        ("num_processes=0", "num_processes=0 must be at least 1"),
        ("force=perhaps", "force=perhaps is not true or false"),
        ("cluster.gpu.nme=x", "unknown key 'cluster.gpu.nme'; did you mean 'name'?"),
        ("out=nowhere/x.yaml", "is not a writable folder"),
    ],
)
def test_a_wrong_word_is_one_sentence_and_measures_nothing(
    call: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    measured_at_once: list[Any],
    word: str,
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = call("probe", word)
    assert (outcome.code, outcome.out) == (2, "")
    assert sentence in outcome.err
    assert not measured_at_once and not list(tmp_path.iterdir())


def test_the_file_is_a_cluster_to_plan_with(call: Call, tmp_path: Path, measured_at_once: list[Any]) -> None:
    path = tmp_path / "mine.yaml"
    outcome = call("probe", f"out={path}", "num_processes=2", "cluster.gpu.device=cpu")
    assert outcome.code == 0
    assert "1 GB/s, 100.0 us a message" in outcome.out and str(path) in outcome.out
    found = decode(ClusterSpec, yaml.safe_load(path.read_text(encoding="utf-8")))
    assert found.name == "mine" and found.measured is not None
    assert found.links[0].latency_us == 100.0
    assert [file.name for file in tmp_path.iterdir()] == ["mine.yaml"], "nothing is left beside it"
    plan = call("plan", f"cluster={path}", "strategy=fake", "cluster.num_nodes=2", "--json").json
    assert plan["inputs"]["cluster"]["measured"]["host"] == found.measured.host
    assert plan["inputs"]["cluster"]["num_nodes"] == 2, "keys may still be set"


def test_as_json_the_file_and_what_was_timed(call: Call, tmp_path: Path, measured_at_once: list[Any]) -> None:
    path = tmp_path / "mine.yaml"
    found = call("probe", f"out={path}", "--json").json
    assert found["out"] == str(path)
    assert found["figures"] == json.loads(json.dumps(FIGURES))
    assert found["cluster"] == yaml.safe_load(path.read_text(encoding="utf-8"))


def test_a_file_that_is_there_stays_unless_forced(
    call: Call, tmp_path: Path, measured_at_once: list[Any]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("precious", encoding="utf-8")
    outcome = call("probe", f"out={path}")
    assert outcome.code == 2 and "use force=true to replace it" in outcome.err
    assert path.read_text(encoding="utf-8") == "precious" and not measured_at_once
    assert call("probe", f"out={path}", "force=true").code == 0
    assert "measured:" in path.read_text(encoding="utf-8")


def test_a_file_that_cannot_replace_another_leaves_it_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured_at_once: list[Any]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("precious", encoding="utf-8")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ConfigError, match="No space left on device"):
        probe.run([f"out={path}", "force=true"])
    assert [file.read_text(encoding="utf-8") for file in tmp_path.iterdir()] == ["precious"]


def test_several_nodes_need_torchrun() -> None:
    _, cluster = probe.read(["cluster=h100_sxm", "cluster.num_nodes=2"])
    with pytest.raises(ClusterError, match=r"cluster.num_nodes=2 needs a start on every node"):
        probe.measure(cluster, seconds=1)


def test_a_device_that_is_not_here_is_one_sentence() -> None:
    _, cluster = probe.read(["cluster=h100_sxm", "num_processes=1"])
    with pytest.raises(ClusterError, match=r"this machine cannot be measured .*this host shows 0"):
        probe.measure(cluster, seconds=5)


def test_workers_that_do_not_end_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_START_S", -4.8)
    _, cluster = probe.read(["cluster.gpu.device=cpu", "num_processes=1"])
    with pytest.raises(ClusterError, match="did not end within"):
        probe.measure(cluster, seconds=5)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "does not exist; `meshwright probe out="),
        ("- 1", "must hold the keys of a cluster"),
        ("a: [", "cannot be read as YAML"),
        ("name: x", "missing key 'cluster."),
        ("name: x\nspeed: 3", "unknown key 'cluster.speed'"),
    ],
)
def test_a_wrong_cluster_file_is_one_sentence(tmp_path: Path, content: str | None, sentence: str) -> None:
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=sentence):
        compose.jobs([f"cluster={path}"])
