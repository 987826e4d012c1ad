"""``thanos.prune_model``: a loaded model pruned in place, to the weights that ``thanos.prune`` writes for its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import thanos
from helpers import VOCABULARY, prose, save_tiny, tiny_model, tiny_tokenizer, windows
from thanos.calibration.windows import build_calibration
from thanos.errors import DataError, ModelError, NumericsError, RecipeError

SAMPLES, LENGTH = 6, 32


def recipe(**changes: Any) -> thanos.Recipe:
    return thanos.Recipe(**{"samples": SAMPLES, "sequence_length": LENGTH, "device": "cpu", "pattern": "2:4"} | changes)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def assert_same(model: Any, folder: Path) -> None:
    expected = load(folder).state_dict()
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor), name


def tokens_of(text: Path) -> Tensor:
    made = build_calibration(
        str(text), tiny_tokenizer(), samples=SAMPLES, sequence_length=LENGTH, seed=0, end_of_text_id=2
    )
    return made.ids


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("llama", {"effort": "max"}),
        ("tinyllama", {"method": "wanda", "pattern": "unstructured"}),
        ("gpt-2", {}),
        ("qwen3-moe", {}),
        ("llama", {"targets": ("lm_head", "*.down_proj"), "method": "sparsegpt", "pattern": "unstructured"}),
        ("llama", {"pattern": "unstructured", "allocation": "error"}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_are_those_of_the_folder(
    tmp_path: Path, text_file: Path, architecture: str, changes: dict[str, Any], dtype: torch.dtype
) -> None:
    folder = save_tiny(tmp_path / "model", architecture, dtype=dtype)
    by_folder = thanos.prune(folder, tmp_path / "out", recipe(calibration=str(text_file), **changes))
    model = load(folder)
    before = dict(model.named_parameters())
    report = thanos.prune_model(model, tokens_of(text_file), recipe(**changes))
    assert_same(model, tmp_path / "out")
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert report.totals == by_folder.totals
    assert [layer.name for layer in report.layers] == [layer.name for layer in by_folder.layers]
    assert report.calibration["sha256"] == by_folder.calibration["sha256"]
    assert report.calibration["rule"] == "given"


def test_sequences_that_the_model_generates(tmp_path: Path, text_file: Path) -> None:
    """Pieces of a text are continued as for a folder; pieces of token ids begin with the ids themselves."""
    folder, settings = save_tiny(tmp_path / "model"), recipe(calibration=str(text_file), generate=3)
    by_folder = thanos.prune(folder, tmp_path / "out", settings)
    model = load(folder).train()
    report = thanos.prune_model(model, None, settings, tokenizer=tiny_tokenizer())
    assert_same(model, tmp_path / "out")
    assert report.calibration == by_folder.calibration
    assert model.training
    report = thanos.prune_model(load(folder), tokens_of(text_file), settings)
    assert (report.calibration["samples"], report.calibration["generated"]) == (SAMPLES, 3)


def test_each_form_of_calibration(tmp_path: Path) -> None:
    """A list of texts is a file with a row for each; a source is the recipe's; tensors may come one by one."""
    folder = save_tiny(tmp_path / "model")
    texts = [prose(60, seed=seed) for seed in range(9)]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    thanos.prune(folder, tmp_path / "out", recipe(calibration=str(file)))
    tokenizer = tiny_tokenizer()
    ids = build_calibration(str(file), tokenizer, samples=SAMPLES, sequence_length=LENGTH, seed=0, end_of_text_id=2).ids
    for calibration, settings in (
        (texts, {}),
        (str(file), {}),
        (None, {"calibration": str(file)}),
        (ids, {}),
        (list(ids), {"samples": 3}),
        (list(ids.split(1)), {}),
    ):
        model = load(folder)
        report = thanos.prune_model(model, calibration, recipe(**settings), tokenizer=tokenizer)
        assert_same(model, tmp_path / "out")
        assert (report.calibration["samples"], report.calibration["sequence_length"]) == (SAMPLES, LENGTH)
    assert report.recipe["calibration"] == "tokens"


@pytest.mark.parametrize("name", ["texts", "tokens"])
def test_a_folder_with_the_name_of_given_texts_or_tokens_has_no_part_in_the_report(
    name: str, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "a.txt").write_text("not the text that is read")
    monkeypatch.chdir(tmp_path)
    given = [prose(60, seed=seed) for seed in range(9)] if name == "texts" else tokens_of(text_file)
    report = thanos.prune_model(load(save_tiny(tmp_path / "model")), given, recipe(), tokenizer=tiny_tokenizer())
    assert (report.calibration["source"], report.calibration["text_sha256"]) == (name, None)


