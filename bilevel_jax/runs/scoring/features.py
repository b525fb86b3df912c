"""Features of examples that a rater reads, by name, and how they are scaled."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float
from scipy import sparse

from bilevel_jax.core.types import Batch, Params
from bilevel_jax.lm.data import batches
from bilevel_jax.lm.data.examples import Example, example_kind
from bilevel_jax.lm.data.features import NUM_HASH_BUCKETS, token_features
from bilevel_jax.lm.data.tokens import Corpus
from bilevel_jax.lm.losses.sft import sft_losses
from bilevel_jax.lm.models import Decoder
from bilevel_jax.runs.config.schema import RaterSection
from bilevel_jax.runs.infra.distributed import fetch_to_host
from bilevel_jax.runs.infra.placement import place_stream
from bilevel_jax.runs.scoring.from_file import load_embeddings, read_id_column
from bilevel_jax.scores.embedding import WordIndex, index_words, iterate_blocks
from bilevel_jax.scores.margin import token_el2n

Table = Float[np.ndarray, "examples columns"]
Measured = dict[str, Table]
"""What the models say of the examples, by the name of a feature: float[examples, columns]."""


class Feature(NamedTuple):
    """A feature that `rater.features` may name."""

    meaning: str
    model: str = ""
    """The model whose forward pass it takes: start, holdout or uniform; "" for none."""
    reads_arrays: bool = False
    """Whether there is one for arrays, too."""


FEATURES = {
    "length": Feature("log(1 + tokens) of the prompt and of the response"),
    "kind": Feature("text, prompt or chat"),
    "source": Feature("the source of the example; of one that training had not, none"),
    "tokens": Feature("type-token ratio and hashed token shares of the response"),
    "likeness": Feature("TF-IDF cosine of the question with those of validation: the mean, and the nearest"),
    "loss": Feature("loss under the model before training", "start", True),
    "margin": Feature("EL2N, |p - onehot|, under the model before training", "start", True),
    "hidden": Feature("principal directions of the mean hidden state before training; of arrays, of the input", "start",
                      True),
    "hidden_likeness": Feature("cosine of the mean hidden state with that of validation", "start"),
    "validation_loss": Feature("loss under a model that is trained on validation alone", "holdout", True),
    "reducible": Feature("loss - validation_loss: what validation has taught of the example", "holdout", True),
    "uniform_loss": Feature("loss under a model that is trained on all examples alike", "uniform", True),
    "embedding": Feature("principal directions of the vectors in rater.embedding_file"),
    "embedding_likeness": Feature("cosine of the vector in rater.embedding_file with those of validation: the mean, "
                                  "and the nearest; all less the training examples' mean"),
    "columns": Feature("the columns that rater.columns names, of rater.file"),
}  # fmt: skip
"""Every feature, in the order of their columns. Scores that are made elsewhere (ica, ifd, ...) come as `columns`."""
MODELS = ("start", "holdout", "uniform")
CLIPPED_SHARE = 0.01
"""transform = clip: the share of the training examples beyond each bound."""
LARGEST_FEATURE = 1e100
"""Sums of squares of larger ones overflow."""
RANK_KNOTS = 129
"""transform = rank: quantiles of the training examples between which ranks are interpolated."""


def check_array_features(names: Sequence[str]) -> None:
    """Raise a ValueError for a feature that arrays do not have."""
    for name in names:
        if not FEATURES[name].reads_arrays:
            known = ", ".join(name for name, feature in FEATURES.items() if feature.reads_arrays)
            raise ValueError(f"rater.features: {name!r} reads text; for arrays there are {known}.")


def models_of(names: Sequence[str]) -> tuple[str, ...]:
    """The models whose forward passes these features take."""
    needed = {FEATURES[name].model for name in names} | ({"start"} if "reducible" in names else set())
    return tuple(name for name in MODELS if name in needed)


# ---- what the models say


def measures_of(model: str, names: Sequence[str]) -> tuple[str, ...]:
    """What the forward pass of a model must give for these features."""
    if model != "start":
        return ("loss",)
    wanted = {"loss": {"loss", "reducible"}, "margin": {"margin"}, "hidden": {"hidden", "hidden_likeness"}}
    return tuple(measure for measure, readers in wanted.items() if readers & set(names))


def forward_measures(decoder: Decoder, wanted: tuple[str, ...]) -> Callable[[Params, Batch], jax.Array]:
    """(params, micro-batch) -> float32[examples, columns] by one pass of the layers.

    The columns are, as far as they are wanted, the loss (nats per token), the margin and the mean of the last hidden
    states over all tokens.
    """

    def measure(params: Params, batch: Batch) -> jax.Array:
        states = decoder.hidden(params, batch["tokens"], batch["positions"], batch["segments"])
        shared = decoder._replace(hidden=lambda *given: states)  # the layers are passed once for all measures
        columns = []
        if "loss" in wanted:
            columns.append(sft_losses(shared)(params, batch)[:, None])
        if "margin" in wanted:
            columns.append(token_el2n(shared)(params, batch)[:, None])
        if "hidden" in wanted:
            real = (batch["segments"] > 0)[: batch["index"].shape[0], :, None]
            sums = jnp.where(real, states[: batch["index"].shape[0]].astype(jnp.float32), 0).sum(1)
            columns.append(sums / jnp.maximum(real.sum(1), 1))
        return jnp.concatenate([column.astype(jnp.float32) for column in columns], axis=1)

    return measure


def measure_corpus(
    decoder: Decoder,
    params: Params,
    corpus: Corpus,
    rows: Sequence[int] | np.ndarray,
    wanted: tuple[str, ...],
    *,
    mesh: Mesh,
    batch_tokens: int,
) -> Measured:
    """`forward_measures` of some rows of a corpus, in batches of rows of about the same length; 0 of a dropped row.

    A row's numbers depend on it and on the lengths of the others alone: the batch of a row is never wider than needed.
    """
    rows = np.asarray(rows)
    lengths = np.maximum(corpus.lengths[rows] - 1, 0)
    padded = np.array([bucket_length(int(n)) for n in lengths])
    compiled = _compiled_measures(decoder, wanted)
    found: list[tuple[np.ndarray, jax.Array]] = []  # read at the end, so that the device need not wait
    for length in np.unique(padded[lengths > 0]):
        members = np.flatnonzero((padded == length) & (lengths > 0))
        size = -(-max(1, batch_tokens // int(length)) // mesh.size) * mesh.size
        shape = batches.BatchShape(1, size, size, int(length))
        for first in range(0, len(members), size):
            places = members[first : first + size]
            index = np.pad(rows[places], (0, size - len(places)), constant_values=corpus.num_examples)
            stream = batches.make_train_stream(corpus, partial(_only_step, index), 1, shape)
            found.append((places, compiled(params, place_stream(mesh, stream).batch(0))))
    sizes = [decoder.config.width if measure == "hidden" else 1 for measure in wanted]
    values = np.zeros((len(rows), sum(sizes)))
    for places, batch_values in found:
        values[places] = fetch_to_host(batch_values)[: len(places)]
    return dict(zip(wanted, np.split(values, np.cumsum(sizes)[:-1], axis=1), strict=True))


def _only_step(index: np.ndarray, step: int) -> np.ndarray:
    return index


@lru_cache(maxsize=8)
def _compiled_measures(decoder: Decoder, wanted: tuple[str, ...]) -> Callable[[Params, Batch], jax.Array]:
    measure = forward_measures(decoder, wanted)
    return jax.jit(lambda params, batch: measure(params, jax.tree.map(lambda leaf: leaf[0], batch)))


def bucket_length(length: int) -> int:
    """The length that a sequence is padded to: a multiple of 8, from 64 on of an eighth of a power of 2."""
    step = max(8, 1 << max(0, int(length - 1).bit_length() - 3))
    return -(-length // step) * step


# ---- from what was measured to a table


class Recipe(NamedTuple):
    """How features are made of examples: what of it was fitted on the training examples, and what was told."""

    features: tuple[str, ...]
    """Names of FEATURES, in their order there."""
    columns: tuple[str, ...]
    """Names of the columns of the table."""
    transform: str
    low: Float[np.ndarray, "columns"]
    """Least value of the training examples."""
    high: Float[np.ndarray, "columns"]
    knots: Float[np.ndarray, "columns knots"]
    """Quantiles of the training examples, from 0 to 1."""
    mean: Float[np.ndarray, "columns"]
    """Of the transformed values of the training examples."""
    scale: Float[np.ndarray, "columns"]
    """Their standard deviation; 1 of a constant column."""
    indicators: Bool[np.ndarray, "columns"]
    """Columns of 0 and 1 alone, which are not transformed."""
    kinds: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    user_columns: tuple[str, ...] = ()
    words: WordIndex | None = None
    validation_vectors: Any = None
    """TF-IDF vectors of validation, a CSR array [validation, words]."""
    hidden_mean: Float[np.ndarray, "width"] | None = None
    directions: Float[np.ndarray, "width directions"] | None = None
    validation_hidden: Float[np.ndarray, "width"] | None = None
    """The mean of validation's hidden states."""
    embedding_mean: Float[np.ndarray, "vector"] | None = None
    embedding_directions: Float[np.ndarray, "vector directions"] | None = None
    validation_embedding: Float[np.ndarray, "validation vector"] | None = None
    """The vectors of validation."""


