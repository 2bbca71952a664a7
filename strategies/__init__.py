"""The engines by name: what each can do, and the adapters that train. Naming one never imports the engine itself."""

from __future__ import annotations

from importlib import import_module

from strategies.base import Capabilities, Strategy
from strategies.names import suggest

__all__ = ["ADAPTERS", "ENGINE_PACKAGES", "Strategy", "capabilities", "engines", "load"]

ADAPTERS = {
    "accelerate": "strategies.accelerate:AccelerateStrategy",
    "colossalai": "strategies.colossalai:ColossalAIStrategy",
    "deepspeed": "strategies.deepspeed:DeepSpeedStrategy",
    "fake": "strategies.fake:FakeStrategy",
    "megatron": "strategies.megatron:MegatronStrategy",
}
# The package behind each engine; `fake` has none and is never chosen for anybody.
ENGINE_PACKAGES = {
    "accelerate": "accelerate",
    "colossalai": "colossalai",
    "deepspeed": "deepspeed",
    "megatron": "megatron",
}


def engines() -> list[str]:
    """Name every engine, whether or not it is installed here."""
    return sorted(ENGINE_PACKAGES)


def capabilities(name: str) -> Capabilities:
    """Return what the engine called `name` can do; raise ValueError with the nearest name otherwise."""
    return load(name).capabilities


def load(name: str) -> type[Strategy]:
    """Return the adapter class called `name`; raise ValueError where there is none, with the nearest name."""
    if name not in ADAPTERS:
        raise ValueError(f"strategy={name} is unknown; {suggest(name, ADAPTERS)}")
    module, _, attribute = ADAPTERS[name].partition(":")
    adapter: type[Strategy] = getattr(import_module(module), attribute)
    return adapter
