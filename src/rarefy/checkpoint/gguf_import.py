"""A ``.gguf`` file as an ordinary safetensors folder.

transformers reads the tensors and the tokenizer. What is mended here: it leaves a quantization
config on the dequantized model and then refuses to save it, and it ignores the file's
pre-tokenizer, so that digits are split differently from the way the model was trained.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rarefy.errors import RarefyError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Pre-tokenizers that cut every digit off before the byte-level rule (names as in llama.cpp).
_SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva"}
_METADATA = (
    "general.license",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eot_token_id",
)


def import_gguf(file: Path, out: Path) -> Path:
    """Convert a GGUF model to a folder that every stage and every other library can read.

    The weights are dequantized in float32 and stored in float16: each stored number is the exact
    dequantized value rounded to eleven significant bits. The folder appears only when complete.
    ``source.json`` in it names the file and its hash.

    Args:
        file: the model.
        out: the folder to make; it must not exist.

    Returns:
        ``out``.

    Raises:
        RarefyError: ``file`` is missing, damaged, of an architecture that transformers cannot
            read, or beyond float16's range; or ``out`` exists.
    """
    if out.exists():
        raise RarefyError(f"{out} exists already: choose another folder or remove it")
    metadata = _metadata(file)
    model, tokenizer = _load(file, metadata)
    _narrow(model, file)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as tmp:
        folder = Path(tmp) / "checkpoint"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _write_source(file, folder, metadata)
        folder.replace(out)
    return out


def file_sha256(file: Path) -> str:
    """Return the hash of a file's content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _metadata(file: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    if not file.is_file():
        raise RarefyError(f"the GGUF file {file} does not exist")
    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError) as error:
        raise RarefyError(
            f"{file} is not a complete GGUF file ({error}): fetch it again"
        ) from error
    fields = {key: reader.get_field(key) for key in _METADATA}
    return {key: field.contents() for key, field in fields.items() if field is not None}


def _load(file: Path, metadata: dict[str, Any]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**place)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise RarefyError(
            f"transformers cannot read {file} ({error}): give the original safetensors folder"
        ) from error
    _mend_tokenizer(tokenizer, metadata)
    ends = {metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")} - {None}
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = sorted(ends) if len(ends) > 1 else tokenizer.eos_token_id
    return model, tokenizer


def _mend_tokenizer(tokenizer: PreTrainedTokenizerBase, metadata: dict[str, Any]) -> None:
    from tokenizers.pre_tokenizers import Digits, Sequence

    if metadata.get("tokenizer.ggml.pre") in _SINGLE_DIGITS:
        backend = tokenizer.backend_tokenizer
        digits = Digits(individual_digits=True)
        backend.pre_tokenizer = Sequence([digits, backend.pre_tokenizer])


def _narrow(model: PreTrainedModel, file: Path) -> None:
    """Make the model an ordinary float16 one, in place."""
    limit = torch.finfo(torch.float16).max
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or float(parameter.detach().abs().max()) > limit:
            raise RarefyError(
                f"{name} in {file} cannot be stored in float16: give the original "
                f"safetensors folder instead"
            )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        # save_pretrained asks the quantizer, and would take the dequantized model for quantized.
        quantizer.remove_quantization_config(model)
        model.hf_quantizer = None
    model.half()
    model.config.dtype = torch.float16


def _write_source(file: Path, folder: Path, metadata: dict[str, Any]) -> None:
    source = {
        "file": file.name,
        "sha256": file_sha256(file),
        "note": "dequantized in float32, then rounded to float16",
    }
    (folder / "source.json").write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
    if licence := metadata.get("general.license"):
        (folder / "LICENSE_NOTE.txt").write_text(
            f"{file.name} declares the licence: {licence}\n"
            "The weights in this folder were made from that file and stay under that licence.\n",
            encoding="utf-8",
        )
