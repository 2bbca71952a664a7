"""Weights of every family go into Megatron-core's networks and out again bit by bit, and mean the same there.

Two ranks build every family in every layout that fits two ranks; transformers' logits and the source files decide.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from strategies import hf
from strategies.model_spec import MlaSpec, ModelSpec, MoeSpec
from strategies.spec import TrainingSpec

TRAINING: dict[str, Any] = {
    "sequence_length": 16,
    "global_batch_size": 2,
    "num_steps": 1,
    "precision": "fp32",
}
SHAPE: dict[str, Any] = {
    "name": "tiny",
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "ffn_hidden_size": 48,
    "vocab_size": 77,  # of no multiple: the last rank's rows are padding
    "max_position_embeddings": 32,
}
BIASES = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-biases": {**BIASES, "model_type": "llama", "tied_embeddings": True},
    "llama3": {
        "model_type": "llama",
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", "attention_bias": True, "tied_embeddings": True},
    "qwen3": {"model_type": "qwen3", "qk_norm": True, "head_dim": 16},
    "gpt2": {
        **BIASES,
        "model_type": "gpt2",
        "num_kv_heads": None,
        "gated_mlp": False,
        "tied_embeddings": True,
        "learned_positions": True,
        "norm": "layernorm",
    },
    "mixtral": {"model_type": "mixtral", "moe": MoeSpec(num_experts=4, top_k=2, expert_ffn_hidden_size=48)},
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        "qk_norm": True,
        "head_dim": 16,
        "moe": MoeSpec(num_experts=4, top_k=2, expert_ffn_hidden_size=24, num_dense_layers=1),
    },
    "qwen3-moe-unnormalized": {
        "model_type": "qwen3_moe",
        "qk_norm": True,
        "moe": MoeSpec(num_experts=4, top_k=2, expert_ffn_hidden_size=24, normalize_top_k=False),
    },
    "deepseek": {
        "model_type": "deepseek_v3",
        "num_kv_heads": 4,
        "norm_eps": 1e-6,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "moe": MoeSpec(
            num_experts=8,
            top_k=4,
            expert_ffn_hidden_size=24,
            shared_ffn_hidden_size=24,
            num_dense_layers=1,
            num_groups=4,
            num_active_groups=2,
            routed_scaling_factor=2.5,
        ),
        "mla": MlaSpec(
            q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12
        ),
    },
}
SPARSE = [name for name, shape in MODELS.items() if "moe" in shape]
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"dp": 2},
    "tp2": {"dp": 1, "tp": 2, "etp": 2, "sequence_parallel": True},
    "pp2": {"dp": 1, "pp": 2},
    "pp2-vp2": {"dp": 1, "pp": 2, "vp": 2},
    "pp2-uneven": {"dp": 1, "pp": 2, "pipeline_split": (1, 3)},
    "ep2": {"dp": 2, "ep": 2},
    "tp2-ep2": {"dp": 1, "tp": 2, "ep": 2, "sequence_parallel": True},
}
# By layout: cases of one share their process groups.
CASES = [(name, layout) for layout in LAYOUTS for name in MODELS if "ep2" not in layout or name in SPARSE]
WHOLE = [(name, layout) for name, layout in CASES if "pp" not in layout]  # one chunk computes the logits


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, start_ranks: Callable[..., None]) -> Bench:
    return Bench(tmp_path_factory.mktemp("megatron-weights"), start_ranks)


class Bench:
    """Weights of all families and one start of two ranks, which run every case."""

    def __init__(self, folder: Path, start_ranks: Callable[..., None]) -> None:
        self.folder, self._torchrun = folder, start_ranks
        self.results = cache(self._start)
        self.tokens = np.random.default_rng(0).integers(
            0, SHAPE["vocab_size"], (2, TRAINING["sequence_length"])
        )

    def weights(self, name: str) -> Path:
        return self.folder / "weights" / name

    def export(self, name: str) -> Path:
        return self.folder / "exports" / name

    def logits(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    def _start(self) -> dict[str, Any]:
        for name in MODELS:
            create_weights(self.weights(name), name)
        alter_copies(self.weights("llama"), self.weights("mixtral"))
        np.save(self.folder / "tokens.npy", self.tokens)
        job, results = self.folder / "job.json", self.folder / "results.json"
        shared = {"training": TRAINING, "tokens": str(self.folder / "tokens.npy")}
        job.write_text(json.dumps({**shared, "cases": self._cases()}), encoding="utf-8")
        worker = str(Path(__file__).with_name("megatron_weights_worker.py"))
        self._torchrun([worker, str(job), str(results)], world_size=2, timeout_s=400)
        answer: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
        return answer

    def _cases(self) -> dict[str, Any]:
        cases = {}
        for name, layout in CASES:
            key = f"{name}-{layout}"
            logits = str(self.logits(key)) if (name, layout) in WHOLE else None
            cases[key] = {**self._case(key, name, LAYOUTS[layout]), "logits": logits}
        bf16 = {**LAYOUTS["tp2-ep2"], "precision": "bf16"}
        cases["bf16-mixtral"] = {**self._case("bf16-mixtral", "mixtral", bf16), "wrap": True}
        cases["bf16-deepseek"] = self._case("bf16-deepseek", "deepseek", bf16)
        cases["many-files"] = {
            **self._case("many-files", "qwen3-moe", LAYOUTS["ep2"]),
            "max_shard_bytes": 20000,
        }
        fused = str(self.weights("mixtral-fused"))
        cases["fused"] = {**self._case("fused", "mixtral", LAYOUTS["ep2"]), "weights": fused}
        for network, model in (("qwen2", "llama"), ("llama", "qwen3"), ("llama-wide", "llama")):
            key = f"{network}-as-{model}"
            source = str(self.weights(network))
            cases[key] = {**self._case(key, model, LAYOUTS["tp2"]), "network": source}
        occupied = str(self.weights("gpt2"))
        cases["occupied"] = {**self._case("occupied", "llama", LAYOUTS["dp2"]), "export": occupied}
        lacking = str(self.weights("llama-lacking"))
        cases["lacking"] = {**self._case("lacking", "llama", LAYOUTS["dp2"]), "weights": lacking}
        return cases

    def _case(self, key: str, name: str, layout: dict[str, Any]) -> dict[str, Any]:
        folder = str(self.weights(name))
        return {
            "plan": {"strategy": "megatron", "precision": "fp32", **layout},
            "network": folder,
            "model": folder,
            "weights": folder,
            "export": str(self.export(key)),
            "logits": None,
            "wrap": False,
            "max_shard_bytes": 10**9,
        }


def create_weights(folder: Path, name: str) -> None:
    """Random norms and biases too, so that one in another's place is seen; matrices large enough to matter."""
    import torch
    from safetensors.torch import load_file, save_file

    hf.create_weights(ModelSpec(**{**SHAPE, **MODELS[name]}), TrainingSpec(**TRAINING), folder)
    draw = torch.Generator().manual_seed(1)
    tensors = load_file(folder / "model.safetensors")
    for key, tensor in sorted(tensors.items()):
        if tensor.ndim == 1:
            tensors[key] = torch.randn(tensor.shape, generator=draw) * 0.2 + (0.0 if "bias" in key else 1.0)
        else:
            tensors[key] = torch.randn(tensor.shape, generator=draw) * 0.1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def alter_copies(llama: Path, mixtral: Path) -> None:
    """Make folders with a fault, and one that keeps all experts of a layer in one tensor."""
    import torch
    from safetensors.torch import load_file, save_file

    lacking = Path(shutil.copytree(llama, llama.with_name("llama-lacking")))
    tensors = load_file(lacking / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, lacking / "model.safetensors")
    # A rank's part of a network twice as wide is as large as the whole.
    wide = Path(shutil.copytree(llama, llama.with_name("llama-wide")))
    config = json.loads((wide / "config.json").read_text(encoding="utf-8"))
    (wide / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}), encoding="utf-8")
    fused = Path(shutil.copytree(mixtral, mixtral.with_name("mixtral-fused")))
    tensors = load_file(fused / "model.safetensors")
    whole = {key: tensor for key, tensor in tensors.items() if "block_sparse_moe" not in key}
    for layer in range(SHAPE["num_layers"]):
        theirs, ours = f"model.layers.{layer}.block_sparse_moe.", f"model.layers.{layer}.mlp."
        w1, w2, w3 = (
            torch.stack([tensors[f"{theirs}experts.{expert}.{part}.weight"] for expert in range(4)])
            for part in ("w1", "w2", "w3")
        )
        whole[ours + "gate.weight"] = tensors[theirs + "gate.weight"]
        whole[ours + "experts.gate_up_proj"] = torch.cat([w1, w3], dim=1)
        whole[ours + "experts.down_proj"] = w2
    save_file(whole, fused / "model.safetensors")


