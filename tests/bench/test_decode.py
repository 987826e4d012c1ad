"""The benchmark of decoding: what it counts, against the models themselves."""

from __future__ import annotations

import functools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import tiny_model
from sparse_matrices import save_pruned
from thanos.bench.decode import read_rate, time_decoding, time_network
from thanos.bench.weights import weight_bytes
from thanos.cli import run
from thanos.errors import DataError
from thanos.export.pack import pack
from thanos.sparse import loader

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("decode")
    save_pruned(folder / "dense")
    pack(folder / "dense", folder / "packed", least_weights=1)
    return str(folder / "packed"), str(folder / "dense")


def continued(model: Any, prompt: torch.Tensor, count: int) -> torch.Tensor:
    """The next tokens by transformers' own greedy decoding. The prompt may hold the pad token, which is not to be masked."""
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)[0, prompt.shape[1] :]


def test_the_report_counts_bytes_and_tokens(models, monkeypatch):
    monkeypatch.setenv(loader.UNPACK, "never")
    report = time_decoding(models[0], dense=models[1], device=CPU, context=9, new_tokens=5)
    packed, dense = report.models
    plain = AutoModelForCausalLM.from_pretrained(models[1])
    prompt = torch.randint(0, 320, (1, 9), generator=torch.Generator().manual_seed(0))
    expected = continued(plain, prompt, 6)
    assert dense.tokens == expected.tolist()
    assert packed.tokens == dense.tokens
    assert report.same_tokens == 5
    assert packed.packed_layers == 21
    assert dense.packed_layers == 0
    sizes = [parameter.nbytes for parameter in plain.parameters()]
    buffers = sum(buffer.nbytes for buffer in plain.buffers())
    assert dense.weight_bytes == sum(sizes) + buffers
    assert dense.read_bytes == dense.weight_bytes - plain.get_input_embeddings().weight.nbytes
    record = json.loads((Path(models[0]) / "packing.json").read_text())
    assert dense.weight_bytes - packed.weight_bytes == record["dense_bytes"] - record["nbytes"]
    assert packed.bytes_per_second == pytest.approx(packed.read_bytes * packed.tokens_per_second)


def test_a_tied_embedding_counts_once_and_is_read(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_pruned(tmp_path / "tied", "tinyllama"))
    total, read = weight_bytes(model)
    assert total == read == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def test_too_many_tokens_are_refused_before_a_model_is_loaded(models, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("thanos.bench.decode.load_model", None)
    with pytest.raises(DataError, match="256 positions"):
        time_decoding(models[0], device=CPU, context=250, new_tokens=20)
    with pytest.raises(DataError, match="at least 1"):
        time_decoding(models[0], device=CPU, context=0)


def test_each_model_is_compiled_as_if_it_were_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        compiled[-1] += 1
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    for width in (64, 32):
        model = tiny_model("llama", intermediate_size=width).eval().requires_grad_(False)
        compiled.append(0)
        assert len(time_network(model, "m", context=4, new_tokens=4, compiled=True).tokens) == 5
    assert compiled[0] == compiled[1] > 0


def test_the_time_of_compiling_is_not_that_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """All compilations are over before the first timed step, also if few steps are timed."""
    from thanos.bench import decode

    compiled: list[int] = []
    timed: list[int] = []
    steps = decode._plain_steps

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(1)
        return graph.forward

    def watched(model: Any, call: Any, prompt: Any, count: int) -> Any:
        before = len(compiled)
        result = steps(model, call, prompt, count)
        timed.append(len(compiled) - before)
        return result

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(decode, "_plain_steps", watched)
    model = tiny_model("llama").eval().requires_grad_(False)
    time_network(model, "m", context=4, new_tokens=2, compiled=True)
    assert timed[0] > 0
    assert timed[1:] == [0]


def test_reading_has_a_rate():
    assert read_rate(CPU) > 1e6


def test_the_command_prints_both_models(models, capsys):
    arguments = ["bench", "decode", models[0], "--dense", models[1], "--device", "cpu", "--context", "5"]
    assert run([*arguments, "--new-tokens", "2", "--quiet"]) == 0
    text = capsys.readouterr().out
    assert "tokens/s" in text
    assert "of 2 new tokens are the same" in text
    assert run([*arguments, "--new-tokens", "2", "--quiet", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_the_steps_of_a_graph_are_greedy_decoding(models, compiled):
    torch._dynamo.reset()
    report = time_decoding(
        models[0], dense=models[1], device=torch.device("cuda", 0), context=9, new_tokens=8, compiled=compiled
    )
    assert report.models[0].packed_layers == 21
    plain = AutoModelForCausalLM.from_pretrained(models[1]).cuda()
    prompt = torch.randint(0, 320, (1, 9), generator=torch.Generator().manual_seed(0))
    for one in report.models:
        assert len(one.tokens) == 9
        tokens = torch.tensor([one.tokens])
        with torch.no_grad():
            logits = plain(torch.cat([prompt, tokens], 1).cuda()).logits[0, 8:-1].float().cpu()
        chosen = logits.gather(1, tokens.T).squeeze(1)
        assert bool((chosen >= logits.amax(1) - 0.1).all())  # other kernels round otherwise


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_packed_model_decodes_in_a_thread_of_its_own(models):
    model = AutoModelForCausalLM.from_pretrained(models[0], device_map="cuda:0").eval()
    prompt = torch.randint(0, 320, (1, 9), generator=torch.Generator().manual_seed(0)).cuda()
    expected = continued(model, prompt, 5)
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(continued, model, prompt, 5).result(), expected)
