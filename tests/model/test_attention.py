"""Attention with shared keys and values, against the same with a copy for each head."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import masking_utils

from helpers import VOCABULARY, tiny_model, windows
from thanos.model.attention import RepeatedHeads, fast_attention, one_sequence_a_row


class Look(TorchFunctionMode):
    """Sees attention's heads, heads of keys, and whether they are said to be shared."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int, bool]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key"), args, strict=False)) | (kwargs or {})
            self.seen.append((given["query"].shape[1], given["key"].shape[1], bool(given.get("enable_gqa"))))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("causal", [True, False])
def test_repeated_heads_compute_what_shared_ones_do(causal: bool) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
    shared = Look()
    with shared, RepeatedHeads():
        got = F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
        named = F.scaled_dot_product_attention(query=query, key=key, value=value, is_causal=causal, enable_gqa=True)
        placed = F.scaled_dot_product_attention(query, key, value, None, 0.0, causal, enable_gqa=True)
    assert shared.seen == [(6, 6, False)] * 3
    torch.testing.assert_close(got, expected)
    assert torch.equal(named, got)
    assert torch.equal(placed, got)


def test_a_model_is_unchanged_but_for_rounding_and_shares_no_heads() -> None:
    torch.manual_seed(0)
    model, ids = tiny_model("llama-3"), torch.randint(3, VOCABULARY, (2, 16))
    with torch.inference_mode(), Look() as look:  # the outer of two modes sees what the inner one makes of it
        expected = model(input_ids=ids).logits
        shared = list(look.seen)
        look.seen.clear()
        with RepeatedHeads():
            got = model(input_ids=ids).logits
    assert shared, "else nothing is seen"
    assert all(heads > keys and gqa for heads, keys, gqa in shared), "else this model shows nothing"
    assert len(look.seen) == len(shared)
    assert all(heads == keys and not gqa for heads, keys, gqa in look.seen)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_only_float32_on_cuda_needs_it() -> None:
    assert isinstance(fast_attention(torch.device("cuda", 0), torch.float32), RepeatedHeads)
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        assert not isinstance(fast_attention(torch.device(device), dtype), RepeatedHeads)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernel_holds_no_matrix_of_scores() -> None:
    query, shared = torch.randn(1, 8, 4096, 64, device="cuda"), torch.randn(1, 2, 4096, 64, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with RepeatedHeads():
        F.scaled_dot_product_attention(query, shared, shared, is_causal=True, enable_gqa=True)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 8 * 4096 * 4096, "a quarter of the scores in float32"


@pytest.mark.parametrize("architecture", ["llama", "gemma-2", "qwen3", "gpt-2", "opt-350m", "qwen3-moe"])
def test_without_the_search_for_packed_rows_logits_are_the_same(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    searches: list[int] = []
    original = masking_utils.find_packed_sequence_indices

    def search(positions: torch.Tensor) -> torch.Tensor | None:
        searches.append(1)
        return original(positions)

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", search)
    model, ids = tiny_model(architecture), windows(3, 40)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        before = len(searches)
        with one_sequence_a_row():
            found = model(input_ids=ids, use_cache=False).logits
    assert len(searches) == before
    assert masking_utils.find_packed_sequence_indices is search
    assert torch.equal(found, expected)


def test_a_release_that_does_not_search_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(masking_utils, "find_packed_sequence_indices")
    with one_sequence_a_row():
        assert not hasattr(masking_utils, "find_packed_sequence_indices")
