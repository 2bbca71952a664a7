"""What each engine can do, in words and as the table of docs/engines.md, out of its `Capabilities`.

`python -c "from launcher import engines; print(engines.markdown())"` prints the table.
"""

from __future__ import annotations

from collections.abc import Iterable

import strategies
from strategies.base import Capabilities

_NONE = "-"


def facts(name: str) -> dict[str, str]:
    """Return column -> cell for the engine called `name`."""
    can = strategies.capabilities(name)
    return {
        "engine": name,
        "degrees": " ".join(["dp", *(d for d in ("tp", "pp", "vp", "cp", "ep", "etp") if d in can.degrees)]),
        "sequence parallel": "yes" if can.sequence_parallel else "no",
        "ZeRO stages": _listed(can.zero_stages),
        "precision": _listed(can.precisions),
        "recompute": _listed(can.recompute),
        "offload": _offload(can),
        "pipeline stages": _stages(can),
        "model types": "any" if can.model_types is None else _listed(can.model_types),
        "resumes under another": _listed(can.reshardable) or _NONE,
    }


def summary(name: str) -> str:
    """Say on one line what the engine called `name` can do."""
    told = facts(name)
    parts = [told["degrees"], f"zero_stage {told['ZeRO stages']}", told["precision"]]
    parts += ["sequence_parallel"] if told["sequence parallel"] == "yes" else []
    parts += [f"offload {told['offload']}"] if told["offload"] != _NONE else []
    return "; ".join(parts)


def markdown() -> str:
    """Return the table of all engines, a row for each fact: there are fewer engines than facts."""
    columns = [facts(name) for name in strategies.engines()]
    lines = [[key if key != "engine" else "", *(column[key] for column in columns)] for key in columns[0]]
    lines[0][1:] = [f"`{name}`" for name in lines[0][1:]]
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])


def _offload(can: Capabilities) -> str:
    parts = [
        f"{what} ({_listed(stages)})"
        for what, stages in (
            ("optimizer", can.offload_optimizer_stages),
            ("parameters", can.offload_parameters_stages),
            ("to a disk", can.nvme_stages),
        )
        if stages
    ]
    return ", ".join(parts) or _NONE


def _stages(can: Capabilities) -> str:
    if "pp" not in can.degrees:
        return _NONE
    return "uneven" if can.uneven_pipeline else "equal"


def _listed(values: Iterable[int | str]) -> str:
    return ", ".join(map(str, sorted(values, key=str)))
