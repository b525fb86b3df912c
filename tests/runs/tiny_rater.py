"""A rater over the tiny task's model, with coefficients that are given and not learned."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax.core.weightings import RaterVariable
from bilevel_jax.lm import models
from bilevel_jax.lm.data.examples import load_examples
from bilevel_jax.lm.data.tokens import load_tokenizer
from bilevel_jax.runs.config.schema import DataSection, ModelSection, RaterSection
from bilevel_jax.runs.engine import raters
from bilevel_jax.runs.infra.placement import make_mesh
from bilevel_jax.runs.scoring import features
from bilevel_jax.runs.tasks.text import tokenize_examples


def tiny_task(made):
    """What features read of a task: the training examples and those of validation, and the model's files."""
    examples = load_examples([str(made / "train.jsonl")])
    validation = load_examples([str(made / "validation.jsonl")])
    architecture, params = models.load_model(made / "model")
    tokenizer = load_tokenizer(made / "model")
    corpus, _ = tokenize_examples(DataSection(), examples + validation, tokenizer, architecture)
    count = len(examples)
    return SimpleNamespace(
        examples=examples,
        held_out_examples={"validation": validation},
        corpus=corpus,
        decoder=models.make_decoder(architecture),
        architecture=architecture,
        tokenizer=tokenizer,
        params=params,
        base_params=None,
        mesh=make_mesh(1),
        num_examples=count,
        trainable_indices=lambda: np.arange(count),
    )


def make_features(task, settings):
    """The features of the training examples under the start model alone."""
    wanted = features.measures_of("start", settings.features)
    measured = {}
    if wanted:
        rows = np.arange(task.num_examples)
        measured = features.measure_corpus(
            task.decoder, task.params, task.corpus, rows, wanted, mesh=task.mesh, batch_tokens=256
        )
    measured |= features.read_embedding_features(settings, task.examples, task.held_out_examples["validation"])
    recipe, table = features.fit_recipe(
        settings, task.examples, task.held_out_examples["validation"], task.corpus, measured, task.trainable_indices()
    )
    return raters.RaterFeatures(recipe, table, 0.0)


def write_rater(made, folder, settings=RaterSection(features=("length", "loss", "likeness"))):  # noqa: B008 (frozen)
    """rater/ in a folder, and the logits of the training examples."""
    task = tiny_task(made)
    built = make_features(task, settings)
    count = len(built.recipe.columns) + (settings.link == "sigmoid")
    coefficients = jax.random.normal(jax.random.key(0), (count,))
    raters.write_rater(
        folder,
        built,
        RaterVariable(jnp.asarray(coefficients), ()),
        settings,
        data=DataSection(),
        model=ModelSection(name_or_path=str(made / "model")),
        task=task,
        records=[{"coefficients": [0.0] * count}, {"coefficients": np.asarray(coefficients, float).tolist()}],
        best_step=1,
    )
    scaled = built.table.scaled
    if settings.link == "sigmoid":
        scaled = np.concatenate([scaled, np.ones((len(scaled), 1))], axis=1)
    return scaled @ np.asarray(coefficients, float)
