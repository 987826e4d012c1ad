"""The end of the dense stream: the last block that needs it."""

from __future__ import annotations

from thanos.engine.inputs import EngineInputs


def dense_end(inputs: EngineInputs) -> int:
    """Return the number of blocks for which the dense stream is needed; one more if the layers after them need it, too."""
    after = len(inputs.blocks)
    wanting = [
        layer.block
        for layer, settings in inputs.layers.items()
        if (settings.repair.retargets if layer.block is None else settings.repair.needs_dense_stream)
    ]
    return 1 + max((after if block is None else block for block in wanting), default=-1)
