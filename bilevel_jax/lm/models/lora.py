"""LoRA adapters, their merging and their PEFT folders."""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from bilevel_jax.lm.checkpoint.config_keys import ConfigKeys
from bilevel_jax.lm.checkpoint.files import open_tensors, read_json_object, read_stacked_tensors
from bilevel_jax.lm.hub.downloads import find_model_files
from bilevel_jax.lm.models.blocks import Adapter
from bilevel_jax.lm.models.config import DecoderConfig
from bilevel_jax.lm.models.families import FAMILIES, find_target_projections, peft_target_name, projection_shapes
from bilevel_jax.lm.models.huggingface import atomic_folder, checkpoint_module_name, write_tensors

Params = Any
Adapters = dict[str, dict[str, Adapter]]
"""`{"lora": {projection: Adapter}}`: only the arrays that are trained; `join_adapters` adds them to a base."""
PLAIN_INITIALIZERS = (True, False, "gaussian", "orthogonal", "eva")
"""Of `init_lora_weights`: those that start the factors and leave the base as it is."""
PLAIN_INITIALIZERS_WHY = " (such an adapter may stand on a changed base)"
NEUTRAL_ADAPTER_KEYS = frozenset(
    # fan_in_fan_out is how a base is stored, not what the factors are; dropout acts in training only
    "base_model_name_or_path revision inference_mode auto_mapping peft_version fan_in_fan_out lora_dropout "
    "megatron_core qalora_group_size loftq_config eva_config corda_config lora_ga_config runtime_config".split()
)
"""Keys of adapter_config.json that change nothing where those that switch them on are off."""
INERT_ADAPTER_VALUES: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "use_qalora": (False,),
    "use_bdlora": (False,),
    "lora_bias": (False,),
    "modules_to_save": ([],),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "exclude_modules": ([],),
    "target_parameters": ([],),
    "trainable_token_indices": ([],),
    "ensure_weight_tying": (False,),
    "layers_to_transform": (None,),
    "layers_pattern": (None,),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "megatron_config": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
}
"""Keys that plain LoRA has, with the values under which they change nothing, as null does."""


def init_lora(
    config: DecoderConfig,
    key: PRNGKeyArray,
    *,
    rank: int,
    alpha: float,
    target_modules: Sequence[str] = (),
    dtype: Any = jnp.float32,
) -> Adapters:
    """Fresh adapters: A ~ normal with variance 1 / in, B = 0, so that the model starts as the base.

    `target_modules` are Hugging Face's names of projections, matched by their ends as peft does (GPT-2's `c_proj` is
    two of them, `mlp.c_proj` one). None: what peft takes for the family, such as the queries and values of a Llama.
    Drawn in float32 and cast, so that float32 and float64 start from the same numbers. scale = alpha / rank.
    With B = 0 the gradient of A is exactly 0 at the first step: an optimizer whose update is not differentiable at
    zero (Adam with eps_root = 0) has a NaN derivative there.

    Args:
        config: the architecture of the base.
        key: of the draws.
        rank: r, at least 1.
        alpha: scale = alpha / rank.
        target_modules: names of projections; none: the family's own.
        dtype: of A and B.

    Returns:
        The tree that is trained.

    Raises:
        ValueError: a rank below 1, or a name that the family does not have.
    """
    if rank < 1:
        raise ValueError(f"rank {rank}; an adapter has a rank of at least 1.")
    lora, shapes = {}, projection_shapes(config)
    for name in find_target_projections(config, target_modules):
        source, sink = shapes[name]
        # keyed by the projection, not by its place in `target_modules`: adding a target leaves the others' draws alone
        draw = jax.random.fold_in(key, list(shapes).index(name))
        a = jax.random.normal(draw, (config.layers, source, rank), jnp.float32) / math.sqrt(source)
        lora[name] = Adapter(a.astype(dtype), jnp.zeros((config.layers, rank, sink), dtype), alpha / rank)
    return {"lora": lora}


def join_adapters(base: Params, adapters: Adapters) -> Params:
    """One tree from a base and its adapters, as `Decoder.hidden` and `Decoder.head` take it. No arithmetic.


    Args:
        base: the parameters of a model.
        adapters: from `init_lora` or `load_peft`.

    Returns:
        The base's leaves and the adapters'.

    Raises:
        ValueError: an adapter does not fit the base, or the base has adapters already.
    """
    if set(adapters) != {"lora"} or "lora" in base:
        raise ValueError(
            f"join_adapters(base, adapters) got a base with {sorted(base)} and adapters with {sorted(adapters)}; "
            "give a base without 'lora' and the tree that init_lora or load_peft made."
        )
    for name, adapter in adapters["lora"].items():
        kernel = base["layers"][name]["kernel"].shape
        if (*adapter.a.shape[:2], adapter.b.shape[2]) != kernel or adapter.a.shape[2] != adapter.b.shape[1]:
            raise ValueError(
                f"adapter of {name}: factors {adapter.a.shape} and {adapter.b.shape} do not fit the base's {kernel}."
            )
    return {**base, **adapters}


