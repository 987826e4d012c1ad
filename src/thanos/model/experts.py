"""Unfuse mixtures of experts: each matrix of each expert becomes a plain linear layer, as the rest of the project expects.

transformers 5 fuses the experts of a block into 3-D parameters, ``gate_up_proj`` (E, 2I, H) and ``down_proj`` (E, H, I).
It runs them by interchangeable functions with one contract: apply up, gate and down of each expert of a token, multiply by the
router's weight, and sum. :class:`Experts` follows this contract too. Nothing is copied: an expert's matrices are contiguous
rows of the fused one, on disk and in memory.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from thanos.errors import ModelError

PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}
"""Fused parameter → the matrices of one expert, in the order of their rows."""

_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d

ROUTING = ["hidden_states", "top_k_index", "top_k_weights"]
"""The arguments of a mixture, in order: tokens (T, H), the experts of each token (T, k), and their weights (T, k)."""


class Expert(nn.Module):
    """One expert.

    Args:
        gate: turns the stacked gate and up projections (T, 2I), or the up projection (T, I), into (T, I).
        shapes: matrix name → (outputs, inputs).
        dtype: dtype of the parameters, which are on the meta device.
    """

    def __init__(
        self, gate: Callable[[Tensor], Tensor], shapes: dict[str, tuple[int, int]], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self._gate = gate
        for name, (rows, columns) in shapes.items():
            setattr(self, name, nn.Linear(columns, rows, bias=False, device="meta", dtype=dtype))
        self._first = [name for name in shapes if name != "down_proj"]

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (T, H) to (T, H)."""
        projected = [self.get_submodule(name)(tokens) for name in self._first]
        return self.get_submodule("down_proj")(self._gate(torch.cat(projected, -1)))


class Experts(nn.Module):
    """The experts of one block, called as transformers calls its own.

    Args:
        fused: the module that holds the 3-D parameters on the meta device. They are removed from it; its activation is used.
        name: name of the module, for messages.

    Attributes:
        fused: name of each 3-D parameter → its parts in order: parameter name, relative to this module → shape.

    Raises:
        ModelError: the layout is not supported.
    """

    def __init__(self, fused: nn.Module, name: str) -> None:
        super().__init__()
        state: Any = fused
        layout = _layout(fused, name)
        shapes = {part: shape for parts in layout.values() for part, shape in parts.items()}
        gate = state._apply_gate if state.has_gate else state.act_fn
        down = fused.get_parameter("down_proj")
        for index in range(len(down)):
            self.add_module(str(index), Expert(gate, shapes, down.dtype))
        self.fused = {
            parameter: {f"{index}.{part}.weight": shape for index in range(len(down)) for part, shape in parts.items()}
            for parameter, parts in layout.items()
        }
        for parameter in layout:
            delattr(fused, parameter)

    def __len__(self) -> int:
        """Number of experts."""
        return len(self._modules)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Apply to each token (T, H) its experts, top_k_index (T, k); sum the outputs, weighted by top_k_weights (T, k)."""
        chosen = top_k_index.reshape(-1)
        order = chosen.argsort(stable=True)
        picks = order.split(torch.bincount(chosen, minlength=len(self)).tolist())
        weights = top_k_weights.reshape(-1, 1)
        output = torch.zeros_like(hidden_states)
        for expert, picked in zip(self.children(), picks, strict=True):
            if len(picked):
                tokens = picked // top_k_index.shape[-1]
                result = expert(hidden_states[tokens]) * weights[picked]
                # No token occurs twice in one call, so the sum has a fixed order on every device.
                output.index_add_(0, tokens, result.to(output.dtype))
        return output


def _layout(fused: nn.Module, name: str) -> dict[str, dict[str, tuple[int, int]]]:
    """Return, for each 3-D parameter of a fused mixture, the matrices of one expert: name → shape."""
    state: Any = fused
    parameters = {key: tuple(parameter.shape) for key, parameter in fused.named_parameters()}
    first = "gate_up_proj" if getattr(state, "has_gate", True) else "up_proj"
    # transformers describes the layout by these flags to the functions that run experts.
    flags = {"is_concatenated": True, "is_transposed": False, "has_bias": False, "has_post_expert_norm": False}
    if (
        hasattr(state, "has_gate")
        and all(getattr(state, flag, value) is value for flag, value in flags.items())
        and parameters.keys() == {first, "down_proj"}
        and list(inspect.signature(type(fused).forward).parameters)[1:] == ROUTING
    ):
        (experts, rows, columns), down = parameters[first], parameters["down_proj"]
        inner = rows // len(PARTS[first])
        if down == (experts, columns, inner) and rows == inner * len(PARTS[first]):
            return {first: dict.fromkeys(PARTS[first], (inner, columns)), "down_proj": {"down_proj": (columns, inner)}}
    found = ", ".join(f"{key} {list(shape)}" for key, shape in parameters.items())
    raise ModelError(
        f"the mixture of experts {name} ({type(fused).__name__}: {found}) has a layout that is not supported; supported are "
        "gate_up_proj [experts, 2 × inner, hidden] and down_proj [experts, hidden, inner] without biases"
    )


def unfuse(model: nn.Module) -> None:
    """Replace every fused mixture of a meta model by :class:`Experts`, in place. Raises ModelError for an unknown layout."""
    counts = _expert_counts(model)
    for name, module in list(model.named_modules()):
        if _is_fused(module, counts):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, Experts(module, name))


def _is_fused(module: nn.Module, counts: Set[int]) -> bool:
    """Return whether a module holds the matrices of several experts as parameters of its own.

    A 3-D parameter alone is no evidence: recurrent and pooling layers have one too. The evidence is one of three: the interface
    by which transformers runs experts, the name of the class, or a stack of as many matrices as there are experts.
    """
    shapes = [parameter.shape for parameter in module.parameters(recurse=False) if parameter.dim() > 1]
    if not shapes or isinstance(module, Experts | nn.Linear | nn.Embedding | _Convolution):
        return False
    called = type(module).__name__.lower()
    named = "expert" in called and "router" not in called and not called.endswith("gate")
    return hasattr(module, "has_gate") or named or any(len(shape) == 3 and shape[0] in counts for shape in shapes)


def _expert_counts(model: nn.Module) -> set[int]:
    """Return the numbers of experts that the configs of a model and of its parts state."""
    configs = [config for module in model.modules() if (config := getattr(module, "config", None)) is not None]
    return {
        value
        for config in {id(config): config for config in configs}.values()
        for name, value in vars(config).items()
        if "expert" in name
        and not any(word in name for word in ("per_tok", "size", "dim"))
        and type(value) is int
        and value > 1
    }


def mixtures(blocks: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield the name, relative to ``blocks``, and the number of experts of each :class:`Experts` and each list of experts."""
    counts = _expert_counts(blocks)
    for name, module in blocks.named_modules():
        if isinstance(module, Experts | nn.ModuleList):
            size = len(module)
            if isinstance(module, Experts) or _is_list(name, size, counts):
                yield name, size


