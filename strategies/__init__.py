"""The adapters by name. Loading one imports its adapter module, never the engine behind it."""

from __future__ import annotations

from importlib import import_module

from strategies.base import Strategy
from strategies.names import suggest

__all__ = ["ADAPTERS", "ENGINE_PACKAGES", "Strategy", "load"]

ADAPTERS = {
    "accelerate": "strategies.accelerate:AccelerateStrategy",
    "deepspeed": "strategies.deepspeed:DeepSpeedStrategy",
    "fake": "strategies.fake:FakeStrategy",
}
# The package behind each engine; `fake` has none and is never chosen for anybody.
ENGINE_PACKAGES = {"accelerate": "accelerate", "deepspeed": "deepspeed"}


def load(name: str) -> type[Strategy]:
    """Return the adapter class called `name`; raise ValueError with the nearest name otherwise."""
    if name not in ADAPTERS:
        raise ValueError(f"strategy={name} is unknown; {suggest(name, ADAPTERS)}")
    module, _, attribute = ADAPTERS[name].partition(":")
    adapter: type[Strategy] = getattr(import_module(module), attribute)
    return adapter
