"""Packed layers that share their input run as one launch."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import tiny_model, windows
from sparse_matrices import DEVICES, random_weight, save_pruned, sparse_weight
from thanos.export.pack import pack
from thanos.sparse import loader, packed_modules
from thanos.sparse.encoding import encode
from thanos.sparse.modules import PackedLinear
from thanos.sparse.ops import packed_linear, packed_linears
from thanos.sparse.siblings import Siblings, find_siblings, join


@pytest.fixture
def stay_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(loader.UNPACK, "never")


def layer_of(weight: Tensor, *, bias: bool, device: str = "cpu") -> PackedLinear:
    packed = encode(weight)
    layer = PackedLinear(packed.spec, bias=bias, device=device)
    state = {"weight_words": packed.words}
    if packed.offsets is not None:
        state["weight_offsets"] = packed.offsets
    if bias:
        state["bias"] = torch.randn(len(weight), generator=torch.Generator().manual_seed(9)).to(weight.dtype)
    layer.load_state_dict(state)
    return layer


class Block(nn.Module):
    """Three layers that read one tensor, in another order than their registration, and one that reads another."""

    q: PackedLinear
    k: PackedLinear
    v: PackedLinear
    o: PackedLinear

    def __init__(self, *, bitmap: bool = False, device: str = "cpu") -> None:
        super().__init__()
        rows = {"k": 33, "q": 96, "v": 70, "o": 96}
        for index, (name, count) in enumerate(rows.items()):
            weight = random_weight(count, 96, 0.7, seed=index) if bitmap else sparse_weight(count, 96, seed=index)
            setattr(self, name, layer_of(weight, bias=name == "v", device=device))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(q) + k.sum(-1, keepdim=True) * v.mean(-1, keepdim=True)


def siblings_of(layer: PackedLinear) -> Siblings:
    assert layer.siblings is not None
    return layer.siblings


def alone(block: Block, x: Tensor) -> Tensor:
    """The block's output, each layer by itself."""
    block = copy.deepcopy(block)
    for layer in packed_modules(block).values():
        layer.siblings = None
    return block(x)


def joined(block: Block) -> Block:
    join([block.q, block.k, block.v])
    return block


