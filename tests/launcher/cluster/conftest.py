"""Clusters, recorded or synthetic, with the placement that follows from their documentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).parent / "data" / "clusters"


def _read(path: Path) -> dict[str, Any]:
    # YAML holds no escape characters; older drivers print them.
    text = path.read_text(encoding="utf-8")
    return {key: _unescaped(value) for key, value in yaml.safe_load(text).items()}


def _unescaped(value: Any) -> Any:
    return value.replace("<esc>", "\x1b") if isinstance(value, str) else value


@pytest.fixture(params=sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def described(request: pytest.FixtureRequest) -> dict[str, Any]:
    """One cluster as its file has it."""
    return _read(request.param)


@pytest.fixture
def clusters() -> dict[str, dict[str, Any]]:
    """All of them by name."""
    return {path.stem: _read(path) for path in FOLDER.glob("*.yaml")}