def _is_list(name: str, length: int, counts: Set[int]) -> bool:
    """Return whether a list of modules in a block holds experts, rather than adapters or halves of the block."""
    return bool(name) and length > 1 and ("expert" in name.rpartition(".")[2] or length in counts)


def router_parameters(block: nn.Module) -> set[str]:
    """Return the names, relative to a block, of the parameters that score experts.

    They belong to the module that holds the mixture, outside of the experts. They have one row for each expert, or a single row
    if they weigh an expert that all tokens share.
    """
    found = dict(mixtures(block))
    rows: dict[str, set[int]] = {}
    for name, size in found.items():
        rows.setdefault(name.rpartition(".")[0], {1}).add(size)
    routers = set()
    for name, parameter in block.named_parameters():
        parts = name.split(".")
        above = [".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1)]
        if any(module in found for module in above):
            continue
        if any(parameter.shape[:1].numel() in rows.get(module, ()) for module in above):
            routers.add(name)
    return routers


def rename_expert(key: str, converters: Sequence[Any]) -> str | None:
    """Translate the name of one expert's matrix in a checkpoint by transformers' table of conversions.

    Two conversions are supported, both of which stack matrices: [gate, up] → ``gate_up_proj`` and [down] → ``down_proj``.
    ``key`` is the matrix's name after the conversions that only rename. Returns its name in :class:`Experts`; the key itself if
    no conversion applies to it; None if one applies that is not supported.
    """
    for converter in converters:
        if converter.rename_source_key(key)[1] is None:
            continue
        kinds = [
            (type(operation).__name__, operation.dim) for operation in converter.operations if hasattr(operation, "dim")
        ]
        target = converter.target_patterns[0]
        prefix, _, fused = target.rpartition(".")
        parts = PARTS.get(fused, ())
        stacked = [("MergeModulelist", 0), ("Concatenate", 1)][: len(parts)]
        if len(converter.target_patterns) != 1 or len(kinds) != len(converter.operations) or kinds != stacked:
            return None
        for source, part in zip(converter.source_patterns, parts, strict=True):
            pattern = re.escape(source).replace(r"\*", r"(\d+)").replace(r"\\.", r"\.") + "$"
            if match := re.search(pattern, key):
                return f"{key[: match.start()]}{prefix}.{match.group(1)}.{part}.weight"
        return None
    return key
