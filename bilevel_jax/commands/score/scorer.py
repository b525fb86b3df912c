"""A rater with the models that make its features, applied to examples."""

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from jax.sharding import AxisType, Mesh
from jaxtyping import Bool, Float

from bilevel_jax.core.types import Params
from bilevel_jax.lm import models
from bilevel_jax.lm.data import tokens
from bilevel_jax.lm.data.examples import Example
from bilevel_jax.lm.data.tokens import Corpus
from bilevel_jax.lm.data.vocabulary import check_special_tokens
from bilevel_jax.lm.models.lora import join_adapters, load_peft
from bilevel_jax.runs.config.load import ScoreConfig
from bilevel_jax.runs.config.schema import DataSection, ObjectiveSection
from bilevel_jax.runs.engine import raters
from bilevel_jax.runs.engine.raters import Rater
from bilevel_jax.runs.infra import run_dir
from bilevel_jax.runs.infra.placement import replicate
from bilevel_jax.runs.scoring import features
from bilevel_jax.runs.scoring.features import Measured, Table
from bilevel_jax.runs.scoring.from_file import Embeddings, load_embeddings
from bilevel_jax.runs.tasks.objective import check_examples
from bilevel_jax.runs.tasks.reference import fingerprint_model_files
from bilevel_jax.runs.tasks.text import tokenize_examples

T = TypeVar("T")
LARGEST_WEIGHT = 1e100
"""Sums of squares of larger ones overflow."""


class Scorer(NamedTuple):
    """What scoring needs, loaded."""

    rater: Rater
    data: DataSection
    """How new examples become tokens: as those that the rater was learned from."""
    tokenizer: Any
    architecture: models.DecoderConfig
    decoder: models.Decoder
    params_of: dict[str, Params]
    """The parameters of each model that features take."""
    mesh: Mesh
    """Of this process's own devices: processes score different examples, and do not wait for each other."""
    file: str
    embeddings: Embeddings | None
    """Vectors of the user's own, where the rater reads any."""
    batch_tokens: int


class ScoredExamples(NamedTuple):
    """The scores of some examples; those that were dropped as too long have none."""

    is_kept: Bool[np.ndarray, "examples"]
    raw: Table
    scaled: Table
    logits: Float[np.ndarray, "examples"]


