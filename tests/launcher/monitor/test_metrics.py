from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest

from launcher.errors import ConfigError, RunDirError
from launcher.monitor.metrics import MetricsFile, flops_utilisation, read, truncate_after
from strategies.model_spec import ModelSpec


def write_steps(steps: SimpleNamespace, path: Path, *, first: int, last: int, loss: float = 2.5) -> None:
    file = MetricsFile(path)
    for step in range(first, last + 1):
        file.write(replace(steps.first, step=step, loss=loss))
    file.close()


def test_a_step_is_readable_before_the_file_is_closed(tmp_path: Path, steps: SimpleNamespace) -> None:
    path = tmp_path / "metrics" / "metrics.jsonl"
    file = MetricsFile(path)
    file.write(steps.first)
    assert [record["step"] for record in read(path)] == [1]
    file.close()


def test_unmeasured_fields_are_left_out(tmp_path: Path, steps: SimpleNamespace) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(steps, path, first=1, last=1)
    (record,) = read(path)
    assert "mfu" not in record
    assert "validation_loss" not in record
    assert record["skipped"] is False
    assert replace(steps.first, mfu=0.4).record()["mfu"] == 0.4


def test_a_diverged_loss_stays_strict_json_and_comes_back_as_a_number(
    tmp_path: Path, steps: SimpleNamespace
) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(steps, path, first=1, last=1, loss=math.nan)
    write_steps(steps, path, first=2, last=2, loss=math.inf)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    first, second = read(path)
    assert math.isnan(first["loss"])
    assert second["loss"] == math.inf


def test_truncation_keeps_earlier_steps_and_returns_them(tmp_path: Path, steps: SimpleNamespace) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(steps, path, first=1, last=10)
    assert truncate_after(path, step=7)[-1] == replace(steps.first, step=7)
    write_steps(steps, path, first=8, last=12, loss=1.0)
    records = read(path)
    assert [record["step"] for record in records] == list(range(1, 13))
    assert [record["loss"] for record in records] == [2.5] * 7 + [1.0] * 5
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncation_of_a_missing_file_is_an_empty_history(tmp_path: Path) -> None:
    assert truncate_after(tmp_path / "metrics.jsonl", step=5) == []


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3}x', "\x00\x00", '"text"'])
def test_a_torn_last_line_is_ignored_and_never_glued_to_the_next_step(
    tmp_path: Path, torn: str, steps: SimpleNamespace
) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(steps, path, first=1, last=2)
    with path.open("a") as file:
        file.write(torn)
    assert [record["step"] for record in read(path)] == [1, 2]
    write_steps(steps, path, first=3, last=3)
    assert [record["step"] for record in read(path)] == [1, 2, 3]


def test_damage_in_the_middle_is_named_and_truncation_repairs_it(
    tmp_path: Path, steps: SimpleNamespace
) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(steps, path, first=1, last=3)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "garbage", lines[2]]) + "\n")
    with pytest.raises(RunDirError, match="line 2 is damaged"):
        read(path)
    truncate_after(path, step=3)
    assert [record["step"] for record in read(path)] == [1, 3]


def test_a_record_of_another_program_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "los": 2.0}\n')
    with pytest.raises(ConfigError, match="'los'; did you mean 'loss'"):
        truncate_after(tmp_path / "metrics.jsonl", step=1)


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "metrics").write_text("a file where a folder should be")
    with pytest.raises(RunDirError, match=r"metrics\.jsonl cannot be written"):
        MetricsFile(tmp_path / "metrics" / "metrics.jsonl")


def test_mfu_is_achieved_over_peak_flops() -> None:
    model = ModelSpec(
        name="tiny",
        model_type="llama",
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        ffn_hidden_size=128,
        vocab_size=256,
        max_position_embeddings=128,
    )
    # Half of a peak that is exactly 2000 times the model's FLOPs per token.
    peak_tflops = 2000 * model.flops_per_token(128) / 1e12
    used = flops_utilisation(model, sequence_length=128, tokens_per_s_per_gpu=1000.0, peak_tflops=peak_tflops)
    assert used == pytest.approx(0.5)
    assert flops_utilisation(model, sequence_length=128, tokens_per_s_per_gpu=1e3, peak_tflops=None) is None


def test_a_step_late_in_a_run_costs_no_more_than_an_early_one(tmp_path: Path, steps: SimpleNamespace) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    durations = []
    for step in range(1, 2001):
        start = time.perf_counter()
        file.write(replace(steps.first, step=step))
        durations.append(time.perf_counter() - start)
    file.close()
    assert median(durations[-500:]) < 5 * median(durations[:500])
