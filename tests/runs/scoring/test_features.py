"""Features of a rater: what the models say, whatever the batches, and how they are scaled."""

import json
from dataclasses import replace
from typing import get_args

import jax
import numpy as np
import pytest
import scipy.stats

from bilevel_jax.lm.losses.sft import sft_losses
from bilevel_jax.runs.config.schema import FeatureName, RaterSection
from bilevel_jax.runs.scoring import features
from bilevel_jax.scores.embedding import tfidf
from bilevel_jax.scores.requests import make_tokenized_examples
from tests.runs.tiny_rater import make_features, tiny_task

ROWS = 24


@pytest.fixture(scope="module")
def task(made):
    return tiny_task(made)


def test_the_names_of_the_config_are_the_features():
    assert set(get_args(FeatureName)) == set(features.FEATURES)


@pytest.mark.parametrize("length", [1, 8, 9, 60, 64, 65, 500, 4097])
def test_a_bucket_wastes_little(length):
    bucket = features.bucket_length(length)
    assert length <= bucket <= max(8, 1.25 * length + 8) and features.bucket_length(bucket) == bucket


def test_what_a_model_says_does_not_depend_on_the_batches(task):
    wanted = ("loss", "margin", "hidden")

    def measure(rows, batch_tokens):
        found = features.measure_corpus(
            task.decoder, task.params, task.corpus, rows, wanted, mesh=task.mesh, batch_tokens=batch_tokens
        )
        return np.concatenate([found[name] for name in wanted], 1)

    whole = measure(np.arange(ROWS), 1024)
    np.testing.assert_allclose(
        np.concatenate([measure(np.arange(7), 40), measure(np.arange(7, ROWS), 24)]), whole, atol=1e-5
    )
    np.testing.assert_array_equal(measure(np.arange(ROWS), 1024), whole)
    for row in (0, 5):
        ids, target, _ = task.corpus.get_sequence(row)
        batch = {
            "tokens": ids[None, :-1], "targets": ids[None, 1:], "positions": np.arange(len(ids) - 1)[None],
            "segments": np.ones((1, len(ids) - 1), int), "slot": np.where(target[1:], 0, 1)[None],
            "index": np.zeros(1, int), "supervised": np.array([float(target[1:].sum())]),
        }  # fmt: skip
        batch = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32 if leaf.dtype.kind == "f" else np.int32), batch)
        states = task.decoder.hidden(task.params, batch["tokens"], batch["positions"], batch["segments"])
        assert abs(float(sft_losses(task.decoder)(task.params, batch)[0]) - whole[row, 0]) < 1e-5
        np.testing.assert_allclose(states[0].mean(0), whole[row, 2:], atol=1e-5)


