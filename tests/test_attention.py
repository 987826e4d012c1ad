"""Attention with shared keys and values, against the same with a copy for each head."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from helpers import VOCABULARY, tiny_model
from thanos.attention import RepeatedHeads, fast_attention


@pytest.mark.parametrize("causal", [True, False])
def test_repeated_heads_compute_what_shared_ones_do(causal: bool) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
    with RepeatedHeads():
        got = F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(got, expected)


def test_a_model_is_unchanged_but_for_rounding_and_shares_no_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, ids = tiny_model("llama-3"), torch.randint(3, VOCABULARY, (2, 16))
    seen: list[tuple[int, int, bool]] = []

    class Look(RepeatedHeads):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is F.scaled_dot_product_attention:
                seen.append((args[0].shape[1], args[1].shape[1], bool((kwargs or {}).get("enable_gqa"))))
            return func(*args, **(kwargs or {}))

    with torch.inference_mode(), Look():  # the outer of two modes sees what the inner one makes of it
        expected = model(input_ids=ids).logits
        shared = list(seen)
        seen.clear()
        with RepeatedHeads():
            got = model(input_ids=ids).logits
    assert all(heads > keys and gqa for heads, keys, gqa in shared), "else this model shows nothing"
    assert len(seen) == len(shared)
    assert all(heads == keys and not gqa for heads, keys, gqa in seen)
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
