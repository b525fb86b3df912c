"""Raters: their features in a run, and the folder in which one is kept."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from safetensors.numpy import load, save
from scipy import sparse
from scipy.special import expit

from bilevel_jax.core import weightings
from bilevel_jax.core.types import Params, Weighting
from bilevel_jax.core.weightings import RaterVariable
from bilevel_jax.lm import models
from bilevel_jax.lm.data.examples import Example
from bilevel_jax.lm.losses.sft import assemble_params
from bilevel_jax.runs.config.schema import DataSection, ModelSection, OuterSection, RaterSection, ScoresSection
from bilevel_jax.runs.infra import distributed, identity, run_dir, seals
from bilevel_jax.runs.infra.placement import padded_table_size
from bilevel_jax.runs.infra.session import Session
from bilevel_jax.runs.scoring import features, scores
from bilevel_jax.runs.scoring.features import FeatureTable, Measured, Recipe
from bilevel_jax.runs.stats import jackknife_half_width, mean_interval
from bilevel_jax.runs.tasks.arrays import ArrayTask
from bilevel_jax.runs.tasks.evaluation import is_validation_trainable, judge_places
from bilevel_jax.runs.tasks.protocol import Task
from bilevel_jax.runs.tasks.reference import fingerprint_model_files
from bilevel_jax.runs.tasks.text import TextTask
from bilevel_jax.scores.embedding import WordIndex

RATER_FOLDER, DOCUMENT_FILE, ARRAYS_FILE = "rater", "rater.json", "rater.safetensors"
FORMAT = 1
"""Of the folder; one of a later version is refused."""
SIDE_MODELS = ("holdout", "uniform")
"""The models that are trained for features, and kept in the folder."""
READING_KEYS = ("max_length", "truncation", "template", "train_on")
"""Keys of section data that decide which tokens an example is read as."""
LEAST_STEPS = 4
"""Outer steps from which on intervals over them are given: Student's t of two has an interval of 13 deviations."""
CHUNK_EXAMPLES = 2048
"""Examples whose features are made at the same time, in training and in scoring."""


class RaterFeatures(NamedTuple):
    """The features of the training examples of a run, and how they were made."""

    recipe: Recipe
    table: FeatureTable
    work: float
    """What making them took, in training steps."""


class Rater(NamedTuple):
    """A learned rater, as its folder holds it."""

    recipe: Recipe
    coefficients: Float[np.ndarray, "columns"]
    """Of the scaled features; with link sigmoid the intercept is the last."""
    link: Literal["softmax", "sigmoid"]
    normalizer: float
    """softmax: the log of the mean of exp(logit) over the training examples; their weights are exp(logit - it)."""
    document: dict[str, Any]
    """What the json file holds beside."""

    def logits(self, scaled: Float[np.ndarray, "examples columns"]) -> Float[np.ndarray, "examples"]:
        """beta . features."""
        if self.link == "softmax":
            return scaled @ self.coefficients
        return scaled @ self.coefficients[:-1] + self.coefficients[-1]

    def weights(self, logits: Float[np.ndarray, "examples"]) -> Float[np.ndarray, "examples"]:
        """The factors of the examples' losses, as if each had stood among the training examples."""
        if self.link == "softmax":
            return np.exp(logits - self.normalizer)
        return 2 * expit(logits)


VALIDATION_FEATURES = {"validation_loss", "reducible", "likeness", "hidden_likeness", "embedding_likeness"}
"""Features that read validation examples."""

# ---- in a run


def make_rater_features(
    task: Task,
    settings: RaterSection,
    session: Session,
    *,
    scores_settings: ScoresSection,
    train_seed: int,
) -> RaterFeatures:
    """The features of the training examples; made once in a run, and read from its checkpoints where it is resumed."""
    if (reading := VALIDATION_FEATURES & {*settings.features}) and not is_validation_trainable(task):
        raise ValueError(
            f"rater.features {', '.join(sorted(reading))} read validation examples as they read training examples, and "
            "here they judge by another loss (section target): name others, as length, loss, hidden and uniform_loss."
        )
    path = session.folder / "checkpoints" / "rater" / "features.safetensors"
    if not distributed.is_there(path):
        made = _make_features(task, settings, session, scores_settings, train_seed)
        distributed.run_on_first_process(lambda: path.parent.mkdir(parents=True, exist_ok=True))
        arrays = _recipe_arrays(made.recipe) | {"raw": made.table.raw, "scaled": made.table.scaled}
        run_dir.write_atomic(path, save(arrays, {"recipe": seals.format_json(_recipe_texts(made.recipe))}))
    arrays, texts = _read_arrays(run_dir.read_bytes(path))
    work = features_work(task, settings, scores_settings)
    return RaterFeatures(_to_recipe(texts, arrays), FeatureTable(arrays["raw"], arrays["scaled"]), work)


