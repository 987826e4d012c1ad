"""Find a pretrained model: a hub name, a local folder of safetensors, or a GGUF file. Pickle files are never read."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thanos.checkpoint.gguf_files import check_gguf, gguf_parts, is_gguf, quick_reader
from thanos.checkpoint.gguf_header import GGUFHeader, read_headers
from thanos.checkpoint.weight_files import WeightFiles, find_weights, pointer_fault, refuse_lone_adapter
from thanos.errors import ModelError
from thanos.model.gguf_config import complete_config
from thanos.model.hub import download
from thanos.model.transformers_errors import describe_config_error, describe_import_error, first_line, package_errors
from thanos.system.extras import is_installed
from thanos.system.user_paths import model_name

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")

_SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model")

_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s*")


@dataclass(frozen=True)
class ModelSource:
    """The location of a model.

    Attributes:
        name: name as the user gave it.
        folder: the local folder with config and tokenizer; for a GGUF file, the folder that holds it.
        gguf: the GGUF file, the first of them if it has several parts, or None.
        trust_remote_code: whether Python code of the checkpoint may run.
    """

    name: str
    folder: Path
    gguf: Path | None = None
    trust_remote_code: bool = False

    @property
    def is_packed(self) -> bool:
        """Whether the model is one that ``thanos pack`` wrote."""
        if self.gguf is not None:
            return False
        config = json.loads((self.folder / "config.json").read_bytes())
        if "quantization_config" not in config:
            return False
        from thanos.sparse.storage import is_packed  # not at the top: it imports the loader, and so transformers

        return is_packed(config)

    @property
    def is_local(self) -> bool:
        """Whether the user named a file or folder rather than a hub name."""
        return self.gguf is not None or self.folder == Path(self.name)

    @property
    def gguf_parts(self) -> tuple[Path, ...]:
        """All parts of the GGUF file, in order; empty for a folder."""
        return () if self.gguf is None else gguf_parts(self.gguf)

    @cached_property
    def gguf_header(self) -> GGUFHeader:
        """The header of the GGUF file, of all parts together. Raises ModelError if it is truncated or corrupt."""
        return read_headers(self.gguf_parts)

    def _arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.gguf is not None:
            arguments["gguf_file"] = self.gguf.name
        return arguments

    def config(self) -> PreTrainedConfig:
        """Return a copy of the model's config. Raises ModelError if it cannot be read."""
        return copy.deepcopy(self._config)

    @cached_property
    def _config(self) -> PreTrainedConfig:
        """The config, read once, because reading it from a GGUF file takes seconds."""
        from transformers import AutoConfig

        try:
            with quick_reader(used=self.gguf is not None):
                config = AutoConfig.from_pretrained(self.folder, **self._arguments())
            return config if self.gguf is None else complete_config(config, self.gguf_header, len(self.gguf_parts))
        except ModelError:
            raise
        except Exception as error:  # a truncated file makes the GGUF reader fail in many ways
            raise ModelError(describe_import_error(self.name, error) or self._config_fault(error)) from error

    def _config_fault(self, error: Exception) -> str:
        """Return the error line for a config that transformers refuses."""
        import transformers

        if self.gguf is None:
            values = json.loads((self.folder / "config.json").read_bytes())
            return describe_config_error(self.name, values, error, trusted=self.trust_remote_code)
        line = first_line(error)
        if "is not supported" in line:
            return (
                f"transformers {transformers.__version__} cannot read {self.name} ({line}); upgrade transformers, or give the "
                "model as a folder of safetensors"
            )
        return (
            f"the GGUF file of {self.name} cannot be used ({line}); it may be truncated or corrupt: download it again"
        )

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer. Raises ModelError if there is none, or it is broken."""
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, read once. It is used twice: to check that it exists before the weights are read, and for the text."""
        from transformers import AutoTokenizer

        if self.gguf is None and not any((self.folder / name).is_file() for name in _TOKENIZER_FILES):
            raise ModelError(
                f"{self.name} has no tokenizer ({', '.join(_TOKENIZER_FILES[:3])}, ...); put the tokenizer's files next to "
                "the weights (tokenizer.save_pretrained)"
            )
        try:
            with quick_reader(used=self.gguf is not None):
                return AutoTokenizer.from_pretrained(self.folder, **self._arguments())
        except Exception as error:  # tokenizers raises bare Exception for a broken file
            who = f"the tokenizer of {self.name}"
            if lacking := _missing_packages(self):  # transformers may name packages of other formats
                raise ModelError(f"{who} cannot be read: {lacking}") from error
            pointers = () if self.gguf else (pointer_fault(self.folder / name) for name in _TOKENIZER_FILES)
            line = next(filter(None, pointers), f"{who} cannot be read: {first_line(error)}")
            raise ModelError(describe_import_error(who, error) or line) from error

    def generation_config(self) -> GenerationConfig | None:
        """Return the generation config: of a folder from its file, None without one; of a GGUF file derived from the config.

        Raises ModelError if the file is not valid.
        """
        from transformers import GenerationConfig

        if self.gguf is not None:
            return GenerationConfig.from_model_config(self.config())
        if not (self.folder / "generation_config.json").is_file():
            return None
        try:
            return GenerationConfig.from_pretrained(self.folder)
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(f"{self.name}/generation_config.json cannot be used: {first_line(error)}") from error


