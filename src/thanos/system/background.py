"""A background thread, for copies and file access during computation, and a pool for single-threaded work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, TypeVar

import torch

A = TypeVar("A")
T = TypeVar("T")


class Background:
    """Runs tasks in the order in which they are submitted.

    On CUDA the tasks run on a separate stream. Before each task the stream waits for the work that the caller had launched
    when it submitted the task.

    Args:
        name: name of the thread.
        device: device on which the caller computes.
        limit: largest number of unfinished tasks. It bounds the memory that they hold. At the limit a submission waits.
    """

    def __init__(self, name: str, device: torch.device, limit: int = 2) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._device, self._limit = device, limit
        self._room = threading.Semaphore(limit)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._error: BaseException | None = None

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Submit a task and return its future, which holds the result or the error. Waits at the limit."""
        return self._enqueue(function, arguments)

    def post(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Submit a task without a result. Its error is raised by the next :meth:`post` or :meth:`flush`. Waits at the limit."""
        self._raise()
        self._enqueue(function, arguments, self._note)

    def flush(self) -> None:
        """Wait until every task is done. Raises the first error of a posted task."""
        for _ in range(self._limit):
            self._room.acquire()
        self._room.release(self._limit)
        self._raise()

    def close(self) -> None:
        """Cancel the tasks that have not begun, wait for the running one, and end the thread. Raises nothing."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _enqueue(
        self, function: Callable[..., T], arguments: tuple[Any, ...], then: Callable[[Future[T]], None] | None = None
    ) -> Future[T]:
        self._room.acquire()
        launched = torch.cuda.current_stream(self._device).record_event() if self._stream is not None else None
        future = self._pool.submit(self._do, launched, function, *arguments)
        if then is not None:
            future.add_done_callback(then)  # before the slot is free again, so that flush sees the error
        future.add_done_callback(lambda _: self._room.release())
        return future

    def _do(self, launched: Any, function: Callable[..., T], *arguments: Any) -> T:
        # `launched` is a CUDA event, or None. The current stream and the grad mode are thread-local: set both here.
        with torch.no_grad(), nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            if launched is not None:
                torch.cuda.current_stream(self._device).wait_event(launched)
            return function(*arguments)

    def _note(self, future: Future[Any]) -> None:
        if not future.cancelled() and self._error is None:
            self._error = future.exception()

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def on_threads(work: Callable[[A], T], parts: Sequence[A]) -> list[T]:
    """Return ``work(part)`` for each part, on as many threads as torch uses. For work that is single-threaded by itself."""
    threads = min(torch.get_num_threads(), len(parts))
    if threads < 2:
        return [work(part) for part in parts]
    inference = torch.is_inference_mode_enabled()  # a mode belongs to a thread

    def here(part: A) -> T:
        with torch.inference_mode(inference):
            return work(part)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(here, parts))
