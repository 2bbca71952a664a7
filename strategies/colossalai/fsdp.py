"""ColossalAI's FSDP plugin, with the optimizer's groups kept, and gradients clipped by the norm over all ranks.

booster/plugin/torch_fsdp_plugin.py:549 (0.5.0) creates the optimizer anew with one group of all parameters, so that
norms and biases decay, and with arguments that torch's AdamW no longer takes. With `use_orig_params` parameters keep
their names behind FSDP, and each group gets its own ones back by these. Upstream's optimizer also inherits a norm over
this rank's shards alone (interface/optimizer.py), where FSDP has one over all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from colossalai.booster.plugin.torch_fsdp_plugin import FSDPOptimizerWrapper, TorchFSDPModel, TorchFSDPPlugin
from torch.distributed.fsdp._common_utils import FSDP_PREFIX
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from strategies import process


class GroupedFSDPPlugin(TorchFSDPPlugin):  # type: ignore[misc]
    """Shards every layer by itself, and what is outside of them together."""

    def __init__(self, *, max_norm: float) -> None:
        super().__init__()
        self._max_norm = max_norm

    def configure(
        self,
        model: Any,
        optimizer: Any = None,
        criterion: Any = None,
        dataloader: Any = None,
        lr_scheduler: Any = None,
    ) -> tuple[Any, ...]:
        """Wrap the model, then give the optimizer the same groups of the parameters as they are now."""
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
        wrapped = TorchFSDPModel(
            model,
            device_id=process.local_device(),
            auto_wrap_policy=ModuleWrapPolicy(_layers_of(model)),
            use_orig_params=True,
        )
        now = {name.replace(FSDP_PREFIX, ""): value for name, value in wrapped.unwrap().named_parameters()}
        for group, own in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = [now[name] for name in own]
        return (
            wrapped,
            _ClippingOptimizer(optimizer, wrapped, self._max_norm),
            criterion,
            dataloader,
            lr_scheduler,
        )


class _ClippingOptimizer(FSDPOptimizerWrapper):  # type: ignore[misc]
    """Clips before it steps, as the optimizers of the other plugins do."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: Any, max_norm: float) -> None:
        super().__init__(optimizer, model)
        self._max_norm, self._norm = max_norm, 0.0

    def step(self, *arguments: Any, **named: Any) -> None:
        self._norm = float(self.model.unwrap().clip_grad_norm_(self._max_norm))
        super().step(*arguments, **named)

    def get_grad_norm(self, **_: Any) -> float:
        """Return the norm of the last step, before clipping."""
        return self._norm


def _layers_of(model: Any) -> set[type[torch.nn.Module]]:
    whole = set(model._no_split_modules)
    return {type(module) for module in model.modules() if type(module).__name__ in whole}
