"""The process's global state, restored after a training: the Trainer changes random states, the environment and more.

Import this module only where accelerate is installed.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState


@contextmanager
def own_state(device: torch.device) -> Iterator[None]:
    """Restore random states, environment variables and accelerate's state on exit; make ``device`` the current one."""
    import numpy

    before, fresh = (random.getstate(), numpy.random.get_state()), not PartialState._shared_state
    environment = dict(os.environ)
    devices = [device] if device.type == "cuda" else []
    if device.index is not None:
        torch.cuda.set_device(device)
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(before[0])
        numpy.random.set_state(before[1])
        os.environ.clear()
        os.environ.update(environment)
        if fresh:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
