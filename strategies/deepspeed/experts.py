"""Expert parallelism: what AutoEP needs beside DeepSpeed's configuration. It imports DeepSpeed; import it late."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer


@contextmanager
def router_logits_found() -> Iterator[None]:
    """Let AutoEP tell transformers where its router is: it names classes, where transformers 5.23 wants models.

    Without it AutoEP fails (module_inject/auto_ep_presets/base.py, _install_instance_transformers_output_recorders).
    """
    from transformers.utils import output_capturing

    registry = getattr(output_capturing, "_CanRecordRegistry", None)
    if registry is None:  # releases that AutoEP was written for
        yield
        return

    def key(model: Any) -> str:
        return model if isinstance(model, str) else str(model.__class__)

    def get(self: dict[str, Any], model: Any, default: Any = None) -> Any:
        return dict.get(self, key(model), default) or {}

    def set_item(self: dict[str, Any], model: Any, outputs: Any) -> None:
        dict.__setitem__(self, key(model), outputs)

    with mock.patch.object(registry, "get", get), mock.patch.object(registry, "__setitem__", set_item):
        yield


def split_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the experts of each group of parameters into one of their own, which DeepSpeed reduces over fewer ranks."""
    named = [{**group, "name": str(index)} for index, group in enumerate(groups)]
    split: list[dict[str, Any]] = split_params_into_different_moe_groups_for_optimizer(named)
    return split