def load_scorer(config: ScoreConfig, rater: Rater) -> Scorer:
    """The models of a rater. Raises ValueError where the model is not the one that made its features."""
    folder = find_model(config, rater)
    tokenizer, architecture = tokens.load_tokenizer(folder), models.read_config(folder)
    check_special_tokens(folder, tokenizer, architecture.vocab_size)
    needed = features.models_of(rater.recipe.features)
    devices = jax.local_devices()
    mesh = jax.make_mesh((len(devices), 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    params_of: dict[str, Params] = {}
    if needed:
        recorded = rater.document["model"]
        fingerprint = fingerprint_model_files(folder, f"{recorded['param_dtype']} {recorded['base_dtype']}")
        if fingerprint != recorded["fingerprint"]:
            raise ValueError(
                f"{folder}: another model than the one that made the rater's features (fingerprint {fingerprint[:12]}, "
                f"and {config.score.rater} has {recorded['fingerprint'][:12]}), so its coefficients mean nothing here. "
                "Give the model of the rater's run by --score.model."
            )
        dtype = jnp.bfloat16 if recorded["base_dtype"] == "bfloat16" else jnp.float32
        _, start = models.load_model(folder, dtype=dtype)
        params_of["start"] = replicate(mesh, start)
        for name, kind in rater.document["side_models"].items():
            side = Path(config.score.rater) / f"{name}_model"
            if kind == "adapter":
                params_of[name] = join_adapters(params_of["start"], replicate(mesh, load_peft(side, architecture)))
            else:
                params_of[name] = replicate(mesh, models.load_model(side, dtype=jnp.float32)[1])
    decoder = models.make_decoder(architecture, remat="none")
    reading = rater.document["reading"]
    if config.data.truncation == "drop":
        reading = {**reading, "truncation": "drop"}
    data = dataclasses.replace(config.data, **reading)
    return Scorer(
        rater=rater,
        data=data,
        tokenizer=tokenizer,
        architecture=architecture,
        decoder=decoder,
        params_of=params_of,
        mesh=mesh,
        file=config.score.file,
        embeddings=_load_embeddings(config, rater),
        batch_tokens=config.score.batch_tokens,
    )


def _load_embeddings(config: ScoreConfig, rater: Rater) -> Embeddings | None:
    """The vectors of the new examples, as wide as those that the rater was learned from."""
    path, mean = config.score.embedding_file, rater.recipe.embedding_mean
    if bool(path) != (mean is not None):
        raise ValueError(
            "the rater reads embeddings of the user's own: give a file with those of the new examples, by id, as "
            "--score.embedding-file."
            if mean is not None
            else "the rater reads no embeddings of a file: leave score.embedding_file empty."
        )
    if mean is None:
        return None
    embeddings = load_embeddings(path)
    if embeddings.width != len(mean):
        raise ValueError(
            f"{path}: embeddings of {embeddings.width:,} numbers, and the rater was learned from ones of "
            f"{len(mean):,}: make them by the same model."
        )
    return embeddings


def find_model(config: ScoreConfig, rater: Rater) -> str:
    """The folder of the model before training: score.model, or that of the run in whose folder the rater lies."""
    if config.score.model:
        return config.score.model
    run = Path(config.score.rater).resolve().parent
    if not (run / run_dir.CONFIG_FILE).is_file():
        raise ValueError(
            f"{config.score.rater}: lies in no run's folder, so nothing says where the model of its features is "
            f"(fingerprint {rater.document['model']['fingerprint'][:12]}). Name it by --score.model."
        )
    name = yaml.safe_load(run_dir.read_text(run / run_dir.CONFIG_FILE))["model"]["name_or_path"]
    return str(run / run_dir.INPUT_FOLDER / "model") if name.startswith("builtin:") else name


def check_reading(config: ScoreConfig, rater: Rater) -> None:
    """Raise a ValueError for keys of section data that score has no use for, or that would make other tokens.

    To drop rows that are too long changes nothing of the others, so it is always allowed.
    """
    for key in ("validation", "dev", "test"):
        if given := getattr(config.data, key):
            raise ValueError(
                f"data.{key} = {', '.join(given)}: score trains and judges nothing, so it reads data.train alone, the "
                f"new examples. Leave data.{key} out."
            )
    for key, value in rater.document["reading"].items():
        given, default = getattr(config.data, key), getattr(DataSection, key)
        if given not in (default, value) and (key, given) != ("truncation", "drop"):
            raise ValueError(
                f"data.{key} = {given!r}, and the rater was learned from examples read with {value!r}; its features "
                f"would mean something else. Leave data.{key} out."
            )


def read_ahead(chunks: Iterator[T]) -> Iterator[T]:
    """The same, the next one made by a thread while the present one is worked on."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, chunks, None)
        while (chunk := future.result()) is not None:
            future = pool.submit(next, chunks, None)
            yield chunk


def tokenize_chunk(scorer: Scorer, examples: Sequence[Example]) -> Corpus:
    """The examples as the rater's own were read."""
    check_examples(ObjectiveSection(), list(examples))
    return tokenize_examples(scorer.data, examples, scorer.tokenizer, scorer.architecture)[0]


def score_examples(scorer: Scorer, examples: Sequence[Example], corpus: Corpus) -> ScoredExamples:
    """The features and logits of tokenized examples; a ValueError names the row of a feature that is not finite."""
    recipe = scorer.rater.recipe
    is_kept = np.isin(np.arange(len(examples)), corpus.kept_indices)
    measured: Measured = {}
    for model in features.models_of(recipe.features):
        found = features.measure_corpus(
            scorer.decoder,
            scorer.params_of[model],
            corpus,
            np.arange(len(examples)),
            features.measures_of(model, recipe.features),
            mesh=scorer.mesh,
            batch_tokens=scorer.batch_tokens,
        )
        measured |= found if model == "start" else {raters.LOSS_NAMES[model]: found["loss"]}
    if scorer.embeddings is not None:
        measured["embedding"] = scorer.embeddings.rows(examples)
    _, raw = features.raw_table(recipe, scorer.file, examples, corpus, measured)
    features.check_finite_features(recipe.columns, raw, examples, np.flatnonzero(is_kept))
    scaled = features.scale_features(recipe, raw)
    logits = scorer.rater.logits(scaled)
    check_weights(scorer.rater, examples, np.where(is_kept[:, None], scaled, 0), np.where(is_kept, logits, 0))
    return ScoredExamples(is_kept, raw, scaled, np.where(is_kept, logits, np.nan))


def check_weights(rater: Rater, examples: Sequence[Example], scaled: Table, logits: np.ndarray) -> None:
    """Raise a ValueError that names the first row whose weight overflows, and the feature that is farthest off."""
    with np.errstate(over="ignore"):
        too_large = np.flatnonzero(~(rater.weights(logits) <= LARGEST_WEIGHT))
    if len(too_large):
        row = too_large[0]
        column = int(np.argmax(np.abs(scaled[row])))
        raise ValueError(
            f"{examples[row].where}: the rater's logit is {logits[row]:.3g}, and the weight overflows: "
            f"{rater.recipe.columns[column]!r} is {scaled[row, column]:.3g} deviations off its mean in training, "
            f"which rater.transform = {rater.recipe.transform} lets through. Mend the row, or learn the rater with "
            "rater.transform: clip."
        )
