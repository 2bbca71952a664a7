from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import yaml

from launcher.config import Job, SubmitConfig


def test_the_page_and_the_root_file_name_the_same_keys(repository: Path) -> None:
    root = yaml.safe_load((repository / "hydra_configs" / "config.yaml").read_text())
    groups = {next(iter(item)) for item in root["defaults"] if isinstance(item, dict)}
    named = {key for key in [*root, *groups] if not key.startswith("override ")} - {
        "defaults",
        "hydra",
        "experiment",
    }
    # These come from keys inside a group: model.weights, model.hf_config, plan.calibration.
    assert {field.name for field in fields(Job)} - {"weights", "hf_config", "calibration"} == named


def test_a_job_says_where_it_runs_by_default() -> None:
    assert SubmitConfig() == SubmitConfig(name="local", port=None)
