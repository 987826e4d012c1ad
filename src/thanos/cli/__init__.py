"""The command line. Nothing here is imported by the library, and only here is anything printed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

EXIT_USER = 2
EXIT_OTHER = 1
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the ``thanos`` command and exit: 0 fine, 2 a user's mistake, 130 interrupted, 1 anything else."""
    sys.exit(run(sys.argv[1:] if arguments is None else list(arguments)))


def run(arguments: Sequence[str]) -> int:
    """Run one command; return its exit code."""
    from thanos.cli.app import app

    # The command raises instead of exiting, so that every outcome is mapped to its code in one place.
    return guard(
        lambda: _mendable(lambda: app(list(arguments) or ["--help"], prog_name="thanos", standalone_mode=False))
    )


def _mendable(action: Callable[[], Any]) -> Any:
    """Run an action; an error of the operating system that a person can mend becomes a user's mistake."""
    from thanos.errors import system_errors

    with system_errors():
        return action()


def guard(action: Callable[[], Any]) -> int:
    """Run an action; return the exit code of its outcome. An error is one line on the standard error."""
    from thanos.errors import UserError

    try:
        code = action()
        if code == EXIT_INTERRUPTED:  # the argument parser has already caught it
            raise KeyboardInterrupt
        sys.stdout.flush()
    except UserError as error:
        return _fail(str(error), EXIT_USER)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was left behind", EXIT_INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains once more as it exits
        return EXIT_OTHER
    except Exception as error:
        return _unexpected(error)
    return code if isinstance(code, int) else 0


def _unexpected(error: Exception) -> int:
    if hasattr(error, "format_message"):  # a mistake in the arguments, found by the argument parser
        from thanos.cli.app import usage_line

        return _fail(usage_line(error), EXIT_USER)
    if type(error).__name__ == "Abort":
        return _fail("interrupted; nothing was left behind", EXIT_INTERRUPTED)
    if os.environ.get("THANOS_DEBUG"):
        raise error
    line = (str(error).strip().splitlines() or [""])[0]
    return _fail(f"unexpected {type(error).__name__}: {line} (set THANOS_DEBUG=1 to see where)", EXIT_OTHER)


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code
