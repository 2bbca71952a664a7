"""What of the weights and of Adam's moments a rank's engine holds, in fp32, whichever ZeRO stage cut them up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from strategies.deepspeed.boxes import Box, Index, Placement, cut

if TYPE_CHECKING:
    import torch

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (WEIGHT, *MOMENTS)


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Elements of a parameter, and where they lie: from `offset` on in the flat tensors of `group`."""

    parameter: str
    shape: Index  # of the parameter
    start: int
    numel: int
    group: int
    offset: int


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A block of a tensor in Hugging Face's layout that this rank holds."""

    placement: Placement
    group: int
    offset: int  # in the flat tensors of `group`
    box: Box  # of the parameter as this rank has it

    @property
    def target(self) -> Box:
        """Where it belongs in the whole tensor."""
        return self.box.moved(self.placement.shift)

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the block's view into a flat tensor."""
        return flat.narrow(0, self.offset, self.box.numel).view(self.box.sizes)


class Holdings(ABC):
    """The flat fp32 tensors of one engine. Groups are what is in memory together."""

    def __init__(self, engine: Any, placements: Mapping[str, Placement]) -> None:
        self.engine, self._placements = engine, placements
        self.slices = tuple(self._find_slices())

    def pieces(self) -> Iterator[Piece]:
        """Yield every block, group by group, and inside one in the order of the model."""
        for part in sorted(self.slices, key=lambda part: part.group):
            offset = part.offset
            for box in cut(part.shape, part.start, part.start + part.numel):
                yield Piece(
                    placement=self._placements[part.parameter], group=part.group, offset=offset, box=box
                )
                offset += box.numel

    def flat(self, kind: str, group: int) -> torch.Tensor:
        """Return the weights of a group, or one of Adam's moments of them; it must be open."""
        master = self._master(group)
        return master.detach() if kind == WEIGHT else self._state(group)[kind]

    def parts(self, *, first: bool) -> dict[int, dict[str, tuple[int, int]]]:
        """Return what lies where in the tensors that the optimizer moves, by their `id`: name -> (offset, length).

        Copies of what another rank holds are left out; `first` is the first of the ranks with the same weights.
        """
        del first  # a shard is nobody's copy
        found: dict[int, dict[str, tuple[int, int]]] = {}
        for part in self.slices:
            if not self._placements[part.parameter].is_copy:
                lie = found.setdefault(id(self._master(part.group)), {})
                lie[part.parameter] = (part.offset, part.numel)
        return found

    def optimizers(self) -> list[Any]:
        """Return torch's optimizers beneath the engine's."""
        return list({id(inner): inner for inner in map(self._inner, self._groups())}.values())

    def batches(self) -> list[tuple[int, ...]]:
        """Return the groups that may be open together: all of them, unless they lie on a disk."""
        return [tuple(dict.fromkeys(part.group for part in self.slices))]

    @contextmanager
    def opened(self, group: int, *, writing: bool = False) -> Iterator[None]:
        """Have a group in memory; with `writing`, what changes there reaches the layers."""
        del group, writing
        yield

    def finish(self) -> None:  # noqa: B027
        """After all groups were written: let every rank compute with the new weights."""

    def step_count(self) -> int:
        """Return how many steps the optimizer has made."""
        for group in self._groups():
            state = self._inner(group).state.get(self._master(group), {})
            return int(state.get("step", 0))
        return 0

    def set_step_count(self, group: int, count: int) -> None:
        """Let the optimizer go on with a group as after so many steps."""
        state = self._state(group)
        step = state["step"]
        state["step"] = step.fill_(count) if hasattr(step, "fill_") else count

    def buffers(self) -> dict[str, torch.Tensor]:
        """Return what is saved with the weights and never trained."""
        network = getattr(
            self.engine.module, "network", self.engine.module
        )  # of a pipeline, this stage's part
        trained = dict(network.named_parameters(remove_duplicate=False))
        state: dict[str, torch.Tensor] = network.state_dict()
        return {name: tensor for name, tensor in state.items() if name not in trained}

    def _groups(self) -> Iterator[int]:
        yield from dict.fromkeys(part.group for part in self.slices)

    def _state(self, group: int) -> dict[str, Any]:
        """Return the optimizer's state of a group, made where the first step would make it."""
        import torch

        master, inner = self._master(group), self._inner(group)
        state: dict[str, Any] = inner.state[master]
        if not all(kind in state for kind in MOMENTS):
            is_torch = isinstance(inner, torch.optim.AdamW)
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device) if is_torch else 0
            for kind in MOMENTS:
                state[kind] = torch.zeros_like(master, requires_grad=False)
        return state

    def _inner(self, group: int) -> Any:
        del group
        return self.engine.optimizer.optimizer

    @abstractmethod
    def _find_slices(self) -> Iterator[Slice]: ...

    @abstractmethod
    def _master(self, group: int) -> torch.Tensor:
        """Return what the optimizer moves."""


