"""The exceptions that callers may see.

A message says what came, what is allowed, and what to change. The command line maps
:class:`UserError` to exit code 2 and everything else to exit code 1.
"""


class ThanosError(Exception):
    """Base of every exception that this package raises on purpose."""


class UserError(ThanosError, ValueError):
    """The request cannot be carried out as given; the message says what to change."""


class RecipeError(UserError):
    """A recipe (method, pattern, sparsity, ...) is malformed or contradicts itself."""


class ModelError(UserError):
    """A model, tokenizer or checkpoint file is missing, broken or not supported."""


class DataError(UserError):
    """Calibration or evaluation text is missing, too short or unreadable."""


class NumericsError(UserError):
    """Weights, activations or statistics hold NaN or infinity; the message names the layer."""


class ResourceError(UserError):
    """The device is absent, or memory or disk is exhausted; the message says which setting to lower."""


class CudaUnavailableError(ResourceError):
    """A CUDA device was asked for and torch sees none."""
