from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.decode import decode, encode
from launcher.errors import ConfigError
from launcher.monitor.config import MonitorConfig

GROUP = Path(__file__).parents[3] / "hydra_configs" / "monitor"


def test_default_yaml_is_the_defaults() -> None:
    assert yaml.safe_load((GROUP / "default.yaml").read_text()) == encode(MonitorConfig())


def test_none_yaml_turns_both_writers_off() -> None:
    record = yaml.safe_load((GROUP / "none.yaml").read_text())
    assert record.pop("defaults") == ["default", "_self_"]
    config = decode(MonitorConfig, record, "monitor")
    assert not config.tensorboard
    assert not config.wandb
    assert config.sample_interval == 0


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"log_interval": 0}, "monitor.log_interval=0 must be at least 1"),
        ({"warmup_steps": -1}, "monitor.warmup_steps=-1 must not be negative"),
        ({"sample_interval": -1}, "monitor.sample_interval=-1 must not be negative; 0 samples nothing"),
        ({"node_seconds": 0}, "monitor.node_seconds=0.0 must be positive"),
        ({"prometheus_port": 70000}, "monitor.prometheus_port=70000 is no port; use 1 to 65535"),
        ({"prometheus_textfile": "a.txt"}, "monitor.prometheus_textfile=a.txt must end in .prom"),
        (
            {"profile": [3]},
            "monitor.profile=[3] must be the first and the last step of a trace, as in [10,12]",
        ),
        ({"profile": [1, 2]}, "the first step is all set-up"),
        ({"profile": [5, 4]}, "monitor.profile=[5, 4] must be"),
        ({"trace_interval": -1}, "monitor.trace_interval=-1 must be at least 2"),
        ({"trace_interval": 1}, "because traced steps are left out of the step times; 0 traces none"),
        ({"alerts": {"slowdown": 0.5}}, "monitor.alerts.slowdown=0.5 must be above 1"),
        ({"alerts": {"repeat_s": -1}}, "monitor.alerts.repeat_s=-1.0 must not be negative; 0 turns"),
        ({"alerts": {"repeat_s": 0}}, "monitor.alerts.repeat_s=0 would tell a cause twice a second"),
        ({"wandb_project": " "}, "monitor.wandb_project=' ' must name a project"),
        ({"wandb_mode": "onlin"}, "monitor.wandb_mode=onlin is not accepted; did you mean 'online'"),
        ({"wandb_projct": "x"}, "unknown key 'monitor.wandb_projct'; did you mean 'wandb_project'"),
    ],
)
def test_refusals_name_the_key(record: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        decode(MonitorConfig, record, "monitor")
    assert sentence in str(caught.value)
