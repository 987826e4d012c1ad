"""The command line. The library imports nothing from here. Only this package prints."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

EXIT_USER = 2
EXIT_OTHER = 1
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the ``thanos`` command and exit.

    Exit codes: 0 success, 2 a user's mistake, 130 interrupted (Ctrl-C), 143 terminated (SIGTERM), 1 anything else.
    """
    from thanos.cli import torchrun as ranks

    ranks.watch()
    code = run(sys.argv[1:] if arguments is None else list(arguments))
    if code in (EXIT_INTERRUPTED, EXIT_TERMINATED):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run has ended: a second Ctrl-C must not disturb the exit
    ranks.leave(code)
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    from thanos.cli import torchrun as ranks

    # The command raises instead of exiting, so that _outcome maps every outcome to its exit code.
    again = shlex.join([*ranks.program(), *(word for word in arguments if word != "--resume"), "--resume"])
    words = list(arguments) or ["--help"]
    return guard(lambda: _with_resource_errors(lambda: _command(words)), again=again)


def _command(words: list[str]) -> Any:
    from thanos.cli.app import app  # imported late: its options read the registry, which imports the user's plug-ins

    return app(words, prog_name="thanos", standalone_mode=False)


def _with_resource_errors(action: Callable[[], Any]) -> Any:
    """Run an action. Convert errors of the operating system that a user can fix to a UserError."""
    from thanos.errors import resource_errors

    with resource_errors():
        return action()


def guard(action: Callable[[], Any], *, again: str = "") -> int:
    """Run an action and return the exit code of its outcome. An error is printed as one line on the standard error.

    SIGTERM ends the action as Ctrl-C does. ``again`` is the command that resumes it if it ends early.
    """
    from thanos.cli.interrupts import EndedEarly, terminable

    with terminable() as terminated:
        try:
            code = action()
            if code == EXIT_INTERRUPTED:  # the argument parser has caught the interrupt and returned its code
                raise KeyboardInterrupt
            sys.stdout.flush()
        except EndedEarly as ended:
            return _outcome(ended.error, ended.hint(again), bool(terminated))
        except (KeyboardInterrupt, Exception) as error:
            return _outcome(error, "", bool(terminated))
    return code if isinstance(code, int) else 0


def _outcome(error: BaseException, hint: str, terminated: bool) -> int:
    """Print in one line why an action ended, and return the exit code."""
    from thanos.errors import UserError

    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        what, code = ("terminated", EXIT_TERMINATED) if terminated else ("interrupted", EXIT_INTERRUPTED)
        return _fail(f"{what}{hint}", code)
    if isinstance(error, UserError):
        return _fail(f"{error}{hint}", EXIT_USER)
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python reports the error again at exit
        return EXIT_OTHER
    if hasattr(error, "format_message"):  # the argument parser's error about the arguments
        from thanos.cli.app import usage_line

        return _fail(usage_line(error), EXIT_USER)
    if os.environ.get("THANOS_DEBUG"):
        raise error
    line = (str(error).strip().splitlines() or [""])[0]
    return _fail(f"unexpected {type(error).__name__}: {line} (set THANOS_DEBUG=1 for the traceback){hint}", EXIT_OTHER)


def _fail(message: str, code: int) -> int:
    from thanos.cli.torchrun import report_failure

    report_failure(message)
    return code
