"""The fit gives back what made the step times, never sees the model it is tested on, and writes what decodes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from benchmarks import fit_efficiency
from benchmarks.fit_efficiency import KINDS, SHARED, efficiency_of, kind_of
from benchmarks.published import PRESETS, Case, case_of
from launcher.cluster.efficiency import Efficiency
from launcher.decode import decode

WIDTHS = {"small": 1024, "middle": 2048, "large": 4096}
PLANS: list[dict[str, Any]] = [
    {"mbs": 1},
    {"mbs": 4},
    {"tp": 2, "sequence_parallel": True},
    {"pp": 2, "recompute": "full"},
    {"zero_stage": 3},
]


def row(width: str = "middle", *, seq_len: int = 2048, **changes: Any) -> dict[str, Any]:
    hidden = WIDTHS[width]
    model = {
        "name": f"toy-{width}",
        "layers": 8,
        "hidden": hidden,
        "heads": hidden // 128,
        "ffn": 4 * hidden,
        "vocab": 32000,
        "gated_mlp": True,
        "seq_len": seq_len,
    }
    defaults = {
        "id": f"mill-{width}",
        "gpu": "A100-SXM4-80GB",
        "num_gpus": 8,
        "model": model,
        "framework": "Megatron-Core",
        "mbs": 1,
        "gbs": 64,
        "recompute": "none",
        "precision": "bf16",
        "usable": {"full_step_time_target": True},
    }
    return defaults | changes


def cases(rows: Sequence[dict[str, Any]], theta: dict[str, float]) -> list[Case]:
    """Return rows whose step times are those of the model under `theta`."""
    found = []
    for one in rows:
        case = case_of(one)
        assert isinstance(case, Case), case
        (item,) = fit_efficiency.prepare([replace(case, measured_step_s=1.0)])
        seconds = math.exp(fit_efficiency.log_ratio(item, efficiency_of(theta, item.kind)))
        found.append(replace(case, measured_step_s=seconds))
    return found


PRIOR = {name: value for name, (value, _) in fit_efficiency.priors().items()}
ROWS = [row(width, **plan) for width in WIDTHS for plan in PLANS]


LONG = [row(width, mbs=1, gbs=8, seq_len=length) for width in WIDTHS for length in (16384, 65536)]


@pytest.mark.parametrize(
    ("table", "name", "factor", "rows", "tolerance"),
    [
        ("matmul", "bf16", 0.85, ROWS, 0.05),
        ("matmul", "bf16", 1.15, ROWS, 0.05),
        # Few rows tell the kernel's share from its backward pass and its tiles: the priors share the blame.
        ("attention", "flash3", 0.8, LONG, 0.16),
    ],
)
def test_the_fit_recovers_what_made_the_rows(
    table: str, name: str, factor: float, rows: list[dict[str, Any]], tolerance: float
) -> None:
    key = f"ampere:{table}.{name}"
    truth = PRIOR | {key: PRIOR[key] * factor}
    items = fit_efficiency.prepare(cases(rows, truth))
    theta = fit_efficiency.fit(items)
    before, after = (np.abs(fit_efficiency.residuals(items, found)) for found in (PRIOR, theta))
    assert np.median(before) > 0.08
    assert np.median(after) < 0.02
    found, expected = (getattr(efficiency_of(values, "a100"), table)[name] for values in (theta, truth))
    assert found == pytest.approx(expected, rel=tolerance)
    # What no row has to do with stays where it was.
    untouched = [name for name in PRIOR if name.startswith(("hopper", "blackwell", "volta"))]
    assert untouched
    assert all(theta[name] == pytest.approx(PRIOR[name]) for name in untouched)


def test_perfect_rows_and_no_rows_leave_the_priors() -> None:
    assert fit_efficiency.fit(fit_efficiency.prepare(cases(ROWS[:3], PRIOR))) == pytest.approx(PRIOR)
    assert fit_efficiency.fit([]) == pytest.approx(PRIOR)


def test_one_wild_row_has_bounded_influence() -> None:
    good = cases(ROWS, PRIOR)
    assert good[0].measured_step_s
    wild = replace(good[0], measured_step_s=20 * good[0].measured_step_s)
    theta = fit_efficiency.fit(fit_efficiency.prepare([wild, *good[1:]]))
    items = fit_efficiency.prepare(good)
    assert np.median(np.abs(fit_efficiency.residuals(items, theta))) < 0.05


def test_large_sources_and_noisy_rows_weigh_less() -> None:
    many = [row(id=f"mill-{index}") for index in range(4)]
    one = row(id="forge-1")
    noisy = row(id="loom-1", flags=["approximate"])
    weights = [item.weight for item in fit_efficiency.prepare(cases([*many, one, noisy], PRIOR))]
    assert weights == pytest.approx([4**-0.4] * 4 + [1.0, 0.3])


def test_folds_never_share_a_model() -> None:
    rows = [row(width, id=f"{source}-{width}") for source in ("mill", "forge") for width in WIDTHS]
    items = fit_efficiency.prepare(cases([*rows, row("large", mbs=2)], PRIOR))
    folds = fit_efficiency.folds_of(items, 2)
    assert sorted(name for fold in folds for name in fold) == ["toy-large", "toy-middle", "toy-small"]
    assert {"toy-large"} in folds  # three rows of it, two of the others each
    assert set() in fit_efficiency.folds_of(items, 5)


def test_a_fold_is_predicted_by_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    items = fit_efficiency.prepare(cases(ROWS, PRIOR))
    seen: list[set[str]] = []

    def record(chosen: Sequence[Any], start: Any = None, *, rounds: int) -> dict[str, float]:
        seen.append({item.case.model.name for item in chosen})
        return PRIOR

    monkeypatch.setattr(fit_efficiency, "fit", record)
    found = fit_efficiency.cross_validate(items, 3, PRIOR)
    assert found == pytest.approx(0)
    assert seen == [{f"toy-{width}" for width in WIDTHS} - fold for fold in fit_efficiency.folds_of(items, 3)]


@pytest.mark.parametrize("gpu", PRESETS)
def test_every_gpu_is_of_a_kind(gpu: str) -> None:
    case = case_of(row(gpu=gpu, precision=None))
    assert isinstance(case, Case)
    assert kind_of(case.cluster.gpu.name) in KINDS


def test_names_within_names() -> None:
    kinds = [kind_of(name) for name in ("GB200 NVL72", "B200-SXM", "GB300", "B300", "H100-96GB", "H200")]
    assert kinds == ["gb200", "b200", "gb300", "b300", "h100_96gb", "h100"]


def test_kinds_scale_what_their_family_shares() -> None:
    theta = PRIOR | {"h100": 1.1, "hopper:matmul.bf16": 0.6, "hopper:memory": 0.7, "skew_us": 33.0}
    found = efficiency_of(theta, "h100")
    assert found.matmul["bf16"] == found.matmul["fp16"] == pytest.approx(0.66)
    assert (found.memory, found.skew_us) == (0.7, 33.0)
    assert efficiency_of(theta | {"h100": 9.0}, "h100").matmul["bf16"] == 0.98  # below the peak
    assert set(SHARED) <= set(Efficiency.__dataclass_fields__)


def test_what_is_written_decodes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_efficiency, "FOLDER", tmp_path)
    items = fit_efficiency.prepare(cases(ROWS, PRIOR))
    theta = PRIOR | {"skew_us": 123.456789}
    fit_efficiency.write(theta, items)
    assert {path.stem for path in tmp_path.iterdir()} == set(KINDS)
    for kind in KINDS:
        values = yaml.safe_load((tmp_path / f"{kind}.yaml").read_text())
        decoded = decode(Efficiency, values, "cluster.gpu.efficiency")
        expected = efficiency_of(theta, kind)
        assert decoded.skew_us == 123.0  # three figures
        assert dict(decoded.matmul) == pytest.approx(dict(expected.matmul), rel=5e-3)
        assert decoded.memory == pytest.approx(expected.memory, rel=5e-3)
        sources = "fitted to 15 published rows (mill)" if kind == "a100" else "priors; no rows"
        assert decoded.source == sources


def test_only_timed_targets_are_loaded(tmp_path: Path) -> None:
    rows = [
        row(step_time_s=1.0),
        row(),  # no time
        row(step_time_s=1.0, usable={"full_step_time_target": False}),
        {name: value for name, value in row(step_time_s=1.0).items() if name != "usable"},
        row(step_time_s=1.0, mbs=None),
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([*map(json.dumps, rows), "", ""]))
    assert [case.measured_step_s for case in fit_efficiency.load_cases(file)] == [1.0]


def test_sources_are_summed_up_one_by_one() -> None:
    made = cases([row(id=f"mill-{index}") for index in range(5)] + [row(id="forge-1")], PRIOR)
    ratios = np.log([1.01, 0.95, 1.04, 1.05, 0.9, 2.0])
    figures = fit_efficiency.errors_by_source(fit_efficiency.prepare(made), ratios)
    assert list(figures) == ["forge", "mill", "all"]
    assert figures["mill"] == pytest.approx({"n": 5, "bias": 0.01, "median": 0.05, "p90": 0.1})
    assert figures["forge"] == pytest.approx({"n": 1, "bias": 1.0, "median": 1.0, "p90": 1.0})
    assert figures["all"] == pytest.approx({"n": 6, "bias": 0.025, "median": 0.05, "p90": 0.1})
    assert fit_efficiency.to_text(figures).endswith("a median of at most 8 %: 1 of 1")


def test_the_command_prints_both_figures(tmp_path: Path, repository: Path) -> None:
    given = tmp_path / "rows.jsonl"
    given.write_text("\n".join(json.dumps(row(width, step_time_s=1.0)) for width in WIDTHS))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.fit_efficiency", "--configs", str(given), "--folds", "2"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "left out by model, 2 folds" in done.stdout
    assert done.stdout.count("\nall ") == 2
