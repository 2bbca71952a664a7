"""One virtual environment per engine, built from a pinned lock: engines whose own pins exclude each other coexist.

An environment counts when its record, written last, lies in it; until then the folder is what a build left behind.
The folder's name holds a hash of the lock, so a new lock builds beside the old one and frozen runs keep theirs.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Literal

import strategies
from launcher.environments import interpreter
from launcher.environments.interpreter import Interpreter, normalised
from launcher.errors import ConfigError, EngineError
from strategies.names import suggest

LOCKS = Path(__file__).resolve().parent / "locks"
TORCH_BUILDS = ("cpu", "cuda")
RECORD = "environment.json"
_PIN = re.compile(r"(?P<name>[A-Za-z0-9._-]+)==(?P<version>[A-Za-z0-9.!+_-]+)")
# Distributions that are not called as their strategy is.
_DISTRIBUTIONS = {"megatron": "megatron-core"}

State = Literal["ready", "outdated", "interrupted", "building", "broken"]


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A folder of ours, what its record says, and what it is good for."""

    path: Path
    name: str  # of the engine
    state: State
    versions: Mapping[str, str] = field(default_factory=dict)
    size_bytes: int = 0
    build_s: float = 0.0
    created: str = ""

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return python_of(self.path)


# ---- locks --------------------------------------------------------------------------------------------------------


def names() -> list[str]:
    """Engines that a lock exists for; base.txt is what all of them include."""
    return sorted(path.stem for path in LOCKS.glob("*.txt") if path.stem != "base")


