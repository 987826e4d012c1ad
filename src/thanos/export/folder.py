"""The output folder of an export: written completely, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from thanos.errors import UserError, resource_errors
from thanos.run.lock import locked
from thanos.run.work_folder import WorkFolder, check_interrupted, check_output


@contextmanager
def written(out: Path, *, model: Path | None, overwrite: bool, what: str) -> Iterator[Path]:
    """Yield a hidden folder next to ``out`` that is renamed to it at the end; after an error nothing is left.

    ``model`` is the folder of the model that is read; None if it is not local. ``what`` is the command, as in ``{"command":
    "pack"}`` of the work folder's description. Raises UserError if ``out`` may not be written, or another process writes it,
    and ResourceError if the disk is full or read-only.
    """
    work = WorkFolder(out)
    check_output(out, model=model, overwrite=overwrite)
    check_interrupted(work, resume=False, overwrite=overwrite, own=False)
    with resource_errors(), locked(out):
        work.tidy(resume=False)
        check_output(out, model=model, overwrite=overwrite)
        check_interrupted(work, resume=False, overwrite=overwrite, own=False)
        try:
            work.start({"command": what})
            yield work.model
            if not overwrite and work.out.is_dir() and any(work.out.iterdir()):
                raise UserError(f"OUT {out} was created during the run; move it away and run again")
            work.publish(overwrite=overwrite)
        except BaseException:
            with suppress(OSError):
                work.remove()
            raise
