"""Inspection: what an engine holds on one rank of a planned world, found out without that world's hardware."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Bytes of one rank, counted on the engine's own tensors; what stayed open is said in `notes`, a sentence each.

    The parts are those of the planner. `working_bytes` is the most that a step takes beside the states: activations,
    logits, gathered weights, buckets. None: that was not found out.
    """

    parameters: int  # elements of the model that this rank holds, before any ZeRO stage shards them
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    working_bytes: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def state_bytes(self) -> int:
        """Bytes of weights, gradients and optimizer together."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes
