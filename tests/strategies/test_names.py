from __future__ import annotations

import pytest

from strategies.names import suggest


@pytest.mark.parametrize(
    ("word", "valid", "expected"),
    [
        ("num_layer", ["num_layers", "num_kv_heads"], "did you mean 'num_layers'?"),
        ("h100", ["v100", "h100_sxm"], "did you mean 'h100_sxm'?"),
        ("zero", ["tp", "zero_stage"], "did you mean 'zero_stage'?"),
        ("xyz", ["b", "a"], "use one of a, b"),
        ("", ["b", "a"], "use one of a, b"),
        ("anything", [], "no key is accepted here"),
    ],
)
def test_the_nearest_word_or_all_of_them(word: str, valid: list[str], expected: str) -> None:
    assert suggest(word, valid) == expected
