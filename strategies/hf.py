"""What the Hugging Face based adapters share: weights, model, loss, parameter groups.

torch and transformers are imported inside the functions, so that the adapters can be read without them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.hf_config import from_hf_config, to_hf_config
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from strategies.base import MicroBatch

# Written last: a folder without it holds weights that a crash cut short.
COMPLETE = "weights.complete"

_SHAPE = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_attention_heads",
    "kv_heads",
    "head_size",
    "ffn_hidden_size",
    "tied_embeddings",
    "norm_eps",
    "rope_theta",
    "rope_scaling",
    "sliding_window",
    "moe",
    "num_parameters",
)


def create_weights(model: ModelSpec, training: TrainingSpec, directory: Path) -> None:
    """Write config.json (unless one is there) and seeded fp32 weights; does nothing when they are complete."""
    if (directory / COMPLETE).exists():
        return
    be_quiet()
    import torch
    from transformers import AutoModelForCausalLM

    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "config.json").exists():
        text = json.dumps(to_hf_config(model), indent=2)
        (directory / "config.json").write_text(text, encoding="utf-8")
    config = _read_config(directory, model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        network = AutoModelForCausalLM.from_config(config, **_in_fp32())
    network.save_pretrained(directory)
    (directory / COMPLETE).touch()


def build_model(weights: Path, model: ModelSpec) -> PreTrainedModel:
    """Load the folder `weights` in fp32 for training, or say in one sentence why it does not fit `model`."""
    be_quiet()
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    config = _read_config(weights, model)
    try:
        network, report = AutoModelForCausalLM.from_pretrained(
            weights, config=config, local_files_only=True, output_loading_info=True, **_in_fp32()
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"weights={weights} cannot be read ({_first_line(error)}); check the folder"
        ) from error
    if report["missing_keys"]:
        first = sorted(report["missing_keys"])[0]
        raise ValueError(
            f"weights={weights} lacks {len(report['missing_keys'])} tensors, '{first}' among them"
        )
    return _for_training(network)


def build_empty_model(weights: Path, model: ModelSpec) -> PreTrainedModel:
    """Build the model without its weights: memory is reserved and not touched, buffers are real."""
    network = _build_on_meta(weights, model)
    _reserve(network)
    network.tie_weights()
    return _for_training(network)


def build_part(weights: Path, model: ModelSpec, keep: Callable[[PreTrainedModel], None]) -> PreTrainedModel:
    """Load what `keep` leaves of the model: nothing else is ever read, or held."""
    network = _build_on_meta(weights, model)
    keep(network)
    _reserve(network)
    _fill(network, weights)
    return _for_training(network)


def _build_on_meta(weights: Path, model: ModelSpec) -> PreTrainedModel:
    be_quiet()
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(_read_config(weights, model), **_in_fp32())


def _reserve(network: PreTrainedModel) -> None:
    import torch

    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(torch.empty_like(parameter, device="cpu")))


def build_unfilled_model(model: ModelSpec) -> PreTrainedModel:
    """Build the model from its shape alone, for tensors that have no memory."""
    be_quiet()
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**to_hf_config(model))
    return _for_training(AutoModelForCausalLM.from_config(config, **_in_fp32()))


def _fill(network: PreTrainedModel, weights: Path) -> None:
    """Read the tensors that `network` has, by name, each from the file that holds it."""
    from safetensors import safe_open

    files = _file_by_tensor(weights)
    for name, parameter in network.named_parameters():
        # A head that is tied is not stored.
        source = name if name in files else network._tied_weights_keys.get(name, name)
        if source not in files:
            raise ValueError(
                f"weights={weights} lacks the tensor '{source}'; use the model these weights belong to"
            )
        with safe_open(weights / files[source], framework="pt") as file:
            parameter.data.copy_(file.get_tensor(source))


def _file_by_tensor(weights: Path) -> dict[str, str]:
    from safetensors import safe_open

    index, single = weights / "model.safetensors.index.json", weights / "model.safetensors"
    if index.is_file():
        files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return files
    if not single.is_file():
        raise ValueError(
            f"weights={weights} holds no safetensors, of which a part could be read; convert it first"
        )
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single.name)


def renaming(weights: Path, model: ModelSpec) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Return what turns tensors as transformers' modules name and stack them into those of its files."""
    from transformers.core_model_loading import revert_weight_conversion

    network = _build_on_meta(weights, model)

    def as_saved(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        renamed: dict[str, torch.Tensor] = revert_weight_conversion(network, tensors)
        return renamed

    return as_saved


def be_quiet() -> None:
    """Keep progress bars and advice of the libraries off the console; faults are exceptions. Call before they load."""
    import torch

    if not torch.cuda.is_available():
        # An installed DeepSpeed would report its search for GPUs.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def enable_recompute(network: PreTrainedModel, plan: Plan) -> None:
    """Recompute every layer in the backward pass where the plan says so."""
    if plan.recompute != "full":
        return
    options = {"use_reentrant": False}
    if hasattr(network, "activation_checkpointing_enable"):  # the newer name of the same switch
        network.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def to_tensors(batch: MicroBatch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Split (sequences, length + 1) token ids into inputs and labels, both (sequences, length), on `device`."""
    import torch

    tokens = torch.from_numpy(batch).to(device=device, dtype=torch.long)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over all tokens, in fp32, nats."""
    from torch.nn import functional

    return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def model_loss(
    network: torch.nn.Module,
    batch: MicroBatch,
    device: torch.device,
    *,
    criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = loss,
) -> torch.Tensor:
    """Run the model: the language-model loss alone, which is what is reported."""
    inputs, labels = to_tensors(batch, device)
    return criterion(network(input_ids=inputs, use_cache=False).logits, labels)


def training_losses(
    network: torch.nn.Module,
    batch: MicroBatch,
    device: torch.device,
    *,
    balance: float,
    criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = loss,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the model: the loss to differentiate, and the language-model loss alone, which is what is reported.

    They differ by `balance` times the load-balancing loss over the experts (Fedus et al. 2021, equations 4 to 6, as
    transformers computes it), where the model has one.
    """
    if not balance:
        value = model_loss(network, batch, device, criterion=criterion)
        return value, value.detach()
    inputs, labels = to_tensors(batch, device)
    output = network(input_ids=inputs, use_cache=False, output_router_logits=True)
    value = criterion(output.logits, labels)
    return value + balance * output.aux_loss, value.detach()


def balance_coefficient(network: PreTrainedModel) -> float:
    """Return the weight of the load-balancing loss; 0 for a family without one."""
    return float(getattr(network.config, "router_aux_loss_coef", None) or 0.0)


def parameter_groups(network: torch.nn.Module, training: TrainingSpec) -> list[dict[str, Any]]:
    """Split parameters for AdamW: matrices decay, norms and biases do not."""
    matrices: list[torch.Tensor] = []
    vectors: list[torch.Tensor] = []
    for parameter in network.parameters():
        # DeepSpeed's ZeRO-3 leaves an empty vector behind and keeps the real shape here.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        (matrices if len(shape) >= 2 else vectors).append(parameter)
    groups = [(matrices, training.weight_decay), (vectors, 0.0)]
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def create_optimizer(groups: list[dict[str, Any]], training: TrainingSpec) -> torch.optim.AdamW:
    """Create torch's AdamW in its fused form: one pass over memory, on CUDA and on the CPU."""
    from torch.optim import AdamW

    betas = (training.adam_beta1, training.adam_beta2)
    return AdamW(groups, lr=training.learning_rate, betas=betas, eps=training.adam_eps, fused=True)


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """Set it in every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def check_weights(weights: Path, model: ModelSpec) -> None:
    """Raise ValueError unless the folder `weights` says that it holds `model`."""
    file = weights / "config.json"
    if not file.is_file():
        raise ValueError(f"weights={weights} has no config.json; give a folder of Hugging Face weights")
    found = from_hf_config(json.loads(file.read_text(encoding="utf-8")), name=model.name)
    for key in _SHAPE:
        ours, theirs = getattr(model, key), getattr(found, key)
        if ours != theirs:
            raise ValueError(
                f"model.{key}={ours} does not match {theirs} in {file}; use the model these weights belong to"
            )


def _read_config(weights: Path, model: ModelSpec) -> Any:
    from transformers import AutoConfig

    check_weights(weights, model)
    config = AutoConfig.from_pretrained(weights, local_files_only=True)
    config.use_cache = False
    for key in ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"):
        if hasattr(config, key):
            setattr(config, key, 0.0)  # as in to_hf_config: not every engine draws the same random numbers
    if _is_before_5():
        # Rotary settings had other names then, and a file of transformers 5 would leave their defaults.
        config.rope_theta = model.rope_theta
        config.rope_scaling = dict(model.rope_scaling) or None
    return config


def _in_fp32() -> dict[str, Any]:
    """Return the argument that asks for fp32 weights; transformers before 5 calls it otherwise."""
    import torch

    return {"torch_dtype" if _is_before_5() else "dtype": torch.float32}


def _is_before_5() -> bool:
    """Tell whether transformers is older than this project's own: ColossalAI 0.5.0 needs 4.51."""
    return int(version("transformers").split(".")[0]) < 5


def _for_training(network: PreTrainedModel) -> PreTrainedModel:
    network.train()
    return network


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
