"""Perplexity and divergences against references of a few lines each."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import thanos
from helpers import ARCHITECTURES, POSITIONS, VOCABULARY, prose, save_tiny, tiny_model, tiny_tokenizer
from thanos.errors import CudaUnavailableError, DataError, ModelError, NumericsError, ResourceError, UserError
from thanos.evaluation import perplexity as evaluation
from thanos.evaluation import scoring
from thanos.evaluation.perplexity import Evaluation
from thanos.evaluation.scoring import Reference
from thanos.evaluation.windows import cut_windows
from thanos.events import Event
from thanos.model.loading import load_model
from thanos.model.source import resolve_model

KEYS = [
    "schema",
    "model",
    "text",
    "text_sha256",
    "sequence_length",
    "bos",
    "bos_ids",
    "windows",
    "tokens",
    "perplexity",
    "mean_loss",
    "dense",
    "dense_perplexity",
    "kl_divergence",
    "top1_agreement",
    "seconds",
    "tokens_per_second",
    "dtype",
    "device",
    "versions",
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Rows of uneven length, some of them empty, and the text that the field makes of them."""
    rows = [x for i in range(30) for x in (prose(3 + 7 * i % 40, seed=i), "")]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return path, "\n\n".join(rows)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same shape."""
    return save_tiny(tmp_path_factory.mktemp("other") / "llama", seed=1)


def reference_windows(text: str, length: int) -> list[list[int]]:
    ids = tiny_tokenizer()(text)["input_ids"]
    return [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]


def reference_perplexity(model: Any, text: str, length: int) -> tuple[float, int]:
    """The field's convention, the way that everyone writes it."""
    losses = []
    for window in reference_windows(text, length):
        ids = torch.tensor([window])
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        for position in range(length - 1):
            scores = logits[0, position].float()
            losses.append(float(torch.logsumexp(scores, 0) - scores[window[position + 1]]))
    return math.exp(sum(losses) / len(losses)), len(losses)


def reference_distance(model: Any, dense: Any, text: str, length: int) -> tuple[float, float]:
    """Mean KL(dense ‖ model) from float64 probabilities, and the share of equal best tokens."""
    divergences, equal = [], []
    for window in reference_windows(text, length):
        ids = torch.tensor([window])
        with torch.no_grad():
            p = dense(input_ids=ids).logits[0, :-1].double().softmax(-1)
            q = model(input_ids=ids).logits[0, :-1].double().softmax(-1)
        divergences += (p * (p / q).log()).sum(-1).tolist()
        equal += (p.argmax(-1) == q.argmax(-1)).tolist()
    return sum(divergences) / len(divergences), sum(equal) / len(equal)


def reload(folder: Path, dtype: Any = "auto") -> Any:
    """The saved model as any user loads it; rotary frequencies stay float32, which ``model.bfloat16()`` would round."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def run(model: Path, text: Path, length: int = 40, *, bos: str = "text", **arguments: Any) -> Evaluation:
    """Evaluate by the field's convention, or with ``bos`` somewhere else."""
    return thanos.evaluate(model, text=str(text), sequence_length=length, bos=bos, device="cpu", **arguments)


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_perplexity(architecture: str, tmp_path: Path, rows: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path, architecture)
    # For Qwen2, transformers replaces the tokenizer that was saved by a byte-level one; the numbers count here.
    monkeypatch.setattr("thanos.model.source.ModelSource.tokenizer", lambda source: tiny_tokenizer())
    result = run(tmp_path, rows[0])
    expected, tokens = reference_perplexity(tiny_model(architecture), rows[1], 40)
    assert result.perplexity == pytest.approx(expected, rel=1e-4)
    assert result.mean_loss == pytest.approx(math.log(expected), rel=1e-5)
    assert result.tokens == tokens
    assert result.dtype == "float32"