def test_features_are_standardised_by_the_training_examples(task):
    settings = RaterSection(
        features=("length", "kind", "source", "tokens", "likeness", "loss", "margin", "hidden"), directions=3,
        transform="none",
    )  # fmt: skip
    made = make_features(task, settings)
    varies = made.recipe.scale != 1
    np.testing.assert_allclose(made.table.scaled.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(made.table.scaled.std(0)[varies], 1, atol=1e-9)
    assert [name for name in made.recipe.columns if name.startswith("hidden")] == ["hidden 1", "hidden 2", "hidden 3"]
    directions = made.recipe.directions
    np.testing.assert_allclose(directions.T @ directions, np.eye(3), atol=1e-9)
    variances = made.table.raw[:, -3:].var(0)
    assert (np.diff(variances) <= 0).all()  # the first direction has the most
    rows = make_tokenized_examples(task.examples, task.corpus)
    validation = make_tokenized_examples(task.held_out_examples["validation"], task.corpus, task.num_examples)
    cosines = (lambda one, other: (one @ other.T).toarray())(*tfidf(rows, validation))
    place = made.recipe.columns.index("mean likeness")
    np.testing.assert_allclose(made.table.raw[:, place : place + 2].T, [cosines.mean(1), cosines.max(1)], atol=1e-12)


@pytest.mark.parametrize("transform", ["clip", "rank"])
def test_heavy_tails_are_bounded(transform):
    values = scipy.stats.t(1).rvs((4000, 1), random_state=0)  # Cauchy
    recipe = features.Recipe(
        ("loss",), ("loss",), transform, values.min(0), values.max(0),
        np.quantile(values, np.linspace(0, 1, features.RANK_KNOTS), axis=0).T, np.zeros(1), np.ones(1),
        np.zeros(1, bool),
    )  # fmt: skip
    new = np.array([[-1e12], [np.quantile(values, 0.25)], [np.median(values)], [1e12]])
    moved = features.scale_features(recipe, new)[:, 0]
    if transform == "rank":
        np.testing.assert_allclose(moved, [0, 0.25, 0.5, 1], atol=5e-3)  # interpolated between 129 quantiles
    else:
        low, high = np.quantile(values, [features.CLIPPED_SHARE, 1 - features.CLIPPED_SHARE])
        np.testing.assert_allclose(moved, [low, *new[1:3, 0], high], rtol=0.2)  # a tail between two quantiles


def test_ties_and_indicators_keep_their_order():
    recipe = features.Recipe(
        ("kind",), ("a", "b"), "rank", np.zeros(2), np.ones(2), np.repeat([[0.0, 1.0]], features.RANK_KNOTS // 2 + 1,
        axis=1)[:, : features.RANK_KNOTS].reshape(1, -1).repeat(2, 0), np.zeros(2), np.ones(2),
        np.array([True, False]),
    )  # fmt: skip
    moved = features.scale_features(recipe, np.array([[0.0, 0.0], [1.0, 1.0]]))
    assert moved[:, 0].tolist() == [0, 1] and moved[0, 1] < moved[1, 1]


def test_a_number_that_is_not_finite_is_refused_with_the_row(task):
    raw = np.zeros((3, 2))
    raw[1, 1] = np.nan
    example = task.examples[1]
    with pytest.raises(ValueError, match=rf"'b' of the example {example.id} \({example.where}\) is nan"):
        features.check_finite_features(("a", "b"), raw, task.examples, np.arange(3))
    features.check_finite_features(("a", "b"), raw, task.examples, np.array([0, 2]))


def test_a_number_whose_square_overflows_is_refused_with_the_row(task):
    raw = np.ones((3, 2))
    raw[2, 0] = -1e300
    words = f"feature 'a' of the example {task.examples[2].id} .* is -1e\\+300; beyond 1e\\+100 its variance overflows"
    with pytest.raises(ValueError, match=words):
        features.check_finite_features(("a", "b"), raw, task.examples, np.arange(3))


def test_columns_of_the_user_are_joined_by_id(task, tmp_path):
    rows = [{"id": example.id, "stars": place} for place, example in enumerate(task.examples)]
    file = tmp_path / "stars.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    settings = RaterSection(features=("columns",), columns=("stars",), file=str(file))
    made = make_features(task, settings)
    assert made.table.raw[:, 0].tolist() == list(range(task.num_examples))
    short = tmp_path / "short.jsonl"
    short.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    with pytest.raises(ValueError, match=f"stars is missing for the example {task.examples[0].id} "):
        make_features(task, replace(settings, file=str(short)))


def test_vectors_of_a_file_are_features_as_hidden_states_are(task, tmp_path):
    """The same vectors, by the model and from a file; the likeness by its formula."""
    rows = np.arange(len(task.examples) + len(task.held_out_examples["validation"]))
    found = features.measure_corpus(
        task.decoder, task.params, task.corpus, rows, ("hidden",), mesh=task.mesh, batch_tokens=256
    )["hidden"]
    examples = [*task.examples, *task.held_out_examples["validation"]]
    order = np.random.default_rng(0).permutation(len(examples))
    file = tmp_path / "e.jsonl"
    lines = [json.dumps({"id": examples[i].id, "embedding": found[i].tolist()}) + "\n" for i in order]
    file.write_text("".join(lines))
    hidden = make_features(task, RaterSection(features=("hidden",), directions=3)).table
    settings = RaterSection(
        features=("embedding", "embedding_likeness"), directions=3, embedding_file=str(file), transform="none"
    )
    made = make_features(task, settings)
    likeness = ("mean embedding likeness", "nearest embedding likeness")
    assert made.recipe.columns == ("embedding 1", "embedding 2", "embedding 3", *likeness)
    np.testing.assert_allclose(made.table.raw[:, :3], hidden.raw, atol=1e-5)  # hidden states are float32
    count = len(task.examples)
    centred = found - found[:count].mean(0)
    cosines = np.array([[x @ y / np.sqrt((x @ x) * (y @ y)) for y in centred[count:]] for x in centred[:count]])
    np.testing.assert_allclose(made.table.raw[:, 3:].T, [cosines.mean(1), cosines.max(1)], atol=1e-9)
    file.write_text("".join(line for line, i in zip(lines, order, strict=True) if i != count))  # one of validation
    with pytest.raises(ValueError, match=f"no embedding for the example {examples[count].id} "):
        make_features(task, settings)
    make_features(task, replace(settings, features=("embedding",)))


def test_features_that_say_nothing_are_an_error(task):
    with pytest.raises(ValueError, match="kind prompt tells no training example from another"):
        make_features(task, RaterSection(features=("kind",)))


def test_arrays_have_features_of_their_own():
    features.check_array_features(["loss", "hidden"])
    with pytest.raises(ValueError, match="'length' reads text; for arrays there are loss, margin, hidden"):
        features.check_array_features(["length"])
