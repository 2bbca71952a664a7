"""The verb without training: what it refuses, starts and writes. Real engines: tests/integration/test_compare.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import freeze, run_dir
from launcher.config import Job
from launcher.environments import catalogue
from launcher.planner import Ranking
from launcher.run_dir import RunDir
from launcher.verbs import compare

Call = Callable[..., Any]
WORDS = ("compare", "experiment=parity", "training.num_steps=3", "strategies=[accelerate,deepspeed]")


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """What the workers of each engine are made to leave; the first one draws weights."""
    wanted = {"accelerate": [4.0, 2.0, 1.0], "deepspeed": [4.0, 2.0, 1.0]}

    def run_workers(run: RunDir, *, quiet_stdout: bool) -> int:
        name = run.plan().strategy
        if not run.weights.exists():
            run.weights.mkdir()
            (run.weights / "drawn_by").write_text(name)
        records = [{"step": step, "loss": loss} for step, loss in enumerate(wanted[name], start=1)]
        run.metrics_file.write_text("".join(json.dumps(record) + "\n" for record in records))
        return 0 if wanted[name] else 130

    monkeypatch.setattr(compare, "run_workers", run_workers)
    return wanted


def test_one_run_an_engine_from_the_same_weights(
    call: Call, tmp_path: Path, losses: dict[str, list[float]]
) -> None:
    losses["deepspeed"][1] = 2.00001
    folder = tmp_path / "both"
    outcome = call(*WORDS, f"run_dir={folder}", "--json")
    assert outcome.code == 0, outcome.err
    data = outcome.json
    assert [engine["strategy"] for engine in data["engines"]] == ["accelerate", "deepspeed"]
    assert data["engines"][1]["largest_deviation"] == pytest.approx(5e-6)
    assert data["engines"][1]["at_step"] == 2
    assert data["engines"][0]["versions"]["accelerate"]
    runs = [RunDir(path=folder / name) for name in ("accelerate", "deepspeed")]
    assert [run.plan().strategy for run in runs] == ["accelerate", "deepspeed"]
    assert [run.job().strategies for run in runs] == [None, None]
    assert [(run.weights / "drawn_by").read_text() for run in runs] == ["accelerate", "accelerate"]
    assert runs[1].weights.readlink() == Path("../accelerate/weights")
    assert data["picture"] == str(folder / "losses.svg")
    assert (folder / "losses.svg").read_text().startswith("<svg ")
    page = (folder / "comparison.md").read_text()
    assert "| deepspeed | 4.000000 | 1.000000 | 5e-06 | 2 |" in page


def test_an_engine_is_planned_once_and_all_of_them_before_a_run_is_written(
    call: Call, tmp_path: Path, losses: dict[str, list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    rank, create = freeze.rank, run_dir.create

    def noted_rank(job: Job) -> Ranking:
        order.append(f"planned {job.strategy.name}")
        return rank(job)

    def noted_create(path: Path, **given: Any) -> RunDir:
        order.append(f"wrote {path.name}")
        return create(path, **given)

    monkeypatch.setattr(freeze, "rank", noted_rank)
    monkeypatch.setattr(run_dir, "create", noted_create)
    assert call(*WORDS, f"run_dir={tmp_path / 'both'}").code == 0
    assert order == ["planned accelerate", "planned deepspeed", "wrote accelerate", "wrote deepspeed"]


def test_a_deviation_above_the_limit_is_exit_code_11_and_still_told(
    call: Call, tmp_path: Path, losses: dict[str, list[float]]
) -> None:
    losses["deepspeed"][2] = 1.001
    words = (*WORDS, f"run_dir={tmp_path / 'both'}")
    outcome = call(*words)
    assert outcome.code == 11
    assert "over 3 steps no loss is further" in outcome.out
    assert "checks.max_deviation=1e-05: the loss of deepspeed is off" in outcome.err
    again = call(*WORDS, f"run_dir={tmp_path / 'more'}", "checks.max_deviation=0.1", "--json")
    assert again.code == 0, again.err
    assert again.json["max_deviation"] == 0.1


def test_a_stopped_engine_ends_the_comparison(
    call: Call, tmp_path: Path, losses: dict[str, list[float]]
) -> None:
    losses["accelerate"] = []
    outcome = call(*WORDS, f"run_dir={tmp_path / 'both'}")
    assert outcome.code == 130
    assert not (tmp_path / "both" / "losses.svg").exists()
    assert not (tmp_path / "both" / "deepspeed" / "metrics" / "metrics.jsonl").exists()


def test_runs_that_share_a_configuration_file_share_weights_too(
    call: Call, tmp_path: Path, losses: dict[str, list[float]]
) -> None:
    config = {
        **{"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"intermediate_size": 128, "vocab_size": 264, "max_position_embeddings": 64},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    folder = tmp_path / "both"
    words = (f"model.hf_config={tmp_path / 'config.json'}", f"run_dir={folder}", "--json")
    assert call(*WORDS, *words).code == 0
    assert (folder / "deepspeed" / "weights").readlink() == Path("../accelerate/weights")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("strategies=[accelerate]",), 2, "strategies=[accelerate] must name two engines or more, each once"),
        (("strategies=[fake,fake]",), 2, "must name two engines or more, each once"),
        (("strategies=[fake,deepsped]",), 2, "'deepsped' is unknown; did you mean 'deepspeed'?"),
        (("strategies=[fake,accelerate]", "strategy=fake"), 2, "`meshwright compare` takes strategies=[a,b]"),
        (("strategies=[megatron,fake]", "plan.zero_stage=3"), 3, "plan.zero_stage=3"),
        (("checks.max_deviation=-1",), 2, "checks.max_deviation=-1.0 must be at least 0"),
        (("--why=tp=2",), 2, "--why is a flag of `meshwright plan`"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(
    call: Call, tmp_path: Path, words: tuple[str, ...], code: int, says: str
) -> None:
    folder = tmp_path / "run"
    outcome = call("compare", "experiment=parity", f"run_dir={folder}", *words)
    assert outcome.code == code
    assert says in outcome.err
    assert outcome.err.count("\n") == 1
    assert not folder.exists()


def test_engines_that_are_not_here_are_told_with_their_command(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "is_here", lambda name: name not in ("colossalai", "megatron"))
    outcome = call("compare", "experiment=parity", f"run_dir={tmp_path / 'run'}")
    assert outcome.code == 7
    assert outcome.err == (
        "meshwright: colossalai: not installed here; meshwright env create colossalai; "
        "megatron: not installed here; meshwright env create megatron\n"
    )
    assert not (tmp_path / "run").exists()


def test_ranks_that_are_there_cannot_become_several_engines(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)
    outcome = call("compare", "experiment=parity", "strategies=[fake,accelerate]")
    assert outcome.code == 2
    assert "call it without torchrun" in outcome.err


@pytest.mark.parametrize("verb", ["plan", "train", "verify"])
def test_other_verbs_run_one_engine(call: Call, verb: str) -> None:
    outcome = call(verb, "strategies=[accelerate,deepspeed]")
    assert outcome.code == 2
    assert "strategies=[accelerate,deepspeed] is a key of `meshwright compare`" in outcome.err
