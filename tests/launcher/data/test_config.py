from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import hydra_configs
from launcher.data.config import DataConfig
from launcher.decode import decode
from launcher.errors import ConfigError

CONFIGS = Path(hydra_configs.__file__).parent / "data"


@pytest.mark.parametrize("source", ["stdlib", "text", "jsonl", "parquet"])
def test_packaged_files_name_every_key_with_its_default(source: str) -> None:
    fields = yaml.safe_load((CONFIGS / f"{source}.yaml").read_text(encoding="utf-8"))
    assert fields["paths"] == []
    if source != "stdlib":
        fields["paths"] = ["corpus"]
    config = decode(DataConfig, fields, "data")
    assert config == DataConfig(source=source, paths=tuple(fields["paths"]))  # type: ignore[arg-type]
    assert set(fields) == set(DataConfig.__dataclass_fields__)


def test_every_packaged_file_is_a_known_source() -> None:
    assert {file.stem for file in CONFIGS.glob("*.yaml")} == {"stdlib", "text", "jsonl", "parquet"}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"source": "text"}, "data.paths=[] is empty; data.source=text needs files, folders or globs"),
        ({"source": "stdlib", "paths": ["a"]}, "data.paths=['a'] has no effect with data.source=stdlib"),
        ({"source": "stdlib", "validation_fraction": 0}, "data.validation_fraction=0.0 must lie above 0"),
        ({"source": "stdlib", "validation_fraction": 1}, "data.validation_fraction=1.0 must lie above 0"),
        ({"source": "stdlib", "num_workers": -1}, "data.num_workers=-1 must not be negative"),
        ({"source": "stdlib", "max_bytes": 0}, "data.max_bytes=0 must be at least 1"),
        ({"source": "stdlib", "tokenizer": ""}, "data.tokenizer is empty"),
        ({"source": "stdlibs"}, "data.source=stdlibs is not accepted; did you mean 'stdlib'?"),
    ],
)
def test_impossible_values_name_key_and_remedy(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        decode(DataConfig, fields, "data")
    assert sentence in str(caught.value)


def test_cache_path_follows_config_then_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert DataConfig(source="stdlib", cache_dir="/mine").cache_path == Path("/mine")
    assert DataConfig(source="stdlib", cache_dir="~/mine").cache_path == Path("/home/somebody/mine")
    assert DataConfig(source="stdlib").cache_path == Path("/caches/meshwright/data")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert DataConfig(source="stdlib").cache_path == Path("/home/somebody/.cache/meshwright/data")


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("config", ["torch", "numpy", "datasets", "tokenizers", "pyarrow"]),
        ("loader", ["torch", "datasets", "tokenizers", "pyarrow"]),
    ],
)
def test_import_stays_cheap(module: str, unwanted: list[str]) -> None:
    code = f"import sys, launcher.data.{module}; print(sorted(set({unwanted}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