def features_work(task: Task, settings: RaterSection, scores_settings: ScoresSection) -> float:
    """What making the features takes, in training steps: side models, and a forward pass over all for each model."""
    needed = features.models_of(settings.features)
    training = {"start": 0, "holdout": scores.holdout_steps(task, scores_settings), "uniform": task.num_steps}
    return sum(training[name] + scores.steps_per_epoch(task) / 3 for name in needed)


def rater_work(task: Task, outer: OuterSection, settings: RaterSection, scores_settings: ScoresSection) -> float:
    """`features_work` of a run with a rater, 0 of any other."""
    return features_work(task, settings, scores_settings) if outer.weighting == "rater" else 0.0


def make_rater_weighting(made: RaterFeatures, settings: RaterSection) -> Weighting:
    """The weighting of a run whose rater reads these features; with link sigmoid it has an intercept, the last."""
    scaled = made.table.scaled
    if settings.link == "sigmoid":
        scaled = np.concatenate([scaled, np.ones((len(scaled), 1))], axis=1)
    return weightings.rater(scaled, settings.link, settings.residual_scale, padded_table_size(len(scaled)))


def _make_features(
    task: Task, settings: RaterSection, session: Session, scores_settings: ScoresSection, train_seed: int
) -> RaterFeatures:
    if isinstance(task, ArrayTask):
        features.check_array_features(settings.features)
    needed = features.models_of(settings.features)
    params_of = {"start": task.init_params(train_seed)}
    if "holdout" in needed:
        params_of["holdout"] = scores.train_holdout_model(task, scores_settings, session)
    if "uniform" in needed:
        session.set_phase("features: training a model on all examples")
        params_of["uniform"] = scores.train_side_model(
            task, "uniform", task.trainable_indices(), seed=train_seed, steps=task.num_steps, session=session
        )
    session.set_phase("features of the examples")
    if isinstance(task, ArrayTask):
        measured = _measure_arrays(task, settings, params_of)
        corpus, validation = None, []
    else:
        assert isinstance(task, TextTask)
        measured = _measure_text(task, settings, params_of)
        corpus, validation = task.corpus, _judging_examples(task)
        _keep_side_models(task, session, {name: params_of[name] for name in SIDE_MODELS if name in params_of})
    recipe, table = features.fit_recipe(settings, task.examples, validation, corpus, measured, task.trainable_indices())
    return RaterFeatures(recipe, table, features_work(task, settings, scores_settings))


def _measure_arrays(task: ArrayTask, settings: RaterSection, params_of: Mapping[str, Params]) -> Measured:
    measured: Measured = {}
    for model, name in (("start", "loss"), ("holdout", "validation_loss"), ("uniform", "uniform_loss")):
        if model in params_of and ({name, "reducible"} & set(settings.features)):
            measured[name] = scores.example_losses(task, params_of[model])[:, None]
    if "margin" in settings.features:
        measured["margin"] = scores.example_margins(task, params_of["start"])[:, None]
    if "hidden" in settings.features:
        measured["hidden"] = np.asarray(task.corpus.x[: task.num_examples], float)
    return measured


def _measure_text(task: TextTask, settings: RaterSection, params_of: Mapping[str, Params]) -> Measured:
    """What the models say of the training examples, and the hidden states of validation."""

    def measure(model: str, rows: np.ndarray) -> Measured:
        wanted = features.measures_of(model, settings.features)
        params = (
            assemble_params(params_of[model], task.base_params)
            if model != "start" or task.base_params is None
            else task.base_params
        )
        parts = [
            features.measure_corpus(
                task.decoder,
                params,
                task.corpus,
                rows[first : first + CHUNK_EXAMPLES],
                wanted,
                mesh=task.mesh,
                batch_tokens=settings.batch_tokens,
            )
            for first in range(0, len(rows), CHUNK_EXAMPLES)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in wanted}

    measured: Measured = {}
    rows = np.arange(task.num_examples)
    for model in features.models_of(settings.features):
        found = measure(model, rows)
        measured |= found if model == "start" else {LOSS_NAMES[model]: found["loss"]}
    if "hidden_likeness" in settings.features:
        measured["validation_hidden"] = measure("start", task.validation_indices())["hidden"]
    return measured | features.read_embedding_features(settings, task.examples, _judging_examples(task))


def _judging_examples(task: TextTask) -> list[Example]:
    """The validation examples that judge, where they have text."""
    judging = (task.held_out_examples["validation"][place] for place in judge_places(task))
    return [example for example in judging if example.turns]


