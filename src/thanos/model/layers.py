"""Find a model's decoder blocks and linear layers by its structure, never by the model's name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from thanos.errors import ModelError
from thanos.model.experts import mixtures, router_parameters
from thanos.recipe import LayerRecipe, Recipe, matches


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """A linear layer of a model.

    Attributes:
        name: full module name.
        module: the module.
        block: index of its decoder block; None outside the blocks.
        transposed: the weight is stored (inputs, outputs), as GPT-2's ``Conv1D`` does.
        expert: name of the expert that the layer belongs to; empty outside mixtures of experts.
        router: whether the layer scores experts. Routers are never pruned.
    """

    name: str
    module: nn.Module
    block: int | None
    transposed: bool
    expert: str = ""
    router: bool = False

    @property
    def weight_name(self) -> str:
        """The weight's full parameter name."""
        return f"{self.name}.weight"

    @property
    def shape(self) -> tuple[int, int]:
        """(output rows, input columns), however the weight is stored."""
        rows, columns = self.module.get_parameter("weight").shape
        return (columns, rows) if self.transposed else (rows, columns)

    def oriented(self, stored: Tensor) -> Tensor:
        """Convert a weight from the stored form to (outputs, inputs), or back: the transposition is the same."""
        return stored.T if self.transposed else stored


def find_blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """Return the name and the modules of the decoder blocks: the module list of the text model with the most linear weights.

    A tower for images or audio may hold more weights than the text model. So lists of the text model come first: those whose
    innermost pretrained model has the text config, then those within the model's decoder. Other lists count only if the text
    model has none.

    Raises:
        ModelError: no module list holds linear layers.
    """
    best, best_rank = None, (False, False, 0)
    owners, decoder = _innermost_configs(model), _decoder_modules(model)
    text_config = _text_config_type(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            size = sum(layer.get_parameter("weight").numel() for _, layer in _linear_modules(module))
            rank = (owners.get(name) is text_config, id(module) in decoder, size)
            if size and rank > best_rank:  # of equal ranks the first wins: the outermost list
                best, best_rank = name, rank
    if best is None:
        raise ModelError(
            f"{type(model).__name__} has no list of decoder blocks with linear layers; it is not supported"
        )
    return best, list(model.get_submodule(best).children())


def _text_config_type(model: nn.Module) -> type | None:
    """Return the class of the text model's config; None if the model has no config, or a config of several text models."""
    find = getattr(getattr(model, "config", None), "get_text_config", None)
    with suppress(ValueError):  # transformers raises it for several text models
        return type(find(decoder=True)) if callable(find) else None
    return None


def _innermost_configs(model: nn.Module) -> dict[str, type]:
    """Return module name → class of the config of the innermost pretrained model that holds the module."""
    from transformers import PreTrainedModel

    found: dict[str, type] = {}
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            found[name] = type(module.config)
        elif name and (parent := name.rpartition(".")[0]) in found:
            found[name] = found[parent]
    return found


def _decoder_modules(model: nn.Module) -> set[int]:
    """Return the ids of the modules within the model's decoder, as transformers finds it; all modules without one."""
    find: Any = getattr(model, "get_decoder", None)
    decoder = find() if callable(find) else None
    return {id(module) for module in (decoder if isinstance(decoder, nn.Module) else model).modules()}


def block_names(names: Iterable[str], blocks_name: str, index: int) -> list[str]:
    """Return the names of one block's parameters."""
    return [name for name in names if name.startswith(f"{blocks_name}.{index}.")]


def outer_names(model: nn.Module, names: Iterable[str], blocks_name: str, *, head: bool = True) -> list[str]:
    """Return the names of the parameters outside the blocks.

    If ``head`` is false, the parameters that only the output embedding has are left out.
    """
    find = None if head else getattr(model, "get_output_embeddings", None)
    output_embedding: Any = find() if callable(find) else None
    own = set() if output_embedding is None else {id(parameter) for parameter in output_embedding.parameters()}
    for module in model.modules():
        if module is not output_embedding:  # a tied head may come first, and the shared parameter then has its name
            own -= {id(parameter) for parameter in module.parameters(recurse=False)}
    only_head = {name for name, parameter in model.named_parameters() if id(parameter) in own}
    return [name for name in names if not name.startswith(f"{blocks_name}.") and name not in only_head]


def _linear_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    from transformers.pytorch_utils import Conv1D

    for name, child in module.named_modules():
        if isinstance(child, nn.Linear | Conv1D):
            yield name, child


def linear_names(module: nn.Module) -> list[str]:
    """Return the names of the linear layers within a module, in the order of its modules."""
    return [name for name, _ in _linear_modules(module)]


def linear_layers(model: nn.Module) -> list[LinearLayer]:
    """Return every linear layer of the model, in the order of its modules. Raises ModelError as :func:`find_blocks`."""
    prefix, _ = find_blocks(model)
    blocks = model.get_submodule(prefix)
    groups = {f"{prefix}.{name}" for name, _ in mixtures(blocks)}
    routers = {f"{prefix}.{name}" for name in router_parameters(blocks)} if groups else set[str]()
    layers = []
    for name, module in _linear_modules(model):
        parts, inside = name.split("."), name.startswith(f"{prefix}.")
        block = int(name[len(prefix) + 1 :].split(".")[0]) if inside else None
        above = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
        expert = next((one for one, parent in pairwise(above) if parent in groups), "")
        is_plain, router = isinstance(module, nn.Linear), f"{name}.weight" in routers
        layers.append(LinearLayer(name, module, block, transposed=not is_plain, expert=expert, router=router))
    return layers


def select_layers(layers: list[LinearLayer], recipe: Recipe) -> tuple[dict[LinearLayer, LayerRecipe], dict[str, str]]:
    """Split linear layers into those that the recipe prunes, with their settings, and the names of the others with the reason.

    The globs of a recipe are applied here and nowhere else.

    Without ``targets`` every linear layer of the blocks is pruned. A layer outside them is pruned only if a target names it.

    Raises:
        ModelError: the glob of a target, skip or override matches no linear layer, or nothing is left to prune.
    """
    overrides = tuple(override.match for override in recipe.overrides)
    for option, globs in (("--targets", recipe.targets), ("--skip", recipe.skip), ("the override of", overrides)):
        for glob in globs:
            if not any(matches(layer.name, glob) for layer in layers):
                raise ModelError(
                    f"{option} {glob!r} matches no linear layer; the model has, for example, "
                    f"{', '.join(sorted({layer.name.rsplit('.', 1)[-1] for layer in layers}))}"
                )
    chosen: dict[LinearLayer, LayerRecipe] = {}
    dense: dict[str, str] = {}
    for layer in layers:
        if layer.router:
            dense[layer.name] = "routes tokens to experts"
        elif recipe.targets and not any(matches(layer.name, glob) for glob in recipe.targets):
            dense[layer.name] = "not matched by targets"
        elif not recipe.targets and layer.block is None:
            dense[layer.name] = "outside the decoder blocks"
        elif any(matches(layer.name, glob) for glob in recipe.skip):
            dense[layer.name] = "matched by skip"
        elif (settings := recipe.for_layer(layer.name)) is None:
            dense[layer.name] = "skipped by an override"
        else:
            chosen[layer] = settings
    if not chosen:
        raise ModelError("the recipe leaves no layer to prune; loosen targets, skip or the overrides")
    return chosen, dense
