"""Which Python runs the workers: chosen once, frozen with the run, checked wherever the run starts.

`python -m launcher.environments.interpreter` prints what its Python has installed; a launcher asks another Python so.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from importlib import metadata, util
from pathlib import Path
from typing import Literal

from launcher.errors import EngineError, LauncherError

PACKAGES_PARENT = Path(__file__).resolve().parents[2]
OUR_PACKAGES = ("launcher", "strategies", "hydra_configs")
# Versions that decide whether a run goes on as it began; the strategy's own distribution comes beside them.
_FROZEN = ("python", "torch", "transformers")
_ANSWER = "MESHWRIGHT-HAS "


@dataclass(frozen=True, kw_only=True)
class Interpreter:
    """A Python and the versions it has to have. `own`: the launcher's; `named`: submit.python says so."""

    path: str
    kind: Literal["own", "environment", "named"]
    versions: Mapping[str, str] = field(default_factory=dict)


def is_foreign(path: str) -> bool:
    """Tell whether `path` is another Python than the one that asks. A link makes another one: it has other packages."""
    return os.path.abspath(path) != os.path.abspath(sys.executable)


def home() -> Path:
    """Return the folder for what outlives a run: $MESHWRIGHT_HOME, else meshwright/ in the XDG data folder."""
    own = os.environ.get("MESHWRIGHT_HOME")
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(own).expanduser().absolute() if own else Path(data).expanduser().absolute() / "meshwright"


# ---- what a Python has --------------------------------------------------------------------------------------------


def installed() -> dict[str, str]:
    """Versions of Python and of every distribution that this process can import, by normalised name."""
    found = {"python": ".".join(map(str, sys.version_info[:2]))}
    for distribution in metadata.distributions():
        # The first on the path is the one that is imported.
        found.setdefault(normalised(distribution.name), distribution.version)
    return found


def normalised(name: str) -> str:
    """Return a distribution's name as indices compare it (PEP 503)."""
    return name.lower().replace("_", "-").replace(".", "-")


def ask(path: str) -> dict[str, str]:
    """Return what the Python at `path` has installed; raise EngineError where there is none that runs."""
    if not os.path.isfile(path):
        raise EngineError(f"the interpreter {path} does not exist on {socket.gethostname()}")
    if not os.access(path, os.X_OK):
        raise EngineError(f"the interpreter {path} is not executable on {socket.gethostname()}")
    command = [path, "-m", "launcher.environments.interpreter"]
    try:
        done = subprocess.run(
            command, env=surroundings(os.environ, path), capture_output=True, text=True, check=False, cwd="/"
        )
    except OSError as error:
        raise EngineError(f"the interpreter {path} cannot be run: {error.strerror}") from error
    answers = [line for line in done.stdout.splitlines() if line.startswith(_ANSWER)]
    if done.returncode or not answers:
        said = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        raise EngineError(
            f"the interpreter {path} cannot run the workers ({said}); give a Python 3.10 or newer"
        )
    versions: dict[str, str] = json.loads(answers[-1].removeprefix(_ANSWER))
    return versions


def frozen_versions(has: Mapping[str, str], *, distribution: str) -> dict[str, str]:
    """Pick out of `installed` what a run of the strategy behind `distribution` has to find again."""
    return {name: has[name] for name in (*_FROZEN, distribution) if name in has}


# ---- at the start of a run ----------------------------------------------------------------------------------------


def find(frozen: Interpreter | None, *, record: Path) -> str:
    """Return the Python that starts the workers of a frozen run, or say in one sentence why this host has none.

    `record` is the file that holds `frozen`. A run that began with the launcher's own Python may find that one moved.
    """
    if frozen is None:
        return sys.executable
    moved = frozen.kind == "own" and not os.path.exists(frozen.path)
    if moved or not is_foreign(frozen.path):
        check(frozen, has=installed(), record=record)
        return sys.executable
    try:
        has = ask(frozen.path)
    except EngineError as error:
        remedy = "`meshwright env create` builds it again" if frozen.kind == "environment" else "install it"
        raise EngineError(f"{error}, and the run was frozen with it; {remedy}, see {record}") from error
    check(frozen, has=has, record=record)
    return frozen.path


def check(frozen: Interpreter, *, has: Mapping[str, str], record: Path) -> None:
    """Raise EngineError unless the versions are those that the run was frozen with."""
    for name, version in frozen.versions.items():
        if has.get(name) != version:
            raise EngineError(
                f"{socket.gethostname()} has {name} {has.get(name, 'not installed')} and the run was frozen with "
                f"{version} ({frozen.path}); use that version, or accept another one by editing "
                f"interpreter.versions in {record}"
            )


def can_import(package: str | None) -> bool:
    """Tell whether this process can import `package`, without importing it; None, no package, always can."""
    try:
        return package is None or util.find_spec(package) is not None
    except ModuleNotFoundError:  # of a package inside another one that is not there
        return False


def check_import(package: str | None, *, strategy: str) -> None:
    """Raise EngineError unless this very process can import the package behind `strategy`."""
    if not can_import(package):
        raise EngineError(
            f"strategy={strategy} needs the package '{package}', which {sys.executable} cannot import; "
            f"start torchrun out of an environment that can: `meshwright env create {strategy}`, and its bin/torchrun"
        )


# ---- what another Python is given ---------------------------------------------------------------------------------


def surroundings(inherited: Mapping[str, str], path: str) -> dict[str, str]:
    """Return the environment variables with which the Python at `path` finds this very Meshwright.

    Our own Python keeps what it has; another one sees its own packages and nothing that was set up for ours.
    """
    if not is_foreign(path):
        found = os.pathsep.join(filter(None, [str(PACKAGES_PARENT), inherited.get("PYTHONPATH", "")]))
        return {**inherited, "PYTHONPATH": found}
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
    kept = {key: value for key, value in inherited.items() if key not in ours}
    tools = os.pathsep.join([str(Path(path).absolute().parent), inherited.get("PATH", os.defpath)])
    return {**kept, "PATH": tools, "PYTHONPATH": str(import_folder()), "PYTHONNOUSERSITE": "1"}


def import_folder() -> Path:
    """Return a folder that holds our packages and nothing else.

    Where Meshwright is installed its packages lie beside the launcher's own torch, which another Python must not see.
    """
    name = sha256(str(PACKAGES_PARENT).encode()).hexdigest()[:8]
    folder = home() / "packages" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for package in OUR_PACKAGES:
            _link(folder / package, PACKAGES_PARENT / package)
    except OSError as error:
        raise LauncherError(
            f"{folder} cannot be written: {error.strerror}; set MESHWRIGHT_HOME to a writable folder"
        ) from error
    return folder


def _link(link: Path, target: Path) -> None:
    if link.is_symlink() and os.readlink(link) == str(target):
        return
    aside = link.with_name(f".{link.name}.{os.getpid()}")
    aside.symlink_to(target)
    os.replace(aside, link)  # two launchers may be at it


if __name__ == "__main__":
    print(_ANSWER + json.dumps(installed()))
