"""Convert exceptions of transformers and of a checkpoint's own code to one line with a remedy."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from thanos.errors import ModelError, is_out_of_memory

_PIP_NAMES = {
    "PIL": "pillow",
    "cv2": "opencv-python",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
    "google": "protobuf",
    "fla": "flash-linear-attention",
}
"""Module name → package name, if they differ by more than a dash."""


@contextmanager
def package_errors(model: str) -> Iterator[None]:
    """Replace an error about a missing package by a ModelError that says how to install it. Other errors pass.

    A package also counts as missing if it lacks a name that the model's code imports.
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        line = describe_import_error(model, error)
        if line is None:
            raise
        raise ModelError(line) from error


@contextmanager
def building_errors(model: str, config: Any) -> Iterator[None]:
    """Replace errors while a model is built from its config by a one-line ModelError; out-of-memory errors pass."""
    try:
        with package_errors(model):
            yield
    except ModelError:
        raise
    except (Exception, SystemExit) as error:  # a checkpoint's own code may raise anything
        if is_out_of_memory(error):
            raise
        raise ModelError(describe_building_error(model, config, error)) from error


def describe_config_error(model: str, values: Mapping[str, Any], error: BaseException, *, trusted: bool) -> str:
    """Return the error line for a config that transformers refuses.

    Args:
        model: the model's name.
        values: the content of config.json.
        error: the refusal.
        trusted: whether the user allowed the checkpoint's own code.
    """
    import transformers

    kind, version = values.get("model_type"), transformers.__version__
    if trusted and values.get("auto_map"):
        return _own_code_fails(model, error)
    if isinstance(kind, str) and kind not in transformers.CONFIG_MAPPING:
        return f"{model} is of the type {kind}, which transformers {version} does not know; upgrade transformers"
    return f"the config of {model} cannot be used ({first_line(error)}); correct config.json, or use the model's original one"


def _own_code_fails(model: str, error: BaseException) -> str:
    import transformers

    if absent := re.search(r"does not appear to have a file named ([\w./-]+\.py)", str(error)):
        return f"{model} lacks {absent[1]}, the Python code that its config.json names; download that file too"
    return (
        f"the Python code of {model} fails with transformers {transformers.__version__} ({type(error).__name__}: "
        f"{first_line(error)}); use a newer version of the checkpoint, or the version of transformers that its card names"
    )


def describe_building_error(model: str, config: Any, error: BaseException) -> str:
    """Return the error line for a model that could not be built from its config."""
    import transformers

    version, what = transformers.__version__, f"{type(error).__name__}: {first_line(error)}"
    if brings_code(config):
        return _own_code_fails(model, error)
    return (
        f"transformers {version} cannot build {model} from its config ({what}); correct config.json, or use the model's "
        "original one"
    )


def brings_code(config: Any) -> bool:
    """Return whether a config's class is defined in the checkpoint's own Python code."""
    return type(config).__module__.partition(".")[0] == "transformers_modules"


def describe_import_error(model: str, error: BaseException) -> str | None:
    """Return a line that says what to install, for an ImportError or an error caused by one; None for any other error."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ImportError):
        cause = cause.__cause__
    if cause is None:
        return None
    names = _packages(cause)
    if names:
        verb = "which is" if len(names) == 1 else "which are"
        return f"{model} needs {' and '.join(names)}, {verb} not installed: pip install {' '.join(names)}"
    import transformers

    return (
        f"the code for {model} does not work with the packages that are installed, transformers {transformers.__version__} "
        f"among them ({first_line(cause)}); use a newer version of the checkpoint, or leave out --trust-remote-code if "
        "transformers knows the model"
    )


def _packages(error: ImportError) -> list[str]:
    """Return the packages to install by pip; an empty list if the package is installed and something else is wrong."""
    text = str(error)
    # transformers lists several names in one message. Some are names of modules.
    if found := re.search(r"pip install ((?:-U |--upgrade )?)([\w.,\- ]*\w)", text):
        return [_pip_name(name) for name in found.group(2).replace(",", " ").split()]
    if found := re.search(r"requires the ([\w\-]+) library", text):
        return [_pip_name(found.group(1))]
    if "package for FlashAttention2" in text:  # a config may ask for it
        return ["flash-attn"]
    root = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or not root or root == "transformers_modules" or _is_there(root):
        return []
    return [_pip_name(root)]


def _pip_name(module: str) -> str:
    return _PIP_NAMES.get(module, module.replace("_", "-"))


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, with the second if the first ends in a colon.

    Without a text, return the name of its type.
    """
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
