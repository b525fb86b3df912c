"""Loading and saving of Hugging Face model folders."""

import fcntl
import glob
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from safetensors.numpy import save_file

from bilevel_jax.lm.checkpoint.files import CONFIG_FILE, LazyTensor, open_tensors, read_floats, read_stacked_tensors
from bilevel_jax.lm.hub.downloads import find_model_files
from bilevel_jax.lm.models.buffers import check_buffer, is_buffer
from bilevel_jax.lm.models.config import DecoderConfig
from bilevel_jax.lm.models.families import FAMILIES, config_to_dict, make_abstract_modules, read_config
from bilevel_jax.lm.models.source_files import write_tokenizer, write_unchanged_files


class TensorLocation(NamedTuple):
    """Where a leaf of the tree lives in a checkpoint: `names` has one tensor, or one for each layer."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    """Of one tensor, as the file has it."""
    transpose: bool
    """The file has [out, in], the tree [in, out]."""
    stacked: bool


def load_model(
    folder: str | Path,
    *,
    dtype: Any = jnp.float32,
    place: Callable[[Any, np.ndarray], Array] = lambda path, values: jnp.asarray(values),
) -> tuple[DecoderConfig, dict[str, Any]]:
    """The model in a Hugging Face folder or on the hub: its configuration and its parameters.

    Reads model.safetensors or the shards of model.safetensors.index.json, one leaf at a time. What is left out is
    looked at first: the head of a model with tied embeddings must equal them (transformers 5 unties them otherwise),
    and masks and rotary frequencies must be those that the configuration says.

    Args:
        folder: with config.json and safetensors files; or a name on the hub, owner/name or owner/name@revision, which
            is fetched into its cache.
        dtype: of the parameters.
        place: (path in the tree, values) -> array: puts each leaf on a device, or shards it over several.

    Returns:
        The architecture and the parameter tree.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: an unsupported architecture; damaged files; missing or unexpected tensors, by name; wrong shapes;
            NaN or infinite values; another head than the embeddings that it is tied to.

    Example:
        >>> import tempfile
        >>> from bilevel_jax.lm import models
        >>> from bilevel_jax.lm.builtin import cipher
        >>> config = models.read_config(cipher.make_cipher_config())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_model(f"{folder}/model", config, models.init_params(config, jax.random.key(0)))
        ...     loaded_config, params = load_model(f"{folder}/model")
        >>> loaded_config == config, sum(leaf.size for leaf in jax.tree.leaves(params))
        (True, 21952)
    """
    folder = find_model_files(folder)
    config = read_config(folder)
    tensors = _add_base_prefix(config, open_tensors(folder, "model.safetensors"))
    locations = locate_tensors(config)
    expected = {name for leaf in jax.tree.leaves(locations, is_leaf=_is_location) for name in leaf.names}
    ignored = {name for name in tensors if name not in expected and is_buffer(config, name)}
    head = _tensor_name(FAMILIES[config.family].top_names["head"], "kernel")
    ignored |= {head} if config.tied_embeddings else set()
    missing, unexpected = sorted(expected - set(tensors)), sorted(set(tensors) - expected - ignored)
    if missing or unexpected:
        raise ValueError(
            f"{folder}: the tensors do not fit its config.json ({config.family}). "
            f"Missing {len(missing)}: {missing[:5]}; unexpected {len(unexpected)}: {unexpected[:5]}. "
            "Take both files from one model: num_hidden_layers and the sizes must be those of the tensors."
        )
    for name in sorted(ignored & set(tensors) - {head}):
        check_buffer(config, tensors[name])
    if head in ignored & set(tensors):
        _require_tied(folder, tensors[locations["embed"].names[0]], tensors[head])

    def read(path: Any, leaf: TensorLocation) -> Array:
        stack = read_stacked_tensors(tensors, leaf.names, leaf.shape, dtype, transpose=leaf.transpose)
        return place(path, stack if leaf.stacked else stack[0])

    return config, jax.tree_util.tree_map_with_path(read, locations, is_leaf=_is_location)


def save_model(
    folder: str | Path,
    config: DecoderConfig,
    params: Mapping[str, Any],
    *,
    tokenizer: Any = None,
    source_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a folder that transformers' AutoModelForCausalLM loads: config.json, model.safetensors and what goes along.

    Each tensor keeps its dtype; config.json names the widest. With `source_files` config.json keeps all that the
    source's said, and every other file is the source's own: tokenizer, chat templates, generation settings. Written
    next to `folder` and renamed, so that there is a whole folder or none.

    Args:
        folder: is created; empty where it exists.
        config: the architecture.
        params: the tree of `config`.
        tokenizer: of a model that has no source folder.
        source_files: from `read_source_files`, of the folder that the parameters were loaded from.

    Raises:
        FileExistsError: `folder` holds something.
        ValueError: `params` is not the tree of `config` (adapters: `merge_adapters` first), or both a tokenizer and
            the source's files are given.
    """
    if tokenizer is not None and source_files is not None:
        raise ValueError("save_model got a tokenizer and source_files, which hold one; give one of the two.")
    locations = locate_tensors(config)
    flat, tree = jax.tree.flatten(locations, is_leaf=_is_location)
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
    raw = _extend_source_config(config, config_to_dict(config, str(dtype)), source_files or {})
    with atomic_folder(folder) as target:
        (target / CONFIG_FILE).write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        write_tensors(target / "model.safetensors", tensors)
        if tokenizer is not None:
            write_tokenizer(target, tokenizer)
        write_unchanged_files(target, source_files or {})


