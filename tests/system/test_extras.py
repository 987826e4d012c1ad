"""The commands that messages give install what pyproject.toml asks for."""

from __future__ import annotations

import re
import shlex
import tomllib

import pytest

from helpers import ROOT
from thanos.system.extras import EXTRAS, install_command

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_ranges_are_those_of_the_project() -> None:
    stated = {name: tuple(packages) for name, packages in PROJECT["optional-dependencies"].items() if name != "dev"}
    assert stated == EXTRAS


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_shell_reads_the_command_as_packages(extra: str) -> None:
    assert shlex.split(install_command(extra)) == ["pip", "install", *PROJECT["optional-dependencies"][extra]]


def test_no_message_names_a_package_that_no_index_has() -> None:
    for path in (ROOT / "src").rglob("*.py"):
        assert not re.search(rf"['\" ]{PROJECT['name']}\[", path.read_text(encoding="utf-8")), path
