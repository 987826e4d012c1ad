"""The section of a model card that says how a packed model is loaded, and saving it with ``save_pretrained``."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from thanos.sparse.modules import packed_modules

HEADING = "## Packed weights"

_SECTION = (
    HEADING
    + """

{} linear layers of this model are stored in a packed sparse format: all tensors take {:.3f} GB, and {:.3f} GB in the dense \
form. transformers alone cannot read it: it would warn of the unknown method `thanos_sparse` and fill the layers with random \
numbers. Install the package and import it first:

```python
import thanos.sparse  # of the package thanos-llm
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")
```

`thanos unpack PACKED OUT` restores {}.
"""
)


def packed_section(layers: int, nbytes: int, dense_bytes: int, restores: str) -> str:
    """Return the section, in Markdown.

    Args:
        layers: number of packed layers.
        nbytes: bytes of all tensors.
        dense_bytes: bytes of all tensors in the dense form.
        restores: what ``thanos unpack`` restores, in words.
    """
    return _SECTION.format(layers, nbytes / 1e9, dense_bytes / 1e9, restores)


def save_with_card(model: Any) -> None:
    """Make ``model.save_pretrained`` write the section to README.md too, as long as the model has packed layers."""
    model.__class__ = _with_card(type(model))


class _Card:
    """Methods of a packed model that come before those of its class."""

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, *arguments: Any, **others: Any
    ) -> None:
        """Save the model as transformers does. If it has packed layers, README.md says how to load them."""
        saved: Any = super()
        saved.save_pretrained(save_directory, is_main_process, *arguments, **others)
        folder = Path(save_directory)
        if is_main_process and folder.is_dir() and packed_modules(self):
            path = folder / "README.md"
            card = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
            if HEADING not in card:
                path.write_text("\n\n".join(filter(None, (card.rstrip(), _section(self)))), encoding="utf-8")

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy by the model's own class, since pickle cannot find a class that was made at run time."""
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, (type(self).__mro__[2],), *state


@cache
def _with_card(base: type[Any]) -> type[Any]:
    """Return the class of a model with :class:`_Card`; it has the same name, which config.json states."""
    if issubclass(base, _Card):
        return base
    return type(base.__name__, (_Card, base), {"__module__": base.__module__, "__doc__": base.__doc__})


def _new(base: type[Any]) -> Any:
    return object.__new__(_with_card(base))


def _section(model: Any) -> str:
    packed = packed_modules(model)
    nbytes = sum(one.nbytes for one in {id(one): one for one in model.parameters()}.values())
    less = sum(one.spec.rows * one.spec.columns * one.spec.dtype.itemsize - one.spec.nbytes for one in packed.values())
    return packed_section(len(packed), nbytes, nbytes + less, "the dense model")