def test_the_model_generates_its_own_text(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    thanos.prune(folder, tmp_path / "out", recipe(calibration="self"))
    model = load(folder).train()
    thanos.prune_model(model, "self", recipe(), tokenizer=tiny_tokenizer())
    assert model.training
    assert_same(model, tmp_path / "out")


def test_gradients_and_events(tmp_path: Path) -> None:
    """A model in training keeps its flags, and another optimiser step works on the pruned weights."""
    model = tiny_model().train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    events = []
    ids = windows(SAMPLES, LENGTH)
    report = thanos.prune_model(model, ids, recipe(), on_event=events.append)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {event.kind for event in events} >= {"phase", "layer", "block"}
    assert len(report.layers) == 21
    assert report.totals["sparsity_targeted"] == 0.5
    weight = model.model.layers[1].mlp.down_proj.weight
    assert int((weight != 0).reshape(-1, 4).sum(1).max()) <= 2
    model(ids, labels=ids).loss.backward()
    assert weight.grad is not None


def test_the_model_is_unchanged_after_a_refusal() -> None:
    ids, generating = windows(SAMPLES, LENGTH), recipe(generate=3)
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    refusals: list[tuple[type[Exception], str, Any]] = [
        (RecipeError, "output_dtype bfloat16 is for a folder", (ids, recipe(output_dtype="bfloat16"))),
        (DataError, "needs the model's tokenizer", ("pydoc", recipe())),
        (DataError, "needs the model's tokenizer", (["a text"], recipe())),
        (DataError, "calibration must be token ids", (7, recipe())),
        (DataError, "calibration must be token ids", ([], recipe())),
        (DataError, r"one length, at least 2 tokens; got lengths \[31, 32\]", ([ids[0], ids[1, :31]], recipe())),
        (DataError, "must be whole numbers", (ids.float(), recipe())),
        (DataError, "beyond the model's 256 positions", (ids.repeat(1, 9), recipe())),
        (DataError, f"token id {VOCABULARY}, but the model embeds", (ids + VOCABULARY - int(ids.max()), recipe())),
        (
            DataError,
            f"token id {VOCABULARY + 9}, but the model embeds",
            (ids + VOCABULARY + 9 - int(ids.max()), generating),
        ),
        (DataError, "token ids must be at least 0; got -100", (ids.masked_fill(ids == ids.min(), -100), recipe())),
        (RecipeError, "no text of which the model could continue pieces", ("self", generating)),
        (ModelError, "matches no linear layer", (ids, recipe(targets=("nothing",)))),
    ]
    for kind, match, arguments in refusals:
        with pytest.raises(kind, match=match):
            thanos.prune_model(model, *arguments)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_is_no_model() -> None:
    ids, model = windows(SAMPLES, LENGTH), tiny_model()
    with pytest.raises(ModelError, match=r"got str; thanos\.prune takes names"):
        thanos.prune_model("a/b", ids)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="LlamaForCausalLM for this config; got LlamaModel"):
        thanos.prune_model(model.model, ids, recipe())
    with pytest.raises(ModelError, match="on the meta device"):
        thanos.prune_model(tiny_model().to("meta"), ids, recipe())
    with torch.inference_mode():
        fixed = tiny_model()
    with pytest.raises(ModelError, match=r"under torch\.inference_mode"):
        thanos.prune_model(fixed, ids, recipe())
    with pytest.raises(DataError, match=r"no calibration sequence: the token ids have shape \(0, "):
        thanos.prune_model(tiny_model(), ids[:0], recipe())
    quantised = tiny_model()
    layer = quantised.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"up_proj\.weight is int8: give the model before quantisation"):
        thanos.prune_model(quantised, ids, recipe())


@pytest.mark.parametrize("generate", [0, 3])
def test_a_damaged_weight_is_named(generate: int) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[3, 4] = float("nan")
    with pytest.raises(NumericsError, match=r"model\.layers\.1\.self_attn\.q_proj\.weight"):
        thanos.prune_model(model, windows(SAMPLES, LENGTH), recipe(generate=generate))


@pytest.mark.parametrize("tokenizer", [True, False])
def test_what_is_generated_after_given_tokens_begins_as_they_do(tokenizer: bool) -> None:
    """Token ids that a tokenizer has begun with BOS: the model continues pieces that begin with it, too."""
    begun, seen = windows(SAMPLES, LENGTH), list[Tensor]()
    begun[:, 0] = 1
    model = tiny_model()
    model.get_input_embeddings().register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    report = thanos.prune_model(model, begun, recipe(generate=3), tokenizer=tiny_tokenizer() if tokenizer else None)
    assert report.calibration["bos_ids"] == [1]
    prompts = next(ids for ids in seen if len(ids) == 3)
    assert prompts.shape[1] > 1
    assert prompts[:, 0].tolist() == [1, 1, 1]
    begun[2, 0] = 5
    assert thanos.prune_model(tiny_model(), begun, recipe(generate=3)).calibration["bos_ids"] == []
