"""Prune large language models after training, without retraining, and measure what it cost."""

from thanos._version import __version__ as __version__
from thanos.recipe import LayerRecipe as LayerRecipe
from thanos.recipe import Override as Override
from thanos.recipe import Recipe as Recipe
