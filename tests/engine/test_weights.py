"""Parameters come in by name, in the model's dtype, wherever the model holds them, and go again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from helpers import ARCHITECTURES, tiny_config, tiny_model, windows
from thanos.engine.weights import ModelWeights, widens
from thanos.model.meta_model import build_meta_model, persistent_tensors


class Source:
    """Tensors by name, and the names that were asked for."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.read_names = tensors, list[str]()

    def read(self, name: str) -> Tensor:
        self.read_names.append(name)
        return self.tensors[name]

    def chunks(self, name: str) -> Iterator[Tensor]:
        yield from self.read(name).reshape(-1).split(100)


def weights_of(
    architecture: str, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, ModelWeights, Source, nn.Module]:
    dense = tiny_model(architecture)
    meta_model = build_meta_model(tiny_config(architecture), dtype)
    names = list(persistent_tensors(meta_model))
    state = dense.state_dict()
    source = Source({f"file.{name}": state[name] for name in names})
    key_of = {name: f"file.{name}" for name in names}
    return meta_model, ModelWeights(meta_model, source, key_of, torch.device("cpu")), source, dense


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.inference_mode()
def test_a_meta_model_with_all_its_weights_is_the_model(architecture: str) -> None:
    meta_model, weights, _, dense = weights_of(architecture)
    weights.load(weights.names)
    ids = windows(2, 40)
    assert torch.equal(meta_model(input_ids=ids).logits, dense(input_ids=ids).logits)
    weights.release(weights.names)
    assert all(parameter.device.type == "meta" for parameter in meta_model.parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_are_those_that_a_saved_checkpoint_must_hold(architecture: str) -> None:
    model = tiny_model(architecture)
    names = list(persistent_tensors(model))
    assert len(set(names)) == len(names)
    state = model.state_dict()
    assert set(names) <= state.keys()
    # What is left out is a second name of a tensor that is there.
    there = {state[name].data_ptr() for name in names}
    assert all(state[name].data_ptr() in there for name in state.keys() - set(names))


def test_only_what_is_asked_for_is_read_and_everything_else_stays_away() -> None:
    meta_model, weights, source, dense = weights_of("llama")
    wanted = [name for name in weights.names if name.startswith("model.layers.1.")]
    weights.load(wanted)
    assert source.read_names == [f"file.{name}" for name in wanted]
    for name, parameter in meta_model.named_parameters():
        assert (parameter.device.type == "cpu") is (name in wanted), name
        if name in wanted:
            assert torch.equal(parameter, dense.get_parameter(name))
            assert not parameter.requires_grad


def test_a_tied_weight_has_one_name_and_arrives_in_both_places() -> None:
    meta_model, weights, _, _ = weights_of("tinyllama")
    names = [name for name in weights.names if "embed_tokens" in name or "lm_head" in name]
    assert names == ["model.embed_tokens.weight"]
    weights.load(names)
    assert meta_model.lm_head.weight is meta_model.model.embed_tokens.weight
    assert meta_model.lm_head.weight.device.type == "cpu"
    weights.put(names[0], torch.ones(320, 32))
    assert meta_model.lm_head.weight is meta_model.model.embed_tokens.weight
    assert bool((meta_model.lm_head.weight == 1).all())
    weights.release(names)
    assert meta_model.lm_head.weight.device.type == meta_model.model.embed_tokens.weight.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_model_runs_in_its_dtype_and_the_stored_weight_keeps_its_own(dtype: torch.dtype) -> None:
    meta_model, weights, _, dense = weights_of("llama", dtype)
    name = "model.layers.0.mlp.up_proj.weight"
    weights.load([name])
    assert meta_model.get_parameter(name).dtype == dtype
    assert torch.equal(meta_model.get_parameter(name), dense.get_parameter(name).to(dtype))
    assert torch.equal(weights.stored(name), dense.get_parameter(name))  # float32, not rounded
    weights.put(name, torch.zeros(64, 32))
    assert meta_model.get_parameter(name).dtype == dtype
    assert weights.key(name) == f"file.{name}"


class WithBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2, device="meta")
        self.register_buffer("scale", torch.full((2,), 5.0))
        self.register_buffer("cache", torch.zeros(3), persistent=False)


def test_persistent_buffers_belong_to_a_checkpoint_and_others_do_not() -> None:
    model = WithBuffer()
    assert list(persistent_tensors(model)) == ["linear.weight", "linear.bias", "scale"]
    source = Source({"scale": torch.tensor([1.0, 2.0])})
    weights = ModelWeights(model, source, {"scale": "scale"}, torch.device("cpu"))
    weights.load(["scale"])
    assert model.scale.tolist() == [1.0, 2.0]
    assert "scale" in dict(model.named_buffers())
    assert "scale" not in dict(model.named_parameters())


