from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.config import Job, PreflightConfig, SubmitConfig, SuperviseConfig
from launcher.decode import decode


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


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_restarts", -1),
        ("max_fruitless", 0),
        ("backoff_s", -0.1),
        ("init_timeout_s", 0.0),
        ("step_timeout_s", 0.0),
        ("health_interval_s", 0.0),
        ("spike_factor", 1.0),
    ],
)
def test_what_cannot_be_waited_for_is_refused(key: str, value: float) -> None:
    given: dict[str, Any] = {key: value}
    with pytest.raises(ValueError, match=rf"supervise\.{key}={value} must be"):
        SuperviseConfig(**given)


@pytest.mark.parametrize(
    ("name", "section"), [("supervise", SuperviseConfig), ("preflight", PreflightConfig)]
)
def test_a_group_says_what_the_page_says(repository: Path, name: str, section: type) -> None:
    group = yaml.safe_load((repository / "hydra_configs" / name / "default.yaml").read_text())
    assert decode(section, group) == section()
    assert set(group) == {field.name for field in fields(section)}
