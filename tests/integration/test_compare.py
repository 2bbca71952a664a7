"""`compare` with every engine for real: each in its own interpreter, from the same weights, with the same losses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import strategies

NUM_STEPS = 6


def test_every_engine_makes_the_same_losses(
    shell: Callable[..., Any], tmp_path: Path, colossalai_python: str
) -> None:
    folder = tmp_path / "parity"
    words = ("compare", "experiment=parity", f"training.num_steps={NUM_STEPS}", f"run_dir={folder}", "--json")
    # The folder of environments is three above the one's bin/.
    outcome = shell(*words, MESHWRIGHT_HOME=str(Path(colossalai_python).parents[3]))
    assert outcome.code == 0, outcome.err
    engines = {engine["strategy"]: engine for engine in outcome.json["engines"]}
    assert list(engines) == strategies.engines()
    for name, engine in engines.items():
        assert len(engine["losses"]) == NUM_STEPS
        assert engine["losses"][-1] < engine["losses"][0]
        assert engine["largest_deviation"] <= 1e-6, name
        run = folder / name
        assert json.loads((run / "plan.json").read_text())["strategy"] == name
        assert (run / "metrics" / "metrics.jsonl").read_text().count("\n") == NUM_STEPS
    assert engines["colossalai"]["versions"]["transformers"] == "4.51.3"
    assert engines["accelerate"]["versions"]["transformers"] != "4.51.3"
    assert f"| {strategies.engines()[-1]} |" in (folder / "comparison.md").read_text()
    ElementTree.parse(folder / "losses.svg")