@pytest.mark.parametrize("length", [2, 3, 17, 64, POSITIONS])
def test_perplexity_at_other_lengths(tiny_llama: Path, text_file: Path, length: int) -> None:
    text = " ".join(text_file.read_text(encoding="utf-8").split()[:700])
    path = text_file.parent / f"part-{length}.txt"
    path.write_text(text, encoding="utf-8")
    result = run(tiny_llama, path, length)
    expected, tokens = reference_perplexity(tiny_model(), text, length)
    assert result.perplexity == pytest.approx(expected, rel=1e-4)
    assert result.tokens == tokens == (701 // length) * (length - 1)


@pytest.mark.parametrize("chunk", [1, 7, 39, 40, 1000])
def test_perplexity_does_not_depend_on_the_chunk(
    tiny_llama: Path, other: Path, rows: tuple[Path, str], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import thanos.evaluation.scoring

    whole = run(tiny_llama, rows[0], dense=other)
    monkeypatch.setitem(thanos.evaluation.scoring._SCORED_POSITIONS, "cpu", chunk)
    parts = run(tiny_llama, rows[0], dense=other)
    assert parts.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    assert parts.kl_divergence == pytest.approx(whole.kl_divergence, rel=1e-6)
    assert parts.top1_agreement == whole.top1_agreement


@pytest.mark.parametrize("architecture", ["llama", "opt-350m", "gemma-2"])
def test_perplexity_in_bfloat16(architecture: str, tmp_path: Path, rows: tuple[Path, str]) -> None:
    """The model runs in bfloat16, the softmax in float32."""
    save_tiny(tmp_path, architecture, dtype=torch.bfloat16)
    result = run(tmp_path, rows[0])
    expected, _ = reference_perplexity(reload(tmp_path), rows[1], 40)
    assert result.dtype == "bfloat16"
    assert result.perplexity == pytest.approx(expected, rel=1e-4)
    asked = run(tmp_path, rows[0], dtype="float32")
    assert asked.dtype == "float32"
    expected, _ = reference_perplexity(reload(tmp_path, torch.float32), rows[1], 40)
    assert asked.perplexity == pytest.approx(expected, rel=1e-4)
    assert asked.perplexity != pytest.approx(result.perplexity, rel=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gpt-2", "gemma-3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distance_to_the_dense_model(
    architecture: str, dtype: torch.dtype, tmp_path: Path, rows: tuple[Path, str]
) -> None:
    models = [reload(save_tiny(tmp_path / str(seed), architecture, seed=seed, dtype=dtype)) for seed in (0, 1)]
    result = run(tmp_path / "0", rows[0], dense=tmp_path / "1")
    divergence, agreement = reference_distance(models[0], models[1], rows[1], 40)
    assert divergence > 0.01
    assert result.kl_divergence == pytest.approx(divergence, rel=1e-4)
    assert result.top1_agreement == pytest.approx(agreement, abs=1e-12)
    assert result.perplexity == pytest.approx(reference_perplexity(models[0], rows[1], 40)[0], rel=1e-4)
    assert result.dense_perplexity == pytest.approx(reference_perplexity(models[1], rows[1], 40)[0], rel=1e-4)
    assert result.dense == str(tmp_path / "1")


def test_kl_divergence_is_dense_to_model(tiny_llama: Path, other: Path, rows: tuple[Path, str]) -> None:
    """The divergence is not symmetric; swapping the models swaps the two values of the reference."""
    models = tiny_model(), tiny_model(seed=1)
    forward, backward = run(tiny_llama, rows[0], dense=other), run(other, rows[0], dense=tiny_llama)
    assert forward.kl_divergence != pytest.approx(backward.kl_divergence, rel=1e-3)
    assert forward.kl_divergence == pytest.approx(reference_distance(*models, rows[1], 40)[0], rel=1e-4)
    assert backward.kl_divergence == pytest.approx(reference_distance(*models[::-1], rows[1], 40)[0], rel=1e-4)
    assert forward.perplexity == backward.dense_perplexity


def test_a_model_against_itself(tiny_llama: Path, rows: tuple[Path, str]) -> None:
    result = run(tiny_llama, rows[0], dense=tiny_llama)
    assert result.kl_divergence == 0
    assert result.top1_agreement == 1
    assert result.dense_perplexity == result.perplexity
    alone = run(tiny_llama, rows[0])
    assert alone.perplexity == result.perplexity
    assert alone.dense is alone.dense_perplexity is alone.kl_divergence is alone.top1_agreement is None


def test_a_model_that_knows_nothing(tmp_path: Path) -> None:
    """All logits equal: the perplexity is the size of the vocabulary."""
    model = tiny_model("gpt-2", tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text(prose(99))
    result = run(tmp_path, tmp_path / "text.txt", 50)
    assert result.perplexity == pytest.approx(VOCABULARY, rel=1e-6)


def test_a_hopeless_model_has_infinite_perplexity_in_python_and_valid_json(tmp_path: Path) -> None:
    """A mean loss above 709 nats overflows exp; JSON has no word for infinity."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight *= 1e6
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text(prose(99))
    result = run(tmp_path, tmp_path / "text.txt", 50)
    assert result.mean_loss > 709
    assert result.perplexity == math.inf
    json.loads(json.dumps(result.to_dict(), allow_nan=False))


# --- counting ---------------------------------------------------------------------------------------------------------


def test_windows_and_tokens(tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(prose(109))  # and <s>: 110 tokens
    assert (run(tiny_llama, path, 20).windows, run(tiny_llama, path, 20).tokens) == (5, 5 * 19)
    assert run(tiny_llama, path, 22).windows == 5
    assert run(tiny_llama, path, 23).windows == 4
    assert run(tiny_llama, path, 110).windows == 1
    for limit, windows in ((1, 1), (3, 3), (5, 5), (6, 5), (10**9, 5)):
        assert run(tiny_llama, path, 20, max_windows=limit).windows == windows


def test_max_windows_takes_the_first(tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(prose(300))
    result = run(tiny_llama, path, 30, max_windows=3)
    expected, tokens = reference_perplexity(tiny_model(), " ".join(prose(300).split()[:89]), 30)
    assert result.tokens == tokens == 3 * 29
    assert result.perplexity == pytest.approx(expected, rel=1e-4)


def test_the_remainder_is_dropped(tiny_llama: Path, tmp_path: Path) -> None:
    short, long = tmp_path / "short.txt", tmp_path / "long.txt"
    short.write_text(prose(59))
    long.write_text(prose(59) + " " + prose(19, seed=9))
    a, b = run(tiny_llama, short, 20), run(tiny_llama, long, 20)
    assert (a.windows, a.perplexity, a.text_sha256) == (3, b.perplexity, b.text_sha256)


def test_hash_of_the_scored_tokens(tiny_llama: Path, rows: tuple[Path, str]) -> None:
    result = run(tiny_llama, rows[0], 40, max_windows=4)
    digest = hashlib.sha256()
    for window in reference_windows(rows[1], 40)[:4]:
        for token in window:
            digest.update(token.to_bytes(8, "little"))
    assert result.text_sha256 == digest.hexdigest()


def test_special_tokens_are_the_tokenizers_own(tiny_llama: Path, tmp_path: Path) -> None:
    """The text is tokenised once: one <s> at its beginning, none in later windows."""
    path = tmp_path / "a.txt"
    path.write_text(prose(79))
    window = [1, *tiny_tokenizer()(prose(79), add_special_tokens=False)["input_ids"]]
    expected = hashlib.sha256(b"".join(token.to_bytes(8, "little") for token in window)).hexdigest()
    assert run(tiny_llama, path, 40).text_sha256 == expected


def test_empty_rows_are_kept(tiny_llama: Path, tmp_path: Path) -> None:
    """Rows are joined with a blank line, empty ones too; a tokenizer that sees line breaks must see all of them."""
    seen: list[str] = []

    class Spy:
        all_special_ids = ()
        unk_token_id = None

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            seen.append(text)
            return {"input_ids": [4] * 50}

    from thanos.model.source import ModelSource

    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in ["a", "", "b", " "]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelSource, "tokenizer", lambda self: Spy())
        run(tiny_llama, path, 10)
    assert [text for text in seen if len(text) > 1] == ["a\n\n\n\nb\n\n "], (
        "and a letter alone, which tells how a text begins"
    )


# --- what is returned -------------------------------------------------------------------------------------------------


def test_to_dict_has_the_documented_keys(tiny_llama: Path, other: Path, rows: tuple[Path, str]) -> None:
    result = run(tiny_llama, rows[0], 40, dense=other)
    values = result.to_dict()
    assert list(values) == KEYS
    assert set(KEYS) == {field.name for field in fields(Evaluation)}
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["schema"] == 1
    assert values["model"] == str(tiny_llama)
    assert values["text"] == str(rows[0])
    assert values["sequence_length"] == 40
    assert values["device"] == "cpu"
    assert set(values["versions"]) == {"thanos", "torch", "transformers"}
    assert values["versions"]["thanos"] == thanos.__version__
    assert values["seconds"] > 0
    assert values["tokens_per_second"] == pytest.approx(values["tokens"] / values["seconds"])
    assert list(run(tiny_llama, rows[0]).to_dict()) == KEYS, "the same keys without a dense model"


def test_events(tiny_llama: Path, rows: tuple[Path, str]) -> None:
    events: list[Event] = []
    result = run(tiny_llama, rows[0], 40, on_event=events.append)
    progress = [event for event in events if event.kind == "progress"]
    assert [event.done for event in progress] == list(range(1, result.windows + 1))
    assert {event.total for event in progress} == {result.windows}
    assert {event.phase for event in progress} == {"evaluate"}
    assert [event.tokens for event in progress] == [39 * i for i in range(1, result.windows + 1)]


def test_the_models_are_not_changed(tiny_llama: Path, rows: tuple[Path, str]) -> None:
    before = {path.name: path.read_bytes() for path in tiny_llama.iterdir()}
    run(tiny_llama, rows[0])
    assert {path.name: path.read_bytes() for path in tiny_llama.iterdir()} == before


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 0, -5])
def test_sequences_too_short(tiny_llama: Path, rows: tuple[Path, str], length: int) -> None:
    with pytest.raises(DataError, match=f"sequence_length must be at least 2.*got {length}"):
        run(tiny_llama, rows[0], length)


@pytest.mark.parametrize("windows", [0, -1])
def test_no_windows(tiny_llama: Path, rows: tuple[Path, str], windows: int) -> None:
    with pytest.raises(DataError, match=f"max_windows must be at least 1; got {windows}"):
        run(tiny_llama, rows[0], max_windows=windows)


def test_text_too_short(tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(prose(18))
    with pytest.raises(DataError, match=f"{re.escape(str(path))} has 19 tokens, fewer than one window of 20; lower"):
        run(tiny_llama, path, 20)


def test_beyond_the_positions(tiny_llama: Path, text_file: Path) -> None:
    with pytest.raises(DataError, match=f"sequence_length {POSITIONS + 1} is beyond the model's {POSITIONS} positions"):
        run(tiny_llama, text_file, POSITIONS + 1)


def test_beyond_the_dense_models_positions(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path, "gpt-2", n_positions=16)
    with pytest.raises(DataError, match="16 positions"):
        run(tiny_llama, text_file, 40, dense=tmp_path)


def test_mismatched_vocabularies(tiny_llama: Path, rows: tuple[Path, str], tmp_path: Path) -> None:
    save_tiny(tmp_path / "larger", vocab_size=VOCABULARY + 8)
    with pytest.raises(DataError, match=f"a vocabulary of {VOCABULARY + 8} tokens, the model one of {VOCABULARY}"):
        run(tiny_llama, rows[0], dense=tmp_path / "larger")


def test_dense_model_with_too_small_a_vocabulary(tiny_llama: Path, rows: tuple[Path, str], tmp_path: Path) -> None:
    """Its embedding cannot look the tokens up; that is the same mistake and gets a line too."""
    save_tiny(tmp_path / "smaller", vocab_size=100)
    with pytest.raises(DataError, match="100"):
        run(tiny_llama, rows[0], dense=tmp_path / "smaller")


def test_a_tokenizer_of_another_model(rows: tuple[Path, str], tmp_path: Path) -> None:
    save_tiny(tmp_path, vocab_size=100)
    with pytest.raises(DataError, match=r"token id .* embeds only 100"):
        run(tmp_path, rows[0])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"text": 3}, "text must be a name or path as a string; got int '3'"),
        ({"text": Path("a.txt")}, "text must be a name or path as a string; got PosixPath 'a.txt'"),
        ({"sequence_length": None}, r"sequence_length must be a whole number; got None"),
        ({"sequence_length": "64"}, r"sequence_length must be a whole number; got '64' \(did you mean 64\?\)"),
        ({"max_windows": 1.5}, "max_windows must be a whole number; got 1.5"),
    ],
)
def test_arguments_of_the_wrong_type(tiny_llama: Path, wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        thanos.evaluate(tiny_llama, **wrong)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers(tmp_path: Path, rows: tuple[Path, str], value: float) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[7] = value
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(NumericsError, match=r"NaN or infinite logits in window 0; its weights may be damaged"):
        run(tmp_path, rows[0])


def test_a_dense_model_with_nan(tiny_llama: Path, tmp_path: Path, rows: tuple[Path, str]) -> None:
    """A report of NaN divergence would look like a result."""
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(NumericsError, match="the dense model gives NaN"):
        run(tiny_llama, rows[0], dense=tmp_path)


@pytest.mark.parametrize("who", [("model",), ("dense",), ("model", "dense")], ids="+".join)
def test_a_token_that_a_model_holds_impossible(
    who: tuple[str, ...], tiny_llama: Path, other: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the dense model gives a token no probability, the divergence has no term for it, whatever the model gives."""
    shared = reference(other, text_file)
    unused = min(set(range(VOCABULARY)) - set(shared.windows.flatten().tolist()))
    original = scoring._logits
    logits: dict[str, list[torch.Tensor]] = {"model": [], "dense": []}

    def masked(model: Any, ids: torch.Tensor) -> torch.Tensor:
        name = "dense" if model is shared.model else "model"
        found = original(model, ids)
        if name in who:
            found[..., unused] = -math.inf
        logits[name].append(found)
        return found

    monkeypatch.setattr(scoring, "_logits", masked)
    if who == ("model",):
        with pytest.raises(NumericsError, match=r"KL divergence is infinite in window 0: .* leave out --dense"):
            thanos.evaluate(tiny_llama, reference=shared, device="cpu")
        return
    got = thanos.evaluate(tiny_llama, reference=shared, device="cpu")
    log_p, log_q = (torch.cat(logits[name])[:, :-1].double().log_softmax(-1) for name in ("model", "dense"))
    possible = log_q > -math.inf
    expected = (log_q.exp() * (log_q - log_p))[possible].sum() / got.tokens
    assert got.kl_divergence == pytest.approx(float(expected), rel=1e-4)


def test_unknown_dtype(tiny_llama: Path, rows: tuple[Path, str]) -> None:
    """Names of other things in torch are no dtypes either, and integers cannot hold a model."""
    for name in ("float12", "cuda", "int8", ""):
        with pytest.raises(UserError, match=f"dtype.*{name}"):
            run(tiny_llama, rows[0], dtype=name)


def test_cuda_absent(tiny_llama: Path, rows: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CudaUnavailableError, match="--device cpu"):
        thanos.evaluate(tiny_llama, text=str(rows[0]), sequence_length=40, device="cuda")


def test_missing_model_tokenizer_and_text(tiny_llama: Path, rows: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        run(tmp_path / "none", rows[0])
    with pytest.raises(DataError, match="does not exist"):
        run(tiny_llama, tmp_path / "none.txt")
    shutil.copytree(tiny_llama, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ModelError, match="has no tokenizer"):
        run(tmp_path / "bare", rows[0])
    with pytest.raises(DataError, match="'self' is for calibration"):
        thanos.evaluate(tiny_llama, text="self", sequence_length=40, device="cpu")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=["device", "host", "torch-host"],
)
def test_out_of_memory_says_what_to_lower(
    error: Exception, tiny_llama: Path, rows: tuple[Path, str], text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(evaluation, "score", score)
    with pytest.raises(ResourceError, match=r"out of memory .*lower --sequence-length \(now 40\)"):
        run(tiny_llama, rows[0])
    with pytest.raises(ResourceError, match=r"now 40"):  # that of the windows, not of the argument's default
        thanos.evaluate(tiny_llama, reference=reference(tiny_llama, text_file), device="cpu")


def test_a_model_that_is_loaded_already_is_scored_as_it_is(
    tiny_llama: Path, rows: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(tiny_llama, rows[0])
    network = load_model(resolve_model(tiny_llama))
    monkeypatch.setattr(evaluation, "load_model", None)
    found = run(tiny_llama, rows[0], network=network, dtype="bfloat16")
    assert (found.mean_loss, found.dtype, found.device) == (expected.mean_loss, "float32", "cpu")


# --- a reference that several models share ----------------------------------------------------------------------------


def reference(dense: Path, text: Path, *, keep_bytes: int = 0) -> Reference:
    source = resolve_model(dense)
    model = load_model(source)
    windows = cut_windows(text.read_text(), source.tokenizer(), model, str(text), 40, 5)
    return Reference(
        text=str(text), windows=windows, dense=str(dense), model=model, keep_bytes=keep_bytes, bos_ids=(1,)
    )


@pytest.mark.parametrize("keep_bytes", [0, 1 << 30])
def test_a_shared_reference_changes_no_digit(
    tiny_llama: Path, text_file: Path, tmp_path: Path, keep_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = reference(tiny_llama, text_file, keep_bytes=keep_bytes)
    assert shared.model is not None
    calls = []
    shared.model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    for seed in (1, 2):
        other = save_tiny(tmp_path / str(seed), seed=seed)
        got = thanos.evaluate(other, reference=shared, device="cpu").to_dict()
        expected = thanos.evaluate(
            other, text=str(text_file), sequence_length=40, max_windows=5, dense=tiny_llama, device="cpu", bos="text"
        ).to_dict()
        timed = ("seconds", "tokens_per_second")
        assert {k: v for k, v in got.items() if k not in timed} == {k: v for k, v in expected.items() if k not in timed}
    assert len(calls) == (5 if keep_bytes else 10), "the dense model's blocks run once where their outputs are kept"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_the_head_runs_again_where_the_outputs_are_kept(architecture: str) -> None:
    torch.manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (4, 24))
    model = tiny_model(architecture)
    shared = Reference(text="", windows=ids, dense="", model=model, keep_bytes=1 << 30)
    linear: list[str] = []
    for name, module in model.get_decoder().named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, name=name: linear.append(name))
    with torch.inference_mode():
        for first in (0, 2):
            expected = model(input_ids=ids[first : first + 2], use_cache=False).logits
            assert torch.equal(shared.logits(first, ids[first : first + 2]), expected)
            linear.clear()
            assert torch.equal(shared.logits(first, ids[first : first + 2]), expected)
            assert not linear
        assert torch.equal(shared.logits(0, ids[:1]), model(input_ids=ids[:1], use_cache=False).logits), "another batch"


def test_outputs_that_do_not_fit_are_not_kept(tiny_llama: Path, text_file: Path) -> None:
    shared = reference(tiny_llama, text_file, keep_bytes=1 << 30)
    assert shared.model is not None
    needed = shared.windows.numel() * shared.model.config.hidden_size * 4
    for room, kept in ((needed, 5), (needed - 1, 0)):
        shared = reference(tiny_llama, text_file, keep_bytes=room)
        thanos.evaluate(tiny_llama, reference=shared, device="cpu")
        assert len(shared._kept) == kept


@pytest.mark.parametrize(("vocabulary", "windows"), [(49152, 8), (151936, 6), (1 << 21, 1)])
def test_a_batch_has_fewer_logits_than_2_to_the_31(
    vocabulary: int, windows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchao's int4 product on CUDA fails with 14,200 tokens of 151,936 logits, and is right with 14,000."""
    monkeypatch.setattr(scoring, "free_device_bytes", lambda device: 1 << 50)
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=vocabulary))
    model: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, config=config)
    shared: Any = SimpleNamespace(windows=torch.zeros(64, 2048, dtype=torch.long), model=None)
    assert scoring._batch_size(model, shared) == windows
    assert windows * 2048 * vocabulary < 1 << 31 or windows == 1


def test_batches_score_what_single_windows_do_and_halve_where_memory_runs_out(
    tiny_llama: Path, text_file: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import thanos.evaluation.scoring as evaluation

    shared = reference(tiny_llama, text_file, keep_bytes=1 << 30)
    single = thanos.evaluate(other, reference=shared, device="cpu").to_dict()
    sizes, inner = [], evaluation._score_batch

    def short(model: Any, reference: Reference, first: int, ids: torch.Tensor) -> torch.Tensor:
        sizes.append(len(ids))
        if len(ids) > 2:
            raise torch.OutOfMemoryError
        return inner(model, reference, first, ids)

    monkeypatch.setitem(evaluation._BATCH_TOKENS, "cpu", 4 * 40 + 39)
    monkeypatch.setattr(evaluation, "free_device_bytes", lambda device: 1 << 30)
    batched = thanos.evaluate(other, reference=shared, device="cpu").to_dict()
    monkeypatch.setattr(evaluation, "_score_batch", short)
    halved = thanos.evaluate(other, reference=shared, device="cpu").to_dict()
    assert sizes == [4, 2, 2, 1]
    for name in ("mean_loss", "kl_divergence", "top1_agreement", "dense_perplexity"):
        assert batched[name] == pytest.approx(single[name], rel=1e-5)
        assert halved[name] == pytest.approx(single[name], rel=1e-5)
    monkeypatch.setattr(evaluation, "free_device_bytes", lambda device: 0)
    sizes.clear()
    thanos.evaluate(other, reference=shared, device="cpu")
    assert sizes == [1] * 5, "as much as fits, one window at least"


def test_a_reference_without_a_dense_model_measures_perplexity_alone(tiny_llama: Path, text_file: Path) -> None:
    whole = reference(tiny_llama, text_file)
    result = thanos.evaluate(tiny_llama, reference=Reference(text="prose", windows=whole.windows), device="cpu")
    assert (result.text, result.dense, result.kl_divergence, result.dense_perplexity) == ("prose", None, None, None)
    assert result.perplexity == thanos.evaluate(tiny_llama, reference=whole, device="cpu").dense_perplexity


def test_a_reference_of_another_vocabulary_is_refused(tmp_path: Path, tiny_llama: Path, text_file: Path) -> None:
    small = save_tiny(tmp_path / "small", vocab_size=100)
    with pytest.raises(DataError, match="embeds only 100"):
        thanos.evaluate(small, reference=reference(tiny_llama, text_file), device="cpu")


def test_two_references_of_one_text_keep_their_own_models_outputs(
    tiny_llama: Path, text_file: Path, other: Path
) -> None:
    base = reference(tiny_llama, text_file, keep_bytes=1 << 30)
    first = base.windows[:1]
    with torch.inference_mode():
        base.logits(0, first)
        second = replace(base, model=load_model(resolve_model(other)))
        assert second.model is not None
        assert torch.equal(second.logits(0, first), second.model(input_ids=first, use_cache=False).logits)


def test_batches_of_other_sizes_take_no_more_room_than_was_given(tiny_llama: Path, text_file: Path) -> None:
    whole = reference(tiny_llama, text_file)
    assert whole.model is not None
    room = whole.windows.numel() * whole.model.config.hidden_size * 4
    shared = replace(whole, keep_bytes=room)
    with torch.inference_mode():
        for size in (1, 2, 5):
            for start in range(0, len(shared.windows), size):
                shared.logits(start, shared.windows[start : start + size])
    assert sum(kept.last_hidden_state.nbytes for kept in shared._kept.values()) <= room


def test_a_forward_of_anothers_making_is_put_back(tiny_llama: Path, text_file: Path) -> None:
    shared = reference(tiny_llama, text_file)
    assert shared.model is not None
    decoder = shared.model.get_decoder()
    mine = decoder.forward
    decoder.forward = hooked = lambda *args, **kwargs: mine(*args, **kwargs)
    with torch.inference_mode():
        shared.logits(0, shared.windows[:1])
    assert decoder.forward is hooked