@cache
def reference_logits(folder: Path, tokens: bytes) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    ids = torch.from_numpy(np.frombuffer(tokens, dtype=np.int64).copy()).view(2, -1)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found: np.ndarray = network(ids, use_cache=False).logits.numpy()
    return found


def tensors_in(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert set(found) == set(wanted)
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype
        assert found[key].equal(tensor), key


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_weights_come_back_bit_by_bit(bench: Bench, name: str, layout: str) -> None:
    assert bench.results()[f"{name}-{layout}"] == {"error": None}
    assert_same(tensors_in(bench.export(f"{name}-{layout}")), tensors_in(bench.weights(name)))


@pytest.mark.parametrize(("name", "layout"), WHOLE)
def test_logits_are_those_of_transformers(bench: Bench, name: str, layout: str) -> None:
    assert bench.results()[f"{name}-{layout}"] == {"error": None}
    wanted = reference_logits(bench.weights(name), bench.tokens.tobytes())
    assert np.abs(wanted).max() > 0.5
    np.testing.assert_allclose(np.load(bench.logits(f"{name}-{layout}")), wanted, atol=1e-4, rtol=0)


def test_transformers_reads_an_export_of_many_files(bench: Bench) -> None:
    assert bench.results()["many-files"] == {"error": None}
    folder = bench.export("many-files")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 5
    assert all(file.stat().st_size < 20000 + 4000 for file in files)  # 4000: the header of names
    assert_same(tensors_in(folder), tensors_in(bench.weights("qwen3-moe")))
    tokens = bench.tokens.tobytes()
    wanted = reference_logits(bench.weights("qwen3-moe"), tokens)
    np.testing.assert_array_equal(reference_logits(folder, tokens), wanted)


@pytest.mark.parametrize("name", ["mixtral", "deepseek"])
def test_16_bit_networks_export_their_own_numbers(bench: Bench, name: str) -> None:
    assert bench.results()[f"bf16-{name}"] == {"error": None}
    wanted = {
        key: tensor if "correction_bias" in key else tensor.bfloat16()
        for key, tensor in tensors_in(bench.weights(name)).items()
    }
    assert_same(tensors_in(bench.export(f"bf16-{name}")), wanted)
    config = json.loads((bench.export(f"bf16-{name}") / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "bfloat16"


def test_experts_in_one_tensor_are_read(bench: Bench) -> None:
    assert bench.results()["fused"] == {"error": None}
    assert_same(tensors_in(bench.export("fused")), tensors_in(bench.weights("mixtral")))


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("qwen2-as-llama", ["model.model_type=llama", "4 tensors are filled by nothing", "linear_qkv.bias"]),
        ("llama-as-qwen3", ["model.model_type=qwen3", "8 tensors have no parameter", "k_layernorm.weight"]),
        ("llama-wide-as-llama", ["linear_fc1.weight has the shape (96, 32) on this rank", "needs (48, 32)"]),
        ("occupied", ["already holds weights; give another folder"]),
        ("lacking", ["lacks 1 tensors, 'model.layers.2.mlp.up_proj.weight' among them"]),
    ],
)
def test_folders_that_do_not_fit_are_named(bench: Bench, case: str, words: list[str]) -> None:
    error = bench.results()[case]["error"]
    assert all(word in error for word in words), error
    assert not bench.export(case).exists()
