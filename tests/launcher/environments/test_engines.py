from __future__ import annotations

from pathlib import Path

import strategies
from launcher.environments import engines


def test_the_table_in_the_docs_is_current(repository: Path) -> None:
    page = (repository / "docs" / "engines.md").read_text(encoding="utf-8")
    assert engines.markdown() in page, "print it anew: see launcher/environments/engines.py"


def test_a_column_an_engine_and_a_row_a_fact() -> None:
    header, rule, *rows = engines.markdown().splitlines()
    names = strategies.engines()
    assert header == f"|  | {' | '.join(f'`{name}`' for name in names)} |"
    assert len({line.count("|") for line in (header, rule, *rows)}) == 1
    assert len(rows) == len(engines.facts("accelerate")) - 1


def test_facts_are_the_capabilities() -> None:
    told = engines.facts("deepspeed")
    assert told["ZeRO stages"] == "0, 1, 2, 3"
    assert told["offload"] == "optimizer (1, 2, 3), parameters (3), to a disk (3)"
    assert told["pipeline stages"] == "uneven"
    assert engines.facts("megatron")["degrees"] == "dp tp pp vp cp ep etp"
    assert engines.facts("megatron")["pipeline stages"] == "uneven"
    assert engines.facts("accelerate")["offload"] == "-"
    assert engines.facts("accelerate")["pipeline stages"] == "-"


def test_a_summary_is_one_line() -> None:
    assert engines.summary("accelerate").startswith("dp; zero_stage 0, 2, 3; ")
    assert "sequence_parallel" in engines.summary("megatron")