LOSS_NAMES = {"holdout": "validation_loss", "uniform": "uniform_loss"}
"""What the loss under a side model is called as a feature."""


# ---- the folder


def _keep_side_models(task: TextTask, session: Session, params_of: Mapping[str, Params]) -> None:
    """Write the models that were trained for features into the rater's folder, whole and noted, once."""

    def write() -> None:
        for name, params in params_of.items():
            folder = session.folder / RATER_FOLDER / f"{name}_model"
            if seals.is_noted_folder(folder):
                continue
            shutil.rmtree(folder, ignore_errors=True)
            folder.parent.mkdir(exist_ok=True)
            if task.base_params is None:
                models.save_model(folder, task.architecture, params, source_files=task.source_files)
            else:
                models.save_peft(folder, task.architecture, params)
            seals.note_folder(folder)

    params_of = {name: jax.tree.map(distributed.fetch_to_host, params) for name, params in params_of.items()}
    distributed.run_on_first_process(write)


def write_rater(
    run_folder: Path,
    made: RaterFeatures,
    variable: RaterVariable,
    settings: RaterSection,
    *,
    data: DataSection,
    model: ModelSection,
    task: TextTask,
    records: Sequence[Mapping[str, Any]],
    best_step: int,
    without_folds: Float[np.ndarray, "folds columns"] | None = None,
) -> dict[str, Any]:
    """Write rater/: the arrays, and then the document, which says what they mean and seals them.

    Returns the coefficients and what their intervals are over, as the document holds them.
    """
    folder = run_folder / RATER_FOLDER
    coefficients = np.asarray(variable.coefficients, float)
    names = [*made.recipe.columns, *(["intercept"] if settings.link == "sigmoid" else [])]
    intervals = coefficient_intervals(
        names, [record["coefficients"] for record in records], best_step, without_folds=without_folds
    )
    rater = Rater(made.recipe, coefficients, settings.link, 0.0, {})
    logits = rater.logits(made.table.scaled[task.trainable_indices()])
    normalizer = float(np.log(np.mean(np.exp(logits - logits.max()))) + logits.max())
    reads_model = bool(features.models_of(settings.features))
    side_models = {
        name: "adapter" if task.base_params is not None else "model"
        for name in SIDE_MODELS
        if name in features.models_of(settings.features)
    }

    def write() -> None:
        folder.mkdir(exist_ok=True)
        arrays = _recipe_arrays(made.recipe) | {"coefficients": coefficients}
        run_dir.write_atomic(folder / ARRAYS_FILE, save(arrays))
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        document = {
            "format": FORMAT,
            "link": settings.link,
            "normalizer": normalizer,
            "recipe": _recipe_texts(made.recipe),
            "reading": {key: value for key, value in asdict(data).items() if key in READING_KEYS},
            "model": {
                "fingerprint": fingerprint_start_model(model.name_or_path, model) if reads_model else "",
                "param_dtype": model.param_dtype,
                "base_dtype": model.base_dtype if task.base_params is not None else model.param_dtype,
            },
            "side_models": side_models,
            "training": {
                "examples": len(logits),
                "ids": identity.hash_text(task.examples[row].id for row in task.trainable_indices()),
                "logits": {"mean": float(logits.mean()), "deviation": float(logits.std())},
            },
            **intervals,
            "residual_scale": settings.residual_scale,
            "packages": identity.list_packages(),
            "files": {name: seals.describe_file(folder / name) for name in names if name != DOCUMENT_FILE},
        }
        run_dir.write_atomic(folder / DOCUMENT_FILE, seals.seal_document(document))

    distributed.run_on_first_process(write)
    return intervals


def coefficient_intervals(
    names: Sequence[str],
    steps: Sequence[Sequence[float]],
    best_step: int,
    without_folds: Float[np.ndarray, "folds columns"] | None = None,
) -> dict[str, Any]:
    """Each coefficient at the best outer step, with its 95 % interval, and in `intervals` what these are over.

    With `without_folds`, the coefficients of as many steps made without each of K folds of the validation set, they are
    over validation sets: the delete-a-group jackknife (`stats.jackknife_half_width`). It holds fixed what the folds do
    not change: the training examples, the data orders, and the features, also those that a model of all of validation
    makes; so a feature of pure noise that chance has made useful for these training examples may be off 0. A step has
    one length, so a coefficient that all agree on is near the sum of the rates, which it cannot pass: over validation
    sets it is skewed, and the interval holds its median in .95 of the cases, its mean in .6 to .9, where that of other
    coefficients holds both in .95 (tests/runs/engine/test_rater_intervals.py).

    Without, they are over the steps: each is made on another data order, and a coefficient is the sum of n changes, so
    that the interval is n times that of their mean. It is too wide where steps shrink, and knows nothing of other
    validation examples. Of less than LEAST_STEPS steps it says nothing, and is None.
    """
    table = np.asarray(steps, float)[: best_step + 1]
    count, over = len(table) - 1, "none"
    halves: list[float | None] = [None] * len(names)
    if without_folds is not None and len(without_folds) > 1:
        halves, over, count = jackknife_half_width(without_folds).tolist(), "folds", len(without_folds)
    elif count >= LEAST_STEPS:
        halves, over = [count * mean_interval(list(changes))[1] for changes in np.diff(table, axis=0).T], "steps"
    coefficients = [
        {"name": name, "value": float(value), "half_width": half}
        for name, value, half in zip(names, table[-1], halves, strict=True)
    ]
    return {"coefficients": coefficients, "intervals": {"over": over, "count": count}}


