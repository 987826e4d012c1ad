"""Prune large language models after training, without retraining, and measure what it cost."""

from thanos._version import __version__ as __version__
from thanos.evaluate import Evaluation as Evaluation
from thanos.evaluate import evaluate as evaluate
from thanos.events import Event as Event
from thanos.pruning import prune as prune
from thanos.recipe import LayerRecipe as LayerRecipe
from thanos.recipe import Override as Override
from thanos.recipe import Recipe as Recipe
from thanos.report import PruningReport as PruningReport
from thanos.solvers import PrunedWeight as PrunedWeight
from thanos.solvers import prune_weight as prune_weight
