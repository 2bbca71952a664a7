"""DeepSpeedStrategy: one plan on a DeepSpeed engine. `settings.py` says what the engine is told."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies import hf, histograms, process, routing
from strategies.base import StepResult, Strategy
from strategies.deepspeed import disk
from strategies.deepspeed.capabilities import CAPABILITIES
from strategies.deepspeed.holdings import Holdings, holdings_of
from strategies.deepspeed.settings import (
    summed_parts,
    swapped_bytes,
    to_deepspeed_config,
    why_not_zero_plus_plus,
)
from strategies.engine_options import check
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

if TYPE_CHECKING:
    import torch

    from strategies.base import MicroBatch
    from strategies.bins import Histograms
    from strategies.deepspeed.checkpoints import Snapshots
    from strategies.inspection import Inspection


class DeepSpeedStrategy(Strategy):
    """One process a GPU, placed by plan.rank_order."""

    capabilities = CAPABILITIES
    _snapshots: Snapshots | None = None

    create_weights = staticmethod(hf.create_weights)

    def setup(self, plan: Plan, model: ModelSpec, training: TrainingSpec, weights: Path) -> None:
        """Hand this rank's part of the model and torch's AdamW to a DeepSpeed engine."""
        device = process.local_device().type
        if refusal := why_not_zero_plus_plus(plan, device=device, local_ranks=_ranks_of_host()):
            raise ValueError(refusal)
        config = self._enter(plan, model, training)
        self._model, self._weights = model, weights
        from strategies.deepspeed import network

        source = network.source_of(weights, model, plan, config)
        self._part = network.build(source, model, plan, training)
        self._initialize(training, config)

    def _enter(self, plan: Plan, model: ModelSpec, training: TrainingSpec) -> dict[str, Any]:
        if refusal := self.capabilities.why_not(plan, model):
            raise ValueError(refusal)
        check(plan.engine, self.capabilities)
        deepspeed = _import_deepspeed()
        import torch.distributed as dist

        self._plan = plan
        process.set_deterministic(training)
        self._device = process.local_device()
        process.join_single_rank_group()
        deepspeed.init_distributed()
        self._swap_folder = _open_swap_folder(plan, model)
        self.dp_rank = plan.coordinate("dp", dist.get_rank())
        process.seed_everything(training, rank=self.dp_rank)
        swapped = plan.nvme_path and replace(plan, nvme_path=str(self._swap_folder))
        return to_deepspeed_config(swapped or plan, model, training)

    def _initialize(self, training: TrainingSpec, config: dict[str, Any]) -> None:
        import deepspeed

        from strategies.deepspeed import experts, norms, sequences

        part, self._summed_parts = self._part, summed_parts(self._plan)
        self._balance = hf.balance_coefficient(part.model)

        def create_optimizer(_: Any) -> torch.optim.Optimizer:
            return _create_optimizer(
                part.module, self._plan, training
            )  # by then AutoEP has put its own experts in

        mended = experts.router_logits_found() if self._plan.ep > 1 else nullcontext()
        with redirect_stdout(StringIO()), mended:  # it prints memory tables
            self._engine, *_ = deepspeed.initialize(
                model=part.module, optimizer=create_optimizer, config=config, mpu=part.mpu
            )
        if self._plan.cp > 1:
            sequences.count_as_data(self._engine)
        if self._plan.zero_stage == 0:
            norms.clip_without_zero(self._engine, part.grid)

    def train_step(self, batches: Sequence[MicroBatch], *, learning_rate: float) -> StepResult:
        """Run the engine's accumulation to its boundary; it clips and steps."""
        assert len(batches) == self._plan.num_microbatches, (
            "the trainer must pass plan.num_microbatches batches"
        )
        hf.set_learning_rate(self._engine.optimizer, learning_rate)
        own: float | None
        if self._plan.pp > 1:
            loss = float(self._engine.train_batch(self._pairs(batches)))
            own = self._own_loss_of_pipeline(len(batches))
        else:
            loss, own = process.means_of([self._accumulate(batch) for batch in batches])
        norm, skipped = self._engine.get_global_grad_norm(), not self._engine.was_step_applied()
        return StepResult(loss=loss, grad_norm=float(norm), skipped=skipped, rank_loss=own)

    def _own_loss_of_pipeline(self, num_microbatches: int) -> float | None:
        """Return the mean over this rank's micro-batches, which the last stage adds up."""
        return float(self._engine.total_loss) / num_microbatches if self._engine.is_last_stage() else None

    def _accumulate(self, batch: MicroBatch) -> torch.Tensor:
        loss, reported = hf.training_losses(
            self._engine, batch, self._device, balance=self._balance, criterion=self._part.loss
        )
        self._engine.backward(loss / self._summed_parts)
        self._engine.step()
        return reported

    def counting_experts(self) -> AbstractContextManager[Mapping[int, Sequence[int]]]:
        """Watch AutoEP's routers."""
        if self._model.moe is None:
            return nullcontext({})
        routers = routing.routers_of([self._engine.module])
        return routing.counting(routers, num_experts=self._model.moe.num_experts)

    def taking_histograms(self) -> AbstractContextManager[Histograms]:
        """Count what this rank holds of the flat tensors, parameter by parameter."""
        holdings = self._holdings()
        parts = holdings.parts(first=self.dp_rank == 0 and self._own_part_of_sequences() == 0)
        return histograms.taking(holdings.optimizers(), lambda moved: parts.get(id(moved), {}))

    def _own_part_of_sequences(self) -> int:
        import torch.distributed as dist

        return self._plan.coordinate("cp", dist.get_rank())

    def _pairs(self, batches: Sequence[MicroBatch]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield inputs, which the first stage reads, and labels, which the last one does."""
        return (hf.to_tensors(batch, self._device) for batch in batches)

    def evaluate(self, batches: Sequence[MicroBatch]) -> float:
        """Mean loss without gradients."""
        import torch

        if self._plan.pp > 1:
            return float(self._engine.eval_batch(self._pairs(batches), num_micro_batches=len(batches)))
        self._engine.eval()
        with torch.no_grad():
            losses = [
                hf.model_loss(self._engine, batch, self._device, criterion=self._part.loss)
                for batch in batches
            ]
        self._engine.train()
        return process.mean_of(losses)

    def save(self, directory: Path) -> None:
        """Write this rank's blocks of weights and moments, in a form that any plan of this engine reads."""
        from strategies.deepspeed import checkpoints

        checkpoints.save(self._holdings(), directory)

    def snapshot_bytes(self) -> int:
        """Of what this rank writes; 0 where some of it is offloaded to a disk."""
        from strategies.deepspeed import checkpoints

        return checkpoints.num_bytes(self._holdings())

    def snapshot(self, directory: Path) -> Callable[[], None]:
        """Copy what `save` would write."""
        from strategies.deepspeed import checkpoints

        self._snapshots = self._snapshots or checkpoints.Snapshots()
        return self._snapshots.take(self._holdings(), directory)

    def load(self, directory: Path) -> None:
        """Restore them; degrees, ZeRO stage and offloading may differ from those that wrote them."""
        from strategies.deepspeed import checkpoints

        checkpoints.load(self._holdings(), directory)

    def export(self, directory: Path) -> None:
        """Write the master weights in fp32, tensor by tensor."""
        from strategies.deepspeed import export

        export.export(self._holdings(), model=self._model, source=self._weights, directory=directory)

    def teardown(self) -> None:
        """Free the engine's hooks, buffers and groups."""
        self._engine.destroy()
        if self._swap_folder:
            disk.remove_folder(self._swap_folder)
        self._part.close()
        self._snapshots = None
        del self._engine, self._part

    @classmethod
    def inspect(cls, plan: Plan, model: ModelSpec, training: TrainingSpec, *, rank: int) -> Inspection:
        """Set up and step as one rank of a world that is not there."""
        from strategies.fake_world import empty_batches, fake_world

        if plan.ep > 1:
            raise ValueError(
                f"plan.ep={plan.ep} cannot be verified: how many tokens reach each expert's rank depends on values"
            )
        # A longer step holds no more micro-batches than these.
        plan = replace(plan, num_microbatches=min(plan.num_microbatches, max(2, plan.pp)))
        _import_deepspeed()
        from strategies.deepspeed import inspect as inspection
        from strategies.deepspeed import network

        strategy = cls()
        with (
            fake_world(rank=rank, world_size=plan.world_size) as ledger,
            inspection.stand_ins(plan, training),
        ):
            config = {**strategy._enter(plan, model, training), "pipeline": inspection.WHOLE_MESSAGES}
            strategy._part = network.build(inspection.source_of(model, plan, config), model, plan, training)
            strategy._initialize(training, config)
            batches = empty_batches(plan, training)
            found = inspection.inspect(
                ledger, strategy._engine, lambda: strategy.train_step(batches, learning_rate=0.0)
            )
            strategy.teardown()
        return found

    def _holdings(self) -> Holdings:
        import torch.distributed as dist

        from strategies.deepspeed.placements import placements_of

        tp_rank = self._plan.coordinate("tp", dist.get_rank())
        return holdings_of(self._engine, placements_of(self._engine, tp_rank=tp_rank))


def _import_deepspeed() -> Any:
    hf.be_quiet()
    try:
        import deepspeed
    except ImportError as error:
        raise ImportError(
            "strategy=deepspeed needs DeepSpeed, which is not installed; pip install 'meshwright[deepspeed]'"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # On CPUs DeepSpeed would compile an all-reduce of its own at the first start: minutes, a compiler, and a
    # lock that a killed job leaves behind. gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", message=".*is deprecated", module="torch.distributed")
    return deepspeed


def _open_swap_folder(plan: Plan, model: ModelSpec) -> Path | None:
    """Make this process' folder for what is offloaded to a disk, and see to it that somebody can write there."""
    if plan.nvme_path is None:
        return None
    from strategies.deepspeed import swapping

    swapping.enable()
    return disk.open_folder(plan.nvme_path, num_bytes=_ranks_of_host() * swapped_bytes(plan, model))


def _ranks_of_host() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _create_optimizer(network: torch.nn.Module, plan: Plan, training: TrainingSpec) -> torch.optim.Optimizer:
    groups = hf.parameter_groups(network, training)
    if plan.ep > 1:
        from strategies.deepspeed import experts

        groups = experts.split_groups(groups)
    if plan.offload_optimizer and _has_cpu_adam():
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        betas = (training.adam_beta1, training.adam_beta2)
        optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(
            groups, lr=training.learning_rate, betas=betas, eps=training.adam_eps, adamw_mode=True
        )
        return optimizer
    return hf.create_optimizer(groups, training)


def _has_cpu_adam() -> bool:
    """Only a build that was compiled at installation counts: compiling at the first step stalls every rank."""
    from deepspeed.git_version_info import installed_ops

    return bool(installed_ops.get("cpu_adam"))
