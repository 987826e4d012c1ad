"""The sentences about a recovery in the model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thanos.run.names import public_name

_KINDS = {"the text": "held_out_text", "generated sequences": "held_out_generated"}
"""Kind of held-out text → its key in the history of ``recovery.json``."""


def recovery_sentence(recovery: Mapping[str, Any]) -> str:
    """Return the sentences about a recovery, from the values of ``recovery.json``."""
    before, after = recovery["held_out_before"], recovery["held_out_after"]
    text, sequences = recovery["calibration"], recovery["sequences"]
    rate = recovery.get("rate") or recovery["recipe"]["rate"]
    recipe, source = recovery["recipe"], public_name(str(text["source"]))
    what = (
        "surviving weights were trained with the zeros fixed" if recovery["masked_layers"] else "weights were trained"
    )
    how = (
        f"After pruning, the {what}, to reproduce the next-token distributions of "
        f"{public_name(str(recovery['dense']))} on {sequences['trained']} × {text['sequence_length']} tokens of "
        f"{source}{_generated(recipe)} (epochs: {recipe['epochs']}, rate {rate:g})"
    )
    held_out = f"{sequences['held_out']} × {text['sequence_length']} held-out tokens"
    if not recovery["best_step"]:
        return (
            f"{how}. No epoch was better on {held_out} (KL divergence {before:.4f} nats a token), so the weights are "
            "unchanged."
        )
    parts = [f"{kind}: {old:.4f} → {new:.4f}" for kind, (old, new) in held_out_by_kind(recovery).items()]
    kinds = f" ({'; '.join(parts)})" if parts else ""
    return f"{how}. On {held_out} the KL divergence fell from {before:.4f} to {after:.4f} nats a token{kinds}."


def held_out_by_kind(recovery: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Return kind of held-out text → divergence before the recovery and of the written weights, in nats a token.

    It is empty if there is one kind, or if one of the values is not finite. ``recovery`` has the values of ``recovery.json``.
    """
    history = recovery["history"]
    first, best = (next(e for e in history if e["step"] == step) for step in (0, recovery["best_step"]))
    found = {what: (first.get(key), best.get(key)) for what, key in _KINDS.items()}
    return found if all(None not in pair for pair in found.values()) else {}


def _generated(recipe: Mapping[str, Any]) -> str:
    """Return words for the sequences that the dense model generated; empty if there are none."""
    if not recipe.get("generate"):
        return ""
    begun = f"the prompts in {recipe['prompts']}" if recipe.get("prompts") else "pieces of it"
    return f", {recipe['generate']} of the sequences written by the dense model as continuations of {begun}"
