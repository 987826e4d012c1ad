"""What transformers and a checkpoint's own code raise, told as what a person can do about it."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager

from thanos.errors import ModelError

_PIP_NAMES = {
    "PIL": "pillow",
    "cv2": "opencv-python",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
    "google": "protobuf",
    "fla": "flash-linear-attention",
}
"""Module → package, where they differ by more than a dash."""


@contextmanager
def package_errors(model: str) -> Iterator[None]:
    """Turn the absence of a package that a model needs into an error that says how to install it; others pass.

    Args:
        model: its name, for the message.

    Raises:
        ModelError: a package is missing, or lacks what the model's code imports from it.
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


def describe_import_error(model: str, error: BaseException) -> str | None:
    """Say what to install for an ImportError, or for an error that one caused; None for any other error."""
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
        f"among them ({first_line(cause)}); take a newer version of the checkpoint, or leave out --trust-remote-code if "
        "transformers knows the model"
    )


def _packages(error: ImportError) -> list[str]:
    """Return what to install by pip; empty where the package is there and the fault another."""
    text = str(error)
    # transformers collects several names, some of them those of modules.
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
    """Return the first line of an error's text; its type's name where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
