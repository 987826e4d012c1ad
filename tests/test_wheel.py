"""A wheel built from the source package, installed into an environment that has the dependencies and not this checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from helpers import ROOT

EXTENSIONS = ("_cpu", "_dense", "_encode")

_NEEDED = 77
"""Least major version of setuptools, as in pyproject.toml."""


def run(*words: str | Path, cwd: Path) -> str:
    """Run a command without this checkout on the path of imports; return its output."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    found = subprocess.run(words, cwd=cwd, env=kept, capture_output=True, text=True, timeout=600, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.mark.slow
def test_a_wheel_installs_and_its_command_runs(tmp_path: Path) -> None:
    try:
        found = {name: int(metadata.version(name).partition(".")[0]) for name in ("pip", "setuptools")}
    except metadata.PackageNotFoundError as error:
        pytest.skip(f"{error} is not installed")
    if found["setuptools"] < _NEEDED:
        pytest.skip(f"setuptools {found['setuptools']} is older than {_NEEDED}")
    source = tmp_path / "source"  # a build writes beside the sources
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__", "*.so"))
    offline = ("--no-deps", "--no-index", "--quiet", "--disable-pip-version-check")
    run(
        sys.executable,
        "-c",
        f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})",
        cwd=source,
    )
    (package,) = tmp_path.glob("*.tar.gz")
    run(sys.executable, "-m", "pip", "wheel", *offline, "--no-build-isolation", "-w", tmp_path, package, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for needed in ("study/report/templates/page.html", "study/report/templates/page.css", "py.typed"):
        assert f"thanos/{needed}" in names
    assert any(name.endswith(".cu") for name in names)
    assert not any(name.startswith("tests/") for name in names)
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    built = [f"thanos/sparse/kernels/{name}{sysconfig.get_config_var('EXT_SUFFIX')}" for name in EXTENSIONS]
    if shutil.which(compiler):  # without one an installation goes on, and so it would without a file that they include
        assert set(built) <= set(names)

    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "empty", cwd=tmp_path)
    binaries = tmp_path / "empty" / ("Scripts" if os.name == "nt" else "bin")
    python = binaries / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", *offline, wheel, cwd=tmp_path)
    # The dependencies come from the environment of the tests. Its .pth files do not count here, so neither does the checkout.
    paths = {sysconfig.get_paths()[name] for name in ("purelib", "platlib")}
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=tmp_path).strip()
    (Path(site) / "dependencies.pth").write_text("\n".join(sorted(paths)) + "\n")
    where = run(python, "-c", "import thanos; print(thanos.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(tmp_path / "empty")
    if shutil.which(compiler):
        run(python, "-c", f"from thanos.sparse.kernels import {', '.join(EXTENSIONS)}", cwd=tmp_path)
    assert "compare" in run(binaries / "thanos", "--help", cwd=tmp_path)
    assert run(binaries / "thanos", "--version", cwd=tmp_path).startswith("thanos ")
