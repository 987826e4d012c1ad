"""Prune large language models after training, without retraining, and measure what it cost."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from thanos._version import __version__ as __version__

if TYPE_CHECKING:
    from thanos.evaluation import Evaluation as Evaluation
    from thanos.evaluation import evaluate as evaluate
    from thanos.events import Event as Event
    from thanos.harness import PAPER_TASKS as PAPER_TASKS
    from thanos.harness import ZeroShot as ZeroShot
    from thanos.harness import zero_shot as zero_shot
    from thanos.inspection import Inspection as Inspection
    from thanos.inspection import inspect_checkpoint as inspect_checkpoint
    from thanos.planning import Plan as Plan
    from thanos.planning import plan as plan
    from thanos.pruning import prune as prune
    from thanos.recipe import LayerRecipe as LayerRecipe
    from thanos.recipe import Override as Override
    from thanos.recipe import Recipe as Recipe
    from thanos.report import PruningReport as PruningReport
    from thanos.solvers import PrunedWeight as PrunedWeight
    from thanos.solvers import prune_weight as prune_weight
    from thanos.study.runner import run_study as run_study
    from thanos.study.store import read_store as read_store

# Torch takes seconds to import, and `thanos --help` does not need it: each name is imported when it is first used.
_EXPORTS = {
    "Evaluation": "evaluation",
    "Event": "events",
    "Inspection": "inspection",
    "LayerRecipe": "recipe",
    "Override": "recipe",
    "PAPER_TASKS": "harness",
    "Plan": "planning",
    "PrunedWeight": "solvers",
    "PruningReport": "report",
    "Recipe": "recipe",
    "ZeroShot": "harness",
    "evaluate": "evaluation",
    "inspect_checkpoint": "inspection",
    "plan": "planning",
    "prune": "pruning",
    "prune_weight": "solvers",
    "read_store": "study.store",
    "run_study": "study.runner",
    "zero_shot": "harness",
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