class FeatureTable(NamedTuple):
    """The features of examples, as a rater reads them."""

    raw: Table
    """In their own units."""
    scaled: Table
    """Transformed, and standardised by the training examples."""


def fit_recipe(
    settings: RaterSection,
    examples: Sequence[Example],
    validation: Sequence[Example],
    corpus: Corpus | None,
    measured: Measured,
    trainable: np.ndarray,
) -> tuple[Recipe, FeatureTable]:
    """The recipe that the training examples give, and their features; those of a dropped example are 0 once scaled.

    Raises ValueError for features that are not finite or have no variance at all.
    """
    names = tuple(name for name in FEATURES if name in settings.features)
    empty = np.zeros(0)
    recipe = Recipe(names, (), settings.transform, empty, empty, np.zeros((0, 2)), empty, empty, empty > 0)
    recipe = recipe._replace(
        kinds=tuple(sorted({example_kind(example) for example in examples})) if "kind" in names else (),
        sources=tuple(sorted({example.source for example in examples})) if "source" in names else (),
        user_columns=tuple(settings.columns),
    )
    if "likeness" in names:
        words = index_words(validation)
        recipe = recipe._replace(words=words, validation_vectors=words.vectors(validation))
    if "hidden" in measured:
        hidden = measured["hidden"][trainable]
        recipe = recipe._replace(hidden_mean=hidden.mean(0))
        if "hidden" in names:
            recipe = recipe._replace(directions=_principal_directions(hidden, settings.directions))
        if "hidden_likeness" in names:
            recipe = recipe._replace(validation_hidden=measured["validation_hidden"].mean(0))
    if "embedding" in measured:
        vectors = measured["embedding"][trainable]
        recipe = recipe._replace(embedding_mean=vectors.mean(0))
        if "embedding" in names:
            recipe = recipe._replace(embedding_directions=_principal_directions(vectors, settings.directions))
        if "embedding_likeness" in names:
            recipe = recipe._replace(validation_embedding=measured["validation_embedding"])
    columns, raw = raw_table(recipe, settings.file, examples, corpus, measured)
    check_finite_features(columns, raw, examples, trainable)
    kept = raw[trainable]
    quantiles = np.linspace(0, 1, RANK_KNOTS)
    recipe = recipe._replace(
        columns=columns,
        low=kept.min(0),
        high=kept.max(0),
        knots=np.quantile(kept, quantiles, axis=0).T.copy(),
        indicators=np.asarray(np.isin(kept, (0, 1)).all(0)),
    )
    moved = _transform(recipe, kept)
    varies = _varies(moved)
    if not varies.any():
        raise ValueError(
            f"rater.features: {', '.join(columns)} tells no training example from another: all {len(kept):,} have "
            "the same. Name other features."
        )
    recipe = recipe._replace(mean=moved.mean(0), scale=np.where(varies, moved.std(0), 1))
    scaled = np.zeros_like(raw)
    scaled[trainable] = scale_features(recipe, kept)
    return recipe, FeatureTable(raw, scaled)


