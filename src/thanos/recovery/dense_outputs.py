"""The outputs of the dense model's decoder for all sequences, computed once before the training.

This is possible only if the text is not varied, so that the dense model's outputs are the same in all epochs. Its decoder runs
once over each sequence. Its weights are freed before memory is needed for gradients and the optimizer's state. The head still
runs in each pass, so the logits of all tokens are never in memory at once.

On a CPU each sequence runs alone, so a resumed run computes the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from thanos.engine.distributed import World
from thanos.recovery.distance import Distillation
from thanos.solvers.row_shards import row_range

SPARE_BYTES = {"cpu": 1 << 30, "cuda": 4 << 30}
"""Bytes that the outputs may need in addition to the bytes of the decoder's weights, which are freed; by type of device."""


def keep_outputs(
    module: Distillation, ids: Tensor, size: int, device: torch.device, world: World, report: Callable[[int], None]
) -> bool:
    """Compute the outputs, set ``module.outputs``, and free the dense decoder.

    If the outputs need more memory than the decoder's weights and :data:`SPARE_BYTES` together, they are not kept: the decoder
    then runs in each pass. The decision depends on sizes and not on the free memory, so a resumed run makes the same one.

    Args:
        module: the student with its loss.
        ids: token ids of all sequences, (n, T), on the CPU.
        size: number of sequences in a pass.
        device: device of the training.
        world: the processes; each computes the outputs of a part of the sequences, and all get all outputs.
        report: function that is called with the number of this process's finished sequences.

    Returns:
        Whether the outputs are kept.
    """
    cuda = device.type == "cuda"
    own, batch = row_range(len(ids), world.rank, world.size), size if cuda else 1
    kept: Tensor | None = None
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=cuda):
        for first in range(own.start, max(own.stop, own.start + 1), batch):
            rows = ids[first : min(first + batch, own.stop)] if len(own) else ids[:1]
            hidden = module.teacher.hidden(rows.to(device)).view(*rows.shape, -1)
            # Autocast rounds the head's inputs to bfloat16 in any case.
            hidden = hidden.to(torch.bfloat16) if cuda else hidden
            if kept is None:
                if len(ids) * hidden[0].nbytes > module.teacher.decoder_bytes + SPARE_BYTES[device.type]:
                    return False
                kept = hidden.new_empty(len(own), *hidden.shape[1:])
            if len(own):
                kept[first - own.start : first - own.start + len(rows)] = hidden
                report(first - own.start + len(rows))
    assert kept is not None
    module.outputs = world.gather(kept, len(ids))
    module.teacher.release_decoder()
    return True
