"""Fixtures of the tests of recovery."""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import thanos
from recovering import VARIED, prune, settings


@pytest.fixture(autouse=True, scope="session")
def _checkpoint_after_each_epoch() -> Iterator[None]:
    """Interrupted runs here last seconds; so they save at the end of each epoch, however soon it comes."""
    if find_spec("accelerate") is None:
        yield
        return
    from thanos.recovery import watch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "CHECKPOINT_SECONDS", 0.0)
        patch.setattr(watch, "CHECKPOINT_FRACTION", math.inf)
        yield


@pytest.fixture(scope="session")
def pruned(tiny_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model at 50 %. Not to be modified."""
    return prune(tiny_llama, tmp_path_factory.mktemp("pruned") / "out", text_file)


@pytest.fixture(scope="session")
def recovered(
    pruned: Path, tiny_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, thanos.RecoveryReport]:
    """Output and report of a plain recovery. Not to be modified."""
    out = tmp_path_factory.mktemp("recovered") / "out2"
    return out, thanos.recover(pruned, out, dense=tiny_llama, recipe=settings(text_file))


@pytest.fixture(scope="session")
def varied(
    pruned: Path, tiny_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, thanos.RecoveryReport]:
    """Output and report of a recovery with the defaults of ``vary`` and ``train``. Not to be modified."""
    out = tmp_path_factory.mktemp("varied") / "out2"
    return out, thanos.recover(pruned, out, dense=tiny_llama, recipe=settings(text_file, **VARIED))
