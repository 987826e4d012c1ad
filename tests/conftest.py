"""The numeric environment of every test, and fixtures for several files."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# Set before transformers is imported: no test may reach for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

from helpers import ROOT, save_tiny

# The same examples each time, however slow the machine.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell's background job ignores Ctrl-C, and what it starts inherits that: tests of Ctrl-C could only fail.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)  # the workers share the cores


@pytest.fixture(autouse=True)
def _numerics():
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() == torch.float32, "a test left another default dtype behind"
    assert torch.get_float32_matmul_precision() == "highest", "a test left another matmul precision behind"


@pytest.fixture(scope="session")
def thanos_data() -> Path:
    """The folder with WikiText-2, the C4 sample and the zero-shot tasks; without it the test is skipped."""
    folder = Path(os.environ.get("THANOS_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"THANOS_DATA: {folder} is not there")
    return folder


@pytest.fixture(scope="session")
def task_folder(thanos_data: Path) -> Path:
    """The folder with local zero-shot tasks of lm_eval; without it the test is skipped."""
    found = thanos_data / "lm_eval_tasks"
    if not found.is_dir():
        pytest.skip(f"{found} is not there")
    return found


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """The demo model, which ``make test`` downloads; without it the test is skipped."""
    path = Path(os.environ.get("THANOS_DEMO_MODEL", ROOT / ".demo" / "model.gguf"))
    if not path.is_file():
        pytest.skip(f"the demo model is not at {path}; `make test` fetches it")
    return path


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaMA with its tokenizer, saved in float32. Tests must not modify it."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of a few thousand tokens of the tiny tokenizer."""
    from helpers import prose

    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(prose(6000, seed=1), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def study_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a full synthetic study with its report. Tests must not modify it."""
    pytest.importorskip("matplotlib", reason="the extra report is not installed")
    from study_records import cell, failed, full_study, write_store
    from thanos.study.report.build import write_report

    records = [
        *full_study(),
        failed(cell("thanos", "columns", sparsity=0.95), "sparsity 0.95 <is> too much"),
    ]
    folder = write_store(tmp_path_factory.mktemp("study") / "full", records)
    write_report(folder)
    return folder
