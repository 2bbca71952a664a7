"""Check the keys that `strategy.engine` passes through, before anything runs: no engine sees a key it would ignore."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from strategies.base import Capabilities
from strategies.names import suggest


def check(options: Mapping[str, Any], capabilities: Capabilities, *, prefix: str = "strategy.engine") -> None:
    """Raise ValueError for a key that is unknown, without effect, or decided by the plan."""
    _check_level(options, capabilities.engine_keys, capabilities, prefix=prefix, path=())


def merge(base: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `options` laid over it, group by group."""
    merged = dict(base)
    for key, value in options.items():
        below = merged.get(key)
        nested = isinstance(value, Mapping) and isinstance(below, Mapping)
        merged[key] = merge(below, value) if nested else value  # type: ignore[arg-type]
    return merged


def _check_level(
    options: Mapping[str, Any],
    keys: Mapping[str, Any],
    capabilities: Capabilities,
    *,
    prefix: str,
    path: tuple[str, ...],
) -> None:
    for name, value in options.items():
        dotted = ".".join((*path, name))
        full = f"{prefix}.{dotted}"
        _check_owned(full, dotted, value, capabilities)
        if name not in keys:
            raise ValueError(f"unknown key '{full}'; {suggest(name, keys)}")
        below = keys[name]
        if below is None:
            continue
        if not isinstance(value, Mapping):
            raise ValueError(f"{full}={value!r} must be a group of keys: {', '.join(sorted(below))}")
        _check_level(value, below, capabilities, prefix=prefix, path=(*path, name))


def _check_owned(full: str, dotted: str, value: Any, capabilities: Capabilities) -> None:
    if dotted in capabilities.owned_engine_keys:
        ours = capabilities.owned_engine_keys[dotted]
        raise ValueError(f"{full}={value} is decided by {ours}; set {ours} and remove this key")
    if dotted in capabilities.unused_engine_keys:
        raise ValueError(
            f"{full}={value} would have no effect here, that part of the engine is not used; remove it"
        )