def read_lock(name: str) -> dict[str, str]:
    """Return distribution -> version of the lock called `name`, with what it includes; its own pins win."""
    if name != "base" and name not in names():
        raise ConfigError(f"'{name}' has no lock; {suggest(name, names())}")
    pins: dict[str, str] = {}
    own: dict[str, str] = {}
    for line in (LOCKS / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        words = line.partition("#")[0].split()
        if not words:
            continue
        if words[0] == "-r":
            pins |= read_lock(words[1].removesuffix(".txt"))
            continue
        pin = _PIN.fullmatch(words[0])
        assert pin is not None and len(words) == 1, f"{name}.txt: '{line}' is not NAME==VERSION"
        own[normalised(pin["name"])] = pin["version"]
    return pins | own


def lock_text(pins: Mapping[str, str]) -> str:
    """Return the pins as a requirements file."""
    return "".join(f"{name}=={version}\n" for name, version in sorted(pins.items()))


def torch_build(inherited: Mapping[str, str]) -> str:
    """Which build of PyTorch this machine wants: $MESHWRIGHT_TORCH, else cuda where there is an NVIDIA driver."""
    found = "cuda" if shutil.which("nvidia-smi") else "cpu"
    wanted = inherited.get("MESHWRIGHT_TORCH") or found
    if wanted not in TORCH_BUILDS:
        raise ConfigError(f"MESHWRIGHT_TORCH={wanted} is unknown; {suggest(wanted, TORCH_BUILDS)}")
    return wanted


# ---- which Python for which strategy ------------------------------------------------------------------------------


def has_package(strategy: str) -> bool:
    """Tell whether this very Python can import the engine behind `strategy`, without importing it."""
    return interpreter.can_import(strategies.ENGINE_PACKAGES.get(strategy))


def distribution_of(strategy: str) -> str:
    """Return the distribution whose version a run of `strategy` is frozen with."""
    return _DISTRIBUTIONS.get(strategy, strategy)


def is_here(strategy: str) -> bool:
    """Tell whether `strategy` can run here: in this Python, or in an environment of its own."""
    return has_package(strategy) or ready(strategy) is not None


def absence(strategy: str) -> str:
    """Say in one sentence that `strategy` is not installed, and what installs it."""
    return f"{strategy}: not installed here; {installation(strategy)}"


def installation(strategy: str) -> str:
    """Return the command that installs `strategy`."""
    return f"meshwright env create {strategy}"


def absences(wanted: Iterable[str]) -> list[str]:
    """Return such a sentence for each engine of `wanted` that could run here and does not."""
    return [absence(name) for name in wanted if not is_here(name)]


def choose(strategy: str, *, named: str | None = None, is_given: bool = False) -> Interpreter:
    """Return the Python for the workers: the one named, this one, or that of the engine's environment.

    With `is_given` the ranks run already, under torchrun, and this one it has to be. EngineError where none will do.
    """
    distribution = distribution_of(strategy)
    if is_given:
        interpreter.check_import(strategies.ENGINE_PACKAGES.get(strategy), strategy=strategy)
        named = None
    environment = None if named or has_package(strategy) else ready(strategy)
    if named is None and environment is None:
        if not has_package(strategy):
            raise EngineError(absence(strategy))
        versions = interpreter.frozen_versions(interpreter.installed(), distribution=distribution)
        return Interpreter(path=sys.executable, kind="own", versions=versions)
    # Not resolved: a virtual environment's Python is a link, and is known by its own place.
    path = os.path.abspath(os.path.expanduser(named)) if named else str(environment and environment.python)
    has = interpreter.ask(path)
    if strategy in strategies.ENGINE_PACKAGES and distribution not in has:
        raise EngineError(
            f"submit.python={path} has no {distribution}, which strategy={strategy} needs; "
            f"install it there, or leave submit.python=null and run `meshwright env create {strategy}`"
        )
    versions = interpreter.frozen_versions(has, distribution=distribution)
    return Interpreter(path=path, kind="named" if named else "environment", versions=versions)


def ready(name: str) -> Environment | None:
    """Return the environment of the engine `name` that runs here, or None."""
    if name not in names():
        return None
    build = torch_build(os.environ)
    # Where there is a GPU, the CPU build would leave it idle; the other way round works.
    for kind in [build] if build == "cuda" else TORCH_BUILDS:
        found = inspect(folder_of(name, torch=kind))
        if found is not None and found.state == "ready":
            return found
    return None


# ---- what is there ------------------------------------------------------------------------------------------------


def root() -> Path:
    """Return the folder of all environments."""
    return interpreter.home() / "environments"


def folder_of(name: str, *, torch: str) -> Path:
    """Return where the environment of today's lock lies, whether or not it exists."""
    digest = sha256(lock_text(read_lock(name)).encode()).hexdigest()[:8]
    return root() / f"{name}-{digest}-{torch}"


def python_of(folder: Path) -> Path:
    """Return the interpreter of a virtual environment."""
    return folder / "bin" / "python"


def found() -> list[Environment]:
    """Everything in the folder of environments, whole or not."""
    folders = [path for path in sorted(root().glob("*")) if path.is_dir()]
    return [environment for path in folders if (environment := inspect(path)) is not None]


def inspect(folder: Path) -> Environment | None:
    """Return what lies in `folder`, without running any of it; None where there is nothing."""
    name = folder.name.split("-")[0]
    if not folder.is_dir():
        return None
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Environment(path=folder, name=name, state="building" if _is_locked(folder) else "interrupted")
    whole = os.access(python_of(folder), os.X_OK) and _distributions(folder) >= _files(record["versions"])
    current = name in names() and folder in [folder_of(name, torch=torch) for torch in TORCH_BUILDS]
    state: State = ("ready" if current else "outdated") if whole else "broken"
    return Environment(path=folder, name=name, state=state, **record)


def _files(versions: Mapping[str, str]) -> set[str]:
    return {f"{name}-{version}" for name, version in versions.items() if name != "python"}


def _distributions(folder: Path) -> set[str]:
    """Name-version of what is installed in `folder`, read off the folders' names."""
    folders = folder.glob("lib/python3*/site-packages/*.dist-info")
    pairs = (path.name.removesuffix(".dist-info").rpartition("-") for path in folders)
    return {f"{normalised(name)}-{version}" for name, _, version in pairs}


# ---- one at a time ------------------------------------------------------------------------------------------------


@contextmanager
def alone(folder: Path) -> Iterator[int]:
    """Hold the lock of an environment; raise EngineError where somebody else builds or removes it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(_lock_file(folder), os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise EngineError(
            f"{folder.parent} cannot be written: {error.strerror}; set MESHWRIGHT_HOME to a writable folder"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise EngineError(f"{folder} is being built by another process; wait for that one") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _is_locked(folder: Path) -> bool:
    try:
        with alone(folder):
            return False
    except EngineError:
        return True


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")
