"""Hugging Face model folders in and out: config.json and safetensors, to and from the stacked parameter tree."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from safetensors import safe_open
from safetensors.numpy import save_file

from bilevel_jax.lm.models.config import MLP, PROJECTIONS, DecoderConfig, projection_shape, read_config, write_config

NORMS = {"input_norm": "input_layernorm", "post_norm": "post_attention_layernorm"}
HEAD_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}


class Tensor(NamedTuple):
    """One tensor of a safetensors file, not read yet."""

    handle: Any
    name: str

    def shape(self) -> tuple[int, ...]:
        """From the file's header."""
        return tuple(self.handle.get_slice(self.name).get_shape())

    def read(self) -> np.ndarray:
        """The numbers, in the dtype of the file."""
        return self.handle.get_tensor(self.name)


class Leaf(NamedTuple):
    """Where a leaf of the tree lives in a checkpoint: `names` has one tensor, or one for each layer."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    """Of one tensor, as the file has it."""
    transpose: bool
    """The file has [out, in], the tree [in, out]."""
    stacked: bool


def load(folder: str | Path, *, dtype: Any = jnp.float32) -> tuple[DecoderConfig, dict[str, Any]]:
    """The model in a Hugging Face folder: its configuration and its parameters cast to `dtype`.

    Reads model.safetensors or the shards of model.safetensors.index.json, one leaf at a time. Raises ValueError that
    names missing and unexpected tensors and wrong shapes. A tied head in the file is ignored, as transformers does.
    """
    config = read_config(folder)
    tensors = open_tensors(folder, "model.safetensors")
    leaves = table(config)
    wanted = {name for leaf in jax.tree.leaves(leaves, is_leaf=_is_leaf) for name in leaf.names}
    ignored = {name for name in tensors if name.endswith("rotary_emb.inv_freq")}  # a buffer, in old checkpoints
    ignored |= {"lm_head.weight"} if config.tied else set()
    missing, unexpected = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted - ignored)
    if missing or unexpected:
        raise ValueError(
            f"{folder}: the tensors do not fit its config.json ({config.family}). "
            f"Missing {len(missing)}: {missing[:5]}; unexpected {len(unexpected)}: {unexpected[:5]}."
        )

    def read(leaf: Leaf) -> Array:
        stack = read_stack(tensors, leaf.names, leaf.shape, dtype, transpose=leaf.transpose)
        return stack if leaf.stacked else stack[0]

    return config, jax.tree.map(read, leaves, is_leaf=_is_leaf)


def save(folder: str | Path, config: DecoderConfig, params: Mapping[str, Any], *, tokenizer: Any = None) -> None:
    """Write a folder that transformers' AutoModelForCausalLM loads: config.json, model.safetensors and the tokenizer.

    Each tensor keeps its dtype; config.json names the widest. Written beside `folder` and renamed, so that there is a
    whole folder or none. Raises FileExistsError if `folder` holds something, ValueError if `params` is not the tree
    of `config` (adapters: `lora.merge` them first).
    """
    leaves = table(config)
    flat, tree = jax.tree.flatten(leaves, is_leaf=_is_leaf)
    if jax.tree.structure(params) != tree:
        hint = "; merge the adapters first" if "lora" in params else ""
        raise ValueError(f"params with {sorted(params)} are not a tree of {config}{hint}.")
    tensors = {}
    for leaf, values in zip(flat, tree.flatten_up_to(params), strict=True):
        stack = np.asarray(values) if leaf.stacked else np.asarray(values)[None]
        shape = leaf.shape[::-1] if leaf.transpose else leaf.shape
        if stack.shape != (len(leaf.names), *shape):
            raise ValueError(f"{leaf.names[0]}: the parameter is {values.shape}, {config.family} has {shape} a layer.")
        for name, value in zip(leaf.names, stack, strict=True):
            tensors[name] = np.ascontiguousarray(value.T if leaf.transpose else value)
    dtype = jnp.result_type(*{value.dtype for value in tensors.values()})
    raw = write_config(config, str(dtype))
    with fresh_folder(folder) as target:
        (target / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        write_tensors(target / "model.safetensors", tensors)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)


def table(config: DecoderConfig) -> dict[str, Any]:
    """The parameter tree with a `Leaf` in place of each array."""

    def stack(name: str, shape: tuple[int, ...], part: str = "weight") -> Leaf:
        names = tuple(f"{layer_name(layer, name)}.{part}" for layer in range(config.layers))
        return Leaf(names, shape, len(shape) == 2, True)

    def linear(name: str) -> dict[str, Leaf]:
        source, sink = projection_shape(config, name)
        kernel = {"kernel": stack(name, (sink, source))}
        return {**kernel, "bias": stack(name, (sink,), "bias")} if name in config.biases else kernel

    layers = {name: linear(name) for name in PROJECTIONS}
    layers |= {name: {"scale": stack(name, (config.width,))} for name in NORMS}
    if config.qk_norm:
        layers |= {name: {"scale": stack(name, (config.head_dim,))} for name in HEAD_NORMS}
    embedding = (config.vocab, config.width)
    top = {
        "embed": Leaf(("model.embed_tokens.weight",), embedding, False, False),
        "layers": layers,
        "norm": {"scale": Leaf(("model.norm.weight",), (config.width,), False, False)},
    }
    return top if config.tied else {**top, "head": Leaf(("lm_head.weight",), embedding, True, False)}


def layer_name(layer: int, name: str) -> str:
    """The name of a module of a layer in a checkpoint."""
    inside = {**NORMS, **HEAD_NORMS}.get(name) or f"{'mlp' if name in MLP else 'self_attn'}.{name}"
    return f"model.layers.{layer}.{inside}"


def open_tensors(folder: str | Path, file: str) -> dict[str, Tensor]:
    """The tensors of `file` in `folder`, or of the shards that `file`.index.json lists; nothing is read yet."""
    folder = Path(folder)
    index = folder / f"{file}.index.json"
    files = [file]
    if not (folder / file).is_file() and index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: no {', '.join(missing)}; only safetensors are read, never pickles.")
    handles = [safe_open(folder / name, framework="numpy") for name in files]
    return {name: Tensor(handle, name) for handle in handles for name in handle.keys()}  # noqa: SIM118


def read_stack(
    tensors: Mapping[str, Tensor], names: Sequence[str], shape: tuple[int, ...], dtype: Any, *, transpose: bool
) -> Array:
    """Tensors of one shape as one array [len(names), *shape] of `dtype`; each transposed if asked."""
    out = np.empty((len(names), *(shape[::-1] if transpose else shape)), np.dtype(dtype))
    for row, name in zip(out, names, strict=True):
        if tensors[name].shape() != shape:
            raise ValueError(f"{name}: the file has {tensors[name].shape()}, the configuration asks for {shape}.")
        value = tensors[name].read()
        row[...] = value.T if transpose else value
    return jnp.asarray(out)


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file that transformers and peft accept: it says that the tensors are laid out as torch's."""
    save_file(tensors, path, metadata={"format": "pt"})


@contextmanager
def fresh_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends, and vanishes if it raises."""
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder}: exists and is not empty; give another folder, or remove it first.")
    target = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    target.mkdir(parents=True)
    try:
        yield target
        os.replace(target, folder)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def _is_leaf(node: Any) -> bool:
    return isinstance(node, Leaf)