def raw_table(
    recipe: Recipe, file: str, examples: Sequence[Example], corpus: Corpus | None, measured: Measured
) -> tuple[tuple[str, ...], Table]:
    """(the names of the columns, the features of some examples in their own units)."""
    lengths, shares = (
        token_features(corpus, len(examples))
        if corpus is not None and {"length", "tokens"} & set(recipe.features)
        else (np.zeros((0, 2)), np.zeros((0, 1 + NUM_HASH_BUCKETS)))
    )

    def one_hot(values: Sequence[str], known: Sequence[str]) -> Table:
        return np.array([[value == name for name in known] for value in values], float).reshape(-1, len(known))

    def likeness() -> Table:
        assert recipe.words is not None
        cosines = recipe.words.vectors(examples) @ recipe.validation_vectors.T
        dense = cosines.toarray() if sparse.issparse(cosines) else cosines
        return np.stack([dense.mean(1), dense.max(1)], 1)

    def project(name: str, mean: np.ndarray | None, directions: Table | None) -> tuple[Sequence[str], Table]:
        assert mean is not None and directions is not None
        table = (measured[name] - mean) @ directions
        return [f"{name} {n + 1}" for n in range(table.shape[1])], table

    def hidden_likeness() -> Table:
        assert recipe.validation_hidden is not None
        states, other = measured["hidden"] - recipe.hidden_mean, recipe.validation_hidden - recipe.hidden_mean
        norms = np.linalg.norm(states, axis=1) * np.linalg.norm(other)
        return ((states @ other) / np.maximum(norms, 1e-30))[:, None]

    def embedding_likeness() -> Table:
        assert recipe.validation_embedding is not None
        vectors, others = (
            centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-30)
            for centred in (
                table - recipe.embedding_mean for table in (measured["embedding"], recipe.validation_embedding)
            )
        )
        cosines = (vectors[block] @ others.T for block in iterate_blocks(len(vectors), len(others)))
        return np.concatenate([np.stack([part.mean(1), part.max(1)], 1) for part in cosines])

    makers: dict[str, Callable[[], tuple[Sequence[str], Table]]] = {
        "length": lambda: (("length of prompt", "length of response"), lengths),
        "kind": lambda: (
            [f"kind {kind}" for kind in recipe.kinds],
            one_hot([example_kind(example) for example in examples], recipe.kinds),
        ),
        "source": lambda: (
            [f"source {source}" for source in recipe.sources],
            one_hot([example.source for example in examples], recipe.sources),
        ),
        "tokens": lambda: (["type-token ratio", *(f"tokens {n}" for n in range(NUM_HASH_BUCKETS))], shares),
        "likeness": lambda: (("mean likeness", "nearest likeness"), likeness()),
        "hidden": lambda: project("hidden", recipe.hidden_mean, recipe.directions),
        "hidden_likeness": lambda: (("hidden_likeness",), hidden_likeness()),
        "embedding": lambda: project("embedding", recipe.embedding_mean, recipe.embedding_directions),
        "embedding_likeness": lambda: (("mean embedding likeness", "nearest embedding likeness"), embedding_likeness()),
        "reducible": lambda: (("reducible",), measured["loss"] - measured["validation_loss"]),
        "columns": lambda: (
            [f"column {name}" for name in recipe.user_columns],
            read_user_columns(file, recipe.user_columns, examples),
        ),
    }
    names: list[str] = []
    tables: list[Table] = []
    for feature in recipe.features:
        columns, table = makers[feature]() if feature in makers else ((feature,), measured[feature])
        names += columns
        tables.append(table)
    return tuple(names), np.concatenate(tables, axis=1)


