"""ColossalAIStrategy: one plan on one of the Booster's plugins. `settings.py` says which, `checkpoints.py` saves it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies import hf, histograms, process
from strategies.base import StepResult, Strategy
from strategies.colossalai import checkpoints
from strategies.colossalai.capabilities import CAPABILITIES
from strategies.colossalai.checkpoints import Place
from strategies.colossalai.settings import Device, PluginSettings, plugin_of, to_plugin_settings
from strategies.engine_options import check
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

if TYPE_CHECKING:
    import torch

    from strategies.base import MicroBatch
    from strategies.bins import Histograms

# Shardformer replaces forward methods of this release by its own; later ones call and return other things.
TRANSFORMERS = "4.51.3"


class ColossalAIStrategy(Strategy):
    """One process a GPU; tensor, pipeline and data parallel ranks, or data parallel ranks with sharded state."""

    capabilities = CAPABILITIES

    create_weights = staticmethod(hf.create_weights)

    def setup(self, plan: Plan, model: ModelSpec, training: TrainingSpec, weights: Path) -> None:
        """Hand model and optimizer to a Booster with the plan's plugin."""
        if refusal := self.capabilities.why_not(plan, model):
            raise ValueError(refusal)
        check(plan.engine, self.capabilities)
        _check_rounds(plan)
        self._plan = plan
        _import_colossalai(plan)
        process.set_deterministic(training)
        self._device = process.local_device()
        process.join_single_rank_group()
        device: Device = "cuda" if self._device.type == "cuda" else "cpu"
        self._build(to_plugin_settings(plan, model, training, device=device), model, training, weights)

    def train_step(self, batches: Sequence[MicroBatch], *, learning_rate: float) -> StepResult:
        """Accumulate over the micro-batches; the engine's optimizer clips by the global norm and steps."""
        assert len(batches) == self._plan.num_microbatches, (
            "the trainer must pass plan.num_microbatches batches"
        )
        hf.set_learning_rate(self._optimizer.optim, learning_rate)
        losses = self._run_pipeline(batches) if self._plan.pp > 1 else self._accumulate(batches)
        self._optimizer.step()
        norm = float(self._optimizer.get_grad_norm())
        self._optimizer.zero_grad(set_to_none=not self._keeps_gradients)
        return StepResult(loss=self._mean(losses), grad_norm=norm, rank_loss=process.own_mean(losses))

    def taking_histograms(self) -> AbstractContextManager[Histograms]:
        """Count all of this rank in one: what the Booster's optimizers move has no names of its own."""
        if self._plan.zero_stage == 0 and self._place.dp > 0:
            return nullcontext({})
        return histograms.taking([self._optimizer.optim], lambda moved: {"all": (0, moved.numel())})

    def evaluate(self, batches: Sequence[MicroBatch]) -> float:
        """Mean loss without gradients."""
        import torch

        self._model.eval()
        with torch.no_grad():
            losses = (
                self._evaluate_pipeline(batches) if self._plan.pp > 1 else [self._loss_of(b) for b in batches]
            )
        self._model.train()
        return self._mean(losses)

    def save(self, directory: Path) -> None:
        """Write this rank's weights and optimizer state, as they lie in memory."""
        checkpoints.save(directory, self._model, self._optimizer, self._place)

    def load(self, directory: Path) -> None:
        """Restore them; the plan must be the one that wrote them."""
        checkpoints.load(directory, self._model, self._optimizer, self._place)

    def export(self, directory: Path) -> None:
        """Have the Booster gather the weights and write them in transformers' layout."""
        checkpoints.export(self._booster, self._model, directory)

    def teardown(self) -> None:
        """Forget model, optimizer and plugin; the plugin takes its process groups with it."""
        del self._model, self._optimizer, self._booster, self._plugin

    # ---- building ------------------------------------------------------------------------------------------------

    def _build(
        self, settings: PluginSettings, model: ModelSpec, training: TrainingSpec, weights: Path
    ) -> None:
        from colossalai.booster import Booster

        self._plugin = _plugin_class(settings)(**settings.arguments)
        self._booster = Booster(plugin=self._plugin)
        self._place = _find_place(self._plugin, self._plan)
        self.dp_rank = self._place.dp
        process.seed_everything(training, rank=self.dp_rank)
        network = hf.build_model(weights, model)
        hf.enable_recompute(network, self._plan)
        optimizer = _create_optimizer(network, self._plan, training)
        self._model, self._optimizer, *_ = self._booster.boost(network, optimizer)
        self._model.train()
        if settings.plugin == "GeminiPlugin":
            _order_chunks(self._optimizer)

    @property
    def _keeps_gradients(self) -> bool:
        """DDP's gradients are views into its buckets; dropping them would make accumulation pay for both.

        Upstream's 16-bit optimizer drops them all the same; what it would keep are the fp32 gradients of one step.
        """
        return self._plan.zero_stage == 0 and self._plan.pp == 1 and self._plan.precision == "fp32"

    # ---- one step ------------------------------------------------------------------------------------------------

    def _accumulate(self, batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        losses = []
        for index, batch in enumerate(batches):
            with self._communication(last=index == len(batches) - 1):
                loss = self._loss_of(batch)
                self._booster.backward(loss / len(batches), self._optimizer)
            losses.append(loss.detach())
        return losses

    def _communication(self, *, last: bool) -> AbstractContextManager[Any]:
        # Stages 2 and 3 keep no whole gradients that could wait.
        if last or self._plan.zero_stage >= 2:
            return nullcontext()
        context: AbstractContextManager[Any] = self._booster.no_sync(self._model, self._optimizer)
        return context

    def _loss_of(self, batch: MicroBatch) -> torch.Tensor:
        inputs, labels = hf.to_tensors(batch, self._device)
        return self._criterion(self._model(input_ids=inputs, use_cache=False), labels)

    def _criterion(self, output: Any, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy over all tokens; tensor parallel ranks hold a part of the vocabulary each."""
        logits: torch.Tensor = output["logits"]
        if self._plan.tp == 1:
            return hf.loss(logits, labels)
        import torch
        from colossalai.shardformer.layer import cross_entropy_1d

        total: torch.Tensor = cross_entropy_1d(
            logits.float().flatten(0, 1),
            labels.flatten(),
            process_group=self._plugin.tp_group,
            vocab_size=self._model.unwrap().lm_head.out_features,
            dtype=torch.float32,
            mode="sum",
        )
        return total / labels.numel()

    def _run_pipeline(self, batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        """Run the schedule over equally many micro-batches every time, and collect losses on the last stage."""
        import torch

        pairs = [hf.to_tensors(batch, self._device) for batch in batches]
        labels = iter([wanted for _, wanted in pairs])
        losses: list[torch.Tensor] = []

        def criterion(output: Any, _: Any) -> torch.Tensor:
            # The labels stay out of the schedule: given them, the model would compute a loss of its own.
            loss = self._criterion(output, next(labels))
            losses.append(loss.detach())
            return loss

        data = iter([{"input_ids": torch.cat([inputs for inputs, _ in pairs])}])
        training = torch.is_grad_enabled()
        # After a forward pass alone there is no gradient that ranks with the same weights could add up.
        with nullcontext() if training else self._model.no_sync():
            optimizer = self._optimizer if training else None
            self._booster.execute_pipeline(data, self._model, criterion, optimizer, return_loss=False)
        return losses

    def _evaluate_pipeline(self, batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        """The schedule takes full rounds only: the last one is filled up, and what filled it is not counted."""
        size, losses = self._plan.num_microbatches, []
        for start in range(0, len(batches), size):
            part = list(batches[start : start + size])
            filled = part + [part[-1]] * (size - len(part))
            losses += self._run_pipeline(filled)[: len(part)]
        return losses

    def _mean(self, losses: Sequence[torch.Tensor]) -> float:
        """Average over this rank's losses and the data parallel ranks; only the last pipeline stage has any."""
        import torch
        import torch.distributed as dist

        own = torch.stack(list(losses)).mean() if losses else torch.zeros((), device=self._device)
        total = own.detach().float().clone()
        dist.all_reduce(total)
        return float(total.item()) * self._plan.pp / int(dist.get_world_size())


def _check_rounds(plan: Plan) -> None:
    """The schedules assert these counts, which Capabilities' rules do not see."""
    if plan.pp > 1 and plan.num_microbatches < plan.pp:
        raise ValueError(
            f"plan.num_microbatches={plan.num_microbatches} must be at least plan.pp={plan.pp} with "
            f"{plan.strategy}; use more micro-batches or fewer stages"
        )
    if plan.vp > 1 and plan.num_microbatches % plan.pp:
        raise ValueError(
            f"plan.num_microbatches={plan.num_microbatches} must be a multiple of plan.pp={plan.pp} with "
            f"plan.vp={plan.vp}; use another count, or plan.vp=1"
        )


def _import_colossalai(plan: Plan) -> None:
    hf.be_quiet()
    _check_releases()
    import torch

    from strategies.colossalai import cpu

    if not torch.cuda.is_available() and (refusal := cpu.why_not(plan)):
        raise ValueError(refusal)
    # Of bitsandbytes, which an optimizer imports that is never used: what it could not load.
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import colossalai.booster  # noqa: F401
        from colossalai.logging import get_dist_logger
    get_dist_logger().set_level("ERROR")
    warnings.filterwarnings("ignore", module="colossalai")
    warnings.filterwarnings("ignore", message=".*is deprecated", module="torch.distributed")
    cpu.enable()


def _check_releases() -> None:
    try:
        found = version("colossalai")
    except PackageNotFoundError as error:
        raise ImportError(
            "strategy=colossalai needs ColossalAI, which is not installed here; it wants an environment of its own"
        ) from error
    if version("transformers") != TRANSFORMERS:
        raise ImportError(
            f"ColossalAI {found} replaces parts of transformers {TRANSFORMERS}, and {version('transformers')} is "
            "installed; give it the pinned environment of its own"
        )


def _plugin_class(settings: PluginSettings) -> Any:
    if settings.plugin == "TorchFSDPPlugin":
        from strategies.colossalai.fsdp import GroupedFSDPPlugin

        return GroupedFSDPPlugin
    from colossalai.booster import plugin

    return getattr(plugin, settings.plugin)


def _find_place(plugin: Any, plan: Plan) -> Place:
    """Ask the plugin's mesh; without one, as with ZeRO 1 and 2 and FSDP, every rank of the world is data parallel."""
    import torch.distributed as dist

    mesh = getattr(plugin, "pg_mesh", None)
    tp, pp, dp = 0, 0, dist.get_rank()
    if plan.zero_stage < 3 and mesh is not None:
        tp, pp, dp = (int(mesh.coordinate(axis)) for axis in (plugin.tp_axis, plugin.pp_axis, plugin.dp_axis))
    elif mesh is not None:
        dp = int(mesh.coordinate(0))
    return Place(tp=tp, pp=pp, dp=dp, sharded=plan.zero_stage > 0, whole_weights=plan.zero_stage < 3)


def _create_optimizer(network: torch.nn.Module, plan: Plan, training: TrainingSpec) -> torch.optim.Optimizer:
    groups = hf.parameter_groups(network, training)
    if plugin_of(plan) != "GeminiPlugin":
        return hf.create_optimizer(groups, training)
    from colossalai.nn.optimizer import HybridAdam  # the one that moves chunks wherever they lie

    betas = (training.adam_beta1, training.adam_beta2)
    optimizer: torch.optim.Optimizer = HybridAdam(
        groups, lr=training.learning_rate, betas=betas, eps=training.adam_eps, adamw_mode=True
    )
    return optimizer


def _order_chunks(optimizer: Any) -> None:
    """Let the norm be summed in one order: a set of chunks is walked by their addresses, which every start changes."""
    optimizer.chunk16_set = dict.fromkeys(sorted(optimizer.chunk16_set, key=lambda chunk: chunk.count_id))
