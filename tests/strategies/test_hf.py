"""What the Hugging Face adapters share, on one process."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from strategies import hf
from strategies.hf_config import to_hf_config
from strategies.model_spec import ModelSpec, MoeSpec
from strategies.spec import Plan, TrainingSpec

MODEL = ModelSpec(
    name="tiny",
    model_type="llama",
    num_layers=2,
    hidden_size=16,
    num_attention_heads=2,
    ffn_hidden_size=32,
    vocab_size=32,
    max_position_embeddings=32,
)
TRAINING = TrainingSpec(sequence_length=8, global_batch_size=2, num_steps=2, seed=5)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    hf.create_weights(MODEL, TRAINING, folder)
    return folder


def test_weights_have_as_many_parameters_as_the_model_says(weights: Path) -> None:
    network = hf.build_model(weights, MODEL)
    assert sum(p.numel() for p in network.parameters()) == MODEL.num_parameters
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert network.training


def test_the_seed_decides_the_weights(weights: Path, tmp_path: Path) -> None:
    for seed, same in ((5, True), (6, False)):
        other = tmp_path / str(seed)
        hf.create_weights(MODEL, replace(TRAINING, seed=seed), other)
        equal = (other / "model.safetensors").read_bytes() == (weights / "model.safetensors").read_bytes()
        assert equal is same


def test_creating_leaves_the_callers_random_numbers_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    hf.create_weights(MODEL, TRAINING, tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_complete_weights_are_not_written_again(weights: Path) -> None:
    before = (weights / "model.safetensors").stat().st_mtime_ns
    hf.create_weights(MODEL, TRAINING, weights)
    assert (weights / "model.safetensors").stat().st_mtime_ns == before


def test_weights_cut_short_are_written_again(tmp_path: Path) -> None:
    hf.create_weights(MODEL, TRAINING, tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:100])
    (tmp_path / hf.COMPLETE).unlink()
    hf.create_weights(MODEL, TRAINING, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == whole


def test_a_config_json_that_is_there_is_used(tmp_path: Path) -> None:
    config = {**to_hf_config(MODEL), "initializer_range": 1e-9}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    hf.create_weights(MODEL, TRAINING, tmp_path)
    assert float(hf.build_model(tmp_path, MODEL).lm_head.weight.detach().abs().max()) < 1e-7


def test_weights_of_another_shape_are_refused_in_one_sentence(weights: Path) -> None:
    with pytest.raises(ValueError) as caught:
        hf.build_model(weights, replace(MODEL, vocab_size=64))
    assert str(caught.value) == (
        f"model.vocab_size=64 does not match 32 in {weights}/config.json; use the model these weights belong to"
    )


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config.json; give a folder of Hugging Face weights"):
        hf.build_model(tmp_path, MODEL)
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(MODEL)), encoding="utf-8")
    with pytest.raises(ValueError, match=r"cannot be read \(.*\); check the folder"):
        hf.build_model(tmp_path, MODEL)


def test_a_truncated_file_is_refused(weights: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((weights / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes((weights / "model.safetensors").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cannot be read \(.*\); check the folder"):
        hf.build_model(tmp_path, MODEL)


def test_a_missing_tensor_is_named(weights: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((weights / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"lacks 1 tensors, 'model\.norm\.weight' among them"):
        hf.build_model(tmp_path, MODEL)


@pytest.mark.parametrize("tied", [False, True])
def test_the_empty_model_has_the_same_parameters_and_real_buffers(tied: bool, tmp_path: Path) -> None:
    model = replace(MODEL, tied_embeddings=tied)
    hf.create_weights(model, TRAINING, tmp_path)
    full, empty = hf.build_model(tmp_path, model), hf.build_empty_model(tmp_path, model)
    assert {n: p.shape for n, p in empty.named_parameters()} == {
        n: p.shape for n, p in full.named_parameters()
    }
    assert {p.device.type for p in empty.parameters()} == {"cpu"}
    buffers = dict(empty.named_buffers())
    assert buffers
    for name, buffer in full.named_buffers():
        assert torch.equal(buffers[name], buffer)


def test_loss_is_the_mean_over_all_tokens() -> None:
    inputs, labels = hf.to_tensors(np.array([[1, 2, 3], [4, 5, 6]]), torch.device("cpu"))
    assert inputs.tolist() == [[1, 2], [4, 5]]
    assert labels.tolist() == [[2, 3], [5, 6]]
    logits = torch.zeros(2, 2, 10, dtype=torch.bfloat16)
    value = hf.loss(logits, labels)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(np.log(10))


def test_only_matrices_decay(weights: Path) -> None:
    network = hf.build_model(weights, MODEL)
    decayed, plain = hf.parameter_groups(network, TRAINING)
    assert decayed["weight_decay"] == TRAINING.weight_decay
    assert plain["weight_decay"] == 0.0
    assert all(p.ndim == 2 for p in decayed["params"])
    assert len(plain["params"]) == 2 * MODEL.num_layers + 1
    assert len(decayed["params"]) + len(plain["params"]) == len(list(network.parameters()))


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_recompute_is_switched_on_and_changes_no_gradient(weights: Path, recompute: str) -> None:
    network, plain = hf.build_model(weights, MODEL), hf.build_model(weights, MODEL)
    hf.enable_recompute(network, Plan(strategy="x", dp=1, recompute=recompute))  # type: ignore[arg-type]
    switched_on = any(getattr(module, "gradient_checkpointing", False) for module in network.modules())
    assert switched_on is (recompute == "full")
    inputs, labels = hf.to_tensors(np.arange(9).reshape(1, 9), torch.device("cpu"))
    for model in (network, plain):
        hf.loss(model(input_ids=inputs).logits, labels).backward()
    for ours, theirs in zip(network.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_the_optimizer_is_fused_everywhere(weights: Path) -> None:
    groups = hf.parameter_groups(hf.build_model(weights, MODEL), TRAINING)
    assert hf.create_optimizer(groups, TRAINING).defaults["fused"] is True


MIXTURE = replace(
    MODEL,
    model_type="mixtral",
    head_dim=8,
    moe=MoeSpec(num_experts=4, top_k=2, expert_ffn_hidden_size=32),
)


def test_routers_learn_to_balance_and_the_loss_reported_does_not_show_it(tmp_path: Path) -> None:
    hf.create_weights(MIXTURE, TRAINING, tmp_path)
    network = hf.build_model(tmp_path, MIXTURE)
    batch, cpu = np.arange(18).reshape(2, 9), torch.device("cpu")
    routers = [p for name, p in network.named_parameters() if p.shape == (4, 16) and "gate" in name]
    assert len(routers) == MIXTURE.num_layers
    plain, alone = hf.training_losses(network, batch, cpu, balance=0.0)
    balanced, reported = hf.training_losses(network, batch, cpu, balance=1.0)
    assert reported == alone == plain == hf.model_loss(network, batch, cpu)
    assert not reported.requires_grad
    assert float(balanced.detach() - reported) >= 1.9  # about top_k where the experts are equally loaded
    without, added = torch.autograd.grad(plain, routers), torch.autograd.grad(balanced, routers)
    for one, other in zip(without, added, strict=True):
        assert float((other - one).abs().max()) > 1e-6
    hf.enable_recompute(network, Plan(strategy="x", dp=1, recompute="full"))
    recomputed, _ = hf.training_losses(network, batch, cpu, balance=1.0)
    torch.testing.assert_close(torch.autograd.grad(recomputed, routers), added)


def test_only_a_family_with_a_balance_loss_has_a_coefficient(weights: Path, tmp_path: Path) -> None:
    assert hf.balance_coefficient(hf.build_model(weights, MODEL)) == 0.0
    assert MIXTURE.moe is not None
    mixture = replace(MIXTURE, moe=replace(MIXTURE.moe, router_aux_loss_coef=0.25))
    hf.create_weights(mixture, TRAINING, tmp_path)
    network = hf.build_model(tmp_path, mixture)
    assert hf.balance_coefficient(network) == 0.25


def test_an_older_transformers_is_asked_in_its_own_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """ColossalAI needs transformers 4, which takes its own default where a file of transformers 5 says otherwise."""
    model = replace(MODEL, rope_theta=500.0)
    hf.create_weights(model, TRAINING, tmp_path)
    monkeypatch.setattr(hf, "version", {"transformers": "4.51.3"}.__getitem__)
    assert hf._in_fp32() == {"torch_dtype": torch.float32}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers 5, which is what reads here, about the older words
        assert hf._read_config(tmp_path, model).rope_theta == 500.0


def keep_head(network: PreTrainedModel) -> None:
    network.base_model.layers._modules = {"1": network.base_model.layers[1]}
    network.set_input_embeddings(None)


def test_a_part_is_read_and_nothing_else(weights: Path) -> None:
    whole = dict(hf.build_model(weights, MODEL).named_parameters())
    part = dict(hf.build_part(weights, MODEL, keep_head).named_parameters())
    assert set(part) == {name for name in whole if "layers.0" not in name and "embed_tokens" not in name}
    assert all(torch.equal(part[name], whole[name]) for name in part)


def test_a_part_is_read_from_several_files(weights: Path, tmp_path: Path) -> None:
    hf.build_model(weights, MODEL).save_pretrained(tmp_path, max_shard_size="8KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    part, expected = (hf.build_part(folder, MODEL, keep_head) for folder in (tmp_path, weights))
    for (name, found), (_, wanted) in zip(part.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(found, wanted), name


def test_a_part_needs_tensors_that_can_be_read_alone(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((weights / "config.json").read_bytes())
    with pytest.raises(
        ValueError, match=r"holds no safetensors, of which a part could be read; convert it first"
    ):
        hf.build_part(tmp_path, MODEL, keep_head)
    save_file({"lm_head.weight": torch.zeros(32, 16)}, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"lacks the tensor 'model\.layers\.1\..*'; use the model these weights"
    ):
        hf.build_part(tmp_path, MODEL, keep_head)


def test_stacked_experts_are_saved_one_by_one(tmp_path: Path) -> None:
    moe = MoeSpec(num_experts=2, top_k=1, expert_ffn_hidden_size=MODEL.ffn_hidden_size)
    mixture = replace(MODEL, model_type="mixtral", moe=moe)
    hf.create_weights(mixture, TRAINING, tmp_path)
    as_saved = hf.renaming(tmp_path, mixture)
    rows, width = 2 * MODEL.ffn_hidden_size, MODEL.hidden_size
    found = as_saved({"model.layers.0.mlp.experts.gate_up_proj": torch.zeros(2, rows, width, device="meta")})
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        f"model.layers.0.block_sparse_moe.experts.{expert}.{part}.weight": (rows // 2, width)
        for expert in (0, 1)
        for part in ("w1", "w3")
    }
    plain = {"model.norm.weight": torch.zeros(width)}
    assert as_saved(plain).keys() == plain.keys()
