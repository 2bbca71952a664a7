"""Transfers between buffers and files, as DeepSpeed's swappers ask for them. Real training: tests/integration."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from strategies.deepspeed.swapping import Handle, _swap_in_once


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_written_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    handle, file = Handle(block_size=1, intra_op_parallelism=1), str(tmp_path / "numbers")
    written = torch.randn(1000).to(dtype)
    found = torch.zeros(2, 1000, dtype=dtype)
    assert handle.async_pwrite(written, file, 0) == 0
    assert handle.wait() == 1
    assert [handle.async_pread(row, file, 0) for row in found] == [0, 0]
    assert handle.wait() == 2
    assert torch.equal(found[0], written) and torch.equal(found[1], written)
    assert handle.wait() == 0


def test_a_file_that_is_too_short_is_a_fault(tmp_path: Path) -> None:
    handle, file = Handle(), tmp_path / "numbers"
    file.write_bytes(b"1234")
    handle.async_pread(torch.zeros(2), str(file), 0)
    with pytest.raises(OSError, match="ends 4 bytes too early"):
        handle.wait()


def test_buffers_are_known_until_they_are_freed() -> None:
    one, other = Handle(), Handle()
    buffer = one.new_cpu_locked_tensor(100, torch.zeros(1, dtype=torch.bfloat16))
    assert (buffer.numel(), buffer.dtype) == (100, torch.bfloat16)
    assert other.is_pinned(buffer.narrow(0, 10, 5))
    assert not other.is_pinned(torch.zeros(3)) and not other.is_pinned(torch.Tensor())
    other.free_cpu_locked_tensor(buffer)
    assert not one.is_pinned(buffer)


def test_each_weight_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[torch.Tensor]] = []
    monkeypatch.setattr(
        "strategies.deepspeed.swapping._swap_in", lambda self, params, **_: seen.append(params)
    )
    one, other = torch.zeros(2), torch.zeros(2)
    _swap_in_once(None, [one, other, one], async_op=True)
    assert [len(params) for params in seen] == [2]
    assert seen[0][0] is one and seen[0][1] is other