def read_embedding_features(
    settings: RaterSection, examples: Sequence[Example], validation: Sequence[Example]
) -> Measured:
    """The vectors of the user's own, of the training examples and, where they are compared, of validation."""
    names = {"embedding", "embedding_likeness"} & set(settings.features)
    if not names:
        return {}
    embeddings = load_embeddings(settings.embedding_file)
    measured = {"embedding": embeddings.rows(examples)}
    return measured | ({"validation_embedding": embeddings.rows(validation)} if "embedding_likeness" in names else {})


def read_user_columns(file: str, columns: Sequence[str], examples: Sequence[Example]) -> Table:
    """Columns of a file of the user's own, joined by id; a ValueError names the first example without a number."""
    tables = [_cached_column(file, column) for column in columns]
    values = np.array([[table.values.get(example.id, np.nan) for table in tables] for example in examples])
    missing = np.argwhere(~np.isfinite(values))
    if len(missing):
        row, column = missing[0]
        example = examples[row]
        is_there, num_missing = example.id in tables[column].values, len(set(missing[:, 0]))
        raise ValueError(
            f"{file}: {columns[column]} {'is no finite number' if is_there else 'is missing'} for the example "
            f"{example.id} ({example.where}){f', one of {num_missing:,}' if num_missing > 1 else ''}. Give a file with "
            "a number for each."
        )
    return values


