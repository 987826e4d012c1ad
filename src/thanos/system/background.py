"""One thread behind the main one: copies and file work that overlap with running blocks and solving layers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Background:
    """Does pieces of work in the order in which they were handed over, at most ``limit`` of them unfinished.

    On CUDA the work runs on a stream of its own, which first waits for what the caller had launched when handing it over.

    Args:
        name: of the thread.
        device: where the caller computes.
        limit: unfinished pieces; another one has to wait. It bounds the memory that they hold.
    """

    def __init__(self, name: str, device: torch.device, limit: int = 2) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._device, self._limit = device, limit
        self._room = threading.Semaphore(limit)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._error: BaseException | None = None

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Hand over work whose result, or error, the caller asks for; waits while too much is unfinished."""
        return self._hand_over(function, arguments)

    def post(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Hand over work without a result; its error comes out at the next :meth:`post` or :meth:`flush`."""
        self._raise()
        self._hand_over(function, arguments, self._note)

    def flush(self) -> None:
        """Wait until everything handed over is done; raises the first error of posted work."""
        for _ in range(self._limit):
            self._room.acquire()
        self._room.release(self._limit)
        self._raise()

    def close(self) -> None:
        """Drop what has not begun, wait for what has, and end the thread. Raises nothing."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _hand_over(
        self, function: Callable[..., T], arguments: tuple[Any, ...], then: Callable[[Future[T]], None] | None = None
    ) -> Future[T]:
        self._room.acquire()
        launched = torch.cuda.current_stream(self._device).record_event() if self._stream is not None else None
        future = self._pool.submit(self._do, launched, function, *arguments)
        if then is not None:
            future.add_done_callback(then)  # before there is room again, so that flush sees what it notes
        future.add_done_callback(lambda _: self._room.release())
        return future

    def _do(self, launched: Any, function: Callable[..., T], *arguments: Any) -> T:
        # `launched` is a CUDA event, or None. Streams and grad mode belong to a thread: this one has to enter its own.
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
