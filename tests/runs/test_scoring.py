"""Scores by name, and training with the weights that they give while the model moves."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest

from bilevel_jax.core.transition import begin, gradient
from bilevel_jax.core.transition import train as run_plain
from bilevel_jax.runs import bench, rows, scoring, session
from bilevel_jax.runs.config import CompareConfig, TrainConfig, load
from bilevel_jax.runs.reweighting import Reweighting
from bilevel_jax.runs.sections import ScoreName, Scores
from bilevel_jax.runs.task import prepare
from bilevel_jax.runs.train import train
from bilevel_jax.scores.weights import by_batch
from tests.runs import blobs

PAIRS = ("--data.train", "pairs.jsonl", "--data.validation", "pairs_report.jsonl", "--data.select")


def config(made, *flags):
    given = [str(made / flag) if flag.endswith(".jsonl") and "/" not in flag else flag for flag in flags]
    return load(TrainConfig, made / "train.yaml", given)


def run(made, out, *flags):
    return train(config(made, *flags, "--out", str(out)))


def task_of(made, folder, *flags, steps=4):
    told = config(made, *flags)
    return prepare(told, rows.load(told.data), folder, steps=steps, seeds=[told.data.seed])


def opened(folder):
    return session.session(folder, progress=False, save_seconds=600)


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """A classification task of three kinds of small images, and its folder."""
    folder = tmp_path_factory.mktemp("blobs")
    (folder / "c.yaml").write_text(blobs.CONFIG.format(path=blobs.write(folder / "blobs.npz")))
    return bench.tasks(load(CompareConfig, folder / "c.yaml"), folder)(0), folder


# ---- the table


def test_the_config_offers_the_scores_that_there_are():
    assert set(get_args(ScoreName)) == {"", *scoring.SCORES} and set(scoring.MEANINGS) == set(scoring.SCORES)


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("perplexty", {}, "no score 'perplexty'; did you mean 'perplexity'?"),
        ("ica", {"arrays": True}, "reads text; for arrays there are loss"),
        ("alignment", {"holdout": False}, "V_fit has none: give data.validation.*or choose one of loss, perplexity"),
    ],
)
def test_what_is_not_there_is_refused(name, options, said):
    with pytest.raises(ValueError, match=said):
        scoring.check(name, **options)
    assert scoring.check("perplexity", **options) is None


def test_scores_of_arrays_equal_plain_formulas(arrays):
    """Against the logits of a linear model and its gradient, written out; reducible against a training of its own."""
    task, folder = arrays
    params = jax.tree.map(lambda leaf: leaf + 0.1, task.fresh(3))
    x, y = task.corpus.x / 255, task.corpus.y
    kernel, bias = (np.asarray(params[0][key], float) for key in ("kernel", "bias"))
    logits = x @ kernel + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    far = p - np.eye(3)[y]
    n, losses = task.rows, -np.log(p[np.arange(len(y)), y])
    slope = np.einsum("nf,nc->fc", x[n:], far[n:]) / (len(y) - n), far[n:].mean(0)
    steps = 3
    run = run_plain(
        task.step, begin(task.optimizer, task.fresh(0)), jnp.ones(len(y)), task.fixed(task.fresh(0)),
        task.stream(0, task.fit_rows())._replace(steps=steps),
    )  # fmt: skip
    held = run.end.params[0]
    theirs = x @ np.asarray(held["kernel"], float) + np.asarray(held["bias"], float)
    irreducible = np.log(np.exp(theirs).sum(1)) - theirs[np.arange(len(y)), y]
    expected = {
        "loss": losses, "perplexity": -np.exp(losses), "margin": np.linalg.norm(far, axis=1),
        "alignment": np.einsum("nf,nc,fc->n", x, far, slope[0]) + far @ slope[1], "reducible": losses - irreducible,
    }  # fmt: skip
    with opened(folder) as work:
        for name, values in expected.items():
            out = scoring.score(name, task, params, Scores(holdout_steps=steps), work)
            assert np.allclose(out.values, values[:n], rtol=1e-4, atol=2e-5), name  # float32 products
            assert out.notes == () and out.passes > 0
        drawn = scoring.score("random", task, params, Scores(), work).values
    assert 0 <= drawn.min() and drawn.max() < 1 and abs(drawn.mean() - 0.5) < 0.12 and len(set(drawn)) == n


# ---- what a step gets


@pytest.mark.parametrize("micro", [1, 8])
@pytest.mark.parametrize("objective", [(), ("--objective.name", "simpo", *PAIRS)], ids=["sft", "simpo"])
def test_a_step_descends_the_sum_of_weighted_gradients(made, tmp_path, objective, micro):
    """Min-max over the global step, however it is cut: 8 micro-batches of one row alone would weigh nothing."""
    flags = (*objective, "--weights.score", "loss", "--train.batch", "8", "--train.micro", str(micro))
    told, task = config(made, *flags), task_of(made, tmp_path, *flags)
    params = task.fresh(0)
    fixed, stream = task.fixed(params), task.stream(told.data.seed)
    with opened(tmp_path) as work:
        moving = Reweighting(task, told, work)
        moving.renew(0, params)
    batch = stream.batch(3)
    index = np.asarray(batch["index"]).ravel()
    scores = moving.made[0].values[index]
    weights = (scores - scores.min()) / (scores.max() - scores.min())
    assert 0 < weights.mean() < 1
    _, grad = gradient(task.problem, params, moving.problem.take(moving.hyper(3), batch), fixed, batch)
    flat = jax.tree.map(lambda leaf: leaf, task_of(made, tmp_path, *flags[:-1], "1").stream(told.data.seed).batch(3))
    one = {name: leaf[0] for name, leaf in flat.items()}
    assert np.array_equal(np.asarray(one["index"]), index)
    each = jax.jacrev(lambda p: task.objective.losses(p, fixed, one))(params)
    wanted = jax.tree.map(lambda leaf: jnp.tensordot(jnp.asarray(weights, leaf.dtype), leaf, 1) / 8, each)
    for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(wanted), strict=True):
        assert np.allclose(a, b, rtol=1e-4, atol=1e-6)  # float32


def test_scales_and_what_rows_got(made, tmp_path, monkeypatch):
    """Over all rows a row has one weight; over a step it depends on the others; a refresh takes over at its step."""
    values = {0: np.arange(36.0), 2: -np.arange(36.0)}
    values[2][5] = np.nan
    at = iter(values.values())
    monkeypatch.setitem(scoring.SCORES, "random", lambda *given: scoring.Made(next(at), 1.0))
    flags = ("--weights.score", "random", "--weights.refresh", "2", "--train.batch", "12")
    task = task_of(made, tmp_path, *flags)
    with opened(tmp_path) as work:
        one = Reweighting(task, config(made, *flags, "--weights.scale", "rows"), work)
        one.renew(0, task.fresh(0))
        one.renew(2, task.fresh(0))
        other = Reweighting(task, config(made, *flags, "--weights.mean-one"), work)  # from scores.parquet
        other.renew(3, task.fresh(0))
    assert one.starts == (0, 2) and list(other.made) == [0, 2]
    order = task.order(0)
    for step, scores in ((1, values[0]), (2, np.where(np.isnan(values[2]), -35.0, values[2]))):
        got = np.asarray(one.hyper(step)).ravel()
        assert np.allclose(got, ((scores - scores.min()) / 35)[order(step)])
        got = np.asarray(other.hyper(step)).ravel()
        assert np.allclose(got, by_batch(scores, order(step)) / by_batch(scores, order(step)).mean(), atol=1e-6)
    got = one.received()
    assert got.drawn == 36 and got.equal == 0
    assert np.allclose(got.weights[order(1)], np.arange(36)[order(1)] / 35, atol=1)
    assert one.records()[1]["with_first"] < -0.8


def test_equal_scores_are_plain_training_bit_for_bit(made, tmp_path, monkeypatch):
    monkeypatch.setitem(scoring.SCORES, "random", lambda task, *rest: scoring.Made(np.full(task.rows, 7.0), 0.0))
    result = run(made, tmp_path / "run", "--weights.score", "random")
    run(made, tmp_path / "plain")
    one, other = ((tmp_path / name / "model/model.safetensors").read_bytes() for name in ("run", "plain"))
    assert one == other
    assert result["scoring"]["equal"] == result["steps"] and result["weights"]["mean"] == 1
    assert "all rows had one score, which tells none from another: weight 1" in (tmp_path / "run" / "report.html").read_text()


# ---- whole runs


@pytest.mark.parametrize(
    "flags, at",
    [
        (("alignment", "--weights.refresh", "3"), 6),
        (("perplexity", "--weights.refresh", "2", "--data.packing", "--model.lora-rank", "2"), 5),
        (("reducible", "--objective.name", "dpo", *PAIRS), 2),
    ],
    ids=["sft", "lora, packed", "dpo"],
)
def test_stopped_anywhere_and_resumed_changes_no_bit(made, tmp_path, stop_at, flags, at):
    flags = ("--weights.score", *flags)
    run(made, tmp_path / "whole", *flags)
    stop_at(at)
    with pytest.raises(session.Interrupted, match="everything is saved"):
        run(made, tmp_path / "run", *flags)
    result = run(made, tmp_path / "run", *flags, "--resume")
    assert 0 < result["resumed"] < result["steps"]
    for name in ("model/model.safetensors", "weights.parquet"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    one, other = (pq.read_table(tmp_path / name / scoring.NAME) for name in ("run", "whole"))
    assert one.equals(other)
