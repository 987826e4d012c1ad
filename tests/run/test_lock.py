"""One run at a time on one output folder; what a dead process left is no lock."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from thanos.cli import run
from thanos.errors import ResourceError, UserError
from thanos.run.lock import lock_path, locked

HOLDER = """
import sys, time
from pathlib import Path
from thanos.run.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of ``tmp_path / "out"``."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_second_is_refused_by_the_number_and_host_of_the_first(holder: Any, tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=rf"process {holder.pid} on {socket.gethostname()}; wait"),
        locked(tmp_path / "out"),
    ):
        pass
    assert json.loads(lock_path(tmp_path / "out").read_text())["pid"] == holder.pid, "the first keeps its lock"
    with locked(tmp_path / "other"):
        pass


def test_the_lock_of_a_killed_process_is_free(holder: Any, tmp_path: Path) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert lock_path(tmp_path / "out").exists()
    with locked(tmp_path / "out"):
        assert json.loads(lock_path(tmp_path / "out").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_two_in_one_process(tmp_path: Path) -> None:
    with locked(tmp_path / "out"):
        with pytest.raises(UserError, match=f"process {os.getpid()} "), locked(tmp_path / "out"):
            pass
        (tmp_path / "link").symlink_to(tmp_path / "out")
        with pytest.raises(UserError, match="is being written"), locked(tmp_path / "link"):
            pass
    with locked(tmp_path / "out"):
        pass


def test_a_lock_on_a_file_that_its_holder_removed_meanwhile_guards_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening the file and locking it, the holder before us may have ended and removed it."""
    calls, flock = [], fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            lock_path(tmp_path / "out").unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path / "out"):
        assert len(calls) == 2
        with pytest.raises(UserError), locked(tmp_path / "out"):
            pass


def test_parents_are_made_and_removed(tmp_path: Path) -> None:
    with locked(tmp_path / "a/b/out"):
        assert (tmp_path / "a/b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "a/b/out"):
        (tmp_path / "a/b/out").mkdir()
    assert (tmp_path / "a/b/out").is_dir()


def test_a_place_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot write next to OUT"), locked(tmp_path / "file/out"):
        pass


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that allows no new files")
def test_a_file_system_that_allows_no_new_files_is_not_another_process(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ResourceError, match=r"no lock file can be created in /proc \("), locked(Path("/proc/out")):
        pass
    assert run(["prune", str(tiny_llama), "/proc/out", "--calibration", "pydoc", "--device", "cpu", "--quiet"]) == 2
    said = capsys.readouterr().err
    assert "cannot write next to OUT /proc/out" in said
    assert "another process" not in said
    assert len(said.splitlines()) == 1


def test_a_file_system_that_refuses_to_create_a_lock_file_is_not_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *arguments: Any, **others: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "open", refuse)
    with (
        pytest.raises(ResourceError, match=r"no lock file .*Read-only file system\); choose"),
        locked(tmp_path / "out"),
    ):
        pass


class TestWithoutTheKernelsLock:
    """Some network file systems have none: then the file itself is the lock."""

    @pytest.fixture(
        autouse=True, params=[errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS], ids=errno.errorcode.get
    )
    def _no_flock(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(descriptor: int, operation: int) -> None:
            raise OSError(request.param, os.strerror(request.param))

        monkeypatch.setattr(fcntl, "flock", refuse)

    def write(self, tmp_path: Path, pid: int, host: str) -> None:
        for path in (lock_path(tmp_path / "out"), lock_path(tmp_path / "out").with_suffix(".held")):
            path.write_text(f"{pid}\n{host}\n", encoding="utf-8")

    def test_one_at_a_time_and_nothing_is_left(self, tmp_path: Path) -> None:
        with locked(tmp_path / "out"):
            with pytest.raises(UserError, match=rf"process {os.getpid()} on {socket.gethostname()}; wait"):
                locked(tmp_path / "out").__enter__()
            with locked(tmp_path / "other"):
                pass
        assert list(tmp_path.iterdir()) == []
        with locked(tmp_path / "out"):
            pass

    def test_a_dead_process_holds_nothing(self, tmp_path: Path) -> None:
        process = subprocess.Popen([sys.executable, "-c", ""])
        process.wait()
        self.write(tmp_path, process.pid, socket.gethostname())
        with locked(tmp_path / "out"):
            pass

    def test_of_another_host_nothing_is_known(self, tmp_path: Path) -> None:
        self.write(tmp_path, os.getpid(), "elsewhere")
        with (
            pytest.raises(UserError, match=r"on elsewhere \(if it is dead, delete .*\.out\.(lock|held)\)"),
            locked(tmp_path / "out"),
        ):
            pass
