"""Pipeline stages: each is transformers' own model with the layers of that stage alone, under their full names.

It imports DeepSpeed; import it late.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule

from strategies.deepspeed import grid
from strategies.spec import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Stage(torch.nn.Module):  # type: ignore[misc]
    """Maps token ids, or the hidden states of the stage before, to hidden states or logits."""

    def __init__(self, build: Callable[[], PreTrainedModel]) -> None:
        super().__init__()
        self.network = build()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Run this stage's layers as the whole model would."""
        name = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
        hidden = self.network.base_model(**{name: inputs}, use_cache=False).last_hidden_state
        head = self.network.get_output_embeddings()
        output: torch.Tensor = hidden if head is None else head(hidden)
        return output


class Pipeline(PipelineModule):  # type: ignore[misc]
    """One `Stage` a pipeline rank; parameters are named as in the whole model."""

    def __init__(self, plan: Plan, build: Callable[[Any], PreTrainedModel], *, tied: bool) -> None:
        with redirect_stdout(StringIO()):  # it prints topology and partition
            super().__init__(
                layers=[LayerSpec(Stage, lambda: build(self._grid))] * plan.pp,
                topology=grid.topology_of(plan),
                partition_method="uniform",
            )
        self._tied_group = self._open_tied_group() if tied else None

    @property
    def network(self) -> PreTrainedModel:
        """The part of the model that this rank holds."""
        return self.forward_funcs[0].network

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yield the names of the whole model, which other plans know."""
        yield from self.network.named_parameters(*args, **kwargs)

    def get_tied_weights_and_groups(self) -> list[tuple[torch.nn.Parameter, Any]]:
        """Return what the engine sums over the first and the last stage: the table of tokens and its copy, the head."""
        if self._tied_group is None:
            return []
        table = self.network.get_input_embeddings() or self.network.get_output_embeddings()
        return [(table.weight, self._tied_group)]

    def _open_tied_group(self) -> Any:
        """Join first and last stage, separately for every other coordinate; norms count the tensor once."""
        own = None
        for ranks in self._grid.pipe_groups:
            ends = [ranks[0], ranks[-1]]
            group = dist.new_group(ends)
            if self.global_rank in ends:
                own = group
        if head := self.network.get_output_embeddings():
            head.weight.ds_pipe_replicated = True
        return own


def keep_stage(network: PreTrainedModel, plan: Plan, stage: int) -> None:
    """Drop everything of `network` that other stages hold; what stays keeps its name."""
    body, config = network.base_model, network.config
    split = plan.layers_by_chunk(len(body.layers))
    first = sum(split[:stage])
    kept = range(first, first + split[stage])
    body.layers._modules = {str(index): body.layers[index] for index in kept}
    if getattr(config, "layer_types", None):
        # The body picks masks by the position in its own list.
        config.layer_types = [config.layer_types[index] for index in kept]
    if stage > 0:
        network.set_input_embeddings(None)
    if stage < plan.pp - 1:
        body.norm = torch.nn.Identity()
        network.set_output_embeddings(None)
