"""Turn what transformers and a checkpoint's own code raise into one line that says what to do."""

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
"""Module name → package name, if they differ by more than a dash."""


@contextmanager
def package_errors(model: str) -> Iterator[None]:
    """Turn an error about a missing package into one that says how to install it. Other errors pass.

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
        f"among them ({first_line(cause)}); take a newer version of the checkpoint, or leave out --trust-remote-code if "
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
    """Return the first line of an error's text, or its type's name if the text is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
