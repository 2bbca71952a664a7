"""What dashboards compare runs by: the plain values of training and plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PLAIN = (bool, int, float, str)


def hyper_parameters(settings: Mapping[str, Any], plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return them under dotted names, out of the configuration and plan.json."""
    groups = {"training": settings.get("training", {}), "plan": plan}
    return {
        f"{group}.{key}": value
        for group, values in groups.items()
        for key, value in values.items()
        if isinstance(value, PLAIN)
    }