def merge_adapters(base: Params, adapters: Adapters) -> Params:
    """The base with W + scale A B in place of W, for export. float32 at least where the base was stored in less.

    For a base in bfloat16 do not cast the result back before measuring: rounding W + AB to bfloat16 can lose AB.

    Args:
        base: the parameters of a model.
        adapters: from `init_lora` or `load_peft`.

    Returns:
        A tree like the base.

    Raises:
        ValueError: as `join_adapters`.
    """
    join_adapters(base, adapters)  # for its checks
    layers = dict(base["layers"])
    for name, adapter in adapters["lora"].items():
        kernel = layers[name]["kernel"]
        dtype = jnp.promote_types(jnp.promote_types(kernel.dtype, adapter.a.dtype), jnp.float32)
        product = jnp.matmul(adapter.a.astype(dtype), adapter.b.astype(dtype), precision=jax.lax.Precision.HIGHEST)
        layers[name] = {**layers[name], "kernel": kernel.astype(dtype) + adapter.scale * product}
    return {**base, "layers": layers}


def balance_adapters(adapters: Adapters) -> Adapters:
    """The same products A B with AᵀA = BBᵀ (diagonal, descending) in every layer: the canonical gauge.

    With A = Q_a R_a, Bᵀ = Q_b R_b and R_a R_bᵀ = U S Vᵀ:  A' = Q_a U √S, B' = √S Vᵀ Q_bᵀ. The answer depends on A B
    only, up to the signs of the columns (and rotations among equal singular values), so a damped solve after it is
    the same for (A G, G⁻¹B). A layer whose product is 0 (fresh adapters) is left alone. Where A B has not full rank,
    the missing directions become 0 in both factors and no gradient leaves that point: balance before a solve,
    not in the middle of training.
    """

    def balance_layer(a, b):
        dtype = jnp.promote_types(a.dtype, jnp.float32)
        qa, ra = jnp.linalg.qr(a.astype(dtype))
        qb, rb = jnp.linalg.qr(b.astype(dtype).T)
        u, s, vt = jnp.linalg.svd(jnp.matmul(ra, rb.T, precision=jax.lax.Precision.HIGHEST), full_matrices=False)
        root = jnp.sqrt(s)
        new_a = jnp.matmul(qa, u * root[None, :], precision=jax.lax.Precision.HIGHEST)
        new_b = jnp.matmul(root[:, None] * vt, qb.T, precision=jax.lax.Precision.HIGHEST)
        live = s[0] > 0
        return jnp.where(live, _pad(new_a, a.shape).astype(a.dtype), a), jnp.where(
            live, _pad(new_b, b.shape).astype(b.dtype), b
        )

    def balance_projection(adapter):
        a, b = jax.vmap(balance_layer)(adapter.a, adapter.b)
        return Adapter(a, b, adapter.scale)

    return {"lora": {name: balance_projection(adapter) for name, adapter in adapters["lora"].items()}}


def save_peft(
    folder: str | Path,
    config: DecoderConfig,
    adapters: Adapters,
    *,
    base: str | None = None,
    base_revision: str | None = None,
) -> None:
    """Write a PEFT adapter folder (adapter_config.json, adapter_model.safetensors). `base` names the base model.

    Written next to `folder` and renamed, so that there is a whole folder or none.

    Args:
        folder: is created; empty where it exists.
        config: the architecture of the base.
        adapters: all of one rank and scale.
        base: the name of the base model.
        base_revision: its commit on the hub.

    Raises:
        FileExistsError: `folder` holds something.
        ValueError: adapters of different rank or scale (one adapter_config.json has one of each).
    """
    lora = adapters["lora"]
    kinds = {(adapter.a.shape[2], adapter.scale) for adapter in lora.values()}
    if len(kinds) != 1:
        raise ValueError(f"adapters with different (rank, scale) {sorted(kinds)}; save_peft writes one of each.")
    ((rank, scale),) = kinds
    alpha = scale * rank
    alpha = round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
    tensors = {}
    for name, adapter in lora.items():
        for part, leaf in (("lora_A", adapter.a), ("lora_B", adapter.b)):
            for layer, factor in enumerate(np.asarray(leaf)):
                tensors[_peft_name(config, layer, name, part)] = np.ascontiguousarray(factor.T)
    adapter_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": base_revision,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({peft_target_name(config, name) for name in lora}),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": not FAMILIES[config.family].transposed,
        "inference_mode": True,
    }
    with atomic_folder(folder) as target:
        (target / "adapter_config.json").write_text(json.dumps(adapter_config, indent=2) + "\n", encoding="utf-8")
        write_tensors(target / "adapter_model.safetensors", tensors)


