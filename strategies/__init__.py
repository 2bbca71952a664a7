"""The engines by name: what each can do, and the adapters that train. Naming one never imports the engine itself."""

from __future__ import annotations

from importlib import import_module

from strategies.base import Capabilities, Strategy
from strategies.names import suggest

__all__ = ["ADAPTERS", "ENGINE_PACKAGES", "PLANNED_ONLY", "Strategy", "capabilities", "engines", "load"]

ADAPTERS = {
    "accelerate": "strategies.accelerate:AccelerateStrategy",
    "colossalai": "strategies.colossalai:ColossalAIStrategy",
    "deepspeed": "strategies.deepspeed:DeepSpeedStrategy",
    "fake": "strategies.fake:FakeStrategy",
}
# The package behind each engine; `fake` has none and is never chosen for anybody.
ENGINE_PACKAGES = {"accelerate": "accelerate", "colossalai": "colossalai", "deepspeed": "deepspeed"}
# Engines whose capabilities are known and whose adapter is still to come.
PLANNED_ONLY = {"megatron": "strategies.megatron"}


def engines() -> list[str]:
    """Name every engine that can be planned for, whether or not it trains here."""
    return sorted([*ENGINE_PACKAGES, *PLANNED_ONLY])


def capabilities(name: str) -> Capabilities:
    """Return what the engine called `name` can do; raise ValueError with the nearest name otherwise."""
    if name in PLANNED_ONLY:
        found: Capabilities = import_module(PLANNED_ONLY[name]).CAPABILITIES
        return found
    return load(name).capabilities


def load(name: str) -> type[Strategy]:
    """Return the adapter class called `name`; raise ValueError where there is none, with the nearest name."""
    if name in PLANNED_ONLY:
        raise ValueError(
            f"strategy={name} can be planned, but this version does not train with it yet; "
            f"use strategy={' or '.join(sorted(ENGINE_PACKAGES))}"
        )
    if name not in ADAPTERS:
        raise ValueError(f"strategy={name} is unknown; {suggest(name, [*ADAPTERS, *PLANNED_ONLY])}")
    module, _, attribute = ADAPTERS[name].partition(":")
    adapter: type[Strategy] = getattr(import_module(module), attribute)
    return adapter
