"""Linear layers whose weight stays packed, as modules of a model."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from thanos.errors import ModelError
from thanos.sparse.formats import PackedSpec, PackedWeight, decode
from thanos.sparse.ops import dense_linear, packed_linear
from thanos.sparse.siblings import Siblings
from thanos.sparse.storage import OFFSETS, WORDS, as_latest, check_weight


class PackedLinear(nn.Module):
    """A linear layer for inference with a packed weight. Its parameters are not initialised.

    Args:
        spec: spec of the weight.
        bias: whether there is a bias.
        device: device of the parameters.

    Attributes:
        siblings: the layers that run in one kernel launch with this one; None if it runs alone.
        sibling_index: index of this layer in ``siblings``.
    """

    weight_words: nn.Parameter
    weight_offsets: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, spec: PackedSpec, *, bias: bool, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.siblings: Siblings | None = None
        self.sibling_index = 0
        self.in_features, self.out_features = spec.columns, spec.rows
        sizes = {WORDS: (spec.words, torch.int32), OFFSETS: (spec.offsets, torch.int32)}
        sizes["bias"] = (spec.rows if bias else 0, spec.dtype)
        for name, (size, dtype) in sizes.items():
            tensor = torch.empty(size, dtype=dtype, device=device) if size else None
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))

    @property
    def packed(self) -> PackedWeight:
        """The packed weight."""
        offsets = self.weight_offsets
        return PackedWeight(self.spec, self.weight_words.data, None if offsets is None else offsets.data)

    @property
    def weight(self) -> Tensor:
        """The dense weight, (out_features, in_features). It is decoded at each access, which is slow."""
        return decode(self.packed)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, (..., out_features).

        Under autocast ``x`` and the bias are cast to the dtype of the packed values, as a plain linear layer casts them.

        Raises:
            TypeError: ``x`` has another dtype than the packed values, without autocast.
            RuntimeError: ``x`` has another last size than ``in_features``.
        """
        if x.dtype != self.spec.dtype and torch.is_autocast_enabled(x.device.type):
            x = x.to(self.spec.dtype)
        if x.dtype != self.spec.dtype:
            raise TypeError(
                f"a packed layer holds {self.spec.dtype} values and got {x.dtype}; run the model in {self.spec.dtype}, or "
                "turn it into a dense one with model.dequantize()"
            )
        if not x.dim() or x.shape[-1] != self.in_features:
            raise RuntimeError(f"a packed layer of {self.in_features} inputs got an input of shape {tuple(x.shape)}")
        return self.alone(x) if self.siblings is None else self.siblings.output(self.sibling_index, x)

    def alone(self, x: Tensor) -> Tensor:
        """Return the layer's output, computed without its siblings; ``x`` has the dtype of the packed values."""
        spec = self.spec
        return packed_linear(x, self.weight_words, self.weight_offsets, self.cast_bias(), spec.rows, spec.n)

    def cast_bias(self) -> Tensor | None:
        """Return the bias; under autocast in the dtype of the packed values."""
        bias, dtype = self.bias, self.spec.dtype
        if bias is None or bias.dtype == dtype or not torch.is_autocast_enabled(bias.device.type):
            return bias
        return bias.to(dtype)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load tensors as any module does, but check packed ones first, since the kernels compute addresses from them."""
        loaded, packed = {name: state_dict.get(prefix + name) for name in (WORDS, OFFSETS)}, None
        words, offsets = (getattr(self, name) if one is None else one for name, one in loaded.items())
        if any(one is not None for one in loaded.values()) and not any(_is_meta(one) for one in (words, offsets)):
            try:
                packed = as_latest(PackedWeight(self.spec, words, offsets), prefix.removesuffix("."))
                check_weight(packed, prefix.removesuffix("."))
            except ModelError as error:
                error_msgs.append(str(error))
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if packed is not None:
            self._hold(packed)

    def check(self, name: str) -> None:
        """Check the content of the packed weight, once it is loaded; from then on it has this version's layout.

        Raises:
            ModelError: see :func:`~thanos.sparse.storage.check_weight` and :func:`~thanos.sparse.storage.as_latest`.
        """
        packed = as_latest(self.packed, name)
        check_weight(packed, name)
        self._hold(packed)

    def _hold(self, packed: PackedWeight) -> None:
        """Replace the loaded offsets by those of this version's layout, if they have another layout."""
        if packed.spec != self.spec and packed.offsets is not None and self.weight_offsets is not None:
            self.spec, self.weight_offsets.data = packed.spec, packed.offsets.to(self.weight_offsets.device)

    def dense(self) -> nn.Linear:
        """Return a plain linear layer with the same weight and bias, on the same device."""
        device, spec = self.weight_words.device, self.spec
        layer = nn.Linear(spec.columns, spec.rows, bias=self.bias is not None, device="meta", dtype=spec.dtype)
        layer.weight = nn.Parameter(self.weight, requires_grad=False)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.data.to(device), requires_grad=False)
        layer.training = self.training
        return layer

    def extra_repr(self) -> str:
        """Return the text that ``print(model)`` shows."""
        kind = f"{self.spec.n}:32" if self.spec.n else "bitmap"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, packed={kind}"


def _is_meta(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.device.type == "meta"


class DenseLinear(nn.Linear):
    """A layer of a packed model that stays dense, such as a head. On a CPU, a kernel of this package is used for few tokens.

    Otherwise, and if a derivative is required, it behaves as ``nn.Linear``.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output, (..., out_features)."""
        derived = torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad)
        # A weight of another class need not be a plain matrix in memory, for example in a quantised or sharded layer.
        if derived or input.device.type != "cpu" or type(self.weight) is not nn.Parameter:
            return super().forward(input)
        return dense_linear(input, self.weight, self.bias)


def is_plain(module: object) -> TypeGuard[nn.Linear]:
    """Whether a module is exactly an ``nn.Linear`` or a :class:`DenseLinear`, and not of another subclass."""
    return type(module) in (nn.Linear, DenseLinear)


def quicken(model: nn.Module, on: bool = True) -> None:
    """Turn the plain linear layers of a model into :class:`DenseLinear`, or back. Their parameters stay the same objects."""
    old, new = (nn.Linear, DenseLinear) if on else (DenseLinear, nn.Linear)
    for module in model.modules():
        if type(module) is old:
            object.__setattr__(module, "__class__", new)


def packed_modules(model: Any) -> dict[str, PackedLinear]:
    """Return the packed layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