def load_peft(folder: str | Path, config: DecoderConfig, *, dtype: Any = jnp.float32) -> Adapters:
    """The adapters in a PEFT folder, checked against `config`.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors, or a name on the hub.
        config: the architecture of the base.
        dtype: of A and B.

    Returns:
        The tree that `join_adapters` takes.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: what `x W + scale (x A) B` with one rank and the base as it is does not say (DoRA, PiSSA, activated
            LoRA, trained biases, saved modules, ranks of some layers, ...), by name; keys of adapter_config.json that
            are not understood; missing or unexpected tensors; wrong shapes; NaN or infinite values.
    """
    folder = find_model_files(folder)
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a PEFT adapter folder.")
    keys = ConfigKeys(read_json_object(path))
    try:
        rank, scale, targets = _read_adapter_config(config, keys)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    tensors = open_tensors(folder, "adapter_model.safetensors")
    shapes = projection_shapes(config)
    names_by_projection = {
        name: [_peft_name(config, layer, name, part) for part in ("lora_A", "lora_B") for layer in range(config.layers)]
        for name in targets
    }
    names = {key for keys in names_by_projection.values() for key in keys}
    missing, unexpected = sorted(names - set(tensors)), sorted(set(tensors) - names)
    if missing or unexpected:
        raise ValueError(
            f"{folder}: the tensors do not fit its adapter_config.json and a {config.family} of {config.layers} "
            f"layers. Missing {len(missing)}: {missing[:3]}; unexpected {len(unexpected)}: {unexpected[:3]}."
        )
    lora = {}
    for name, keys_of_projection in names_by_projection.items():
        source, sink = shapes[name]
        a_names, b_names = keys_of_projection[: config.layers], keys_of_projection[config.layers :]
        a = read_stacked_tensors(tensors, a_names, (rank, source), dtype, transpose=True)
        b = read_stacked_tensors(tensors, b_names, (sink, rank), dtype, transpose=True)
        lora[name] = Adapter(jnp.asarray(a), jnp.asarray(b), scale)
    return {"lora": lora}


def _read_adapter_config(config: DecoderConfig, keys: ConfigKeys) -> tuple[int, float, list[str]]:
    """Rank, scale and projections; ValueError for everything that is not plain LoRA."""
    keys.require(("peft_type", "r", "lora_alpha", "target_modules"), "an adapter_config.json of LoRA")
    keys.expect("peft_type", "LORA")
    keys.expect("task_type", "CAUSAL_LM", None)
    keys.expect("bias", "none")
    keys.expect("init_lora_weights", *PLAIN_INITIALIZERS, why=PLAIN_INITIALIZERS_WHY)
    rank, alpha = keys.integer("r"), keys.number("lora_alpha")
    scale = alpha / (math.sqrt(rank) if keys.flag("use_rslora", False) else rank)
    projections = _match_targets(config, keys.value("target_modules"))
    keys.refuse_others(NEUTRAL_ADAPTER_KEYS, INERT_ADAPTER_VALUES, of="an adapter of plain LoRA")
    return rank, scale, projections


def _match_targets(config: DecoderConfig, targets: Any) -> list[str]:
    """The projections whose modules `target_modules` means, as peft matches them; each in every layer, or in none."""
    names = {
        checkpoint_module_name(config, layer, name): name
        for name in projection_shapes(config)
        for layer in range(config.layers)
    }
    if targets is None:
        return find_target_projections(config, ())
    if targets == "all-linear":
        return list(projection_shapes(config))
    if isinstance(targets, str):
        try:
            matched = [name for name in names if re.fullmatch(targets, name)]
        except re.error as error:
            raise ValueError(f"target_modules {targets!r} is no regular expression ({error}).") from error
        if not matched:
            raise ValueError(f"target_modules {targets!r} matches no projection, such as {next(iter(names))}.")
    elif isinstance(targets, list) and targets and all(isinstance(target, str) for target in targets):
        found = {target: [name for name in names if f".{name}".endswith(f".{target}")] for target in targets}
        if unknown := [target for target, matches in found.items() if not matches]:
            find_target_projections(config, unknown)  # for its error
        matched = sorted({name for matches in found.values() for name in matches})
    else:
        raise ValueError(f"target_modules is {targets!r}; it is a list of names, a regular expression or null.")
    counts = Counter(names[name] for name in matched)
    if partly := sorted(peft_target_name(config, name) for name, count in counts.items() if count < config.layers):
        raise ValueError(f"target_modules has {partly} in some of the {config.layers} layers only; all are supported.")
    return [name for name in projection_shapes(config) if name in counts]


def _peft_name(config: DecoderConfig, layer: int, projection: str, part: str) -> str:
    return f"base_model.model.{checkpoint_module_name(config, layer, projection)}.{part}.weight"


def _pad(x: Array, shape: tuple[int, ...]) -> Array:
    # a rank above the width: the reduced factorisation has fewer columns than the adapter
    return jnp.pad(x, [(0, whole - part) for whole, part in zip(shape, x.shape, strict=True)])
