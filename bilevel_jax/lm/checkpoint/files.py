"""JSON objects, safetensors and file names of a model folder."""

import fnmatch
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

CONFIG_FILE = "config.json"
TOKENIZER_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "encoder.json",
    "merges.txt",
    "tekken.json",
    "*.model",  # sentencepiece: tokenizer.model, spiece.model, sentencepiece.bpe.model
    "*.spm",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
)
"""Patterns of the names of files that say how text becomes tokens, and how answers are generated."""
UNCHANGED_FILES = (
    *TOKENIZER_FILES,
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Patterns of file names. Whatever else lies in a model folder (weights, cards, code, states of a trainer) is about
that model alone."""
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
"""The dtypes that are read: others are quantised weights, which need the scales that their library applies."""
MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors format."""
INDEX_SUFFIX = ".index.json"


class LazyTensor(NamedTuple):
    """One tensor of a safetensors file, not read yet."""

    handle: Any
    path: Path
    name: str

    def shape(self) -> tuple[int, ...]:
        """From the file's header."""
        return tuple(self.handle.get_slice(self.name).get_shape())

    def dtype(self) -> str:
        """As the file's header spells it."""
        return self.handle.get_slice(self.name).get_dtype()

    def read(self) -> np.ndarray:
        """The numbers, in the dtype of the file."""
        try:
            return self.handle.get_tensor(self.name)
        except (SafetensorError, OSError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path}: {self.name} cannot be read ({error}).") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: of a text in UTF-8, with or without a byte order mark.

    Returns:
        The object; of a key that stands twice, the last value.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds anything else; one sentence with the path, and the line where it is known.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    content = path.read_bytes()
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8 text{_describe_content(content)}.") from error
    except json.JSONDecodeError as error:
        hint = _describe_content(content)
        raise ValueError(f"{path}:{error.lineno}: not JSON, {error.msg.lower()}{hint}.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: JSON that cannot be read ({str(error).splitlines()[0]}).") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds {_kind(value)}; a JSON object {{...}} belongs there.")
    return value


def require_whole_files(folder: Path, patterns: Sequence[str]) -> None:
    """Raise an error for a file that an interrupted download left.

    Libraries pass over such a file, as if it had never been there.

    Args:
        folder: where the files are; not its subfolders.
        patterns: names as fnmatch reads them, of which the case counts.

    Raises:
        ValueError: a file of such a name is empty, a link to nothing, or no file.
    """
    for path in sorted(folder.iterdir()):
        if not any(fnmatch.fnmatchcase(path.name, pattern) for pattern in patterns):
            continue
        if path.is_symlink() and not path.exists():
            raise ValueError(f"{path}: a link to a file that is not there; fetch it again.")
        if not path.is_file():
            raise ValueError(f"{path}: no file, though a file of this name is read; remove it, or fetch it again.")
        if not path.stat().st_size:
            raise ValueError(f"{path}: empty; the download was interrupted, so fetch it again, or remove it.")


def open_tensors(folder: str | Path, file: str) -> dict[str, LazyTensor]:
    """The tensors of `file` in `folder`, or of the shards that `file`.index.json lists; nothing is read yet.

    Args:
        folder: of a model or an adapter.
        file: the name of a safetensors file; where there is one, the index is not looked at.

    Returns:
        name -> tensor.

    Raises:
        FileNotFoundError: the file or a shard is missing.
        ValueError: one is damaged, or the shards do not hold what the index says.
    """
    folder = Path(folder)
    index = folder / f"{file}{INDEX_SUFFIX}"
    if (folder / file).is_file() or not index.is_file():
        _require_files(folder, [file])
        return _open_file(folder / file)
    shard_of = _read_index(index)
    _require_files(folder, sorted(set(shard_of.values())), index)
    tensors: dict[str, LazyTensor] = {}
    for shard in sorted(set(shard_of.values())):
        opened = _open_file(folder / shard)
        absent = sorted(name for name, place in shard_of.items() if place == shard and name not in opened)
        if absent:
            raise ValueError(
                f"{folder / shard}: lacks {len(absent)} of the tensors that {index.name} places there: {absent[:3]}; "
                "index and shards are of different checkpoints, so fetch the folder again."
            )
        if twice := sorted(set(opened) & set(tensors)):
            raise ValueError(f"{folder / shard}: {twice[:3]} also in {tensors[twice[0]].path.name}; which one counts?")
        tensors |= opened
    return tensors


def read_stacked_tensors(
    tensors: Mapping[str, LazyTensor], names: Sequence[str], shape: tuple[int, ...], dtype: Any, *, transpose: bool
) -> np.ndarray:
    """Tensors of one shape as one array.

    Args:
        tensors: name -> tensor, as `open_tensors` gives them.
        names: of the tensors, in the order of the array.
        shape: of each tensor in its file.
        dtype: of the array.
        transpose: whether the axes of each tensor are reversed.

    Returns:
        [len(names), *shape], or [len(names), *reversed(shape)] where they are.

    Raises:
        ValueError: a tensor has another shape, is none of floats, or holds NaN or infinite values in `dtype`.
    """
    for name in names:
        if tensors[name].shape() != shape:
            raise ValueError(
                f"{tensors[name].path}: {name}: the file has {tensors[name].shape()}, the configuration asks for "
                f"{shape}."
            )
    out = np.empty((len(names), *(shape[::-1] if transpose else shape)), np.dtype(dtype))
    for row, name in zip(out, names, strict=True):
        value = read_floats(tensors[name])
        row[...] = value.T if transpose else value
        require_finite(tensors[name], row)
    return out


def read_floats(tensor: LazyTensor) -> np.ndarray:
    """The numbers of a tensor of floats.

    Args:
        tensor: of a safetensors file.

    Returns:
        The numbers, in the dtype of the file.

    Raises:
        ValueError: the dtype is not in FLOAT_DTYPES, or the tensor cannot be read.
    """
    if tensor.dtype() not in FLOAT_DTYPES:
        raise ValueError(
            f"{tensor.path}: {tensor.name} is {tensor.dtype()}, which is not supported; supported: "
            f"{', '.join(FLOAT_DTYPES)}. Quantised weights have to be converted to floats first."
        )
    return tensor.read()


def require_finite(tensor: LazyTensor, values: np.ndarray) -> None:
    """Raise an error for numbers that are NaN or infinite.

    Args:
        tensor: what they were read from, which the error names.
        values: the numbers, in the dtype in which they are used.

    Raises:
        ValueError: some are NaN or infinite; it says how many.
    """
    bad = values.size - int(
        np.count_nonzero(jnp.isfinite(values) if values.dtype == jnp.bfloat16 else np.isfinite(values))
    )
    if bad:
        raise ValueError(
            f"{tensor.path}: {tensor.name} has {bad:,} NaN or infinite values of {values.size:,} as {values.dtype}; "
            "the training that wrote it diverged or its conversion overflowed, so take another checkpoint."
        )


def _open_file(path: Path) -> dict[str, LazyTensor]:
    try:
        handle = safe_open(path, framework="numpy")
        return {name: LazyTensor(handle, path, name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: {_diagnose(path) or f'not a safetensors file ({error}).'}") from error


def _diagnose(path: Path) -> str:
    """What is wrong with a safetensors file, and the remedy; "" where the library knows better."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        hint = _describe_content(start + file.read(192))
        if hint:
            return f"not a safetensors file{hint}."
        if len(start) < 8:
            return f"ends after {size} bytes, inside its header; the download was interrupted, so fetch it again."
        (length,) = struct.unpack("<Q", start)
        if length > MAX_HEADER:
            return f"not a safetensors file, its header would have {length:,} bytes; fetch it again."
        if 8 + length > size:
            return (
                f"ends after {size:,} bytes, inside its header of {length:,}; the download was interrupted, so fetch "
                "it again."
            )
        file.seek(8)
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            wanted = 8 + length + max(ends, default=0)
        except (ValueError, RecursionError, TypeError, KeyError, IndexError, AttributeError):
            return "its header is damaged; fetch it again."
    if wanted > size:
        return (
            f"has {size:,} of {wanted:,} bytes; the download was interrupted, so fetch it again (delete what is there "
            "where the tool continues a file)."
        )
    if wanted < size:
        return f"has {size - wanted:,} bytes more than its header says; it is damaged, so fetch it again."
    return ""


def _read_index(index: Path) -> dict[str, str]:
    """Tensor -> shard."""
    shard_of = read_json_object(index).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of or not all(isinstance(name, str) for name in shard_of.values()):
        raise ValueError(
            f"{index}: weight_map is {_kind(shard_of)}; it is a JSON object that gives each tensor its shard, as in "
            '{"model.norm.weight": "model-00001-of-00002.safetensors"}.'
        )
    if strange := sorted(name for name in set(shard_of.values()) if Path(name).name != name or "\0" in name):
        raise ValueError(f"{index}: {strange[0]!r} is no file of this folder; shards lie beside their index.")
    return shard_of


def _require_files(folder: Path, files: Sequence[str], index: Path | None = None) -> None:
    missing = [name for name in files if not (folder / name).is_file()]
    if not missing:
        return
    if index is not None:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise FileNotFoundError(
            f"{folder}: no {shown}, of {len(files)} shards that {index.name} names; fetch what is missing."
        )
    there = sorted(path.name for path in folder.glob("*") if path.suffix in (".safetensors", ".bin", ".pth", ".gguf"))
    hint = f" The folder has {', '.join(there[:3])}." if there else ""
    raise FileNotFoundError(f"{folder}: no {missing[0]}; only safetensors are read, never pickles.{hint}")


def _describe_content(content: bytes) -> str:
    """What a file seems to be that is not what its name says."""
    start = content[:200].lstrip().lower()
    if not content.strip(b"\0 \r\n\t"):
        return ", it is empty; the download was interrupted, so fetch it again" if content else ", it is empty"
    if start.startswith(b"version https://git-lfs"):
        return ", it is a pointer of Git LFS; fetch the file itself with `git lfs pull`"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return ", it is a web page; the download was refused or went to another address"
    if start.startswith((b"pk\x03\x04", b"\x80\x02", b"\x80\x04")):
        return ", it is a pickle; convert it with `save_pretrained` of transformers"
    return ""


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list"}
    return kinds.get(type(value), "an object")
