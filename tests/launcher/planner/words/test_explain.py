"""The explanation as text, against golden files, and as the content of plan.json."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

import strategies
from launcher.decode import decode
from launcher.errors import PlanError
from launcher.planner.cost import GIB
from launcher.planner.search.ranking import Ranking
from launcher.planner.words import explain
from strategies.fake import FakeStrategy
from strategies.spec import Plan


def changed_gpu(ranking: Ranking, **changes: Any) -> Ranking:
    cluster = ranking.problem.cluster
    cluster = replace(cluster, gpu=replace(cluster.gpu, **changes))
    return replace(ranking, problem=replace(ranking.problem, cluster=cluster))


@pytest.mark.parametrize("name", ["dense", "mixture"])
def test_the_text_is_that_of_the_golden_file(
    name: str, repository: Path, request: pytest.FixtureRequest
) -> None:
    text = explain.table(request.getfixturevalue(name))
    expected = (repository / "tests" / "golden" / f"explain_{name}.txt").read_text(encoding="utf-8")
    assert text + "\n" == expected


def test_lines_of_figures_stay_readable(mixture: Ranking) -> None:
    """Every dimension at once; the line of the chosen plan and sentences may be as long as they are."""
    figures = [line for line in explain.table(mixture).splitlines() if line.startswith("  ")]
    assert max(map(len, figures)) <= 150


def test_a_choice_that_is_not_the_fastest_is_explained(dense: Ranking) -> None:
    assert explain.tie(dense) == []
    first, second, third = dense.candidates
    swapped = replace(dense, candidates=(second, first, third))
    (words,) = explain.tie(swapped)
    assert words.startswith("1 is 1.2% slower than the fastest")
    assert words in explain.table(swapped)


def test_a_guessed_peak_is_said(dense: Ranking) -> None:
    text = explain.table(changed_gpu(dense, peak_is_nominal=True))
    assert "the peak of this device is a guess" in text


def test_plan_json_holds_the_plan_and_its_predictions(dense: Ranking) -> None:
    data = json.loads(json.dumps(explain.to_json(dense)))
    names = [field.name for field in fields(Plan)]
    assert decode(Plan, {name: data[name] for name in names}) == dense.choose().plan
    predictions = data["predictions"]
    assert predictions["memory_bytes"] == pytest.approx(
        sum(predictions["memory_bytes_by_part"].values()), abs=6
    )
    assert predictions["step_s"] == pytest.approx(sum(predictions["step_s_by_part"].values()))
    assert predictions["memory_bytes"] <= predictions["usable_bytes"] == 76 * GIB
    assert predictions["headroom_bytes"] == predictions["usable_bytes"] - predictions["memory_bytes"]
    assert data["num_candidates"] == 3
    assert len(data["runners_up"]) == 2
    assert data["rejected"] == [{"reason": dense.rejected[0].reason, "count": 8}]
    assert all(words in explain.table(dense) for words in data["left_out"])


def test_the_size_of_the_search_is_said(dense: Ranking) -> None:
    assert "search " not in explain.table(dense), "a made-up ranking was never searched"
    whole = replace(dense, num_considered=12345, num_costed=678)
    assert "search    12,345 legal plans, 678 of them costed in full\n" in explain.table(whole)
    cut = replace(whole, num_slow=9000, limit_s=4.2)
    text = explain.table(cut)
    assert "; 9,000 are out because their micro-batches alone take longer than 4.200 s a step" in text
    assert "3 plans fit and may be among the best (1 is chosen):" in text
    assert explain.to_json(cut)["search"] == {
        "num_considered": 12345,
        "num_costed": 678,
        "num_slow": 9000,
        "limit_s": 4.2,
    }


def test_on_a_cpu_the_process_itself_counts(dense: Ranking) -> None:
    predictions = explain.to_json(changed_gpu(dense, device="cpu"))["predictions"]
    tensors = sum(predictions["memory_bytes_by_part"].values())
    assert predictions["memory_bytes"] == pytest.approx(tensors + 4 * GIB, abs=6)


def test_nothing_fits_is_an_error_and_not_a_table(dense: Ranking) -> None:
    empty = changed_gpu(replace(dense, candidates=()), memory_gib=5.0)
    for write in (explain.table, explain.to_json):
        with pytest.raises(PlanError, match="no plan of llama_8b"):
            write(empty)


def test_engine_keys_that_the_estimate_does_not_follow_are_named(
    dense: Ranking, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Adapter:
        capabilities: ClassVar[Any] = replace(
            FakeStrategy.capabilities, unpriced_engine_keys=frozenset({"zero.prefetch", "host"})
        )

    monkeypatch.setattr(strategies, "load", lambda name: Adapter)
    assert "priced" not in explain.table(dense)
    engine = {"zero": {"prefetch": 7, "bucket": 1}, "host": {"ratio": 0.5}, "log": True}
    best = dense.candidates[0]
    keyed = replace(dense, candidates=(replace(best, plan=replace(best.plan, engine=engine)),))
    named = [line for line in explain.table(keyed).splitlines() if "priced" in line]
    assert named == [
        "strategy.engine.zero.prefetch is passed on but not priced",
        "strategy.engine.host.ratio is passed on but not priced",
    ]
    assert explain.to_json(keyed)["unpriced"] == named
