"""Hidden states come back as they were put, wherever they are kept, and the tier follows from the memory that is free."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from thanos.engine import activations as module
from thanos.engine.activations import Activations, Tier, choose_tier
from thanos.errors import RecipeError, ResourceError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GIB = 1 << 30

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
ON_CPU = [(tier, CPU) for tier in ("host", "disk")]
ON_CUDA = [
    pytest.param(tier, CUDA, marks=[pytest.mark.gpu, needs_cuda], id=f"{tier}-cuda")
    for tier in ("device", "host", "disk")
]


def states(samples: int, dtype: torch.dtype = torch.float32, length: int = 5, width: int = 7) -> Tensor:
    return torch.randn(samples, length, width, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize(("tier", "device"), [*ON_CPU, *ON_CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_two_passes_over_the_states(
    tier: Tier, device: torch.device, dtype: torch.dtype, size: int, tmp_path: Path
) -> None:
    given = states(8, dtype)
    kept = Activations(8, given[:1].to(device), tier, device, tmp_path)
    for first in range(0, 8, 2):
        kept.write(first, given[first : first + 2].to(device))
    for first, batch in kept.batches(size):  # in place, as the engine does it
        assert batch.device.type == device.type
        kept.write(first, batch * 2)
    got = [(first, batch.cpu().clone()) for first, batch in kept.batches(size)]
    assert [first for first, _ in got] == list(range(0, 8, size))
    assert torch.equal(torch.cat([batch for _, batch in got]), given * 2)
    assert kept.tier == tier
    assert kept.nbytes == given.nbytes
    kept.close()


@pytest.mark.parametrize(("tier", "device"), [*ON_CPU, *ON_CUDA])
@pytest.mark.parametrize(
    ("boundary", "first", "end", "batches"),
    [
        (5, 0, None, [(0, 3), (3, 2), (5, 3)]),
        (5, 5, None, [(5, 3)]),
        (5, 0, 5, [(0, 3), (3, 2)]),
        (5, 6, 8, [(6, 2)]),
        (2, 1, 7, [(1, 1), (2, 3), (5, 2)]),
        (0, 0, None, [(0, 3), (3, 3), (6, 2)]),
        (8, 0, None, [(0, 3), (3, 3), (6, 2)]),
        (None, 0, None, [(0, 3), (3, 3), (6, 2)]),
    ],
)
def test_no_batch_reaches_over_the_boundary(
    tier: Tier,
    device: torch.device,
    boundary: int | None,
    first: int,
    end: int | None,
    batches: list[tuple[int, int]],
    tmp_path: Path,
) -> None:
    given = states(8)
    one = Activations(8, given[:1].to(device), tier, device, tmp_path, boundary)
    for kept in (one, one.empty_like(tier, tmp_path)):
        kept.write(0, given.to(device))
        kept.flush()
        got = list(kept.batches(3, first, end))
        assert [(start, len(batch)) for start, batch in got] == batches
        assert torch.equal(torch.cat([batch.cpu() for _, batch in got]), given[first:end])
        kept.close()


@pytest.mark.parametrize(("tier", "device"), [*ON_CPU, *ON_CUDA])
def test_sequences_in_any_order(tier: Tier, device: torch.device, tmp_path: Path) -> None:
    given = states(8, torch.bfloat16)
    kept = Activations(8, given[:1].to(device), tier, device, tmp_path)
    kept.write(0, given.to(device))
    kept.flush()
    lists = [[3, 1], [7], [0, 5, 2], [4]]
    got = list(kept.gather(lists))
    assert [batch.device.type for batch in got] == [device.type] * 4
    for rows, batch in zip(lists, got, strict=True):
        batch += 1  # a copy: what is stored does not change
        assert torch.equal(batch.cpu(), given[rows] + 1)
    assert torch.equal(next(kept.batches(8))[1].cpu(), given)
    assert list(kept.gather([])) == []
    assert kept.dtype == torch.bfloat16
    kept.close()


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_batches_may_begin_anywhere(tier: Tier, tmp_path: Path) -> None:
    given = states(8)
    kept = Activations(8, given[:1], tier, CPU, tmp_path)
    kept.write(0, given)
    assert [first for first, _ in kept.batches(2, 5)] == [5, 7]
    assert torch.equal(torch.cat([batch for _, batch in kept.batches(2, 5)]), given[5:])
    kept.close()


def test_the_file_has_no_name_and_takes_its_room_at_once(tmp_path: Path) -> None:
    before = os.statvfs(tmp_path).f_bavail
    kept = Activations(64, torch.empty(1, 128, 1024), "disk", CPU, tmp_path)
    assert list(tmp_path.iterdir()) == []
    taken = (before - os.statvfs(tmp_path).f_bavail) * os.statvfs(tmp_path).f_frsize
    assert taken > kept.nbytes // 2  # other processes use the disk too
    kept.close()


def test_no_room_for_the_file_is_an_error_and_not_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "reserve", full)
    with pytest.raises(ResourceError, match="no room"):
        Activations(8, torch.empty(1, 5, 7), "disk", CPU, tmp_path)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    known = {"device": 10 * GIB, "host": 10 * GIB, "disk": 100 * GIB}
    monkeypatch.setattr(module, "free_device_bytes", lambda device: known["device"])
    monkeypatch.setattr(module, "free_host_bytes", lambda: known["host"])
    monkeypatch.setattr(module, "free_disk_bytes", lambda folder: known["disk"])
    return known


@pytest.mark.parametrize(
    ("device", "needed", "tier"),
    [
        (CUDA, 4 * GIB, "device"),
        (CUDA, 4 * GIB + 1, "host"),
        (CUDA, 5 * GIB + 1, "disk"),
        (CPU, 5 * GIB, "host"),
        (CPU, 5 * GIB + 1, "disk"),
    ],
)
def test_the_place_follows_from_free_memory(
    device: torch.device, needed: int, tier: str, free: dict[str, int], tmp_path: Path
) -> None:
    assert choose_tier(needed, device, tmp_path) == tier


def test_a_place_that_is_asked_for_is_taken(free: dict[str, int], tmp_path: Path) -> None:
    for asked in ("device", "host", "disk"):
        assert choose_tier(50 * GIB, CUDA, tmp_path, asked) == asked
    assert choose_tier(1, CPU, tmp_path, "device") == "host"  # the CPU's memory is the host's
    with pytest.raises(RecipeError, match="auto, device, host, disk"):
        choose_tier(1, CPU, tmp_path, "swap")


@pytest.mark.parametrize("asked", ["auto", "disk"])
def test_too_little_disk_is_refused_with_the_numbers(asked: str, free: dict[str, int], tmp_path: Path) -> None:
    free["disk"] = 6 * GIB
    with pytest.raises(ResourceError, match=r"need 8\.59 GB .* has 6\.44 GB free"):
        choose_tier(8 * GIB, CPU, tmp_path, asked)


def mapped_bytes(address: int) -> int:
    """Bytes of the mapping at ``address`` that are in this process's memory now."""
    mine = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):  # the first line of a mapping
            mine = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif mine and line.startswith("Rss:"):
            return int(line.split()[1]) << 10
    raise AssertionError(f"no mapping at {address:#x}")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="/proc")
def test_states_on_disk_do_not_stay_in_this_process(tmp_path: Path) -> None:
    kept = Activations(64, torch.empty(1, 256, 1024), "disk", CPU, tmp_path)  # 64 MiB
    batch, address = torch.ones(8, 256, 1024), kept._store.data_ptr()
    kept._store[:8] = batch  # past the storage: these pages stay
    assert mapped_bytes(address) >= 8 << 20
    for first in range(0, 64, 8):
        kept.write(first, batch)
    kept.flush()
    assert mapped_bytes(address) < 1 << 20
    for first, got in kept.batches(8):
        kept.write(first, got + 1)
    kept.flush()
    assert mapped_bytes(address) < 1 << 20
    assert all(bool((got == 2).all()) for _, got in kept.batches(8))
    kept.close()


def test_a_failure_to_let_go_is_not_told_as_one_to_pin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Activations(2, states(1), "host", CPU, tmp_path)
    kept._pinned = True
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(module, "_cudart", lambda: SimpleNamespace(cudaHostUnregister=lambda address: 719))
    with pytest.raises(ResourceError, match=r"cannot unpin .*\(error 719\), after an earlier error"):
        kept.close()