def test_releasing_a_pruned_weight_lets_its_memory_go() -> None:
    import gc
    import weakref

    meta_model, weights, _, _ = weights_of("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    weights.put(name, torch.ones(64, 32))
    reference = weakref.ref(meta_model.get_parameter(name))
    weights.release([name])
    gc.collect()
    assert reference() is None


def block_names(weights: ModelWeights, block: int) -> list[str]:
    return [name for name in weights.names if name.startswith(f"model.layers.{block}.")]


def test_a_weight_from_a_file_lies_in_memory_as_a_computed_one_does() -> None:
    """A product on the CPU may have other last bits if a matrix begins elsewhere than at a cache line."""
    _, weights, _, _ = weights_of("llama")
    name = "model.layers.0.self_attn.q_proj.weight"
    for begin in range(3):
        value = torch.randn(32 * 32 + begin)[begin:].view(32, 32)
        weights.put(name, value)
        assert weights.parameter(name).data_ptr() % 64 == 0
        assert torch.equal(weights.parameter(name), value)


def test_other_values_are_used_inside_a_context_alone() -> None:
    model, weights, _, _ = weights_of("tinyllama")
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    weights.load(names)
    before = {name: weights.parameter(name) for name in names}
    other = {name: nn.Parameter(torch.zeros_like(value)) for name, value in before.items()}
    with weights.replaced(other):
        assert all(weights.parameter(name) is other[name] for name in names)
        assert model.lm_head.weight is other[names[0]]  # type: ignore[union-attr]
    assert all(weights.parameter(name) is value for name, value in before.items())
    assert model.lm_head.weight is before[names[0]]  # type: ignore[union-attr]


def test_prefetched_weights_are_read_once_and_arrive_at_the_load() -> None:
    meta_model, weights, source, dense = weights_of("llama")
    names = block_names(weights, 1)
    weights.prefetch(names)
    assert all(parameter.device.type == "meta" for parameter in meta_model.parameters())
    weights.load(names)
    assert source.read_names == [f"file.{name}" for name in names]
    for name in names:
        assert torch.equal(meta_model.get_parameter(name), dense.get_parameter(name))
    weights.close()


def test_a_load_of_other_names_than_the_prefetched_ones_is_right_too() -> None:
    meta_model, weights, _, dense = weights_of("llama")
    weights.prefetch(block_names(weights, 1))
    weights.load(block_names(weights, 2))
    weights.load(block_names(weights, 1))
    for name in block_names(weights, 1) + block_names(weights, 2):
        assert torch.equal(meta_model.get_parameter(name), dense.get_parameter(name))
    weights.close()


def test_an_error_of_the_background_reading_comes_out_at_the_load() -> None:
    _, weights, source, _ = weights_of("llama")
    names = block_names(weights, 1)
    del source.tensors[f"file.{names[3]}"]
    weights.prefetch(names)
    with pytest.raises(KeyError, match=r"layers\.1"):
        weights.load(names)
    weights.close()


def test_no_room_for_the_next_block_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    meta_model, weights, _, dense = weights_of("llama")
    names = block_names(weights, 1)
    original = weights._allocate

    def full(names: list[str]) -> dict[str, Tensor]:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(weights, "_allocate", full)
    weights.prefetch(names)
    monkeypatch.setattr(weights, "_allocate", original)
    weights.load(names)
    assert torch.equal(meta_model.get_parameter(names[0]), dense.get_parameter(names[0]))


def test_the_stored_weight_is_read_again_only_where_it_was_rounded_or_replaced() -> None:
    for dtype, reads in ((torch.float32, 1), (torch.bfloat16, 2)):
        _, weights, source, dense = weights_of("llama", dtype)
        name = "model.layers.0.mlp.up_proj.weight"
        weights.load([name])
        assert torch.equal(weights.stored(name), dense.get_parameter(name))
        assert source.read_names.count(f"file.{name}") == reads
        weights.put(name, torch.zeros(64, 32))
        assert torch.equal(weights.stored(name), dense.get_parameter(name))
        weights.release([name])
        assert torch.equal(weights.stored(name), dense.get_parameter(name))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("held", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_what_widens_comes_back_as_it_was(stored: torch.dtype, held: torch.dtype) -> None:
    assert widens(stored, held) == (stored.itemsize == 2 and held.itemsize > 2)
    if widens(stored, held):
        bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
        values = bits.view(stored)
        there = values.isfinite()
        assert torch.equal(values.to(held).to(stored).view(torch.int16)[there], bits[there])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_widened_weight_is_not_read_again() -> None:
    kept = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    with torch.device("meta"):
        meta_model = nn.Linear(30, 40, bias=False)
    source = Source({"weight": kept})
    weights = ModelWeights(meta_model, source, {"weight": "weight"}, torch.device("cuda"))
    weights.load(["weight"])
    assert meta_model.weight.dtype == torch.float32
    assert torch.equal(weights.stored("weight").cpu(), kept)
    assert source.read_names == ["weight"]
    weights.put("weight", kept.cuda() * 2)
    assert torch.equal(weights.stored("weight").cpu(), kept)
    assert source.read_names == ["weight"] * 2


def test_a_parameter_is_a_modules_own_if_no_other_holds_it_and_it_is_no_buffer() -> None:
    _, weights, _, _ = weights_of("tinyllama")  # with tied embeddings
    assert weights.is_own("model.layers.0.mlp.up_proj.weight")
    assert not weights.is_own("model.embed_tokens.weight")
    module = nn.Module()
    module.first, module.second = nn.Linear(2, 2), nn.Linear(2, 2)
    module.second.weight = module.first.weight
    module.register_buffer("table", torch.zeros(2))
    names = ["first.weight", "first.bias", "second.bias", "table"]
    own = ModelWeights(module, Source({}), {name: name for name in names}, torch.device("cpu"))
    assert [name for name in names if own.is_own(name)] == ["first.bias", "second.bias"]
