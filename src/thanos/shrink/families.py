"""The units that can be removed from each architecture: one row for each family of models with the same blocks.

A unit is a neuron of an MLP or an attention head. A row has the names of the layers around the units, and the fields of the
config that state the sizes. The *writer* reads the units' outputs and writes its own into the residual stream, such as
``down_proj``. The *makers* compute the units, such as ``gate_proj`` and ``up_proj``; they are in the writer's module.
"""

from __future__ import annotations

from dataclasses import dataclass

from thanos.errors import ModelError


@dataclass(frozen=True, slots=True)
class Cut:
    """The layers that lose rows or columns when a unit is removed.

    Attributes:
        writer: name of the writer relative to the block; ``*`` stands for the index of an expert.
        makers: name of each maker in the writer's module, and the matrices that its rows consist of, in order: ``g`` and ``u``
            (gate and up: one row for each neuron), ``q`` (``head_dim`` rows for each query head), ``k`` and ``v``
            (``head_dim`` rows for each key-value head).
        uncut: other parameters of the writer's module, which all units share.
    """

    writer: str
    makers: tuple[tuple[str, str], ...]
    uncut: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Family:
    """Architectures with the same blocks.

    Attributes:
        types: values of ``model_type`` in the text model's config.
        mlp: the layers that lose neurons.
        width: the config's field for the number of neurons.
        attention: the layers that lose heads, or the reason why heads cannot be removed.
        layers: the config's field for the number of blocks.
        uses_index: the config's field that, if true, makes a block's function depend on its index; empty without one.
    """

    types: tuple[str, ...]
    mlp: Cut
    width: str
    attention: Cut | str
    layers: str = "num_hidden_layers"
    uses_index: str = ""

    @property
    def has_experts(self) -> bool:
        """Whether the neurons are those of experts."""
        return "*" in self.mlp.writer

    @property
    def last_writer(self) -> str:
        """Name of the last layer of a block whose output alone is added to the residual stream, so no expert."""
        return "self_attn.o_proj" if self.has_experts else self.mlp.writer


_GATED = (("gate_proj", "g"), ("up_proj", "u"))
_MLP = Cut("mlp.down_proj", _GATED)
_EXPERTS = Cut("mlp.experts.*.down_proj", _GATED)
_QKV = (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"))
_ATTENTION = Cut("self_attn.o_proj", _QKV)
_NORMED = Cut("self_attn.o_proj", _QKV, ("q_norm.weight", "k_norm.weight"))

_NO_HEAD_DIM = "its config cannot state a head's width, which is the hidden size divided by the number of heads"
_WIDE_NORMS = "it normalises queries and keys over all heads, so every head depends on all others"

FAMILIES = (
    Family(("llama", "mistral", "qwen2", "gemma", "gemma2", "granite"), _MLP, "intermediate_size", _ATTENTION),
    Family(("smollm3",), _MLP, "intermediate_size", _ATTENTION),
    Family(("qwen3", "gemma3_text"), _MLP, "intermediate_size", _NORMED),
    Family(("olmo2",), _MLP, "intermediate_size", _WIDE_NORMS),
    Family(
        ("phi3",),
        Cut("mlp.down_proj", (("gate_up_proj", "gu"),)),
        "intermediate_size",
        Cut("self_attn.o_proj", (("qkv_proj", "qkv"),)),
    ),
    Family(("opt",), Cut("fc2", (("fc1", "u"),)), "ffn_dim", _NO_HEAD_DIM),
    Family(
        ("gpt2",),
        Cut("mlp.c_proj", (("c_fc", "u"),)),
        "n_inner",
        _NO_HEAD_DIM,
        layers="n_layer",
        uses_index="scale_attn_by_inverse_layer_idx",
    ),
    Family(("gpt_neox",), Cut("mlp.dense_4h_to_h", (("dense_h_to_4h", "u"),)), "intermediate_size", _NO_HEAD_DIM),
    Family(("mixtral",), _EXPERTS, "intermediate_size", _ATTENTION),
    Family(("qwen2_moe",), _EXPERTS, "moe_intermediate_size", _ATTENTION),
    Family(("qwen3_moe",), _EXPERTS, "moe_intermediate_size", _NORMED),
    Family(("olmoe",), _EXPERTS, "intermediate_size", _WIDE_NORMS),
)
"""All families. A model of any other type is refused."""


def family_of(model_type: str, name: str) -> Family:
    """Return the family of a model.

    Args:
        model_type: field of the text model's config.
        name: name of the model's class, for messages.

    Raises:
        ModelError: no family has the type.
    """
    for family in FAMILIES:
        if model_type in family.types:
            return family
    known = ", ".join(sorted(one for family in FAMILIES for one in family.types))
    raise ModelError(
        f"{name} (model_type {model_type}) cannot be made smaller: there is no description of its units; supported types are "
        f"{known}"
    )
