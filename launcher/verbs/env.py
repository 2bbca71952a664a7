"""`meshwright env create|list|check|remove`: the environments of the engines, from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import strategies
from launcher.environments import build, catalogue, engines, interpreter
from launcher.environments.catalogue import Environment
from launcher.errors import BY_EXIT_CODE, FINISHED, ConfigError, EngineError, LauncherError
from launcher.output import Output
from strategies.names import suggest

Say = Callable[[str], None]
GIB = 2**30
# Small enough for any machine, and the real thing: data, plan, workers, two steps.
CHECK = (
    *("model=debug_tiny", "cluster=local", "data=stdlib", "data.max_bytes=200000", "monitor=none"),
    *("training.num_steps=2", "training.sequence_length=64", "training.global_batch_size=8"),
    *("evaluation.num_sequences=8", "checkpoint.save_last=false"),
)


def env(arguments: list[str], output: Output) -> int:
    """Do what `env` was asked to."""
    output.result(*_run(arguments, say=output.say))
    return FINISHED


def _run(arguments: Sequence[str], *, say: Say) -> tuple[dict[str, Any], str]:
    verb, words = (arguments[0], list(arguments[1:])) if arguments else ("list", [])
    if verb not in VERBS:
        raise ConfigError(f"'{verb}' is not a verb of `meshwright env`; {suggest(verb, VERBS)}")
    return VERBS[verb](words, say)


def _create(words: list[str], say: Say) -> tuple[dict[str, Any], str]:
    name, options = _name("create", words, options=("torch", "python"))
    torch = options.get("torch") or catalogue.torch_build(os.environ)
    if torch not in catalogue.TORCH_BUILDS:
        raise ConfigError(f"torch={torch} is unknown; {suggest(torch, catalogue.TORCH_BUILDS)}")
    folder = catalogue.folder_of(name, torch=torch)
    say(f"building {folder} (what pip says: {folder}.log)")
    made, is_new = build.create(name, torch=torch, base=options.get("python", sys.executable))
    text = f"{_line(made)}\ncheck it with `meshwright env check {name}`"
    return {**_to_json(made), "built": is_new}, text if is_new else f"{_line(made)}\nit was there already"


def _list(words: list[str], say: Say) -> tuple[dict[str, Any], str]:
    if words:
        raise ConfigError(f"`meshwright env list` takes no '{words[0]}'")
    there = catalogue.found()
    data, lines = [], []
    for name in strategies.engines():
        own = interpreter.installed() if catalogue.has_package(name) else {}
        own = interpreter.frozen_versions(own, distribution=catalogue.distribution_of(name))
        mine = [environment for environment in there if environment.name == name]
        told = [f"  this Python  {sys.executable}: {_versions(own)}"] if own else []
        told += [f"  {_line(environment)}" for environment in mine]
        told += [] if told else [f"  {catalogue.absence(name)}"]
        lines += [name, f"  can run      {engines.summary(name)}", *told]
        facts = {"engine": name, "own": own or None, "can": engines.facts(name)}
        data.append({**facts, "environments": [_to_json(environment) for environment in mine]})
    return {"root": str(catalogue.root()), "engines": data}, "\n".join(lines)


def _check(words: list[str], say: Say) -> tuple[dict[str, Any], str]:
    name, _ = _name("check", words)
    chosen = catalogue.ready(name)
    if chosen is None and not catalogue.has_package(name):
        raise EngineError(catalogue.absence(name))
    python = str(chosen.python) if chosen else sys.executable
    say(f"training two steps of strategy={name} with {python}")
    started = time.monotonic()
    facts = _train(name, python)
    seconds = time.monotonic() - started
    data = {"engine": name, "python": python, "seconds": round(seconds, 1), "loss": facts["loss"]}
    return data, f"{name}: two steps in {seconds:.0f} s from start to end, loss {facts['loss']:.4f}; all well"


def _train(name: str, python: str) -> dict[str, Any]:
    """Let `train` do in a folder of its own what a person would; raise what it failed of."""
    with tempfile.TemporaryDirectory(prefix="meshwright-check-") as folder:
        words = [*CHECK, f"strategy={name}", f"submit.python='{python}'", f"run_dir={folder}/run", "--json"]
        done = subprocess.run(
            [sys.executable, "-m", "launcher", "train", *words],
            env=interpreter.surroundings(os.environ, sys.executable),
            capture_output=True,
            text=True,
            check=False,
            cwd=folder,
        )
    try:
        facts: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        said = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        raise LauncherError(f"strategy={name} could not be started: {said}") from None
    if "error" in facts:
        error = facts["error"]
        raise BY_EXIT_CODE.get(error["exit_code"], LauncherError)(f"env check {name}: {error['message']}")
    return facts


def _remove(words: list[str], say: Say) -> tuple[dict[str, Any], str]:
    if len(words) != 1:
        raise ConfigError("`meshwright env remove` takes one engine, or one name that `env list` shows")
    there = catalogue.found()
    chosen = [environment for environment in there if words[0] in (environment.name, environment.path.name)]
    if not chosen:
        known = {word for environment in there for word in (environment.name, environment.path.name)}
        raise ConfigError(
            f"'{words[0]}' has no environment here; "
            + (suggest(words[0], sorted(known)) if known else "none was created yet")
        )
    for environment in chosen:
        build.remove(environment)
    removed = [str(environment.path) for environment in chosen]
    return {"removed": removed}, "\n".join(f"removed {path}" for path in removed)


VERBS: dict[str, Callable[[list[str], Say], tuple[dict[str, Any], str]]] = {
    "create": _create,
    "list": _list,
    "check": _check,
    "remove": _remove,
}


def _name(verb: str, words: list[str], *, options: Sequence[str] = ()) -> tuple[str, dict[str, str]]:
    """Take the engine's name and key=value options out of the words."""
    given = dict(word.split("=", 1) for word in words if "=" in word)
    rest = [word for word in words if "=" not in word]
    unknown = next((key for key in given if key not in options), None)
    if unknown is not None:
        raise ConfigError(f"unknown key '{unknown}' of `meshwright env {verb}`; {suggest(unknown, options)}")
    if len(rest) != 1:
        raise ConfigError(f"`meshwright env {verb}` takes one of {', '.join(catalogue.names())}")
    if rest[0] not in catalogue.names():
        raise ConfigError(f"'{rest[0]}' is not an engine; {suggest(rest[0], catalogue.names())}")
    return rest[0], given


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _line(environment: Environment) -> str:
    head = f"{environment.state:<12} {environment.path}"
    if environment.state not in ("ready", "outdated"):
        return f"{head}; meshwright env create {environment.name}"
    picked = interpreter.frozen_versions(
        environment.versions, distribution=catalogue.distribution_of(environment.name)
    )
    built = f"built in {environment.build_s:.0f} s on {environment.created[:10]}"
    return f"{head}: {_versions(picked)}; {environment.size_bytes / GIB:.2f} GiB, {built}"


def _to_json(environment: Environment) -> dict[str, Any]:
    return {
        "engine": environment.name,
        "path": str(environment.path),
        "state": environment.state,
        "versions": dict(environment.versions),
        "size_bytes": environment.size_bytes,
        "build_s": environment.build_s,
        "created": environment.created,
    }
