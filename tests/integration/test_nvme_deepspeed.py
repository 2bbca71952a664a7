"""ZeRO-Infinity: states and weights on a disk, against one plain PyTorch loop; resumed there, and in memory."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.decode import decode
from strategies import hf
from strategies.model_spec import ModelSpec
from strategies.spec import TrainingSpec

ROOT = Path(__file__).parents[2]
SAVE_AFTER = 10
SCHEDULE: dict[str, Any] = {
    **{"sequence_length": 16, "global_batch_size": 8, "num_steps": 20, "learning_rate": 1e-2},
    **{"warmup_steps": 3, "max_grad_norm": 0.5, "seed": 3},
}
# DeepSpeed swaps nothing below a megabyte: here the MLP's halves have exactly that.
SHAPE: dict[str, Any] = {
    **{"name": "wide", "model_type": "llama", "num_layers": 1, "hidden_size": 128, "ffn_hidden_size": 4096},
    **{"num_attention_heads": 4, "num_kv_heads": 2, "vocab_size": 64, "max_position_embeddings": 32},
}
PLAN = {"strategy": "deepspeed", "precision": "fp32", "dp": 2, "num_microbatches": 2, "micro_batch_size": 2}


@pytest.fixture(scope="module")
def swap_folder() -> Iterator[Path]:
    """Beside the tests: where others lie may be memory, which is refused."""
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".swap-") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def found(
    start_ranks: Callable[..., None],
    plainly: Callable[..., dict[str, Any]],
    make_tokens: Callable[..., np.ndarray],
    tmp_path_factory: pytest.TempPathFactory,
    swap_folder: Path,
) -> dict[str, Any]:
    """One start of two ranks trains on the disk, goes on from the middle there, and goes on in memory."""
    folder, training = tmp_path_factory.mktemp("nvme"), TrainingSpec(**SCHEDULE)
    weights, data, saved = folder / "start", folder / "data.npy", str(folder / "saved")
    hf.create_weights(decode(ModelSpec, SHAPE), training, weights)
    np.save(data, make_tokens(training, SHAPE["vocab_size"]))
    swapped = {"offload_optimizer": True, "offload_parameters": True, "nvme_path": str(swap_folder)}
    on_disk, in_memory = {**PLAN, "zero_stage": 3, **swapped}, {**PLAN, "zero_stage": 1}
    again = {"first": SAVE_AFTER, "last": 20, "load": saved, "save": None, "save_after": None}
    first = {"first": 0, "last": 20, "load": None, "save": saved, "save_after": SAVE_AFTER}
    cases = {
        "trained": {"plan": on_disk, **first},
        "resumed": {"plan": on_disk, **again},
        "in_memory": {"plan": in_memory, **again},
    }
    shared = {"model": SHAPE, "training": SCHEDULE, "data": str(data), "weights": str(weights)}
    job, results = folder / "job.json", folder / "results.json"
    job.write_text(json.dumps({**shared, "cases": cases}), encoding="utf-8")
    start_ranks([str(Path(__file__).with_name("parity_worker.py")), str(job), str(results)], world_size=2)
    reference = plainly(weights, np.load(data), training)
    return {**json.loads(results.read_text(encoding="utf-8")), "reference": reference}


def test_fp32_matches_plain_pytorch(found: dict[str, Any]) -> None:
    result, reference = found["trained"], found["reference"]
    np.testing.assert_allclose(result["losses"], reference["losses"], rtol=1e-5)
    np.testing.assert_allclose(result["norms"], reference["norms"], rtol=1e-4)
    np.testing.assert_allclose(result["evaluated"], reference["evaluated"], rtol=1e-5)


def test_resume_is_bit_identical(found: dict[str, Any]) -> None:
    unbroken, resumed = found["trained"], found["resumed"]
    assert resumed["losses"] == unbroken["losses"][SAVE_AFTER:]
    assert resumed["norms"] == unbroken["norms"][SAVE_AFTER:]
    assert resumed["evaluated"] == unbroken["evaluated"]


def test_what_lay_on_the_disk_goes_on_in_memory(found: dict[str, Any]) -> None:
    losses = found["in_memory"]["losses"]
    np.testing.assert_allclose(losses, found["reference"]["losses"][SAVE_AFTER:], rtol=1e-5)


def test_nothing_stays_on_the_disk(found: dict[str, Any], swap_folder: Path) -> None:
    assert found and list(swap_folder.iterdir()) == []
