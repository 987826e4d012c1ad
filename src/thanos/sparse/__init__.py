"""Packed sparse weights: storage formats, kernels, and the loader for transformers.

``import thanos.sparse`` registers the loader. ``AutoModelForCausalLM.from_pretrained`` then loads models that ``thanos pack``
wrote, and the weights stay packed.
"""

from thanos.sparse.loader import SparseConfig as SparseConfig
from thanos.sparse.modules import PackedLinear as PackedLinear
from thanos.sparse.modules import packed_modules as packed_modules
