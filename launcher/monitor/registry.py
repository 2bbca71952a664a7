"""What a metric is: tag, unit and help text. The metrics themselves are the fields of StepMetrics, and only there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

_KEY = "metric"
# How the exposition format of Prometheus wants a unit at the end of a name.
_SUFFIXES = {
    "_s": "_seconds",
    "_gib": "_gibibytes",
    "_w": "_watts",
    "_celsius": "_celsius",
    "_mhz": "_megahertz",
    "_bytes": "_bytes",
}


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One curve, or with a `label` one curve for each of its values; every sink reads this and nothing else."""

    name: str  # the field of StepMetrics, and the key in metrics.jsonl
    tag: str  # in TensorBoard and W&B
    unit: str
    text: str
    label: str | None = None  # what tells the curves apart: rank, group of ranks, node, gpu or cause
    counter: bool = False  # only ever grows

    @property
    def exposed(self) -> str:
        """The name under /metrics."""
        found = next((suffix for suffix in _SUFFIXES if self.name.endswith(suffix)), None)
        stem = self.name if found is None else self.name.removesuffix(found) + _SUFFIXES[found]
        return f"meshwright_{stem}{'_total' if self.counter else ''}"

    @property
    def help(self) -> str:
        """What it is, in which unit."""
        return f"{self.text} ({self.unit})" if self.unit else self.text


def metric(
    tag: str,
    text: str,
    *,
    unit: str = "",
    label: str | None = None,
    counter: bool = False,
    default: Any = None,
) -> Any:
    """Declare a field of StepMetrics as a metric; `default=...` (Ellipsis) means that every step has it."""
    described = {_KEY: {"tag": tag, "text": text, "unit": unit, "label": label, "counter": counter}}
    return field(default=MISSING if default is ... else default, metadata=described)


def declared(cls: type) -> tuple[Metric, ...]:
    """Return the metrics among the fields of `cls`, in their order."""
    return tuple(Metric(name=f.name, **f.metadata[_KEY]) for f in fields(cls) if _KEY in f.metadata)


def series(
    metrics: Mapping[str, Any], known: tuple[Metric, ...]
) -> Iterator[tuple[Metric, str | None, float]]:
    """Yield (metric, label value, number) of every curve that a record has a point of."""
    for item in known:
        value = metrics.get(item.name)
        if isinstance(value, Mapping):
            yield from ((item, str(where), float(number)) for where, number in value.items())
        elif value is not None:
            yield item, None, float(value)


def tag_of(item: Metric, where: str | None) -> str:
    """Return the curve's name in TensorBoard and W&B."""
    return item.tag if where is None else f"{item.tag}/{where}"