class Calls(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func._schema.name] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bitmap", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 12, 40])
def test_a_joint_call_gives_what_the_layers_give(tokens, bitmap, device):
    block = Block(bitmap=bitmap, device=device)
    x = torch.randn(2, tokens, 96, generator=torch.Generator().manual_seed(1)).bfloat16().to(device)
    layers = [block.q, block.k, block.v]
    together = packed_linears(
        x,
        [layer.weight_words for layer in layers],
        [layer.weight_offsets for layer in layers],
        [layer.bias for layer in layers],
        [layer.spec.rows for layer in layers],
        layers[0].spec.n,
    )
    for layer, got in zip(layers, together, strict=True):
        own = packed_linear(x, layer.weight_words, layer.weight_offsets, layer.bias, layer.spec.rows, layer.spec.n)
        assert got.shape == own.shape
        assert got.is_contiguous()
        if device == "cpu":
            assert torch.equal(got, own)
        assert torch.allclose(got.float(), own.float(), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("device", DEVICES)
def test_the_block_computes_the_same_with_one_call_for_three(device):
    block = Block(device=device)
    x = torch.randn(2, 96, generator=torch.Generator().manual_seed(2)).bfloat16().to(device)
    expected = alone(block, x)
    joined(block)
    assert siblings_of(block.q) is block.k.siblings is block.v.siblings
    assert block.o.siblings is None
    for _ in range(2):
        with Calls() as calls:
            got = block(x)
        assert torch.allclose(got.float(), expected.float(), atol=0.05, rtol=0.02)
        assert calls.count["thanos::packed_linears"] == 1
        assert siblings_of(block.q).held is None


def test_other_inputs_and_other_orders_are_computed_for_themselves():
    block = joined(Block())
    a, b = torch.randn(2, 96).bfloat16(), torch.randn(2, 96).bfloat16()
    own = {name: [getattr(block, name).alone(x) for x in (a, b)] for name in "qkv"}
    for order in ("vkq", "qkkv", "kq", "qqv"):
        for name in order:
            assert torch.equal(getattr(block, name)(a), own[name][0])
            assert torch.equal(getattr(block, name)(b), own[name][1])
    assert torch.equal(block.q(a), own["q"][0])
    assert torch.equal(block.q(b), own["q"][1])
    assert torch.equal(block.k(a), own["k"][0])
    assert torch.equal(block.v(b), own["v"][1])


def test_copies_of_a_block_have_siblings_of_their_own():
    block = joined(Block())
    twin = copy.deepcopy(block)
    assert siblings_of(twin.q) is not block.q.siblings
    assert siblings_of(twin.q).layers == [twin.q, twin.k, twin.v]


def test_a_bias_of_another_dtype_is_cast_under_autocast_and_refused_without():
    block = joined(Block())
    x = torch.randn(2, 96, generator=torch.Generator().manual_seed(3)).bfloat16()
    expected = block(x)
    assert block.v.bias is not None
    block.v.bias.data = block.v.bias.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(block(x.float()), expected)
        assert torch.equal(block.v.alone(x), block.v(x))
    with pytest.raises(RuntimeError, match="does not fit"):
        block(x)


def test_copies_and_files_hold_no_outputs_of_a_run_that_has_not_ended():
    block = joined(Block())
    x = torch.randn(2, 96).bfloat16().requires_grad_()
    block.q(x)
    assert siblings_of(block.q).held is not None
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert siblings_of(twin.q).held is None
        assert torch.equal(twin(x), block(x))


def test_compilation_leaves_one_call_and_no_state():
    block = Block()
    x = torch.randn(2, 96).bfloat16()
    expected = alone(block, x)
    joined(block)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        del inputs
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    for _ in range(3):
        assert torch.equal(compiled(x), expected)
    assert len(graphs) == 1  # and no recompilation
    calls = Counter(str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function")
    assert calls["thanos.packed_linears.default"] == 1
    assert calls["thanos.packed_linear.default"] == 1
    [output] = [node for node in graphs[0].graph.nodes if node.op == "output"]
    assert len(output.args[0]) == 1  # the outputs of the siblings do not leave the graph
    assert siblings_of(block.q).held is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_block_on_a_device_gives_the_same(mode):
    block = joined(Block(device="cuda"))
    x = torch.randn(2, 96, device="cuda").bfloat16()
    expected = alone(block, x)
    torch._dynamo.reset()
    with torch.inference_mode():
        compiled = torch.compile(block, mode=mode, fullgraph=True)
        for _ in range(4):
            assert torch.allclose(compiled(x).float(), expected.float(), atol=0.05, rtol=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_replays_a_joint_call():
    block = joined(Block(device="cuda"))
    x = torch.randn(2, 96, device="cuda").bfloat16()
    expected = block(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = block(x)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)


def test_the_operator_of_several_follows_the_rules_of_torch():
    for bitmap in (False, True):
        block = Block(bitmap=bitmap)
        layers = [block.q, block.v]
        arguments = (
            torch.randn(3, 96).bfloat16(),
            [layer.weight_words for layer in layers],
            [layer.weight_offsets for layer in layers],
            [layer.bias for layer in layers],
            [layer.spec.rows for layer in layers],
            layers[0].spec.n,
        )
        torch.library.opcheck(
            torch.ops.thanos.packed_linears.default, arguments, test_utils=("test_schema", "test_faketensor")
        )


def test_only_layers_of_one_kind_are_joined():
    layers = [layer_of(sparse_weight(32, 64, n=n), bias=False) for n in (16, 8, 16, 8, 4)]
    join(layers)
    assert layers[0].siblings is layers[2].siblings
    assert layers[1].siblings is layers[3].siblings
    assert layers[0].siblings is not layers[1].siblings
    assert layers[4].siblings is None
    many = [layer_of(sparse_weight(32, 64), bias=False) for _ in range(6)]
    join(many)
    assert [len(siblings_of(layer).layers) for layer in many] == [4, 4, 4, 4, 2, 2]


class Changing(nn.Module):
    """Two layers read one tensor, which changes in place between their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8, bias=False) for _ in range(4))
        self.embedding = nn.Embedding(4, 8)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        del use_cache
        x = self.embedding(input_ids)
        y = self.a(x)
        x.add_(1)
        z = self.b(x)
        return self.c(y) + self.c(z) + self.d(y)


def test_inputs_that_change_in_place_and_layers_that_are_called_twice_are_no_siblings():
    with torch.device("meta"):
        model = Changing()
    assert find_siblings(model, ["a", "b", "c", "d"]) == []


@pytest.mark.parametrize("inference", [False, True])
def test_siblings_are_found_in_inference_mode_too(inference):
    with torch.inference_mode(inference), torch.device("meta"):
        model = tiny_model("llama", num_hidden_layers=1)
    with torch.inference_mode(inference):
        found = find_siblings(model, [name for name, one in model.named_modules() if isinstance(one, nn.Linear)])
    parts = [[name.rpartition(".")[2] for name in group] for group in found]
    assert parts == [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]


class Dropping(nn.Module):
    """Two layers read one tensor; in training a random number decides, and a position has the default device."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(8, 8, bias=False) for _ in range(2))
        self.embedding = nn.Embedding(4, 8)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        del use_cache
        x = self.embedding(input_ids) + torch.ones(8)
        if self.training and torch.rand([]) < 0.5:  # as OPT of transformers 5.17 drops a layer
            return x
        return self.a(x) + self.b(x)


def test_siblings_are_found_in_a_model_in_training_mode_and_whatever_the_default_device():
    with torch.device("meta"):  # transformers holds it while it prepares a model
        model = Dropping()
        assert find_siblings(model, ["a", "b"]) == [["a", "b"]]
        assert torch.ones(1).device.type == "meta"
    assert model.training


def test_a_model_that_cannot_run_without_weights_has_no_siblings():
    with torch.device("meta"):
        model = Changing()
    model.forward = lambda **_: 1 / 0  # type: ignore[method-assign]
    assert find_siblings(model, ["a"]) == []


@pytest.mark.usefixtures("stay_packed")
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma-2", "opt-350m", "gpt-neox"])
def test_siblings_are_found_in_real_architectures(architecture, tmp_path):
    source = save_pruned(tmp_path / "model", architecture)
    pack(source, tmp_path / "packed", least_weights=1)
    layers = packed_modules(load(tmp_path / "packed"))
    groups = {id(layer.siblings): layer.siblings for layer in layers.values() if layer.siblings is not None}
    names = {id(layer): name for name, layer in layers.items()}
    found = {tuple(names[id(layer)] for layer in group.layers) for group in groups.values()}
    expected = set()
    for parent in {name.rpartition(".")[0] for name in layers}:  # as far as they are packed, and in the same format
        for last in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            packed = [f"{parent}.{one}" for one in last if f"{parent}.{one}" in layers]
            by_kind: dict[Any, list[str]] = {}
            for name in packed:
                by_kind.setdefault((layers[name].spec.format, layers[name].spec.n), []).append(name)
            expected |= {tuple(group) for group in by_kind.values() if len(group) > 1}
    assert found == expected
    assert bool(found) == (architecture != "gpt-neox")


@pytest.mark.usefixtures("stay_packed")
def test_joint_layers_change_neither_the_logits_nor_the_names(tmp_path):
    source = save_pruned(tmp_path / "model", "llama")
    pack(source, tmp_path / "packed", least_weights=1)
    model, plain = load(tmp_path / "packed"), load(tmp_path / "packed")
    for layer in packed_modules(plain).values():
        layer.siblings = None
    assert model.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(model(windows(2, 17)).logits, plain(windows(2, 17)).logits)
    moved = model.to("meta")
    assert all(tensor.device.type == "meta" for tensor in moved.state_dict().values())


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
