"""One process of a recovery under torchrun: ``torchrun … recovering_ranks.py JSON``."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

import thanos
from thanos.recovery import run, watch
from thanos.recovery.guard import Guard


def main(job: dict[str, Any]) -> None:
    """Recover; check that weights are sharded where they have to be; end at a step as if the machine had failed."""
    measure = Guard.measure

    def watched(self: Guard, module: Any, *args: Any, **kwargs: Any) -> Any:
        sharded = {isinstance(parameter, DTensor) for parameter in module.parameters()}
        assert sharded == {job["settings"]["shard"]}, sharded
        return measure(self, module, *args, **kwargs)

    if job["settings"]["shard"]:
        _allow_shards_on_cpu()

    def stop(event: thanos.Event) -> None:
        if event.kind == "progress" and event.phase == "train" and event.done == job["stop"]:
            os._exit(7)

    Guard.measure = watched
    watch.CHECKPOINT_SECONDS, watch.CHECKPOINT_FRACTION = 0.0, float("inf")
    recipe = thanos.RecoveryRecipe(**job["settings"])
    thanos.recover(job["model"], job["out"], dense=job["dense"], recipe=recipe, resume=True, on_event=stop)


def _allow_shards_on_cpu() -> None:
    """Let accelerate shard on a CPU, which torch can: accelerate asks for the kind of the devices alone."""
    run.check_shard = lambda recipe, device: None
    original = PartialState.__init__

    def init(self: PartialState, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.distributed_type = DistributedType.MULTI_XPU

    PartialState.__init__ = init


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
