"""`meshwright env ...` as a person meets it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import strategies
from launcher.environments import catalogue

Call = Callable[..., Any]


@pytest.fixture
def nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without any environment."""
    monkeypatch.setenv("MESHWRIGHT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def present(nothing: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Environments as builds leave them: a whole one, one of an older lock, one that was interrupted."""
    whole = catalogue.folder_of("deepspeed", torch="cpu")
    versions = {"python": "3.11", "torch": "2.13.0", "deepspeed": "0.19.8"}
    record = {
        "versions": versions,
        "size_bytes": 2**30,
        "build_s": 61.0,
        "created": "2026-01-02T03:04:05+00:00",
    }
    for folder in (whole, whole.with_name("deepspeed-00000000-cpu")):
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").symlink_to(sys.executable)
        for name in ("torch-2.13.0", "deepspeed-0.19.8"):
            (folder / "lib" / "python3.11" / "site-packages" / f"{name}.dist-info").mkdir(parents=True)
        (folder / "environment.json").write_text(json.dumps(record))
    whole.with_name("megatron-11111111-cpu").mkdir()
    return whole


def test_list_tells_what_is_there_and_what_it_can_do(call: Call, present: Path) -> None:
    text = call("env", "list").out
    assert (
        f"ready        {present}: python 3.11, torch 2.13.0, deepspeed 0.19.8; 1.00 GiB, built in 61 s"
        in text
    )
    assert "outdated     " in text
    assert "megatron-11111111-cpu; meshwright env create megatron" in text
    assert "colossalai: not installed here; meshwright env create colossalai" in text
    assert f"this Python  {sys.executable}: python" in text
    assert "zero_stage 0, 1, 2, 3; bf16, fp32; offload optimizer (1, 2, 3)" in text
    data = call("env", "list", "--json").json
    engines = {entry["engine"]: entry for entry in data["engines"]}
    assert sorted(engines) == strategies.engines()
    assert {entry["state"] for entry in engines["deepspeed"]["environments"]} == {"ready", "outdated"}
    assert engines["megatron"]["environments"][0]["state"] == "interrupted"
    assert engines["accelerate"]["own"]["torch"]
    assert call("env").out == text


def test_create_says_when_it_was_there_already(call: Call, present: Path) -> None:
    outcome = call("env", "create", "deepspeed", "torch=cpu", "--json")
    assert outcome.code == 0
    assert outcome.json["built"] is False
    assert outcome.json["path"] == str(present)


def test_remove_takes_an_engine_or_one_environment(call: Call, present: Path) -> None:
    assert call("env", "remove", "deepspeed-00000000-cpu", "--json").json["removed"] == [
        str(present.with_name("deepspeed-00000000-cpu"))
    ]
    assert present.exists()
    assert call("env", "remove", "deepspeed").out == f"removed {present}\n"
    assert call("env", "remove", "megatron").code == 0
    assert catalogue.found() == []


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("creat",), 2, "'creat' is not a verb of `meshwright env`; did you mean 'create'?"),
        (("create",), 2, "`meshwright env create` takes one of accelerate, colossalai, deepspeed, megatron"),
        (("create", "deepsped"), 2, "'deepsped' is not an engine; did you mean 'deepspeed'?"),
        (
            ("create", "deepspeed", "torhc=cpu"),
            2,
            "unknown key 'torhc' of `meshwright env create`; did you mean",
        ),
        (("create", "deepspeed", "torch=rocm"), 2, "torch=rocm is unknown; use one of cpu, cuda"),
        (("check", "deepspeed", "torch=cpu"), 2, "unknown key 'torch' of `meshwright env check`"),
        (("remove", "deepspeed"), 2, "'deepspeed' has no environment here; none was created yet"),
        (("remove",), 2, "takes one engine"),
        (("list", "x"), 2, "`meshwright env list` takes no 'x'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_meant(
    call: Call, nothing: Path, words: tuple[str, ...], code: int, says: str
) -> None:
    outcome = call("env", *words)
    assert (outcome.code, outcome.out) == (code, "")
    assert says in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_check_trains_two_steps(call: Call, nothing: Path) -> None:
    outcome = call("env", "check", "accelerate", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["python"] == sys.executable
    assert 0 < outcome.json["loss"] < 10


def test_check_says_what_is_wrong(call: Call, nothing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "has_package", lambda strategy: False)
    absent = call("env", "check", "deepspeed")
    assert (absent.code, absent.err) == (
        7,
        "meshwright: deepspeed: not installed here; meshwright env create deepspeed\n",
    )


def test_check_passes_on_what_train_said(call: Call, present: Path) -> None:
    """The environment is a shell without an engine: training with it cannot start."""
    (present / "bin" / "python").unlink()
    (present / "bin" / "python").write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
    (present / "bin" / "python").chmod(0o755)
    outcome = call("env", "check", "deepspeed")
    assert outcome.code == 7
    assert "env check deepspeed: the interpreter" in outcome.err
    assert "cannot run the workers (broken)" in outcome.err
