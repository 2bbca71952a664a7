"""Build the environment of an engine from its lock, whole or not at all; delete one."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from launcher.environments import interpreter
from launcher.environments.catalogue import (
    RECORD,
    Environment,
    alone,
    folder_of,
    inspect,
    lock_text,
    python_of,
    read_lock,
)
from launcher.errors import EngineError
from launcher.files import write_whole

# Imported by the setup of packages that come as sources, which therefore must not build in isolation.
_BUILD_TOOLS = ("setuptools", "wheel", "ninja")
_UV_INSTALL = ("pip", "install", "--python")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of a build; where it fails, `otherwise` may do the same in another way."""

    command: tuple[str, ...]
    otherwise: tuple[Step, ...] = ()


def steps(
    folder: Path, *, pins: Mapping[str, str], torch: str, base: str, uv: str | None, system: str
) -> list[Step]:
    """Return the commands that fill `folder`; `base` makes it, `uv` installs where there is one.

    PyTorch comes first, with its own dependencies (the CUDA build brings a dozen); the rest comes as locked and without
    asking what it would depend on: ColossalAI's own pins exclude the versions it is known to work with.
    """
    lock, python = str(folder / "lock.txt"), str(python_of(folder))
    pip = (python, "-m", "pip", "--disable-pip-version-check", "install")

    def install(*words: str) -> Step:
        by_pip = Step(command=(*pip, *words))
        # uv does not read pip's configuration, which may know an index of the house.
        return Step(command=(uv, *_UV_INSTALL, python, *words), otherwise=(by_pip,)) if uv else by_pip

    done = [Step(command=(base, "-m", "venv", str(folder)))]
    if "torch" in pins:
        exact = f"torch=={pins['torch']}"
        if torch == "cpu" and system == "Linux":
            # The build without CUDA: from wherever pip was told to look, else from where uv knows it to be.
            fetch = () if uv else (Step(command=(*pip, "uv")),)
            by_uv = (uv or str(folder / "bin" / "uv"), *_UV_INSTALL, python, "--torch-backend=cpu")
            otherwise = (*fetch, Step(command=(*by_uv, exact, "-c", lock)))
            done.append(Step(command=(*pip, f"{exact}+cpu", "-c", lock), otherwise=otherwise))
        else:
            done.append(install(exact, "-c", lock))
    tools = [f"{name}=={pins[name]}" for name in _BUILD_TOOLS if name in pins]
    if tools:
        done.append(install("--no-deps", *tools))
    return [*done, install("--no-deps", "--no-build-isolation", "-r", lock)]


def create(name: str, *, torch: str, base: str) -> tuple[Environment, bool]:
    """Build the environment of the engine `name` unless it is whole; return it and whether it was built now."""
    pins = read_lock(name)
    folder = folder_of(name, torch=torch)
    with alone(folder) as lock:
        present = inspect(folder)
        if present is not None and present.state == "ready":
            _lead_here(folder)
            return present, False
        shutil.rmtree(folder, ignore_errors=True)
        try:
            _build(folder, pins=pins, torch=torch, base=base, lock=lock)
        except BaseException as error:  # Ctrl-C as well: nothing half is left
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise EngineError(f"{folder} cannot be written: {error.strerror}") from error
            raise
    built = inspect(folder)
    assert built is not None and built.state == "ready", f"{folder} was just built"
    return built, True


def _build(folder: Path, *, pins: Mapping[str, str], torch: str, base: str, lock: int) -> None:
    started = time.monotonic()
    log = folder.with_name(f"{folder.name}.log")
    log.unlink(missing_ok=True)
    uv = find_uv()
    first, *rest = steps(folder, pins=pins, torch=torch, base=base, uv=uv, system=platform.system())
    _run(first, log=log, lock=lock)
    (folder / "lock.txt").write_text(lock_text(pins), encoding="utf-8")
    for step in rest:
        _run(step, log=log, lock=lock)
    _lead_here(folder)
    record = {
        "versions": _verified(folder, pins, log=log),
        "size_bytes": _size(folder),
        "build_s": round(time.monotonic() - started, 1),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    write_whole(folder / RECORD, json.dumps(record, indent=2) + "\n")


def _lead_here(folder: Path) -> None:
    """Let a bare torchrun out of this environment find the Meshwright that last asked for it.

    What a launcher of ours starts is told its place.
    """
    site = next(folder.glob("lib/python3*/site-packages"))
    (site / "meshwright.pth").write_text(f"{interpreter.import_folder()}\n", encoding="utf-8")


def _verified(folder: Path, pins: Mapping[str, str], *, log: Path) -> dict[str, str]:
    """What its Python says it has, which has to be every pin; a local version (+cpu) may stand behind it."""
    has = interpreter.ask(str(python_of(folder)))
    for name, version in pins.items():
        if has.get(name, "").partition("+")[0] != version.partition("+")[0]:
            raise EngineError(f"{name}=={version} was asked for and {has.get(name)} is there; see {log}")
    return {name: has[name] for name in ("python", *pins)}


def find_uv() -> str | None:
    """Return the uv that installs, on the PATH or beside this Python; None: pip does."""
    beside = Path(sys.executable).with_name("uv")
    return shutil.which("uv") or (str(beside) if beside.exists() else None)


def _run(step: Step, *, log: Path, lock: int) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(step.command)}\n")
        file.flush()
        # It inherits the lock: what a killed launcher leaves running keeps others out.
        try:
            done = subprocess.run(
                step.command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                check=False,
                pass_fds=(lock,),
            )
        except OSError as error:
            raise EngineError(f"{step.command[0]} cannot be run: {error.strerror}") from error
    if done.returncode == 0:
        return
    if not step.otherwise:
        said = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
        raise EngineError(
            f"the environment could not be built: {next(filter(None, reversed(said)), 'nothing was said')}; see {log}"
        )
    for other in step.otherwise:
        _run(other, log=log, lock=lock)


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_symlink())


def remove(environment: Environment) -> None:
    """Delete an environment; its record goes first, so that a half deleted one does not count."""
    with alone(environment.path):
        (environment.path / RECORD).unlink(missing_ok=True)
        shutil.rmtree(environment.path)
    for suffix in (".log", ".lock"):
        environment.path.with_name(environment.path.name + suffix).unlink(missing_ok=True)