def resolve_model(model: str | Path, *, trust_remote_code: bool = False, packed: bool = False) -> ModelSource:
    """Find a model, and refuse models that cannot be pruned, before anything is loaded.

    Args:
        model: a hub name, a local Hugging Face folder, or a ``.gguf`` file.
        trust_remote_code: let transformers run Python code of the checkpoint.
        packed: allow a model that ``thanos pack`` wrote.

    Raises:
        ModelError: nothing is there, or it is not a causal language model in safetensors or GGUF form.
    """
    source = find_local(model, trust_remote_code=trust_remote_code, packed=packed)
    if source is None:
        name = model_name(model)

        def check(folder: Path, listed: list[str]) -> WeightFiles:
            return _check_folder(ModelSource(name, folder, None, trust_remote_code), packed=packed, listed=listed)

        source = ModelSource(name, download(name, code=trust_remote_code, check=check), None, trust_remote_code)
    _check_causal(source)
    return source


def find_local(
    model: str | Path, *, trust_remote_code: bool = False, what: str = "MODEL", packed: bool = False
) -> ModelSource | None:
    """Find a local model and check its files; None for a hub name. This is fast: no config is built, nothing is loaded.

    ``what`` names the argument in messages; the other arguments are those of :func:`resolve_model`. Raises ModelError if
    nothing is there, or it is not in safetensors or GGUF form.
    """
    name = model_name(model, what)
    path = Path(name)
    if path.is_dir():
        source = ModelSource(name, path, None, trust_remote_code)
        _check_folder(source, packed=packed)
        return source
    if path.is_file():
        return ModelSource(name, path.parent, check_gguf(path, what), trust_remote_code)
    if _looks_like_path(name):
        raise ModelError(f"{model} does not exist; {what} is a hub name, a local folder or a .gguf file")
    return None


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or is_gguf(name) or name.count("/") > 1 or os.sep * 2 in name


def _check_folder(source: ModelSource, *, packed: bool, listed: Sequence[str] = ()) -> WeightFiles:
    """Refuse a folder without a model that can be pruned; return its weights. ``listed`` is as for :func:`find_weights`."""
    folder = source.folder
    refuse_lone_adapter(folder, source.name, listed=listed)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{source.name} has no config.json; {_instead_of_config(folder, listed)}")
    found = find_weights(folder, source.name, listed=listed)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{source.name}/config.json is not valid JSON: {error}; correct it, or download it again"
        ) from error
    if source.is_packed:
        if not packed:
            raise ModelError(f"{source.name} is packed; give the unpacked one: thanos unpack {source.name} OUT")
        from thanos.sparse.storage import parse_settings

        parse_settings(config["quantization_config"], source.name)
    elif config.get("quantization_config") is not None:
        settings = config["quantization_config"]
        method = settings.get("quant_method", "unknown method") if isinstance(settings, dict) else settings
        method = method if isinstance(method, str) and method.isprintable() else repr(method)[:80]
        raise ModelError(f"{source.name} is quantised ({method}); give the model before quantisation")
    if "auto_map" in config and not source.trust_remote_code and not _is_native(source.name, config.get("model_type")):
        raise ModelError(
            f"{source.name} needs Python code that comes with the checkpoint; read that code, then allow it with "
            "--trust-remote-code"
        )
    return found


def _instead_of_config(folder: Path, listed: Sequence[str]) -> str:
    """Return what to do with a folder without a config: give the GGUF file that lies there, if there is one."""
    if local := sorted(path for path in folder.iterdir() if is_gguf(path)):
        return f"name the file itself, for example {local[0]}"
    if on_hub := sorted(path for path in listed if is_gguf(path)):
        return f"download one of its GGUF files, such as {on_hub[0]}, and give that file"
    return "it is not a Hugging Face model folder"


def _is_native(name: str, kind: Any) -> bool:
    """Return whether transformers has a causal language model of this type, so that the checkpoint's own code is not needed."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    with package_errors(name):
        return isinstance(kind, str) and kind in CONFIG_MAPPING and CONFIG_MAPPING[kind] in MODEL_FOR_CAUSAL_LM_MAPPING


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
        raise ModelError(
            f"{source.name} is not a causal language model that transformers knows ({config.model_type}); "
            "give another model, or a newer transformers"
        )


def _missing_packages(source: ModelSource) -> str:
    """Return the end of an error line that names the packages which the tokenizer's format needs; empty if none is missing."""
    if source.gguf is not None or (source.folder / "tokenizer.json").is_file():
        return ""
    for file in (source.folder / name for name in _SENTENCEPIECE_FILES):
        if not file.is_file():
            continue
        with file.open("rb") as opened:  # in sentencepiece's format, or in tiktoken's, as for Llama 3
            is_tiktoken = _TIKTOKEN_LINE.fullmatch(opened.readline(4096)) is not None
        needed = (
            {"tiktoken": "tiktoken"}
            if is_tiktoken
            else {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
        )
        absent = [package for module, package in needed.items() if not is_installed(module)]
        if absent:
            what = f"{file.name} alone, without a tokenizer.json, needs packages that are missing"
            return f"{what}: pip install {' '.join(absent)}"
    return ""