class WholeHoldings(Holdings):
    """ZeRO 0: the parameters themselves, a group each."""

    def _find_slices(self) -> Iterator[Slice]:
        self._parameters = []
        for group, (name, parameter) in enumerate(self.engine.module.named_parameters()):
            self._parameters.append(parameter)
            shape, numel = tuple(parameter.shape), parameter.numel()
            yield Slice(parameter=name, shape=shape, start=0, numel=numel, group=group, offset=0)

    def flat(self, kind: str, group: int) -> torch.Tensor:
        return super().flat(kind, group).view(-1)

    def parts(self, *, first: bool) -> dict[int, dict[str, tuple[int, int]]]:
        found = super().parts(first=first)
        if first:
            return found
        # The others have all of it as well, but for experts, which ranks of a group share out.
        own = {id(parameter) for parameter in self._parameters if self._is_only_copy(parameter)}
        return {key: lie for key, lie in found.items() if key in own}

    def _is_only_copy(self, parameter: Any) -> bool:
        from deepspeed.utils import groups

        name = getattr(parameter, "group_name", None)
        return name is not None and groups._get_expert_data_parallel_rank(name) == 0

    def _master(self, group: int) -> torch.Tensor:
        parameter: torch.Tensor = self._parameters[group]
        return parameter

    def _inner(self, group: int) -> Any:
        return self.engine.optimizer


class SplitHoldings(Holdings):
    """ZeRO 1 and 2: one flat tensor a parameter group, cut over the data parallel ranks."""

    def _find_slices(self) -> Iterator[Slice]:
        for name, parameter in self.engine.module.named_parameters():
            link = parameter._hp_mapping  # None: all of it lies on other ranks
            if link is not None:
                yield Slice(
                    parameter=name,
                    shape=tuple(parameter.shape),
                    start=link.lp_fragment_address.start,
                    numel=link.lp_fragment_address.numel,
                    group=link.param_group_index,
                    offset=link.hp_fragment_address.start,
                )

    def _master(self, group: int) -> torch.Tensor:
        flat: torch.Tensor = self._inner(group).param_groups[group]["params"][0]
        return flat

    def finish(self) -> None:
        """Copy the master weights into the layers' own, and gather those."""
        self.engine.optimizer.update_lp_params()


class ShardedHoldings(Holdings):
    """ZeRO 3: every parameter cut over the data parallel ranks; a group may lie on a disk."""

    def _find_slices(self) -> Iterator[Slice]:
        optimizer = self.engine.optimizer
        for name, parameter in self.engine.module.named_parameters():
            group, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = optimizer._get_param_partition_rank(parameter) * numel
            held = min(numel, parameter.ds_numel - start)  # the last ranks' parts are padded
            if held > 0:
                shape = tuple(parameter.ds_shape)
                yield Slice(parameter=name, shape=shape, start=start, numel=held, group=group, offset=offset)

    def batches(self) -> list[tuple[int, ...]]:
        groups = range(len(self.engine.optimizer.fp16_groups))
        if any(map(self._is_on_disk, groups)):
            return [(group,) for group in groups]
        return [tuple(groups)]

    @contextmanager
    def opened(self, group: int, *, writing: bool = False) -> Iterator[None]:
        optimizer = self.engine.optimizer
        if self._is_on_disk(group):
            optimizer._optimizer_states_and_gradient_swap_in(group)
        yield
        if writing:
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if self._is_on_disk(group):
            close = optimizer._optimizer_states_and_gradient_swap_out
            (close if writing else optimizer._release_swap_buffers)(group)

    def finish(self) -> None:
        """Gather what ZeRO-3 keeps gathered, and forget copies inside a node (ZeRO++) that are old now."""
        optimizer = self.engine.optimizer
        optimizer._partition_all_parameters()
        if kept := optimizer.persistent_parameters:
            kept[0].all_gather(kept)
        optimizer.invalidate_secondary_tensor()

    def _groups(self) -> Iterator[int]:
        yield from range(len(self.engine.optimizer.fp16_groups))

    def _is_on_disk(self, group: int) -> bool:
        return bool(self.engine.optimizer._swappable_optimizer_subgroup(group))

    def _inner(self, group: int) -> Any:
        optimizer = self.engine.optimizer
        # A share of the groups may stay on the device, with an optimizer of their own (ZeRO-Offload++).
        on_host = not optimizer.offload_optimizer or optimizer.subgroup_to_device[group] == "cpu"
        return optimizer.optimizer if on_host else optimizer.backup_optimizer

    def _master(self, group: int) -> torch.Tensor:
        flat: torch.Tensor = self.engine.optimizer.fp32_partitioned_groups_flat[group]
        return flat


class Reader(ExitStack):
    """Reads blocks one after the other, opening each group when its turn comes and closing the one before."""

    def __init__(self, holdings: Holdings) -> None:
        super().__init__()
        self._holdings = holdings
        self._open: int | None = None
        self.device = holdings.engine.device

    def read(self, kind: str, piece: Piece) -> torch.Tensor:
        """Return the view behind a block; it is good until the next group is opened."""
        if piece.group != self._open:
            self.close()
            self.enter_context(self._holdings.opened(piece.group))
            self._open = piece.group
        return piece.of(self._holdings.flat(kind, piece.group))


def holdings_of(engine: Any, placements: Mapping[str, Placement]) -> Holdings:
    """Return the holdings of an engine; `placements` says where each of its parameters belongs."""
    if engine.zero_optimization_stage() == 3:
        return ShardedHoldings(engine, placements)
    split = any(hasattr(parameter, "_hp_mapping") for parameter in engine.module.parameters())
    return (SplitHoldings if split else WholeHoldings)(engine, placements)
