"""Finding and loading a pretrained model: a hub name, a local folder, or a GGUF file; safetensors only, never pickles."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thanos.checkpoint.layout import INDEX_NAME, SINGLE_NAME
from thanos.errors import ModelError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase


_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*"]


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


@dataclass(frozen=True)
class ModelSource:
    """Where a model is.

    Attributes:
        name: as the user gave it.
        folder: the local folder with config and tokenizer (for a GGUF file, the folder it lies in).
        gguf: the GGUF file, or None.
        trust_remote_code: whether code that the checkpoint carries may run.
    """

    name: str
    folder: Path
    gguf: Path | None = None
    trust_remote_code: bool = False

    @property
    def is_local(self) -> bool:
        """Whether the user named a file or folder rather than a hub name."""
        return self.gguf is not None or self.folder == Path(self.name)

    def _arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.gguf is not None:
            arguments["gguf_file"] = self.gguf.name
        return arguments

    def config(self) -> PreTrainedConfig:
        """Return the model's config, a copy of its own.

        Raises:
            ModelError: it cannot be read.
        """
        return copy.deepcopy(self._config)

    @cached_property
    def _config(self) -> PreTrainedConfig:
        """The config, read once: of a GGUF file that takes seconds."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.folder, **self._arguments())
        except Exception as error:  # a truncated GGUF file makes its reader index past the end in many ways
            what = "config" if self.gguf is None else "GGUF file"
            raise ModelError(
                f"the {what} of {self.name} cannot be used ({first_line(error)}); it may be truncated or corrupt: download it "
                "again"
            ) from error

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer.

        Raises:
            ModelError: there is none, or it is broken.
        """
        from transformers import AutoTokenizer

        if self.gguf is None and not any((self.folder / name).is_file() for name in _TOKENIZER_FILES):
            raise ModelError(
                f"{self.name} has no tokenizer ({', '.join(_TOKENIZER_FILES[:3])}, ...); put the tokenizer's files beside "
                "the weights (tokenizer.save_pretrained)"
            )
        try:
            return AutoTokenizer.from_pretrained(self.folder, **self._arguments())
        except Exception as error:  # tokenizers raises bare Exception for a broken file
            raise ModelError(f"the tokenizer of {self.name} cannot be read: {first_line(error)}") from error

    def generation_config(self) -> GenerationConfig | None:
        """Return the generation config, derived from the config where there is no file; None for a folder without one."""
        from transformers import GenerationConfig

        if self.gguf is not None:
            return GenerationConfig.from_model_config(self.config())
        if (self.folder / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(self.folder)
        return None


def resolve_model(model: str | Path, *, trust_remote_code: bool = False) -> ModelSource:
    """Find a model and refuse what cannot be pruned, before anything is loaded.

    Args:
        model: a hub name, a local Hugging Face folder, or a ``.gguf`` file.
        trust_remote_code: let transformers run Python code that the checkpoint carries.

    Raises:
        ModelError: nothing is there, or it is not a causal language model in safetensors or GGUF form.
    """
    name, path = str(model), Path(model)
    if path.is_dir():
        source = ModelSource(name, path, None, trust_remote_code)
    elif path.is_file():
        _check_gguf(path)
        source = ModelSource(name, path.parent, path, trust_remote_code)
    elif _looks_like_path(name):
        raise ModelError(f"{name} does not exist; MODEL is a hub name, a local folder or a .gguf file")
    else:
        source = ModelSource(name, _download(name), None, trust_remote_code)
    if source.gguf is None:
        _check_folder(source)
    _check_causal(source)
    return source


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1 or os.sep * 2 in name


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except HFValidationError as error:
        raise ModelError(f"{name!r} is no hub name, and no such folder or .gguf file exists") from error
    except Exception as error:  # the hub client raises its own, requests' and httpx's errors
        raise ModelError(
            f"{name} is no local folder or file, and the hub cannot give it ({first_line(error)}); check the name, or "
            "download it elsewhere and give the local folder or a .gguf file"
        ) from error


def _check_folder(source: ModelSource) -> None:
    folder = source.folder
    if not (folder / "config.json").is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        hint = f"; name the file itself, for example {ggufs[0]}" if ggufs else "; it is not a Hugging Face model folder"
        raise ModelError(f"{source.name} has no config.json{hint}")
    if not any((folder / name).is_file() for name in (INDEX_NAME, SINGLE_NAME)):
        if any(file for glob in _PICKLES for file in folder.glob(glob)):
            raise ModelError(
                f"{source.name} holds its weights as pickle files, which can run any code when they are read; convert them "
                "where you trust them: AutoModelForCausalLM.from_pretrained(...).save_pretrained(..., safe_serialization)"
            )
        raise ModelError(f"{source.name} has no weights: neither {SINGLE_NAME} nor {INDEX_NAME}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{source.name}/config.json is not valid JSON: {error}") from error
    if "quantization_config" in config:
        settings = config["quantization_config"]
        method = settings.get("quant_method", "unknown method") if isinstance(settings, dict) else settings
        raise ModelError(f"{source.name} is quantised ({method}); give the model before quantisation")
    if "auto_map" in config and not source.trust_remote_code:
        raise ModelError(
            f"{source.name} needs Python code that comes with the checkpoint; read that code, then allow it with "
            "--trust-remote-code"
        )


def _check_gguf(path: Path) -> None:
    if path.suffix != ".gguf":
        raise ModelError(f"{path} is a file, but not a .gguf file; MODEL is a hub name, a local folder or a .gguf file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file, or is truncated; download it again")
    require_gguf_packages()


def require_gguf_packages() -> None:
    """Refuse to go on without the packages that read GGUF files.

    Raises:
        ModelError: names the missing package.
    """
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
    except ImportError as error:
        raise ModelError(f"GGUF files need the package {error.name}: pip install 'thanos-llm[gguf]'") from error


def _check_causal(source: ModelSource) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    config = source.config()
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{source.name} is an encoder-decoder model ({config.model_type}); only causal LMs are supported"
        )
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise ModelError(f"{source.name} is a bidirectional model ({config.model_type}), not a causal language model")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not source.trust_remote_code:
        raise ModelError(f"{source.name} is not a causal language model that transformers knows ({config.model_type})")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; its type where there is none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