def locate_tensors(config: DecoderConfig) -> dict[str, Any]:
    """The parameter tree with a `TensorLocation` in place of each array."""
    family = FAMILIES[config.family]

    def locate_in_layers(name: str, part: str, shape: tuple[int, ...]) -> TensorLocation:
        names = tuple(_tensor_name(checkpoint_module_name(config, layer, name), part) for layer in range(config.layers))
        transpose = part == "kernel" and family.transposed
        return TensorLocation(names, shape[::-1] if transpose else shape, transpose, True)

    def locate_outside_layers(name: str, shape: tuple[int, ...], part: str = "kernel") -> TensorLocation:
        return TensorLocation((_tensor_name(family.top_names[name], part),), shape, name == "head", False)

    modules = make_abstract_modules(config)
    tree = {
        "embed": locate_outside_layers("embed", (config.vocab_size, config.width)),
        "layers": {
            name: {part: locate_in_layers(name, part, shape) for part, shape in parts.items()}
            for name, parts in modules.layer_shapes.items()
        },
        "norm": {part: locate_outside_layers("norm", shape, part) for part, shape in modules.norm_shapes.items()},
    }
    if not config.tied_embeddings:
        tree["head"] = locate_outside_layers("head", (config.vocab_size, config.width))
    if config.rope is None:
        tree["positions"] = locate_outside_layers("positions", (config.max_length, config.width))
    return tree


def checkpoint_module_name(config: DecoderConfig, layer: int, name: str) -> str:
    """The name of a module of a layer in a checkpoint."""
    family = FAMILIES[config.family]
    return f"{family.top_names['layers']}.{layer}.{family.layer_names[name]}"


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file that transformers and peft accept: it says that the tensors are laid out as torch's."""
    path.touch()
    mode = path.stat().st_mode  # as the umask wants it; safetensors lets the owner alone read
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends, and vanishes if it raises.

    Those that killed processes left for the same name are removed first.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder}: exists and is not empty; give another folder, or remove it first.")
    for leftover in folder.parent.glob(f".{glob.escape(folder.name)}." + "[0-9a-f]" * 32):
        with _held_folder(leftover) as is_held:
            if is_held:  # or the process that makes it is at work
                shutil.rmtree(leftover, ignore_errors=True)
    target = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    target.mkdir(parents=True)
    try:
        with _held_folder(target):
            yield target
            os.replace(target, folder)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


@contextmanager
def _held_folder(folder: Path) -> Iterator[bool]:
    """Hold a folder for this process; whether it can be. The kernel lets go of those of a killed process."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # held by another, or a file system that cannot
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _extend_source_config(
    config: DecoderConfig, own: dict[str, Any], source_files: Mapping[str, bytes]
) -> dict[str, Any]:
    """`own` with the values, and the further keys, of the source's config.json, without where that lay."""
    if CONFIG_FILE not in source_files:
        return own
    new = {key: own[key] for key in ("dtype", "torch_dtype")}
    source = {key: value for key, value in json.loads(source_files[CONFIG_FILE]).items() if key != "_name_or_path"}
    extended = {**own, **source, **new}
    # a checkpoint may overrule its config (a tied one with a head of its own): then `own` says what is in the tensors
    return extended if read_config(extended) == config else {**source, **own}


def _tensor_name(module: str, part: str) -> str:
    return f"{module}.{'bias' if part == 'bias' else 'weight'}"


def _add_base_prefix(config: DecoderConfig, tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """GPT-2's own files were saved from the model without its head: their names lack the first part."""
    top = FAMILIES[config.family].top_names
    first = f"{top['embed'].partition('.')[0]}."
    if any(name.startswith(first) for name in tensors):
        return tensors
    return {name if name.startswith(f"{top['head']}.") else first + name: tensor for name, tensor in tensors.items()}


def _require_tied(folder: str | Path, embed: LazyTensor, head: LazyTensor) -> None:
    """Raise ValueError where the head in a file is another one than the embeddings to which config.json ties it."""
    if embed.shape() == head.shape() and np.array_equal(read_floats(embed), read_floats(head)):
        return
    raise ValueError(
        f"{head.path}: {head.name} has other values than {embed.name}, to which {Path(folder) / 'config.json'} ties "
        "it. Set tie_word_embeddings to false there to use this head, as transformers 5 does, or delete the tensor."
    )


def _is_location(node: Any) -> bool:
    return isinstance(node, TensorLocation)
