"""C extensions that were built from another version are not used."""

from __future__ import annotations

import re
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import thanos.sparse.kernels as kernels
from sparse_matrices import product, sparse_weight
from thanos.cli.progress import hush
from thanos.sparse.encoding import encode
from thanos.sparse.kernels import cpu, dense, encoder, extensions
from thanos.system import library_warnings

FOLDER = Path(kernels.__file__).parent


def forget() -> None:
    for cached in (extensions.load, cpu.lacking, dense._extension, encoder._extension):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(library_warnings, "_SAID", set())
    forget()
    yield
    monkeypatch.undo()
    forget()


def install(monkeypatch: pytest.MonkeyPatch, interface: int | None) -> None:
    """Put extensions in place whose functions must not be called."""

    def never(*_: Any) -> Any:
        raise AssertionError("a function of another interface was called")

    for name in extensions.INTERFACES:
        module = types.ModuleType(f"thanos.sparse.kernels.{name}")
        module.__dict__.update(support=lambda: 2, linear=never, run=never)
        if interface is not None:
            module.__dict__["INTERFACE"] = interface
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize("interface", [None, 0, 10**6])
def test_another_interface_is_said_once_and_not_used(interface: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = sparse_weight(64, 96)
    x = torch.randn(3, 96).to(torch.bfloat16)
    install(monkeypatch, interface)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reasons = {cpu.lacking() for _ in range(3)}
        packed = encode(weight)
        found = product(packed, x)
        served = dense.serves(x, weight)
    assert reasons == {"the extension for CPUs is of another version of thanos"}
    assert not served
    assert not encoder.available(weight)
    said = [str(one.message) for one in caught if "pip install" in str(one.message)]
    assert said == [
        "the compiled extensions are of another version of thanos and are not used, so packed models are slower; run "
        "pip install -e . again"
    ]
    expected = x.double() @ weight.double().T
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.05)


def test_the_same_interface_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None)
    for name, number in extensions.INTERFACES.items():
        sys.modules[f"thanos.sparse.kernels.{name}"].__dict__["INTERFACE"] = number
    assert cpu.lacking() == ""
    assert encoder.available(torch.zeros(1, dtype=torch.float16))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named '_cpu'"), extensions.NOT_BUILT),
        (
            ImportError("libgomp.so.1: cannot open shared object file"),
            "the extension for CPUs cannot be loaded: libgomp.so.1: cannot open shared object file",
        ),
    ],
)
def test_why_there_is_none(error: ImportError, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise error

    monkeypatch.setattr(extensions, "import_module", fail)
    assert cpu.lacking() == reason


def test_the_sources_state_the_numbers_that_python_wants() -> None:
    stated = {path.stem: path.read_text() for path in FOLDER.glob("_*.c")}
    numbers = {name: int(re.findall(r"^#define INTERFACE (\d+)", text, re.M)[0]) for name, text in stated.items()}
    assert numbers == extensions.INTERFACES


@pytest.mark.parametrize("name", extensions.INTERFACES)
def test_a_built_extension_states_its_number(name: str) -> None:
    if not list(FOLDER.glob(f"{name}.*.so")):
        pytest.skip("the extension was not built")
    extension, reason = extensions.load(name)
    assert reason == "", "built from an older commit: run pip install -e . again"
    assert extensions.INTERFACES[name] == extension.INTERFACE


def test_the_commands_print_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    hush()
    assert warnings.formatwarning("too slow", library_warnings.ThanosWarning, "a.py", 3) == "warning: too slow\n"
    assert warnings.formatwarning("of another's", UserWarning, "a.py", 3, "").startswith(
        "a.py:3: UserWarning: of another's"
    )
