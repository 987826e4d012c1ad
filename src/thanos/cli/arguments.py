"""Commands that check their words before the argument parser, which accepts some mistakes and reports others unclearly.

Their help shows the options under headings, each with its default, and examples at the end.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from typer.core import TyperCommand, TyperGroup

from thanos.cli.options import NUMBERS, SETTINGS, WORDS_TOO
from thanos.errors import UserError
from thanos.settings import Heading, words
from thanos.system.ranks import is_main_process
from thanos.system.suggestions import near, near_number, near_whole

_HELP = ("-h", "--help")
_SETTING_OF = {f"--{name.replace('_', '-')}": described for name, described in SETTINGS.items()}
"""Option → its setting, for options of a recipe."""


class Command(TyperCommand):
    """A command that checks its words before the argument parser reads them, and groups its options in its help."""

    def __init__(self, *args: Any, **others: Any) -> None:
        super().__init__(*args, **others)
        parameters: list[Any] = self.params
        for one in parameters:  # the help states each default: the text of ``show_default``, else the value
            if one.param_type_name == "option" and one.name != "help":
                default = one.show_default if isinstance(one.show_default, str) else words(one.default)
                stated = "" if one.required else f" (default: {default})"
                one.help, one.show_default = f"{one.help}{stated}.", False

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the options under their headings. Options without a heading are under the last one."""
        arguments: list[Any] = []
        options: dict[str, list[Any]] = {heading: [] for heading in Heading}
        parameters: list[Any] = self.get_params(ctx)
        for one in parameters:
            record = one.get_help_record(ctx)
            if record is not None:
                is_option = one.param_type_name == "option"
                (options[one.rich_help_panel or Heading.OUTPUT] if is_option else arguments).append(record)
        if arguments:
            with formatter.section("Arguments"):
                formatter.write_dl(arguments)
        formatter.write("\nOptions:\n")
        for heading, records in options.items():
            if records:
                formatter.write(f"\n {heading}:\n")
                with formatter.indentation():
                    formatter.write_dl(records)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples without wrapping: a wrapped command cannot be copied."""
        if self.epilog:
            formatter.write(f"\nExamples:\n{self.epilog}\n")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words. Print a warning if an option is given twice; the last one counts.

        Raises UserError for an unknown option, a missing, empty or non-numeric value, and for too many arguments.
        """
        if args and not any(word in _HELP for word in args):
            words = _Words(self, ctx.command_path, args)
            args = list(words)
            for note in words.notes if is_main_process() else ():
                print(f"warning: {note}", file=sys.stderr)
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if getattr(error, "ctx", ctx) is None:  # without a context the message could not name the command's help
                error.ctx = ctx  # type: ignore[attr-defined]
            raise


class Group(TyperGroup):
    """A group of commands that suggests the nearest command for an unknown one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words; without any, show the help. Raises UserError for an unknown option before the command."""
        args = [] if args == ["--"] else args
        options = [name for param in self.params for name in (*param.opts, *param.secondary_opts)] + ["--help"]
        word = (args or ["--help"])[0].partition("=")[0]
        if word.startswith("-") and word not in (*options, "-h", "--"):
            commands = [self.get_command(ctx, name) for name in self.list_commands(ctx)]
            later = any(word in param.opts for command in commands if command for param in command.params)
            hint = "; give it after the command" if later else near(word, options)
            raise UserError(f"there is no option {word} before the command{hint}; see {ctx.command_path} --help")
        return super().parse_args(ctx, args or ["--help"])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that the first word names. Raises UserError if there is none."""
        name, commands = args[0], self.list_commands(ctx)
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            raise UserError(
                f"there is no command {name!r}{near(name, commands)}; choose one of {', '.join(commands)}; see "
                f"{ctx.command_path} --help"
            )
        return super().resolve_command(ctx, args)


class _Words:
    """The checked words of one command.

    A leading ``~/`` of a value is expanded, since the shell does not expand it after ``=``.
    """

    def __init__(self, command: Any, path: str, words: Sequence[str]) -> None:
        self._path, self._words = path, list(words)
        self._options = {name: p for p in command.params for name in (*p.opts, *p.secondary_opts) if name[:1] == "-"}
        self._arguments = [p for p in command.params if p.param_type_name == "argument"]
        self._given: set[str] = set()
        self._positional = 0
        self.notes: list[str] = []

    def __iter__(self) -> Iterator[str]:
        waiting = iter(self._words)
        for word in waiting:
            if word == "--":
                yield word
                for rest in waiting:
                    yield self._argument(rest)
                return
            name, equals, value = word.partition("=")
            if word[:1] != "-" or word == "-":
                yield self._argument(word)
            elif name[:2] == "--" or name in self._options:
                option = self._option(name)
                if getattr(option, "is_flag", False):
                    yield word
                    continue
                value = value if equals else next(waiting, None)
                yield name
                yield self._value(name, option, value)
            else:
                self._short(word)
                yield word

    def _option(self, name: str) -> Any:
        option = self._options.get(name)
        if option is None:
            raise self._refusal(f"there is no option {name}{near(name, [*self._options, '--help'])}")
        return option

    def _short(self, word: str) -> None:
        """Refuse a word such as ``-sparsity``: the parser would read it as one-letter options."""
        known = all(f"-{letter}" in self._options for letter in word[1:])
        hint = near(f"-{word}", [name for name in self._options if name.startswith("--")])
        if hint and not known:
            raise self._refusal(f"there is no option {word.partition('=')[0]}{hint}")

    def _argument(self, word: str) -> str:
        self._positional += 1
        names = [argument.metavar or argument.name.upper() for argument in self._arguments]
        if self._arguments and self._arguments[-1].nargs == -1:  # the last one may be repeated
            self._positional = min(self._positional, len(names))
        if self._positional > len(names):
            quote = "; a glob needs quotes, else the shell expands it" if "--skip" in self._options else ""
            raise self._refusal(
                f"{word!r} is one argument too many: {self._path} takes {' '.join(names) or 'only options'}{quote}"
            )
        if not word.strip():
            raise self._refusal(f"{names[self._positional - 1]} is empty")
        return _expanded(word)

    def _value(self, name: str, option: Any, value: str | None) -> str:
        metavar = option.metavar or "a value"
        if value is None or value.partition("=")[0] in (*self._options, *_HELP):
            where = ", or - for the standard output" if name == "--json" else ""
            after = "" if value is None else f"; got the option {value}"
            raise self._refusal(f"{name} needs a value: {name} {metavar}{where}{after}")
        if not value.strip():
            raise self._refusal(f"{name} is empty; give {metavar}, or leave {name} out")
        if name in self._given and not option.multiple:
            self.notes.append(f"{name} is given twice; the last one counts: {value}")
        self._given.add(name)
        self._check_number(name, option, value)
        return _expanded(value)

    def _check_number(self, name: str, option: Any, value: str) -> None:
        kind = None if name in WORDS_TOO else NUMBERS.get(option.metavar)
        try:
            if kind is not None:
                kind(value)
        except ValueError:
            described = _SETTING_OF.get(name)
            allows = math.isfinite if described is None else described.allows
            fraction = described is not None and described.below == 1
            hint = near_whole(value, allows) if kind is int else near_number(value, fraction=fraction, allows=allows)
            what = "a whole number" if kind is int else "a number"
            raise self._refusal(f"{name} must be {what}; got {value!r}{hint}") from None

    def _refusal(self, message: str) -> UserError:
        return UserError(f"{message}; see {self._path} --help")


def _expanded(word: str) -> str:
    return str(Path(word).expanduser()) if word == "~" or word.startswith("~/") else word
