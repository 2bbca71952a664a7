"""Own attention against PyTorch's over the whole sequence, split over four gloo ranks; masks, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
WINDOW = {"window_size": [5, 0]}  # each token sees itself and five before it
CASES: dict[str, dict[str, Any]] = {
    "cp4": {"cp": 4},
    "cp4 with a window": {"cp": 4, **WINDOW},
    "cp4 in the second layer, where no window is": {
        "cp": 4,
        "layer": 2,
        "window_attn_skip_freq": 2,
        **WINDOW,
    },
    "tp2 cp2": {"tp": 2, "cp": 2},
    "tp2 cp2 with sequence parallelism and a window": {"tp": 2, "cp": 2, "sequence_parallel": True, **WINDOW},
    "cp2 in bf16": {"cp": 2, "dtype": "bfloat16", **WINDOW},
    "cp2 with values shorter than keys": {"cp": 2, "value_size": 6},
    "one rank": {},
    "one rank with a window": WINDOW,
    "one rank against upstream": {"against": "upstream"},
    "one rank with a window against upstream": {"against": "upstream", **WINDOW},
    "one rank in bf16 with a window against upstream": {"against": "upstream", "dtype": "bfloat16", **WINDOW},
}
SPECS_AND_MASKS = """
import json, torch
from types import SimpleNamespace
from strategies.megatron import cpu
cpu.install()
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from strategies.megatron.attention import CausalAttention, hidden_positions, with_own_attention

def mask(**options):
    found = hidden_positions(2, cp=2, device=torch.device("cpu"), **options)
    return ["".join(".x"[hidden] for hidden in row) for row in found[0, 0].tolist()]

def core(layer):
    return layer.submodules.self_attention.submodules.core_attention

def refusal(call):
    try:
        call()
    except ValueError as error:
        return str(error)

config = TransformerConfig(
    num_layers=2, hidden_size=8, num_attention_heads=2, cuda_graph_scope=[],
    num_moe_experts=2, moe_layer_freq=[0, 1], moe_ffn_hidden_size=8,
)
block = get_gpt_decoder_block_spec(config, use_transformer_engine=False, pp_rank=0)
dense, sparse = with_own_attention(block).layer_specs
plain = get_gpt_layer_local_spec()
owned = with_own_attention(plain)
other = get_gpt_layer_local_spec()
other.submodules.self_attention.submodules.core_attention = IdentityOp
shape = {"cp": 1, "rank": 0, "num_earlier": None, "device": torch.device("cpu")}
shared = [core(layer).params["hidden_positions"](4, **shape) for layer in (dense, sparse)]
options = {"config": config, "layer_number": 1, "attention_type": "self", "hidden_positions": hidden_positions}
group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
groups = SimpleNamespace(tp=group, cp=group)
causal = CausalAttention(attn_mask_type=AttnMaskType.causal, pg_collection=groups, **options)
part = torch.zeros(2, 1, 2, 4)
print(json.dumps({
    "first of two": mask(rank=0, num_earlier=None),
    "second of two": mask(rank=1, num_earlier=None),
    "first of two, one earlier": mask(rank=0, num_earlier=1),
    "odd": hidden_positions(3, **shape).int()[0, 0].tolist(),
    "owned": [core(layer).module is CausalAttention for layer in (dense, sparse, owned)],
    "given spec kept": core(plain).__name__,
    "another attention kept": core(with_own_attention(other)).__name__,
    "one mask for all layers": shared[0] is shared[1],
    "padding": refusal(lambda: CausalAttention(attn_mask_type=AttnMaskType.padding, **options)),
    "mask": refusal(lambda: causal(part, part, part, torch.zeros(1, 1, 2, 2, dtype=torch.bool))),
    "configuration kept": config.context_parallel_size == 1 and causal.config is not config,
}))
"""


def output_of(*command: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("attention")
    (folder / "cases.json").write_text(json.dumps(CASES), encoding="utf-8")
    worker = ROOT / "tests" / "integration" / "megatron_attention_worker.py"
    output_of(worker, folder / "cases.json", folder / "results.json")
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def facts() -> Any:
    return json.loads(output_of("-W", "error", "-c", SPECS_AND_MASKS))


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_plain_attention(differences: Any, case: str) -> None:
    exact = "against" in CASES[case]  # upstream's operations in upstream's order
    limit = 0.0 if exact else 0.01 if "dtype" in CASES[case] else 1e-6
    assert max(differences[case].values()) <= limit, differences[case]


def test_a_query_is_kept_from_later_keys_and_from_those_before_its_window(facts: Any) -> None:
    # Of positions 0 to 3 the first rank holds 0 and 3, the second 1 and 2; keys come in the order 0 3 1 2.
    assert facts["first of two"] == [".xxx", "...."]
    assert facts["second of two"] == [".x.x", ".x.."]
    assert facts["first of two, one earlier"] == [".xxx", "x.x."]


def test_one_rank_takes_a_sequence_of_any_length(facts: Any) -> None:
    assert facts["odd"] == [[0, 1, 1], [0, 0, 1], [0, 0, 0]]


def test_every_layer_with_upstreams_unfused_attention_gets_the_own_one(facts: Any) -> None:
    assert facts["owned"] == [True, True, True]
    assert facts["given spec kept"] == "DotProductAttention"
    assert facts["another attention kept"] == "IdentityOp"


def test_all_layers_share_one_mask(facts: Any) -> None:
    assert facts["one mask for all layers"]


def test_masks_from_outside_are_refused(facts: Any) -> None:
    assert facts["padding"].startswith("strategy=megatron without Transformer Engine attends causally only")
    assert facts["mask"].endswith("pass attention_mask=None")
    assert facts["configuration kept"]
