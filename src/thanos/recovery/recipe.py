"""The settings of a recovery, validated when they are built."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thanos.errors import RecipeError
from thanos.recipe import Recipe
from thanos.recipe.checks import check_settings
from thanos.recipe.repair import SEGMENT, WITHOUT_GENERATED
from thanos.recipe.run_fields import check_prompts_setting
from thanos.recovery.rate import rate_for
from thanos.settings import Heading, either, setting
from thanos.system.suggestions import near

AUTO = "auto"
"""Value of ``rate``, which :func:`~thanos.recovery.rate.rate_for` chooses, and of ``train`` (:meth:`RecoveryRecipe.parts`)."""

PARTS = {
    AUTO: "linear; blocks if OUT only has smaller sizes and no zeros",
    "all": "all parameters",
    "blocks": "those of the decoder blocks, neither embeddings nor the head",
    "linear": "the weights of the blocks' linear layers",
}
"""The values of ``train``, each with an explanation."""

_ONE_HELD_OUT_OF = 16
"""By default one sequence of this many is held out: 8 of 128."""

_DESCRIBED = ("epochs", "vary", "batch", "micro_batch", "held_out", "generate", "segment", "prompt", "shard", "compile")
"""Fields whose descriptions state every allowed value."""


def _as_prune(name: str) -> Any:
    """Return a field with the default and the description of the same field of a pruning recipe."""
    field = Recipe.__dataclass_fields__[name]
    return dataclasses.field(default=field.default, metadata=field.metadata)


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoveryRecipe:
    """All settings of a recovery.

    Args:
        epochs: number of passes over the sequences that are trained on.
        rate: largest learning rate of the one-cycle schedule; ``auto``: chosen by the loss before the training, see
            :func:`~thanos.recovery.rate.rate_for`.
        train: the parameters that are trained: ``all``, ``blocks`` (those of the decoder blocks, so neither the embeddings,
            tied ones included, nor the head), ``linear`` (the weights of the blocks' linear layers), or ``auto``: see
            :meth:`parts`.
        vary: cut the text into segments, join them in a new order, and replace a few tokens, in every epoch; see
            :mod:`thanos.recovery.sequences`. The dense model then runs in each pass.
        generate: number of additional sequences that the dense model generates for training; see
            :mod:`thanos.calibration.continued`. It generates one more in 16, which is held out.
        segment: tokens of a segment (``vary``) and of a generated piece, or those of a sequence if they are fewer.
        prompt: tokens of the text with which a generated piece begins, at most half a piece. With 0 it begins with BOS, or with
            end-of-text if the tokenizer adds no BOS.
        prompts: local files of prompts with which the pieces begin instead; see :mod:`thanos.calibration.prompts`.
        batch: number of sequences in a step, over all processes.
        micro_batch: number of sequences that a process runs at once; the gradients of several runs are summed. None: on CUDA
            the process's whole part of the batch, on a CPU one. It changes the result only by rounding errors.
        held_out: least number of sequences of the text that are not trained on. The state with the smallest loss on all
            held-out sequences is kept. None: one in 16, at least one.
        shard: with several processes, each holds a part of the pruned model, its gradients and the optimizer's state (FSDP),
            instead of a copy. Each process holds the dense model whole in any case.
        compile: run the blocks of both models through ``torch.compile``. None: where it saves time, see
            :mod:`thanos.recovery.compiling`. It changes the result only by rounding errors. It works neither with
            ``shard`` nor for mixtures of experts.
        calibration: source of the text, as for pruning.
        samples: number of sequences, those held out included.
        sequence_length: tokens of a sequence.
        seed: seed of the draw of the sequences, of their order in training, and of their variation.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        trust_remote_code: let transformers run Python code from a checkpoint.

    Raises:
        RecipeError: a value is outside its range, or too few sequences remain to train on.
    """

    epochs: int = setting(10, "Passes over the calibration sequences", Heading.RECOVERY, "N", lowest=1)
    rate: float | str = setting(
        AUTO,
        "Largest learning rate, above 0 and below 1, or auto: the larger the loss before the training, the larger the rate",
        Heading.RECOVERY,
        "RATE",
    )
    train: str = setting(
        AUTO,
        "Parameters that are trained",
        Heading.RECOVERY,
        "PARTS",
        choices=lambda: [f"{name} ({what})" for name, what in PARTS.items()],
    )
    vary: bool = setting(
        True,
        "Cut the text into segments, join them in a new order, and replace a few tokens, in every epoch",
        Heading.RECOVERY,
    )
    generate: int = setting(
        0,
        "Additional sequences that the dense model generates, as continuations of pieces of the text, or of prompts",
        Heading.RECOVERY,
        "N",
        lowest=0,
    )
    segment: int = setting(
        SEGMENT,
        "Tokens of the segments into which the text is cut, and of a generated piece",
        Heading.RECOVERY,
        "TOKENS",
        lowest=2,
    )
    prompt: int = _as_prune("prompt")
    prompts: str | None = _as_prune("prompts")
    batch: int = setting(4, "Sequences in a step, over all processes", Heading.RECOVERY, "N", lowest=1)
    micro_batch: int | None = setting(
        None,
        "Sequences that a process runs at once; fewer need less memory",
        Heading.RECOVERY,
        "N",
        lowest=1,
        default="on CUDA its part of the batch, on a CPU 1",
    )
    held_out: int | None = setting(
        None,
        "Sequences of the text that are not trained on, to select the best state",
        Heading.RECOVERY,
        "N",
        lowest=1,
        default="one in 16",
    )
    shard: bool = setting(
        False,
        "With torchrun, divide the pruned model and the optimizer's state over the processes (FSDP)",
        Heading.RECOVERY,
        default="each process holds a copy",
    )
    compile: bool | None = setting(
        None,
        "Compile the blocks with torch.compile: about 15 s at the start, and faster steps",
        Heading.RECOVERY,
        default="on CUDA for 100 steps or more",
    )
    calibration: str = _as_prune("calibration")
    samples: int = _as_prune("samples")
    sequence_length: int = _as_prune("sequence_length")
    seed: int = _as_prune("seed")
    device: str = _as_prune("device")
    trust_remote_code: bool = _as_prune("trust_remote_code")

    def __post_init__(self) -> None:
        check_settings(RecoveryRecipe, {name: getattr(self, name) for name in _DESCRIBED})
        if self.generate % self.batch:
            raise RecipeError(
                f"generate {self.generate} is not a multiple of batch {self.batch}; give a multiple of {self.batch}"
            )
        check_prompts_setting(self.prompts, self.prompt)
        for name, used in (
            ("segment", self.vary or self.generate),
            ("prompt", self.generate),
            ("prompts", self.generate),
        ):
            if not used and getattr(self, name) != WITHOUT_GENERATED[name]:
                wanted = "vary, or generate above 0" if name == "segment" else "generate above 0"
                raise RecipeError(
                    f"{name} {getattr(self, name)} has no meaning here; leave {name} out, or set {wanted}"
                )
        object.__setattr__(self, "rate", _rate(self.rate))
        if self.train not in PARTS:
            raise RecipeError(f"train must be {either(PARTS)}; got {self.train!r}{near(self.train, PARTS)}")
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise RecipeError(
                f"micro_batch {self.micro_batch} does not divide batch {self.batch}; give a divisor of {self.batch}"
            )
        _ = self.text  # raises if a setting of the text is wrong
        if self.trained < self.batch:
            few = "1 sequence is" if self.samples == 1 else f"{self.samples} sequences are"
            raise RecipeError(
                f"{few} too few: {self._least} to hold out and a batch of {self.batch} need {self._least + self.batch}; "
                "raise --samples, or lower --batch or --held-out"
            )

    @property
    def text(self) -> Recipe:
        """The pruning recipe with the same text and device, from which calibration windows are made."""
        return Recipe(
            calibration=self.calibration,
            samples=self.samples,
            sequence_length=self.sequence_length,
            seed=self.seed,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
        )

    @property
    def trained(self) -> int:
        """Number of sequences of the text that are trained on: the first ones, in whole batches. All others are held out."""
        return max(0, self.samples - self._least) // self.batch * self.batch

    @property
    def _least(self) -> int:
        return self.held_out or max(1, self.samples // _ONE_HELD_OUT_OF)

    @property
    def generated_held_out(self) -> int:
        """Number of sequences that the dense model generates in addition to ``generate``, to hold them out."""
        return math.ceil(self.generate / _ONE_HELD_OUT_OF)

    @property
    def rows(self) -> int:
        """Number of sequences of an epoch: those of the text and ``generate``."""
        return self.trained + self.generate

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps of the optimizer in a pass over the sequences."""
        return self.rows // self.batch

    @property
    def steps(self) -> int:
        """Number of steps of the whole training."""
        return self.epochs * self.steps_per_epoch

    def largest_rate(self, history: Sequence[Mapping[str, Any]], size: float) -> float:
        """Return the largest learning rate, chosen if it is ``auto``.

        Args:
            history: measurements of the held-out loss; the first is of the model before the training.
            size: root mean square of the non-zero weights of the pruned model's blocks.
        """
        return rate_for(history[0]["held_out"], size) if isinstance(self.rate, str) else self.rate

    def parts(self, *, sparse: bool) -> str:
        """Return the parameters that are trained, chosen if ``train`` is ``auto``.

        ``auto`` chooses the weights of the blocks' linear layers if pruning set some of them to zero. If the model only lost
        neurons, heads or blocks, it chooses all parameters of the blocks, so norms and biases too: the activations changed.

        Args:
            sparse: whether weights of the pruned model's blocks were set to zero.
        """
        if self.train != AUTO:
            return self.train
        return "linear" if sparse else "blocks"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values by name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RecoveryRecipe:
        """Build a recipe from plain values. Unknown names are refused.

        Raises:
            RecipeError: a name is unknown, or a value is refused.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise RecipeError(
                    f"unknown setting {name} of a recovery{near(name, known)}; allowed are {', '.join(known)}"
                )
        return cls(**values)


def _rate(value: Any) -> float | str:
    if value == AUTO:
        return AUTO
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < 1:
        raise RecipeError(f"rate must be {AUTO} or a number above 0 and below 1, such as 2e-4; got {value!r}")
    return number
