"""The table of keys against the installed DeepSpeed: nothing it reads is missing, nothing listed is unread."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pytest

from strategies.deepspeed.keys import ACCEPTED, OWNED, UNUSED

MINIMAL = {"train_batch_size": 1}
# Read by the engine or its launcher rather than by DeepSpeedConfig.
READ_ELSEWHERE = {"sequence_parallel_size"}


class Recorder(dict[str, Any]):
    """A configuration that notes every key somebody asks for."""

    asked: ClassVar[set[str]] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def keys(self) -> Any:  # `key in config.keys()` is a question too
        return self

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()


def top_level_keys_read() -> set[str]:
    from deepspeed.runtime import config as deepspeed_config

    Recorder.asked.clear()
    deepspeed_config.DeepSpeedConfig(Recorder(MINIMAL))
    return Recorder.asked - set(deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS)


def sections() -> list[tuple[str, Any]]:
    """Dotted section and the pydantic model that reads it."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    return [
        ("zero_optimization", DeepSpeedZeroConfig),
        ("zero_optimization.offload_optimizer", DeepSpeedZeroOffloadOptimizerConfig),
        ("zero_optimization.offload_param", DeepSpeedZeroOffloadParamConfig),
        ("zero_optimization.leaf_module", DeepSpeedZeroLeafModuleConfig),
        ("bf16", DeepSpeedBF16Config),
        ("comms_logger", CommsLoggerConfig),
        ("timers.throughput", DeepSpeedThroughputTimerConfig),
    ]


def classified_below(section: str) -> set[str]:
    """Keys of `section` that our tables know, whichever table."""
    accepted: Mapping[str, Any] = ACCEPTED
    for name in section.split("."):
        accepted = accepted[name]
    depth, prefix = section.count(".") + 1, f"{section}."
    elsewhere = {key for key in (*OWNED, *UNUSED) if key.startswith(prefix) and key.count(".") == depth}
    return set(accepted) | {key.removeprefix(prefix) for key in elsewhere}


def test_every_top_level_key_is_classified() -> None:
    ours = {key for key in (*ACCEPTED, *OWNED, *UNUSED) if "." not in key}
    read = top_level_keys_read()
    assert read - ours == set()
    assert ours - read == READ_ELSEWHERE


@pytest.mark.parametrize("index", range(7))
def test_every_key_of_a_section_is_classified(index: int) -> None:
    section, model = sections()[index]
    theirs = {field.alias or name for name, field in model.model_fields.items()}
    assert classified_below(section) == theirs


def test_sections_read_without_a_model() -> None:
    from deepspeed.profiling import constants as profiling
    from deepspeed.runtime.swap_tensor import constants as swapping

    aio = {
        v for k, v in vars(swapping).items() if k.startswith("AIO_") and not k.endswith(("DEFAULT", "FORMAT"))
    }
    profiler = {
        value
        for name, value in vars(profiling).items()
        if name.startswith("FLOPS_PROFILER_") and not name.endswith(("DEFAULT", "FORMAT"))
    }
    assert set(ACCEPTED["aio"]) == aio
    assert set(ACCEPTED["flops_profiler"]) == profiler


def test_no_key_stands_in_two_tables() -> None:
    top = {key for key in ACCEPTED if ACCEPTED[key] is None}
    assert not top & set(OWNED)
    assert not top & UNUSED
    assert not set(OWNED) & UNUSED
