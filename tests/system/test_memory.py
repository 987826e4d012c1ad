"""Seconds add up, and a phase's peak of memory is its own."""

from __future__ import annotations

import gc
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import thanos.system.files as files
import thanos.system.memory as memory
from thanos.system.memory import host_bytes, host_peak_bytes, release_free_heap, reset_host_peak
from thanos.system.meter import PhaseMeter

MIB = 1 << 20
CPUS = os.cpu_count() or 1
INEXACT = mmap.PAGESIZE * max(32, 2 * CPUS) * CPUS
"""Bytes by which Linux's count of resident memory may be wrong: each CPU keeps up to max(32, 2 · CPUs) pages to itself."""

SIZE = max(100 * MIB, 8 * INEXACT)
LIMITS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def can_reset() -> bool:
    """Whether the kernel lets this process reset its peak of resident memory."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return "VmHWM" in Path("/proc/self/status").read_text()


needs_reset = pytest.mark.skipif(not can_reset(), reason="the system does not let a process reset its peak")


@contextmanager
def held(size: int) -> Iterator[None]:
    """Hold so many bytes, every page written to, past the heap: its free chunks might serve, or keep what is freed."""
    with mmap.mmap(-1, size) as block:
        np.frombuffer(block, dtype=np.uint8)[::1024] = 1
        yield


def touch(size: int) -> None:
    """Hold so many bytes, and give them back to the system at once."""
    with held(size):
        pass


@pytest.fixture
def meter() -> PhaseMeter:
    return PhaseMeter(torch.device("cpu"))


def test_seconds_are_those_of_the_clock(meter: PhaseMeter, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([10.0, 12.5, 20.0, 20.25, 100.0, 107.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    for name in ("a", "b", "a"):
        with meter.phase(name):
            pass
    assert {name: record.seconds for name, record in meter.records().items()} == {"a": 9.5, "b": 0.25}


def test_order_is_that_of_the_first_entry(meter: PhaseMeter) -> None:
    assert meter.records() == {}
    for name in ("write", "load", "write", "solve", "load"):
        with meter.phase(name):
            pass
    assert list(meter.records()) == ["write", "load", "solve"]


def test_an_inner_phase_counts_for_itself_alone(meter: PhaseMeter, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.0, 10.0, 12.0, 100.0, 103.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    with meter.phase("outer"), meter.phase("inner"):
        pass
    assert {name: record.seconds for name, record in meter.records().items()} == {"outer": 4.0, "inner": 2.0}


def test_no_device_peak_on_the_cpu(meter: PhaseMeter) -> None:
    with meter.phase("load"):
        pass
    assert meter.records()["load"].device_peak_bytes is None


def test_a_phase_that_fails_is_measured_and_fails(meter: PhaseMeter, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([10.0, 12.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))

    def fail() -> None:
        with meter.phase("load"):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert meter.records()["load"].seconds == 2.5


@needs_reset
def test_a_phases_peak_is_its_own(meter: PhaseMeter) -> None:
    gc.collect()  # else pages of earlier tests may go back to the system during the phases
    release_free_heap()
    before = host_bytes()
    with meter.phase("small"):
        touch(MIB)
    with meter.phase("large"):
        touch(SIZE)
    with meter.phase("after"):
        touch(MIB)
    peaks = {name: record.host_peak_bytes for name, record in meter.records().items()}
    assert before - 20 * MIB - INEXACT < peaks["small"] < before + SIZE // 2
    assert before + 0.9 * SIZE - INEXACT < peaks["large"] < before + 1.5 * SIZE
    assert peaks["after"] < peaks["large"] - SIZE // 2, "the next phase's peak does not hold the last one's"


@needs_reset
def test_a_phases_peak_is_the_largest_of_its_visits(meter: PhaseMeter) -> None:
    with meter.phase("solve"):
        touch(SIZE)
    first = meter.records()["solve"].host_peak_bytes
    with meter.phase("solve"):
        pass
    assert meter.records()["solve"].host_peak_bytes == first


@needs_reset
def test_memory_that_stays_counts_in_later_phases(meter: PhaseMeter) -> None:
    with meter.phase("before"):
        pass
    with held(SIZE), meter.phase("holding"):
        pass
    records = meter.records()
    assert records["holding"].host_peak_bytes > records["before"].host_peak_bytes + 0.9 * SIZE - INEXACT


@needs_reset
def test_reset_host_peak() -> None:
    touch(SIZE)
    high = host_peak_bytes()
    reset_host_peak()
    assert host_peak_bytes() < high - SIZE // 2


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_bytes_are_the_kernels(meter: PhaseMeter) -> None:
    status = Path("/proc/self/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    now = int(fields["VmRSS"].split()[0]) * 1024
    assert host_bytes() == pytest.approx(now, rel=0.05)
    assert host_peak_bytes() >= now * 0.95


def test_systems_without_proc(meter: PhaseMeter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Elsewhere the peak is the process's, and nothing fails."""
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "no" / "such")
    import resource

    with meter.phase("load"):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    assert meter.records()["load"].host_peak_bytes == pytest.approx(peak, rel=0.05)
    assert host_bytes() == pytest.approx(peak, rel=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_device_peaks_are_their_phases_own() -> None:
    device = torch.device("cuda")
    meter = PhaseMeter(device)
    before = torch.cuda.memory_allocated(device)
    with meter.phase("large"):
        torch.ones(SIZE, dtype=torch.uint8, device=device)
    with meter.phase("small"):
        torch.ones(MIB, dtype=torch.uint8, device=device)
    records = meter.records()
    assert records["large"].device_peak_bytes == pytest.approx(before + SIZE, abs=4 * MIB)
    assert records["small"].device_peak_bytes == pytest.approx(before + MIB, abs=4 * MIB)


def test_free_host_memory_is_the_kernels_figure() -> None:
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    assert 0 < memory.free_host_bytes() <= available * 1.05


@pytest.mark.parametrize("version", [1, 2])
def test_a_control_groups_limit_counts(version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo, cgroup, root = tmp_path / "meminfo", tmp_path / "cgroup", tmp_path / "fs"
    meminfo.write_text("MemTotal: 900000 kB\nMemAvailable: 800000 kB\n")
    cgroup.write_text("3:cpuset:/\n4:memory:/job/part\n" if version == 1 else "0::/job/part\n")
    for name in ("_MEMINFO", "_CGROUP", "_CGROUPS"):
        path = {"_MEMINFO": meminfo, "_CGROUP": cgroup, "_CGROUPS": root}[name]
        monkeypatch.setattr(memory, name, path)
    assert memory.free_host_bytes() == 800_000 * 1024
    base = root / "memory" if version == 1 else root
    limit, usage, cache = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if version == 1
        else ("memory.max", "memory.current", "inactive_file")
    )
    for name, allowed in (("job", 500 * MIB), ("job/part", 300 * MIB)):
        (base / name).mkdir(parents=True)
        (base / name / limit).write_text(f"{allowed}\n")
        (base / name / usage).write_text(f"{120 * MIB}\n")
        (base / name / "memory.stat").write_text(f"anon 5\n{cache} {20 * MIB}\n")
    assert memory.free_host_bytes() == 200 * MIB
    if version == 2:
        (base / "job/part" / limit).write_text("max\n")
        assert memory.free_host_bytes() == 400 * MIB


def test_free_disk_is_that_of_the_nearest_folder(tmp_path: Path) -> None:
    import shutil

    expected = shutil.disk_usage(tmp_path).free
    assert files.free_disk_bytes(tmp_path / "not" / "yet") == pytest.approx(expected, rel=0.05)


_PRODUCTS = """
import os, sys
import torch
from thanos.system.memory import host_bytes

weight = torch.randn(384, 768, dtype=torch.bfloat16)
torch.randn(99, 768, dtype=torch.bfloat16) @ weight.T
before = host_bytes()
for rows in range(100, 500):  # as experts, which get another number of tokens in each batch
    torch.nn.functional.linear(torch.ones(rows, 768, dtype=torch.bfloat16), weight)
print(host_bytes() - before, os.environ["LRU_CACHE_CAPACITY"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("given", "kept"), [({}, "64"), ({"LRU_CACHE_CAPACITY": "9"}, "9")])
def test_products_of_many_sizes_fill_no_memory_with_their_kernels(given: dict[str, str], kept: str) -> None:
    """Without a limit 400 sizes take about 250 MB, where oneDNN has kernels for 16 bits."""
    known = {name: value for name, value in os.environ.items() if name not in LIMITS}
    environment = known | given | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", _PRODUCTS], env=environment, capture_output=True, text=True, check=True)
    grown, said = run.stdout.split()
    assert int(grown) < 100e6
    assert said == kept
