"""The YAML file that a probe writes and `cluster=FILE.yaml` plans with."""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from launcher.cluster.spec import ClusterSpec
from launcher.decode import encode
from launcher.errors import ConfigError
from launcher.files import write_whole


def check(path: Path, *, force: bool) -> None:
    """Raise before anything is measured where the file could not be written."""
    if path.exists() and not (force and path.is_file()):
        raise ConfigError(f"out={path} exists; use force=true to replace it, or another out")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConfigError(
            f"out={path} cannot be written: {path.parent} is not a writable folder; use another out"
        )


def check_name(out: str) -> None:
    """Raise ValueError where no `cluster=` would read it."""
    if not out.endswith((".yaml", ".yml")):
        raise ValueError(f"out={out} must end in .yaml, so that cluster={out} reads it")


def write(path: Path, cluster: ClusterSpec, *, by: str) -> None:
    """Write `cluster` as YAML: the whole file appears at once, or none. `by`: who measured what, where and when."""
    header = f"# Measured by `meshwright {by}. Use it with cluster={path.name}.\n"
    try:
        write_whole(path, header + yaml.safe_dump(encode(cluster), sort_keys=False))
    except OSError as error:
        raise ConfigError(f"out={path} cannot be written: {error.strerror}; use another out") from error
