"""Plans, bytes and seconds as words, and rows as text with aligned columns. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import groupby

from launcher.planner.cost import GIB
from launcher.planner.problem import text_of
from strategies.model_spec import ModelSpec
from strategies.spec import Plan

# Where to find them in the configuration: not in the section `plan`.
_OTHER_SECTIONS = {"strategy": "strategy", "precision": "training.precision", "engine": "strategy.engine"}


@dataclass(frozen=True, kw_only=True)
class Column:
    """One property of a plan in a table. `plain` is its text where nothing is to be told."""

    title: str
    text: Callable[[Plan, ModelSpec], str]
    plain: str | None = None  # None: worth a column always
    words: bool = False  # aligned to the left


def _field(title: str, name: str, plain: str | None = None) -> Column:
    return Column(title=title, text=lambda plan, _: str(getattr(plan, name)), plain=plain)


COLUMNS = (
    Column(title="strategy", text=lambda plan, _: plan.strategy, words=True),
    _field("zero", "zero_stage"),
    _field("dp", "dp"),
    *(_field(degree, degree, "1") for degree in ("tp", "pp", "vp", "cp", "ep", "etp")),
    _field("mbs", "micro_batch_size"),
    _field("num_mb", "num_microbatches"),
    Column(title="recompute", text=lambda plan, model: recompute_text(plan, model), plain="none", words=True),
    Column(title="sp", text=lambda plan, _: "yes" if plan.sequence_parallel else "-", plain="-", words=True),
    Column(title="offload", text=lambda plan, _: offload_text(plan), plain="-", words=True),
    Column(title="split", text=lambda plan, _: split_text(plan.pipeline_split), plain="-", words=True),
    Column(
        title="rank order",
        text=lambda plan, _: "-".join(plan.rank_order),
        plain="-".join(Plan(strategy="", dp=1).rank_order),
        words=True,
    ),
)


def columns_of(plans: Sequence[Plan], model: ModelSpec) -> list[Column]:
    """Return the columns that tell something about one of these plans."""
    return [
        column
        for column in COLUMNS
        if column.plain is None or any(column.text(plan, model) != column.plain for plan in plans)
    ]


_LONGEST_SPLIT = 16  # chunks, above which a split is summed up


def describe(plan: Plan) -> str:
    """Write a plan as the words that pin it, without those at rest."""
    words = [plan.strategy, f"dp={plan.dp}"]
    words += [
        f"{key}={getattr(plan, key)}"
        for key in ("tp", "pp", "vp", "cp", "ep", "etp")
        if getattr(plan, key) > 1
    ]
    words += [f"zero_stage={plan.zero_stage}", f"micro_batch_size={plan.micro_batch_size}"]
    words += [f"num_microbatches={plan.num_microbatches}", f"recompute={plan.recompute}"]
    words += [
        f"{key}={text_of(getattr(plan, key))}"
        for key in ("recompute_num_layers", "recompute_modules")
        if getattr(plan, key)
    ]
    if plan.pipeline_split:
        short = len(plan.pipeline_split) <= _LONGEST_SPLIT
        words.append(f"pipeline_split={(text_of if short else split_text)(plan.pipeline_split)}")
    words += [
        key for key in ("sequence_parallel", "offload_optimizer", "offload_parameters") if getattr(plan, key)
    ]
    if plan.nvme_path:
        words.append(f"nvme_path={plan.nvme_path}")
    if plan.rank_order != Plan(strategy="", dp=1).rank_order:
        words.append(f"rank_order={text_of(plan.rank_order)}")
    return " ".join(words)


def differences(plan: Plan, other: Plan) -> dict[str, tuple[object, object]]:
    """Return what two plans say differently, by field, in the order of the fields."""
    return {
        field.name: (getattr(plan, field.name), getattr(other, field.name))
        for field in fields(Plan)
        if getattr(plan, field.name) != getattr(other, field.name)
    }


def key_of(field: str) -> str:
    """Return the full configuration key of a field of Plan."""
    return _OTHER_SECTIONS.get(field, f"plan.{field}")


def recompute_text(plan: Plan, model: ModelSpec) -> str:
    """Write what is recomputed: full 4/10 is 4 of the 10 layers of a stage."""
    if plan.recompute == "full" and plan.recompute_num_layers:
        return f"full {plan.recompute_num_layers}/{-(-model.num_layers // plan.pp)}"
    modules = f" {'+'.join(plan.recompute_modules)}" if plan.recompute_modules else ""
    return f"{plan.recompute}{modules}"


def offload_text(plan: Plan) -> str:
    """Name what lives on the host."""
    where = (("optimizer", plan.offload_optimizer), ("weights", plan.offload_parameters))
    return "+".join(name for name, moved in where if moved) or "-"


def split_text(split: Sequence[int]) -> str:
    """Write layers by chunk as a sum: 9+10*6+9 is 9, six times 10, and 9."""
    runs = [(layers, len(list(run))) for layers, run in groupby(split)]
    return "+".join(str(layers) if count == 1 else f"{layers}*{count}" for layers, count in runs) or "-"


def grid(rows: Sequence[Sequence[str]], *, words: Sequence[int] = (0,)) -> str:
    """Align columns: figures to the right, `words` columns to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            text.ljust(widths[column]) if column in words else text.rjust(widths[column])
            for column, text in enumerate(row)
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def seconds_text(value: float) -> str:
    """Write seconds with three figures that matter."""
    return f"{value:.4f}" if abs(value) < 0.1 else f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"


def gib_text(num_bytes: float) -> str:
    """Write bytes in GiB."""
    return f"{num_bytes / GIB:.2f}"


def percent_text(share: float | None) -> str:
    """Write a share in percent, with one decimal."""
    return "-" if share is None else f"{100 * share:.1f}%"


def count_text(count: float) -> str:
    """Write a large count in millions or billions."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
