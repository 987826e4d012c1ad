"""Faster evaluation with lm_eval. Its tasks and model class are used, and what does not depend on the weights is reused.

For every model, lm_eval renders the tasks' documents with one compiled Jinja template each, and tokenises every text. Here
requests and token ids are kept for the next model, and each template is compiled once. On CUDA the size of the logits limits
the batches. Log-likelihoods and metrics are lm_eval's own.

Reason: lm_eval's ``HFLM`` takes 2 ms more of CPU time per document, for any model. Measured with a tiny LLaMA on one CPU core,
lm_eval 0.4.13, five tasks of 200 documents, equal scores: every model after the first takes 0.5 to 0.9 s here and 2.7 to 2.9 s
with ``HFLM``. It takes 1.2 to 1.6 s here if templates are compiled again, and 0.8 to 1.0 s if token ids are not kept. All 7153
documents of these tasks would take 14 s more per model. A cell of the study of SmolLM2-135M takes 22 s on an H200, 11 s of them
for these tasks, so it would be more than 20 % slower (computed, not measured on a GPU). On a CPU the difference does not
matter: the forward passes of that model take 0.6 s per document.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from thanos.events import Event
from thanos.model.attention import fast_attention
from thanos.model.bos import added_bos, without_bos

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SEQUENCES = {"cpu": 16, "cuda": 64}
"""Sequences per forward pass, by type of device. Larger batches are not faster on a CPU. On CUDA the number holds only for
requests that are not log-likelihoods; :data:`_LOGITS_BYTES` limits the others."""

_LOGITS_BYTES = 2 << 30
"""Bytes of the logits of one forward pass on CUDA; their log-softmax needs the same again. It is not a fraction of the free
memory, since scores should not depend on other programs on the device."""

TokenIds = dict[tuple[str, bool | None, bool | None, int | None], array]
"""(text, add_special_tokens, add_bos_token, left_truncate_len) → token ids."""


# --- tasks ------------------------------------------------------------------------------------------------------------


def keep_requests(task: Any) -> Any:
    """Make a task of lm_eval build its requests once and reuse them with empty answers; return the task."""
    build = task.build_all_requests
    kept: dict[str, list[Any]] = {}

    def build_all_requests(**settings: Any) -> None:
        key = repr(sorted(settings.items()))
        if key not in kept:
            build(**settings)
            kept.clear()  # keep the requests of one limit only
            kept[key] = task._instances
        for request in kept[key]:
            request.resps, request.filtered_resps = [], {}
        task._instances = kept[key]

    task.build_all_requests = build_all_requests
    return task


@contextmanager
def templates_compiled_once() -> Iterator[None]:
    """Compile each of lm_eval's Jinja templates once. Without this, lm_eval compiles it for every field of every document."""
    from lm_eval import utils

    environment: Any = utils.env
    environment.from_string = lru_cache(maxsize=1024)(environment.from_string)
    try:
        yield
    finally:
        del environment.from_string  # restores the method of the class


# --- token ids --------------------------------------------------------------------------------------------------------


def kept_ids(tokenizer: Any) -> TokenIds:
    """Return the dict that keeps a tokenizer's token ids. Equal tokenizers share it; only that of the last one is kept."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer written in Python: equality cannot be determined
        return {}
    settings = {name: str(value) for name, value in tokenizer.init_kwargs.items() if name != "name_or_path"}
    described = f"{type(tokenizer).__qualname__} {sorted(settings.items())} {backend.to_str()}"
    return _ids_of(hashlib.sha256(described.encode()).hexdigest())


@lru_cache(maxsize=1)
def _ids_of(identity: str) -> TokenIds:
    return {}


# --- the model --------------------------------------------------------------------------------------------------------


def wrap(network: PreTrainedModel, tokenizer: Any, emit: Callable[[Event], None], *, bos: bool = False) -> Any:
    """Return lm_eval's model class around a loaded model, which is on its device and in eval mode.

    ``emit`` gets events with the number of answered requests. ``bos``: whether lm_eval adds a beginning-of-text token before
    each request (its ``add_bos_token``). Otherwise a request begins as the tokenizer begins a text.
    One without a context does so too.
    """
    from lm_eval.models import huggingface

    base: Any = huggingface.HFLM
    known, begin = kept_ids(tokenizer), added_bos(tokenizer)

    class Wrapped(base):
        done = total = 0
        tokens = 0  # largest number per batch; 0 if a batch has a fixed number of sequences
        size = end = 0  # of the current batch: its number of sequences, and the index after its last one
        batch_size_per_gpu: Any

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            self.total = len(requests)
            while True:
                self.done = 0
                try:
                    return super().loglikelihood(requests, disable_tqdm=True)
                except torch.OutOfMemoryError:  # most likely in the first batch, which has the longest sequences
                    if not self.halve():
                        raise
                torch.cuda.empty_cache()  # outside the handler, whose traceback keeps the batch alive

        def halve(self) -> bool:
            """Halve the batches; return False if they cannot be smaller."""
            if self.tokens > 1:
                self.tokens //= 2
            elif not self.tokens and self.batch_size_per_gpu > 1:
                self.batch_size_per_gpu //= 2
            else:
                return False
            return True

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
        ) -> list[int]:
            key = (string, add_special_tokens, self.add_bos_token, left_truncate_len)
            if key not in known:
                known[key] = array("i", super().tok_encode(string, add_special_tokens, left_truncate_len))
            return known[key].tolist()

        def begun(self, request: Any) -> Any:
            """Return a request whose context is all tokens that begin a text, if lm_eval put only one for an empty one."""
            texts, *_ = request
            if len(begin) < 2 or not texts or texts[0] != "":
                return request
            text = without_bos(self.tok_encode(texts[1], add_special_tokens=False), begin)
            return texts, list(begin), text

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **others: Any) -> Any:
            requests = [self.begun(request) for request in requests]
            if not self.tokens:
                return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, **others)
            # With "auto" lm_eval calls _batch_scheduler.
            sequences, self.batch_size_per_gpu = self.batch_size_per_gpu, "auto"
            try:
                return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm)
            finally:
                self.batch_size_per_gpu = sequences

        def _batch_scheduler(self, pos: int, n_reordered_requests: Any) -> int:
            if pos in (0, self.end):  # a batch begins; its first sequence is its longest
                _, context, continuation = n_reordered_requests[pos]
                self.size = max(1, self.tokens // (len(context) + len(continuation)))
                self.end = pos + self.size
            return self.size

        def _model_call(self, inps: Any, *arguments: Any, **others: Any) -> Any:
            self.done += len(inps)
            # One sequence answers all requests that share a context, so `done` may end below `total`.
            if self.total:
                emit(Event(kind="progress", phase="tasks", done=min(self.done, self.total), total=self.total))
            with fast_attention(network.device, network.dtype):
                return super()._model_call(inps, *arguments, **others)

    sequences = _SEQUENCES.get(network.device.type, _SEQUENCES["cpu"])
    first = begin[0] if begin else None
    model = Wrapped(
        pretrained=network, tokenizer=tokenizer, batch_size=sequences, add_bos_token=bos or None, prefix_token_id=first
    )
    if network.device.type == "cuda":
        width = getattr(network.config.get_text_config(), "vocab_size", len(tokenizer))
        model.tokens = max(1, _LOGITS_BYTES // (width * network.dtype.itemsize))
    return model