_cached_column = lru_cache(maxsize=16)(read_id_column)


def check_finite_features(
    columns: Sequence[str], raw: Table, examples: Sequence[Example], rows: Sequence[int] | np.ndarray
) -> None:
    """Raise a ValueError that names the first of some rows with a feature that is no finite number, or too large."""
    rows = np.asarray(rows)
    bad = np.argwhere(~(np.abs(raw[rows]) <= LARGEST_FEATURE))
    if len(bad):
        row, column = rows[bad[0][0]], bad[0][1]
        if np.isfinite(raw[row, column]):
            raise ValueError(
                f"the feature {columns[column]!r} of the example {examples[row].id} ({examples[row].where}) is "
                f"{raw[row, column]:.3g}; beyond {LARGEST_FEATURE:g} its variance overflows. Give it another unit."
            )
        raise ValueError(
            f"the feature {columns[column]!r} of the example {examples[row].id} ({examples[row].where}) is "
            f"{raw[row, column]}; a finite number is wanted. Remove the row, or leave the feature out of "
            "rater.features."
        )


def scale_features(recipe: Recipe, raw: Table) -> Table:
    """The features as the rater reads them: transformed, less the training examples' mean, over their deviation."""
    return (_transform(recipe, raw) - recipe.mean) / recipe.scale


def find_constant_columns(recipe: Recipe) -> Bool[np.ndarray, "columns"]:
    """Columns that are one value for all training examples once transformed, so that nothing was learned of them."""
    return ~_varies(_transform(recipe, recipe.knots.T))


def _varies(moved: Table) -> Bool[np.ndarray, "columns"]:
    return moved.std(0) > 1e-9 * np.maximum(1e-30, np.abs(moved).max(0))


def _transform(recipe: Recipe, raw: Table) -> Table:
    shares = np.linspace(0, 1, recipe.knots.shape[1])

    def clip(column: np.ndarray, knots: np.ndarray) -> np.ndarray:
        return np.clip(column, *np.interp((CLIPPED_SHARE, 1 - CLIPPED_SHARE), shares, knots))

    def rank(column: np.ndarray, knots: np.ndarray) -> np.ndarray:
        upper, lower = np.interp(column, knots, shares), 1 - np.interp(-column, -knots[::-1], shares)
        return (upper + lower) / 2  # of a tie, the middle of its ranks

    transform = {"none": lambda column, knots: column, "clip": clip, "rank": rank}[recipe.transform]
    columns = [
        column if is_indicator else transform(column, knots)
        for column, knots, is_indicator in zip(raw.T, recipe.knots, recipe.indicators, strict=True)
    ]
    return np.stack(columns, 1)


def _principal_directions(hidden: Table, count: int) -> Float[np.ndarray, "width directions"]:
    """The directions of most variance, each with its largest entry above 0."""
    centred = hidden - hidden.mean(0)
    _, directions = np.linalg.eigh(centred.T @ centred / len(centred))
    chosen = directions[:, ::-1][:, : min(count, directions.shape[1])]
    largest = np.take_along_axis(chosen, np.abs(chosen).argmax(0)[None], 0)
    return chosen * np.sign(largest)
