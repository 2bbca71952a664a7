from __future__ import annotations

from launcher.cluster.nccl_variables import DEPRECATED, NCCL, PROFILES, REMOVED


def test_a_default_is_a_value_that_is_accepted() -> None:
    for name, variable in NCCL.items():
        if variable.default is not None and variable.lowest is not None:
            assert variable.lowest <= int(variable.default) <= (variable.highest or 2**31), name
        if variable.default is not None and variable.accepted is not None:
            assert variable.default in variable.accepted, name


def test_a_name_is_either_read_or_gone() -> None:
    assert not set(NCCL) & (set(REMOVED) | set(DEPRECATED))
    assert not set(REMOVED) & set(DEPRECATED)


def test_a_profile_only_excuses_what_would_be_said() -> None:
    for profile in PROFILES.values():
        assert profile.needs
        assert profile.source
