from __future__ import annotations

import json

import pytest

from launcher.decode import decode, encode
from launcher.preflight.gathered import Gathered, pairs, rounds_of


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 9])
def test_everybody_meets_everybody_once(count: int) -> None:
    nodes = [10 + node for node in range(count)]
    met = [pairs(nodes, number=number) for number in range(rounds_of(count))]
    for pairs_of_round in met:
        busy = [node for pair in pairs_of_round for node in pair]
        assert len(busy) == len(set(busy)) == count - count % 2
    everything = [pair for pairs_of_round in met for pair in pairs_of_round]
    assert len(everything) == len(set(everything)) == count * (count - 1) // 2


def test_what_was_gathered_survives_its_file(sound: Gathered) -> None:
    assert decode(Gathered, json.loads(json.dumps(encode(sound)))) == sound
    facts = sound.facts(3)
    assert facts is not None and facts.host == "n3"
    assert [rank.rank for rank in sound.of_node(3)] == [6, 7]
