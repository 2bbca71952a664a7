from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from launcher.cluster import detect
from launcher.errors import ConfigError
from launcher.verbs import cluster_file


def test_a_file_says_who_wrote_it_and_is_never_replaced_unasked(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    cluster_file.check(path, force=False)
    cluster_file.write(path, detect.detect({}), by="probe` on here, today")
    first, *rest = path.read_text().splitlines()
    assert first == "# Measured by `meshwright probe` on here, today. Use it with cluster=mine.yaml."
    assert yaml.safe_load("\n".join(rest))["num_nodes"] == 1
    with pytest.raises(ConfigError, match="use force=true to replace it"):
        cluster_file.check(path, force=False)
    cluster_file.check(path, force=True)
    with pytest.raises(ConfigError, match="is not a writable folder"):
        cluster_file.check(tmp_path / "none" / "x.yaml", force=False)
    with pytest.raises(ValueError, match=r"out=x\.json must end in \.yaml"):
        cluster_file.check_name("x.json")
