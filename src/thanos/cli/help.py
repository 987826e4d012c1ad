"""The output of ``--help``: plain text, options under headings, each with its default, and examples at the end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from thanos.settings import Heading, words


def state_defaults(parameters: Iterable[Any]) -> None:
    """Add the default to each option's help text: the text of ``show_default``, else the value."""
    for one in parameters:
        if one.param_type_name == "option" and one.name != "help":
            default = one.show_default if isinstance(one.show_default, str) else words(one.default)
            one.help, one.show_default = f"{one.help} (default: {default}).", False


def write_options(parameters: Iterable[Any], ctx: Any, formatter: Any) -> None:
    """Write the arguments, then the options under their headings. Options without a heading are under the last one."""
    arguments: list[Any] = []
    options: dict[str, list[Any]] = {heading: [] for heading in Heading}
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


def write_examples(text: str | None, formatter: Any) -> None:
    """Write the examples without wrapping: a wrapped command cannot be copied."""
    if text:
        formatter.write(f"\nExamples:\n{text}\n")
