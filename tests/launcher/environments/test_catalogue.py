"""Locks, what lies in the folder of environments, and which Python runs a strategy."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import strategies
from launcher.environments import catalogue, interpreter
from launcher.errors import ConfigError, EngineError

# ---- locks --------------------------------------------------------------------------------------------------------


def test_every_engine_has_a_lock_with_what_meshwright_imports(repository: Path) -> None:
    assert catalogue.names() == strategies.engines()
    [listed] = re.findall(
        r"^dependencies = \[(.*?)^\]", (repository / "pyproject.toml").read_text(), flags=re.M | re.S
    )
    ours = set(re.findall(r'"([\w-]+)', listed))
    assert "torch" in ours
    for name in catalogue.names():
        pins = catalogue.read_lock(name)
        assert catalogue.distribution_of(name) in pins
        assert ours <= set(pins), f"{name}: {sorted(ours - set(pins))}"


def test_locks_agree_with_what_was_tested(repository: Path) -> None:
    tested = dict(re.findall(r"^([\w.-]+)==(\S+)$", (repository / "constraints.txt").read_text(), flags=re.M))
    tested = {interpreter.normalised(name): version for name, version in tested.items()}
    older = {"colossalai": {"datasets", "fsspec", "huggingface-hub", "tokenizers", "transformers"}}
    for name in catalogue.names():
        pins = catalogue.read_lock(name)
        differ = {package for package, version in pins.items() if tested.get(package, version) != version}
        assert differ == older.get(name, set()), name


def test_a_lock_is_read_with_what_it_includes(engine: Path) -> None:
    assert catalogue.read_lock("tinyengine") == {"tinybase": "1.0", "tinyengine": "2.0"}
    (engine / "tinyengine.txt").write_text("tinybase==2.0\n-r base.txt\n")
    assert catalogue.read_lock("tinyengine") == {"tinybase": "2.0"}, "its own pin wins"
    with pytest.raises(ConfigError, match=r"'tinyengin' has no lock; did you mean 'tinyengine'"):
        catalogue.read_lock("tinyengin")


def test_the_build_of_pytorch_follows_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for path, build in (("/bin/nvidia-smi", "cuda"), (None, "cpu")):
        monkeypatch.setattr(shutil, "which", lambda tool, path=path: path)
        assert catalogue.torch_build({}) == build
        assert catalogue.torch_build({"MESHWRIGHT_TORCH": "cuda"}) == "cuda"
    with pytest.raises(ConfigError, match=r"MESHWRIGHT_TORCH=rocm is unknown"):
        catalogue.torch_build({"MESHWRIGHT_TORCH": "rocm"})


def test_a_gpu_machine_wants_the_build_for_it(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for build, name, ready in (("cpu", "cpu", True), ("cuda", "cpu", False), ("cpu", "cuda", True)):
        folder = catalogue.folder_of("tinyengine", torch=name)
        monkeypatch.setattr(
            catalogue,
            "inspect",
            lambda path, folder=folder: (
                catalogue.Environment(path=path, name="tinyengine", state="ready") if path == folder else None
            ),
        )
        monkeypatch.setenv("MESHWRIGHT_TORCH", build)
        assert (catalogue.ready("tinyengine") is not None) is ready


# ---- which Python for which strategy ------------------------------------------------------------------------------


def test_our_own_python_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for strategy in ("accelerate", "fake"):
        own = catalogue.choose(strategy)
        assert (own.kind, own.path) == ("own", sys.executable)
        assert own.versions["torch"] == interpreter.installed()["torch"]
    named = catalogue.choose("accelerate", named=sys.executable)
    assert (named.kind, named.versions["accelerate"]) == ("named", interpreter.installed()["accelerate"])


def test_no_python_for_an_engine_is_one_sentence(engine: Path) -> None:
    with pytest.raises(
        EngineError, match=r"^tinyengine: not installed here; meshwright env create tinyengine$"
    ):
        catalogue.choose("tinyengine")
    with pytest.raises(EngineError, match=rf"submit.python={sys.executable} has no tinyengine"):
        catalogue.choose("tinyengine", named=sys.executable)
    with pytest.raises(EngineError, match=r"which .* cannot import; start torchrun out of an environment"):
        catalogue.choose("tinyengine", is_given=True)


def test_plan_says_what_is_missing_and_plans(
    call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(strategies.ENGINE_PACKAGES, "deepspeed", "no_such_package")
    words = ("plan", "strategy=deepspeed", "model=llama3_8b", "cluster=h100_sxm")
    text = call(*words)
    assert text.code == 0
    assert text.out.endswith("deepspeed: not installed here; meshwright env create deepspeed\n")
    plan = call(*words, "--json").json
    assert plan["strategy"] == "deepspeed"
    assert plan["notes"] == ["deepspeed: not installed here; meshwright env create deepspeed"]
