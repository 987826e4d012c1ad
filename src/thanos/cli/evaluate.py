"""``thanos eval``: perplexity, distance to the dense model, or zero-shot accuracy."""

from __future__ import annotations

from typing import Annotated, Any

from thanos.cli.options import (
    JsonFile,
    MaxWindows,
    Model,
    Quiet,
    SequenceLength,
    TaskFolder,
    TaskLimit,
    Threads,
    examples,
    given,
    option,
    use_threads,
    with_settings,
)
from thanos.errors import DataError
from thanos.settings import TEXT_SOURCES, Heading

EXAMPLES = examples(
    ("Perplexity on WikiText-2", "thanos eval pruned"),
    (
        "Compare with the dense model on your own text",
        "thanos eval pruned --text held-out.jsonl --dense meta-llama/Llama-3.2-1B",
    ),
    ("Zero-shot accuracy on the seven tasks of the paper", "thanos eval pruned --tasks paper --limit 100"),
)


@with_settings("device", "dtype", "trust_remote_code")
def evaluate(
    model: Model,
    *,
    text: Annotated[
        str | None, option(f"Text: {TEXT_SOURCES}", Heading.PERPLEXITY, "SOURCE", default="wikitext2")
    ] = None,
    sequence_length: SequenceLength = 2048,
    max_windows: MaxWindows = None,
    dense: Annotated[
        str | None,
        option(
            "Compare with this dense model: KL divergence (nats per token) and top-1 agreement",
            Heading.PERPLEXITY,
            "MODEL",
        ),
    ] = None,
    bos: Annotated[
        str,
        option(
            "Position of the beginning-of-text token, if the tokenizer adds one: window (start of each window), text (start of "
            "the text only), or auto (window if that lowers the perplexity of the first windows by at least 10 percent, "
            "measured on the dense model if one is given)",
            Heading.PERPLEXITY,
            "POSITION",
        ),
    ] = "auto",
    tasks: Annotated[
        str | None,
        option(
            "Measure zero-shot accuracy on these lm_eval tasks instead of perplexity: names separated by commas, or paper for "
            "the seven tasks of the paper",
            Heading.TASKS,
            "NAMES",
        ),
    ] = None,
    task_folder: TaskFolder = None,
    limit: TaskLimit = None,
    no_cache: Annotated[
        bool,
        option(
            "Score tasks again, even those with stored scores",
            Heading.TASKS,
            None,
            "--no-cache",
            default="reuse the scores",
        ),
    ] = False,
    threads: Threads = None,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    **settings: Any,
) -> None:
    """Measure the perplexity of MODEL, and its distance to a dense model; or its zero-shot accuracy."""
    from thanos.cli import output, tables
    from thanos.cli import progress as display

    display.hush()
    import thanos

    use_threads(threads)
    tables.check_writable(json_file)
    common: dict[str, Any] = {"bos": bos, **given(settings)}
    if tasks is not None:
        if text is not None or dense is not None:
            raise DataError(
                "--tasks measures accuracy instead of perplexity; leave out --text and --dense, or run eval twice"
            )
        from thanos.evaluation.tasks import task_names

        with display.watch(quiet=quiet) as watcher:
            scores = thanos.zero_shot(
                model,
                tasks=task_names(tasks.split(",")),
                task_folder=task_folder,
                limit=limit,
                cache=not no_cache,
                on_event=watcher,
                **common,
            )
        output.show_zero_shot(scores, json_file)
        return
    if task_folder is not None or limit is not None or no_cache:
        raise DataError("--task-folder, --limit and --no-cache need --tasks; name the tasks")
    with display.watch(quiet=quiet) as watcher:
        result = thanos.evaluate(
            model,
            text=text or "wikitext2",
            sequence_length=sequence_length,
            max_windows=max_windows,
            dense=dense,
            on_event=watcher,
            **common,
        )
    output.show_evaluation(result, json_file)
