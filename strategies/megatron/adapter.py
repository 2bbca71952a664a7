"""One rank of a Megatron-core job behind the common interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies import hf, histograms, process, routing
from strategies.base import StepResult, Strategy
from strategies.engine_options import check
from strategies.megatron.capabilities import CAPABILITIES
from strategies.megatron.settings import Settings, to_settings
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

if TYPE_CHECKING:
    import torch

    from strategies.base import MicroBatch
    from strategies.bins import Histograms
    from strategies.inspection import Inspection
    from strategies.megatron.snapshots import Snapshots


class MegatronStrategy(Strategy):
    """One process a GPU, placed by plan.rank_order."""

    capabilities = CAPABILITIES
    _snapshots: Snapshots | None = None

    create_weights = staticmethod(hf.create_weights)

    def setup(self, plan: Plan, model: ModelSpec, training: TrainingSpec, weights: Path) -> None:
        """Build this rank's layers, fill them from `weights`, and give them buffers and optimizer."""
        if refusal := self.capabilities.why_not(plan, model):
            raise ValueError(refusal)
        check(plan.engine, self.capabilities)
        hf.check_weights(weights, model)
        process.set_deterministic(training)
        self._device = process.local_device()
        process.join_single_rank_group()
        from strategies.megatron import network

        self._plan, self._model, self._training, self._weights = plan, model, training, weights
        extensions = network.prepare()
        if plan.precision == "fp8" and not extensions.transformer_engine:
            raise ValueError(
                "training.precision=fp8 needs Transformer Engine on a GPU, which is not installed here; "
                "use bf16, or install transformer_engine[pytorch]"
            )
        settings = to_settings(plan, model, training, extensions=extensions)
        network.join_groups(settings.parallel)
        self._build(settings, model, weights)

    def _build(self, settings: Settings, model: ModelSpec, weights: Path) -> None:
        from megatron.core import parallel_state

        from strategies.megatron import checkpoints, network
        from strategies.megatron.weights import load

        self.dp_rank = parallel_state.get_data_parallel_rank()
        process.seed_everything(self._training, rank=self.dp_rank)
        config = network.build_config(settings)
        chunks = network.build_chunks(settings, config, vocab_size=model.vocab_size)
        load(chunks, model=model, weights=weights)
        self._chunks, self._optimizer = network.wrap(settings, config, chunks)
        checkpoints.open_groups(self._optimizer)

    def train_step(self, batches: Sequence[MicroBatch], *, learning_rate: float) -> StepResult:
        """Run the pipeline schedule over the micro-batches, reduce, clip, step."""
        assert len(batches) == self._plan.num_microbatches, (
            "the trainer must pass plan.num_microbatches batches"
        )
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        losses = self._run_schedule(batches, forward_only=False)
        hf.set_learning_rate(self._optimizer, learning_rate)
        applied, norm, _ = self._optimizer.step()
        return StepResult(
            loss=self._mean(losses),
            rank_loss=process.own_mean(losses),
            grad_norm=float("nan") if norm is None else float(norm),
            skipped=not applied,
        )

    def counting_experts(self) -> AbstractContextManager[Mapping[int, Sequence[int]]]:
        """Watch Megatron-core's routers; each stage has those of its own layers."""
        if self._model.moe is None:
            return nullcontext({})
        return routing.counting(routing.routers_of(self._chunks), num_experts=self._model.moe.num_experts)

    def taking_histograms(self) -> AbstractContextManager[Histograms]:
        """Count this rank's shards, or what no other rank counts."""
        from strategies.megatron import moved

        names = moved.names_of(self._chunks, self._optimizer, sharded=self._plan.zero_stage > 0)
        return histograms.taking(moved.optimizers_of(self._optimizer), histograms.whole(names))

    def evaluate(self, batches: Sequence[MicroBatch]) -> float:
        """Mean loss without gradients."""
        import torch

        # An interleaved schedule wants whole rounds of micro-batches; what is repeated does not count.
        missing = -len(batches) % self._plan.pp if self._plan.vp > 1 else 0
        for chunk in self._chunks:
            chunk.eval()
        with torch.no_grad():
            losses = self._run_schedule([*batches, *[batches[-1]] * missing], forward_only=True)
        for chunk in self._chunks:
            chunk.train()
        return self._mean(losses[: len(batches)])

    def save(self, directory: Path) -> None:
        """Write model and optimizer with dist_checkpointing."""
        from strategies.megatron import checkpoints

        checkpoints.save(self._chunks, self._optimizer, directory)

    def snapshot_bytes(self) -> int:
        """Copies of what this rank holds, and what meets here before it is written."""
        from strategies.megatron import snapshots

        return snapshots.num_bytes(self._chunks, self._optimizer)

    def snapshot(self, directory: Path) -> Callable[[], None]:
        """Copy what this rank holds of what `save` would write."""
        from strategies.megatron import snapshots

        self._snapshots = self._snapshots or snapshots.Snapshots(self._optimizer)
        return self._snapshots.take(self._chunks, self._optimizer, directory)

    def load(self, directory: Path) -> None:
        """Restore it; all degrees of the plan may differ from those that wrote it."""
        from strategies.megatron import checkpoints

        checkpoints.load(self._chunks, self._optimizer, directory)

    def export(self, directory: Path) -> None:
        """Gather the weights tensor by tensor, without padding, in the precision they are trained in."""
        from strategies.megatron import checkpoints, weights

        with checkpoints.gathered(self._chunks):
            weights.export(self._chunks, model=self._model, source=self._weights, directory=directory)

    def teardown(self) -> None:
        """Free the model and Megatron-core's groups."""
        from strategies.megatron import network

        del self._chunks, self._optimizer
        self._snapshots = None
        network.leave_groups()

    @classmethod
    def inspect(cls, plan: Plan, model: ModelSpec, training: TrainingSpec, *, rank: int) -> Inspection:
        """Build this rank's layers, buffers and optimizer in a world that is not there, and run the schedule."""
        import torch

        from strategies.fake_world import empty_batches
        from strategies.megatron.inspect import inspect

        if refusal := cls.capabilities.why_not(plan, model):
            raise ValueError(refusal)
        check(plan.engine, cls.capabilities)

        def run_schedule(chunks: list[Any], shorter: Plan) -> None:
            strategy = cls()
            strategy._plan, strategy._training = shorter, training
            strategy._chunks, strategy._device = chunks, torch.device("cpu")
            strategy._run_schedule(empty_batches(shorter, training), forward_only=False)

        return inspect(plan, model, training, rank=rank, run_schedule=run_schedule)

    def _run_schedule(self, batches: Sequence[MicroBatch], *, forward_only: bool) -> list[torch.Tensor]:
        """Return the mean loss of each micro-batch, on the ranks of the last stage; nothing on the others."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        schedule = get_forward_backward_func()
        losses: list[torch.Tensor] = schedule(
            forward_step_func=_forward_step,
            data_iterator=[self._inputs(batches) for _ in self._chunks],
            model=self._chunks,
            num_microbatches=len(batches),
            seq_length=self._training.sequence_length,
            micro_batch_size=self._plan.micro_batch_size,
            forward_only=forward_only,
        )
        return losses

    def _inputs(self, batches: Sequence[MicroBatch]) -> Iterator[dict[str, torch.Tensor]]:
        """Yield tokens, labels and positions of each micro-batch, all (sequences, length), this cp rank's part."""
        import torch
        from megatron.core.utils import get_batch_on_this_cp_rank

        for batch in batches:
            tokens, labels = hf.to_tensors(batch, self._device)
            positions = torch.arange(tokens.shape[1], device=self._device).expand_as(tokens).contiguous()
            parts = {"input_ids": tokens, "labels": labels, "position_ids": positions}
            yield get_batch_on_this_cp_rank(parts)

    def _mean(self, losses: Sequence[torch.Tensor]) -> float:
        """Average over micro-batches and data, from the last stage to every rank."""
        import torch
        import torch.distributed as dist

        total = torch.stack(list(losses)).mean() if losses else torch.zeros((), device=self._device)
        dist.all_reduce(total)
        plan = self._plan
        return float(total) / (plan.dp * plan.cp * plan.tp)


def _forward_step(batches: Iterator[dict[str, torch.Tensor]], model: Any) -> tuple[torch.Tensor, Any]:
    """Run one chunk on the next micro-batch; on the last stage the output is the loss of every token."""
    batch = next(batches)
    output = model(**batch, attention_mask=None)
    return output, _loss


def _loss(per_token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return sum, number of tokens, and the mean to report."""
    import torch

    per_token = per_token.float()
    count = torch.tensor(per_token.numel(), dtype=torch.int, device=per_token.device)
    return per_token.sum(), count, per_token.detach().mean()
