"""Tokenizers that begin a text with several tokens, or with one that they do not call BOS: nobody runs without them."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import thanos
from helpers import WORDS, prose, tiny_model, tiny_tokenizer
from thanos.calibration.windows import Calibration, build_calibration
from thanos.cli import run
from thanos.errors import DataError
from thanos.evaluation.perplexity import choose_bos
from thanos.evaluation.scoring import Reference
from thanos.model.bos import added_bos

END = 2
ID = {word: 4 + i for i, word in enumerate(WORDS)}
GMASK, SOP = 4 + len(WORDS), 5 + len(WORDS)
BEGIN = [GMASK, SOP]


def encode(text: str) -> list[int]:
    """The tiny tokenizer by hand, without special tokens."""
    return [ID[word] for word in text.split()]


def tokenizer_with(*begin: str, end: str = "") -> Any:
    """The tiny tokenizer, but every text begins with these tokens; it defines no BOS. ``end`` is put after every text."""
    from tokenizers import processors

    made = copy.deepcopy(tiny_tokenizer(begins=False))
    made.bos_token = None
    made.add_special_tokens({"additional_special_tokens": ["[gMASK]", "<sop>"]})
    known = [(token, made.convert_tokens_to_ids(token)) for token in {*begin, *filter(None, [end])}]
    made._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{' '.join(begin)} $A {end}".strip(), special_tokens=known
    )
    return made


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glm") / "model"
    tiny_model().save_pretrained(folder)
    tokenizer_with("[gMASK]", "<sop>").save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text(prose(500))
    return path


def build(source: Path, tokenizer: Any, *, samples: int, length: int, **arguments: Any) -> Calibration:
    settings = {"seed": 0, "end_of_text_id": END, **arguments}
    return build_calibration(str(source), tokenizer, samples=samples, sequence_length=length, **settings)


def test_what_a_tokenizer_adds_is_found() -> None:
    assert added_bos(tokenizer_with("[gMASK]", "<sop>")) == (GMASK, SOP)
    assert added_bos(tokenizer_with("<sop>")) == (SOP,), "one that it does not call BOS"
    assert added_bos(tokenizer_with("[gMASK]", "<sop>", end="</s>")) == (GMASK, SOP), "what ends a text begins none"
    assert added_bos(tokenizer_with(end="</s>")) == ()


def test_a_tokenizer_that_adds_them_whatever_it_is_told() -> None:
    class Stubborn:
        all_special_ids = (END, 3, GMASK)
        unk_token_id = 3

        def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [GMASK, *(3 for _ in text.split())]}

    assert added_bos(Stubborn()) == (GMASK,)  # type: ignore[arg-type]


def test_calibration_windows_begin_with_all_of_them(tmp_path: Path) -> None:
    tokenizer = tokenizer_with("[gMASK]", "<sop>")
    path = tmp_path / "a.jsonl"
    documents = [prose(40 + i, seed=i) for i in range(12)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in documents))
    drawn = build(path, tokenizer, samples=8, length=32, seed=4)
    assert (drawn.rule, drawn.bos_ids, drawn.to_dict()["bos_ids"]) == ("random-window", (GMASK, SOP), BEGIN)
    for window in drawn.ids.tolist():
        assert window[:2] == BEGIN
        assert any(window[2:] == ids[i : i + 30] for ids in map(encode, documents) for i in range(len(ids) - 29))
    packed = build(path, tokenizer, samples=4, length=50)
    stream = [token for row in documents for token in (END, *encode(row))][1:]
    assert packed.rule == "packed"
    assert packed.ids.tolist() == [[*BEGIN, *stream[48 * i : 48 * i + 48]] for i in range(4)]


def test_a_text_or_template_that_writes_them_gets_no_second_ones(tmp_path: Path) -> None:
    tokenizer = tokenizer_with("[gMASK]", "<sop>")
    tokenizer.chat_template = "[gMASK]<sop>{% for m in messages %}{{ m.content }} {% endfor %}"
    path = tmp_path / "a.jsonl"
    chats = [[{"role": "user", "content": prose(9, seed=i)}] for i in range(4)]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in chats))
    stream = [token for i in range(4) for token in (END, *encode(prose(9, seed=i)))][1:]
    assert build(path, tokenizer, samples=2, length=14).ids.tolist() == [
        [*BEGIN, *stream[:12]],
        [*BEGIN, *stream[12:24]],
    ]
    begun = tmp_path / "a.txt"
    begun.write_text("[gMASK]<sop>" + prose(40))
    assert build(begun, tokenizer, samples=2, length=12).ids[0].tolist() == [*BEGIN, *encode(prose(40))[:10]]


def test_the_models_own_text_begins_with_them() -> None:
    made = build(Path("self"), tokenizer_with("[gMASK]", "<sop>"), samples=4, length=9, model=tiny_model())
    assert made.ids.shape == (4, 9)
    assert made.ids[:, :2].tolist() == [BEGIN] * 4


def test_windows_without_room_for_text(text: Path, glm: Path) -> None:
    with pytest.raises(
        DataError, match=r"^sequence_length 2 leaves no room for text: .* 2 tokens \(284, 285\); .* 3 or"
    ):
        build(text, tokenizer_with("[gMASK]", "<sop>"), samples=1, length=2)
    with pytest.raises(DataError, match="sequence_length 2 leaves no room for text"):
        thanos.evaluate(glm, text=str(text), sequence_length=2, device="cpu")
    with pytest.raises(DataError, match=r"--sequence-length is 600, of which the first 2 are the tokenizer's own"):
        build(text, tokenizer_with("[gMASK]", "<sop>"), samples=1, length=600)


def by_hand(windows: list[list[int]], begun: list[int]) -> tuple[float, int]:
    """Perplexity of the tiny model and the number of tokens scored; ``begun``: tokens of BEGIN in each window."""
    losses = []
    with torch.inference_mode():
        for window, skip in zip(windows, begun, strict=True):
            logits = tiny_model()(input_ids=torch.tensor([window])).logits[0].double()
            targets = torch.tensor(window[1:])
            each = torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="none")
            losses += each[max(0, skip - 1) :].tolist()
    return math.exp(sum(losses) / len(losses)), len(losses)


def test_evaluation_begins_with_them_and_predicts_none(glm: Path, text: Path) -> None:
    ids = encode(prose(500))
    begun = [[*BEGIN, *ids[i : i + 38]] for i in range(0, len(ids) - 37, 38)]
    usual = [[*BEGIN, *ids][i : i + 40] for i in range(0, len(ids) + 2 - 39, 40)]
    for bos, windows, skips in (("window", begun, [2] * len(begun)), ("text", usual, [2] + [0] * (len(usual) - 1))):
        expected, tokens = by_hand(windows, skips)
        found = thanos.evaluate(glm, text=str(text), sequence_length=40, bos=bos, device="cpu", dense=glm)
        assert found.perplexity == pytest.approx(expected, rel=1e-4)
        assert found.dense_perplexity == pytest.approx(expected, rel=1e-4)
        assert (found.bos, found.bos_ids, found.tokens, found.windows) == (bos, BEGIN, tokens, len(windows))
        assert found.top1_agreement == 1


def test_auto_tries_both_by_the_text_alone(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import thanos.evaluation.perplexity as perplexity

    ids, tokenizer = encode(prose(500)), tokenizer_with("[gMASK]", "<sop>")
    for factor, expected in ((0.89, "window"), (0.91, "text")):
        seen: list[Reference] = []

        def score(model: Any, reference: Reference, emit: Any, seen: Any = seen, factor: float = factor) -> list[float]:
            seen.append(reference)
            loss = 3.0 + (math.log(factor) if reference.windows[0, 0] == GMASK else 0.0)
            return [loss * reference.tokens, 0, 0, 0]

        monkeypatch.setattr(perplexity, "score", score)
        assert choose_bos("auto", prose(500), tokenizer, tiny_model(), 40, lambda event: None) == expected
        usual, begun = seen
        count = len(usual.windows)
        assert usual.windows.tolist() == [ids[38 + 40 * i : 78 + 40 * i] for i in range(count)]
        assert begun.windows.tolist() == [[*BEGIN, *ids[38 + 38 * i : 76 + 38 * i]] for i in range(count)]
        assert (usual.tokens, begun.tokens) == (39 * count, 38 * count)


def test_a_run_and_an_evaluation_record_them(
    glm: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    recipe = thanos.Recipe(method="magnitude", calibration=str(text), samples=4, sequence_length=32, device="cpu")
    assert thanos.prune(glm, out, recipe).calibration["bos_ids"] == BEGIN
    assert json.loads((out / "pruning.json").read_text())["calibration"]["bos_ids"] == BEGIN
    assert f"each window begins with the tokens {GMASK}, {SOP}" in (out / "README.md").read_text()
    capsys.readouterr()
    assert run(["eval", str(out), "--text", str(text), "--sequence-length", "40", "--device", "cpu"]) == 0
    assert f"(the 2 tokens {GMASK}, {SOP})" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("begin", [("[gMASK]", "<sop>"), ("<sop>",)])
@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_requests_without_a_context_begin_with_all_of_them(begin: tuple[str, ...], written: bool, bos: bool) -> None:
    from thanos.evaluation.lm_eval_model import wrap

    instance = pytest.importorskip("lm_eval.api.instance").Instance
    tokenizer, text = tokenizer_with(*begin), prose(6)
    ids = [GMASK, SOP] if len(begin) > 1 else [SOP]
    asked = "".join(begin) + text if written else text  # a text that writes them itself gets no second ones
    with torch.inference_mode():
        logits = tiny_model()(input_ids=torch.tensor([[*ids, *encode(text)]])).logits[0].double().log_softmax(-1)
    each = [logits[len(ids) - 1 + i, token].item() for i, token in enumerate(encode(text))]
    model = wrap(tiny_model(), tokenizer, lambda event: None, bos=bos)
    request = instance(request_type="loglikelihood", doc={}, arguments=("", asked), idx=0)
    [(found, _)] = model.loglikelihood([request])
    assert found == pytest.approx(sum(each), rel=1e-4)
    assert model.tok_encode(asked) == [*ids, *encode(text)]


def test_scores_with_other_beginnings_are_stored_apart(glm: Path, tmp_path: Path) -> None:
    from thanos.evaluation.score_cache import keys_of
    from thanos.model.source import resolve_model

    pytest.importorskip("lm_eval")

    class Task:
        eval_docs = ({"query": "a"},)

        def dump_config(self) -> dict[str, Any]:
            return {}

    source = resolve_model(glm)
    found = keys_of(source, {"a": Task()}, None, "float32", torch.device("cpu"), bos=False)
    plain = dataclasses.replace(source)
    object.__setattr__(plain, "tokenizer", lambda: tokenizer_with())
    assert keys_of(plain, {"a": Task()}, None, "float32", torch.device("cpu"), bos=False) != found


def test_requests_of_tasks_begin_with_them_either_way() -> None:
    from thanos.evaluation.lm_eval_model import wrap

    pytest.importorskip("lm_eval")
    tokenizer = tokenizer_with("[gMASK]", "<sop>")
    for bos in (False, True):
        model = wrap(tiny_model(), tokenizer, lambda event: None, bos=bos)
        assert model.tok_encode(prose(5)) == [*BEGIN, *encode(prose(5))]
        assert model.prefix_token_id == GMASK
