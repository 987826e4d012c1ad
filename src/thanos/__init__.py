"""Prune pretrained language models, recover their accuracy, and measure the result."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from thanos._version import __version__ as __version__

if TYPE_CHECKING:
    from thanos.evaluation.inspect import Inspection as Inspection
    from thanos.evaluation.inspect import inspect_checkpoint as inspect_checkpoint
    from thanos.evaluation.perplexity import Evaluation as Evaluation
    from thanos.evaluation.perplexity import evaluate as evaluate
    from thanos.evaluation.tasks import PAPER_TASKS as PAPER_TASKS
    from thanos.evaluation.tasks import ZeroShot as ZeroShot
    from thanos.evaluation.tasks import zero_shot as zero_shot
    from thanos.events import Event as Event
    from thanos.export.pack import pack as pack
    from thanos.export.record import Packing as Packing
    from thanos.export.unpack import unpack as unpack
    from thanos.planning.plan import Plan as Plan
    from thanos.planning.plan import plan as plan
    from thanos.recipe import LayerRecipe as LayerRecipe
    from thanos.recipe import Override as Override
    from thanos.recipe import Recipe as Recipe
    from thanos.recovery.recipe import RecoveryRecipe as RecoveryRecipe
    from thanos.recovery.report import RecoveryReport as RecoveryReport
    from thanos.recovery.run import recover as recover
    from thanos.run.in_memory import prune_model as prune_model
    from thanos.run.prune import prune as prune
    from thanos.run.report import PruningReport as PruningReport
    from thanos.solvers.prune_layer import PrunedWeight as PrunedWeight
    from thanos.solvers.prune_layer import prune_weight as prune_weight
    from thanos.study.run import run_study as run_study
    from thanos.study.store import read_store as read_store

# Torch takes seconds to import, and `thanos --help` does not need it: each name is imported when it is first used.
_EXPORTS = {
    "Evaluation": "evaluation.perplexity",
    "Event": "events",
    "Inspection": "evaluation.inspect",
    "LayerRecipe": "recipe",
    "Override": "recipe",
    "PAPER_TASKS": "evaluation.tasks",
    "Packing": "export.record",
    "Plan": "planning.plan",
    "PrunedWeight": "solvers.prune_layer",
    "PruningReport": "run.report",
    "Recipe": "recipe",
    "RecoveryRecipe": "recovery.recipe",
    "RecoveryReport": "recovery.report",
    "ZeroShot": "evaluation.tasks",
    "evaluate": "evaluation.perplexity",
    "inspect_checkpoint": "evaluation.inspect",
    "pack": "export.pack",
    "plan": "planning.plan",
    "prune": "run.prune",
    "prune_model": "run.in_memory",
    "prune_weight": "solvers.prune_layer",
    "read_store": "study.store",
    "recover": "recovery.run",
    "run_study": "study.run",
    "unpack": "export.unpack",
    "zero_shot": "evaluation.tasks",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
