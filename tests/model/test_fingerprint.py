"""Hashes of what a result depends on."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from helpers import ROOT
from thanos.model.fingerprint import file_sha256, source_commit


def test_a_files_hash_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_the_commit_is_the_trees_and_what_is_stated_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THANOS_COMMIT", "0123abc")
    assert source_commit() == "0123abc"
    monkeypatch.delenv("THANOS_COMMIT")
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        assert source_commit() is None
    else:
        assert (source_commit() or "").removesuffix("+changes") == head.stdout.strip()
