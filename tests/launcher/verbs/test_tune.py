"""The verb `probe nccl`: its words, and a trial of real processes in which one setting wins, one cannot run."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import compose
from launcher.cluster import nccl
from launcher.cluster.nccl_trial import Outcome
from launcher.verbs import tune
from launcher.verbs.tune import Setting, Trial

Call = Callable[..., Any]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["try=Tree"], "try=Tree is not NAME=VALUE"),
        (["tri=A=1"], "'tri=A=1' is not a word of `probe nccl`; did you mean 'try'?"),
        (["rounds=0"], "rounds=0 must lie between 1 and 16"),
        (["rounds=8"], "and what each does to 16 operations and sizes, from noise; use 9 or more"),
        (["out=x.json"], "out=x.json must end in .yaml"),
        (["try=NCCL_IB_TIMEOUT=300"], "try=NCCL_IB_TIMEOUT=300: NCCL_IB_TIMEOUT=300: it has to be 0 to 31"),
        (["cluster=h100_sxm", "cluster.fabric=efa"], "cluster.fabric=efa has no candidates of ours"),
    ],
)
def test_a_wrong_word_is_one_sentence(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = call("probe", "nccl", *words)
    assert (outcome.code, outcome.out) == (2, "") and sentence in outcome.err
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_stays(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("precious")
    outcome = call("probe", "nccl", f"out={path}")
    assert outcome.code == 2 and "use force=true to replace it" in outcome.err
    assert path.read_text() == "precious"


def test_settings_take_turns_in_processes_of_their_own(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.yaml"
    # With this left on every collective is checked by more of them: several times as slow where messages are small.
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "DETAIL")
    outcome = call(
        *("probe", "nccl", f"out={path}", "cluster.gpus_per_node=2", "cluster.gpu.device=cpu", "--json"),
        *("try=TORCH_DISTRIBUTED_DEBUG=OFF", "try=GLOO_SOCKET_IFNAME=nosuch0", "rounds=9"),
    )
    assert outcome.code == 0, outcome.err
    by_name = {setting["name"]: setting for setting in outcome.json["settings"]}
    assert list(by_name)[:2] == [tune.INHERITED, tune.CONTROL]
    assert by_name["GLOO_SOCKET_IFNAME=nosuch0"]["verdict"] == "could not run"
    assert "nosuch0" in by_name["GLOO_SOCKET_IFNAME=nosuch0"]["reason"]
    tried = by_name["TORCH_DISTRIBUTED_DEBUG=OFF"]
    assert len(tried["seconds"]) == 9 and len(tried["seconds"][0]) == len(outcome.json["cells"]) == 16
    small = [number for number, cell in enumerate(outcome.json["cells"]) if cell["bytes"] == 2**12]
    assert statistics.fmean(tried["by_cell"][number] for number in small) > 1.3, tried["by_cell"]
    # Whether that is beyond noise depends on what else this machine does; the file is there where it is.
    assert path.exists() == (tried["verdict"] == "adopt") == (outcome.json["tuned"] is not None)


def trial(*outcomes: Outcome) -> Trial:
    settings = (Setting(name=tune.INHERITED), Setting(name=tune.CONTROL))
    tried = tuple(Setting(name=f"A={n}", environment={"A": str(n)}) for n in range(len(outcomes)))
    return Trial(
        settings=settings + tried,
        cells=(("all_reduce", 2**12), ("all_to_all", 2**28)),
        seconds={},
        outcomes={tune.CONTROL: Outcome(verdict="within noise", by_cell=(1.01, 0.98))}
        | {setting.name: outcome for setting, outcome in zip(tried, outcomes, strict=True)},
        rounds=10,
    )


def test_where_nothing_wins_nothing_is_adopted_and_it_says_so() -> None:
    found = trial(
        Outcome(verdict="no gain", speedup=1.01), Outcome(verdict="could not run", reason="no device")
    )
    assert tune.adopted(found, host="here") is None
    text = tune.to_text(found, written=None)
    assert "adopted   nothing: no setting wins beyond noise" in text
    assert "could not run: no device" in text
    assert "all_reduce 4K +1.0%, all_to_all 256M -2.0%" in text


def test_of_several_winners_the_fastest_is_written_where_training_reads_it(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    won = [Outcome(verdict="adopt", speedup=s, p=0.001, by_cell=(s, s)) for s in (1.05, 1.2, 1.1)]
    found = trial(*won, Outcome(verdict="slows a part down", speedup=2.0, by_cell=(4.0, 1.0)))
    monkeypatch.setattr(tune, "run", lambda *_, **__: found)
    path = tmp_path / "mine.yaml"
    outcome = call("probe", "nccl", f"out={path}", "cluster.gpu.device=cpu")
    assert outcome.code == 0, outcome.err
    assert f"adopted   A=1: written to {path}; plan and train with cluster=mine.yaml" in outcome.out
    kept = yaml.safe_load(path.read_text())["tuned"]
    assert kept["environment"] == {"A": "1"} and (kept["speedup"], kept["p"], kept["rounds"]) == (
        1.2,
        0.001,
        10,
    )
    (job,) = compose.jobs([f"cluster={path}"])
    environ: dict[str, str] = {}
    nccl.fill(environ, job.cluster)
    assert environ["A"] == "1"


def test_where_nothing_can_be_measured_it_says_why(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    words = ("cluster.gpus_per_node=2", "cluster.gpu.device=cpu", "try=A=1")
    outcome = call("probe", "nccl", f"out={tmp_path / 'x.yaml'}", *words)
    assert outcome.code == 8 and "collectives cannot be measured here: " in outcome.err
    assert "nosuch0" in outcome.err
