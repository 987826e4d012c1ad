"""Load the optional C extensions. One that was built from other sources than this Python code is not used."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from thanos.system.library_warnings import warn_once

INTERFACES = {"_cpu": 1, "_encode": 1, "_dense": 1}
"""Extension → the number of its interface, ``INTERFACE`` in its C file. Raise both if the arguments or results of a function
change, or the layout of what they point to: the functions take addresses, so another interface would give wrong numbers."""

NOT_BUILT = "the extension for CPUs was not built: there was no C compiler when the package was installed"


@cache
def load(name: str) -> tuple[Any, str]:
    """Return an extension of this package and an empty string; or None and the reason why it cannot be used.

    It warns once of extensions that were built from another version.
    """
    try:
        extension = import_module(f"thanos.sparse.kernels.{name}")
    except ModuleNotFoundError:
        return None, NOT_BUILT
    except ImportError as error:  # it was built for another system, or a library is missing
        return None, f"the extension for CPUs cannot be loaded: {(str(error).splitlines() or [''])[0]}"
    if getattr(extension, "INTERFACE", None) == INTERFACES[name]:
        return extension, ""
    warn_once(
        "the compiled extensions are of another version of thanos and are not used, so packed models are slower; run "
        "pip install -e . again"
    )
    return None, "the extension for CPUs is of another version of thanos"