def read_rater(folder: str | Path) -> Rater:
    """The rater in a folder, whole and of this version; a ValueError or FileNotFoundError says what else there is."""
    folder = Path(folder)
    if not (folder / DOCUMENT_FILE).is_file():
        hint = f" Did you mean {folder / RATER_FOLDER}?" if (folder / RATER_FOLDER / DOCUMENT_FILE).is_file() else ""
        raise FileNotFoundError(
            f"{folder}: no {DOCUMENT_FILE}, so no rater. Give the folder rater/ of a finished run of `select` with "
            f"outer.weighting = rater.{hint}"
        )
    document, difference = seals.find_document_difference(folder / DOCUMENT_FILE)
    if document is None or difference:
        raise seals.DamagedFileError(
            f"{folder}: {difference}.", "Put back a copy of the folder, or learn the rater again."
        )
    if document.get("format") != FORMAT:
        raise ValueError(
            f"{folder}: a rater of format {document.get('format')}, and this version reads {FORMAT}. Use the version "
            f"that wrote it ({document.get('packages', {}).get('bilevel-jax')}), or learn it again."
        )
    arrays, _ = _read_arrays((folder / ARRAYS_FILE).read_bytes())
    recipe = _to_recipe(document["recipe"], arrays)
    return Rater(recipe, arrays["coefficients"], document["link"], document["normalizer"], document)


def fingerprint_start_model(folder: str, model: Any) -> str:
    """Of the model before training: its files and the types that they are read in."""
    return fingerprint_model_files(folder, f"{model.param_dtype} {model.base_dtype}")


_RECIPE_ARRAYS = ("low", "high", "knots", "mean", "scale", "indicators", "hidden_mean", "directions",
                  "validation_hidden", "embedding_mean", "embedding_directions",
                  "validation_embedding")  # fmt: skip


def _recipe_arrays(recipe: Recipe) -> dict[str, np.ndarray]:
    arrays = {name: np.ascontiguousarray(value) for name in _RECIPE_ARRAYS
              if (value := getattr(recipe, name)) is not None}  # fmt: skip
    if recipe.words is not None:
        vectors = recipe.validation_vectors
        arrays |= {"word_weights": recipe.words.weights, "likeness_data": vectors.data,
                   "likeness_indices": vectors.indices.astype(np.int64),
                   "likeness_ends": vectors.indptr.astype(np.int64)}  # fmt: skip
    return arrays


def _recipe_texts(recipe: Recipe) -> dict[str, Any]:
    texts: dict[str, Any] = {
        name: list(getattr(recipe, name)) for name in ("features", "columns", "kinds", "sources", "user_columns")
    }
    words = None if recipe.words is None else {"words": recipe.words.words, "unseen": recipe.words.unseen_weight}
    return texts | {"transform": recipe.transform, "words": words}


def _to_recipe(texts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Recipe:
    index, vectors = None, None
    if texts["words"] is not None:
        index = WordIndex(texts["words"]["words"], arrays["word_weights"], texts["words"]["unseen"])
        ends = arrays["likeness_ends"]
        vectors = sparse.csr_array(
            (arrays["likeness_data"], arrays["likeness_indices"], ends), shape=(len(ends) - 1, len(index.words))
        )
    fields: dict[str, Any] = {name: arrays.get(name) for name in _RECIPE_ARRAYS}
    fields |= {key: tuple(texts[key]) for key in ("features", "columns", "kinds", "sources", "user_columns")}
    return Recipe(**fields, transform=texts["transform"], words=index, validation_vectors=vectors)


def _read_arrays(content: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(the arrays of a safetensors file, the value of "recipe" in its metadata)."""
    header = seals.parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = header.get("__metadata__", {})
    return load(content), seals.parse_json(metadata["recipe"]) if "recipe" in metadata else {}
