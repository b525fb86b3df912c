"""Scores by name, and training with the weights that they give while the model moves."""

import re
import signal
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bilevel_jax.cli import main
from bilevel_jax.commands.compare.run import make_task_builder
from bilevel_jax.commands.select.run import select
from bilevel_jax.commands.train.run import train
from bilevel_jax.core.training import init_train_state, inner_loss_and_grad
from bilevel_jax.core.training import train as run_plain
from bilevel_jax.lm.data.examples import load_examples as load_rows
from bilevel_jax.lm.losses.sft import assemble_params
from bilevel_jax.runs.config.load import CompareConfig, SelectConfig, TrainConfig, load_config
from bilevel_jax.runs.config.schema import ScoreName, ScoresSection, WeightsSection
from bilevel_jax.runs.infra import session
from bilevel_jax.runs.infra.journal import read_journal
from bilevel_jax.runs.scoring import likelihoods
from bilevel_jax.runs.scoring.from_file import load_weights as given_weights
from bilevel_jax.runs.scoring.likelihoods import TaskLikelihoods
from bilevel_jax.runs.scoring.online import Reweighting
from bilevel_jax.runs.scoring.scores import (
    SCORE_MEANINGS,
    SCORES,
    SCORES_FILE,
    ScoreResult,
    check_score_name,
    compute_score,
    load_or_compute_score,
)
from bilevel_jax.runs.tasks import splits
from bilevel_jax.runs.tasks.text import prepare_text_task
from bilevel_jax.scores import incontext
from bilevel_jax.scores.demonstrations import demonstration_selector
from bilevel_jax.scores.weights import batch_minmax_weights, minmax_weights
from tests.runs import blobs

PAIRS = ("--data.train", "pairs.jsonl", "--data.validation", "pairs_report.jsonl", "--data.dev")


def config(made, *flags):
    told = [str(made / flag) if flag.endswith(".jsonl") and "/" not in flag else flag for flag in flags]
    return load_config(TrainConfig, made / "train.yaml", told)


def run(made, out, *flags):
    return train(config(made, *flags, "--out", str(out)))


def task_of(made, folder, *flags, steps=4):
    told = config(made, *flags)
    return prepare_text_task(told, splits.load_splits(told.data), folder, num_steps=steps, seeds=[told.data.seed])


def reweighting(task, told, work):
    param_dtype = told.model.param_dtype
    return Reweighting(task, work, weights=told.weights, scores=told.scores, data=told.data, param_dtype=param_dtype)


def opened(folder):
    return session.open_session(folder, progress=False, save_seconds=600)


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """A classification task of three kinds of small images, and its folder."""
    folder = tmp_path_factory.mktemp("blobs")
    (folder / "c.yaml").write_text(blobs.CONFIG.format(path=blobs.write(folder / "blobs.npz")))
    return make_task_builder(load_config(CompareConfig, folder / "c.yaml"), folder)(0), folder


@pytest.mark.slow
@pytest.mark.parametrize("score", ("ica", "alignment", "perplexity"))
def test_eight_devices_equal_one(made, tmp_path, eight_devices, score):
    """Likelihoods, gradients and training with weights that a score gives, made twice; also with split parameters."""
    flags = ("--weights.score", score, "--weights.refresh", "2", "--scores.k", "1", "--model.param-dtype", "float64")
    found = {}
    with jax.enable_x64(True):
        for data, model in ((1, 1), (8, 1), (4, 2)):
            out = tmp_path / f"{data} x {model}"
            run(made, out, *flags, "--mesh.data", str(data), "--mesh.fsdp", str(model))
            found[data, model] = pq.read_table(out / "scores.parquet")
    one = found[1, 1]
    for other in found.values():
        for column in one.column_names[4:]:
            np.testing.assert_allclose(np.array(other[column]), np.array(one[column]), rtol=1e-9, atol=1e-9)


# ---- the table


def test_the_config_offers_the_scores_that_there_are():
    assert set(get_args(ScoreName)) == {"", *SCORES} and set(SCORE_MEANINGS) == set(SCORES)


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("perplexty", {}, "no score 'perplexty'; did you mean 'perplexity'?"),
        ("ica", {"arrays": True}, "reads text; for arrays there are loss"),
        (
            "alignment",
            {"holdout": False},
            "validation has none: give data.validation.*or choose one of loss, perplexity",
        ),
    ],
)
def test_what_is_not_there_is_refused(name, options, said):
    with pytest.raises(ValueError, match=said):
        check_score_name(name, **options)
    assert check_score_name("perplexity", **options) is None


def test_scores_of_arrays_equal_plain_formulas(arrays):
    """Against the logits of a linear model and its gradient, written out; reducible against a training of its own."""
    task, folder = arrays
    params = jax.tree.map(lambda leaf: leaf + 0.1, task.init_params(3))
    x, y = task.corpus.x / 255, task.corpus.y
    kernel, bias = (np.asarray(params[0][key], float) for key in ("kernel", "bias"))
    logits = x @ kernel + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    far = p - np.eye(3)[y]
    n, losses = task.num_examples, -np.log(p[np.arange(len(y)), y])
    slope = np.einsum("nf,nc->fc", x[n:], far[n:]) / (len(y) - n), far[n:].mean(0)
    steps = 3
    run = run_plain(
        task.train_step, init_train_state(task.optimizer, task.init_params(0)), jnp.ones(len(y)),
        task.frozen(task.init_params(0)),
        task.training_stream(0, task.validation_indices())._replace(steps=steps),
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
            out = compute_score(name, task, params, ScoresSection(holdout_steps=steps), work)
            assert np.allclose(out.values, values[:n], rtol=1e-4, atol=2e-5), name  # float32 products
            assert out.notes == () and out.passes > 0
        drawn = compute_score("random", task, params, ScoresSection(), work).values
    assert 0 <= drawn.min() and drawn.max() < 1 and abs(drawn.mean() - 0.5) < 0.12 and len(set(drawn)) == n


# ---- what a step gets


@pytest.mark.parametrize("micro", [pytest.param(1, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize(
    "objective",
    [(), pytest.param(("--objective.name", "simpo", *PAIRS), marks=pytest.mark.slow)],
    ids=["sft", "simpo"],
)
def test_a_step_descends_the_sum_of_weighted_gradients(made, tmp_path, objective, micro):
    """Min-max over the global step, however it is cut: 8 micro-batches of one row alone would weigh nothing."""
    flags = (
        *objective,
        "--weights.score",
        "loss",
        "--train.global-batch-size",
        "8",
        "--train.gradient-accumulation-steps",
        str(micro),
    )
    told, task = config(made, *flags), task_of(made, tmp_path, *flags)
    params = task.init_params(0)
    fixed, stream = task.frozen(params), task.training_stream(told.data.seed)
    with opened(tmp_path) as work:
        moving = reweighting(task, told, work)
        moving.update_scores(0, params)
    batch = stream.batch(3)
    index = np.asarray(batch["index"]).ravel()
    scores = moving.scores_by_step[0].values[index]
    weights = (scores - scores.min()) / (scores.max() - scores.min())
    assert 0 < weights.mean() < 1
    weigh = moving.problem.gather(moving.step_weights(3), batch)
    _, grad = jax.jit(partial(inner_loss_and_grad, task.problem))(params, weigh, fixed, batch)
    whole = task_of(made, tmp_path, *flags[:-1], "1").training_stream(told.data.seed).batch(3)
    one = {name: leaf[0] for name, leaf in whole.items()}
    assert np.array_equal(np.asarray(one["index"]), index)
    given = jnp.asarray(weights, jnp.float32)
    wanted = jax.jit(jax.grad(lambda p: jnp.vdot(given, task.objective.losses(p, fixed, one)) / 8))(params)
    for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(wanted), strict=True):
        assert np.allclose(a, b, rtol=1e-4, atol=1e-6)  # float32


def test_scales_and_what_rows_got(made, tmp_path, monkeypatch):
    """Over all rows a row has one weight; over a step it depends on the others; a refresh takes over at its step."""
    values = {0: np.arange(36.0), 2: -np.arange(36.0)}
    values[2][5] = np.nan
    at = iter(values.values())
    monkeypatch.setitem(SCORES, "random", lambda *given: ScoreResult(next(at), 1.0))
    flags = ("--weights.score", "random", "--weights.refresh", "2", "--train.global-batch-size", "12")
    task = task_of(made, tmp_path, *flags)
    with opened(tmp_path) as work:
        one = reweighting(task, config(made, *flags, "--weights.scaling", "examples"), work)
        one.update_scores(0, task.init_params(0))
        one.update_scores(2, task.init_params(0))
        other = reweighting(task, config(made, *flags, "--weights.mean-one"), work)  # from scores.parquet
        other.restore(3)
    assert one.refresh_steps == (0, 2) and list(other.scores_by_step) == [0, 2]
    order = task.data_order(0)
    for step, scores in ((1, values[0]), (2, np.where(np.isnan(values[2]), -35.0, values[2]))):
        got = np.asarray(one.step_weights(step)).ravel()
        assert np.allclose(got, ((scores - scores.min()) / 35)[order(step)])
        got = np.asarray(other.step_weights(step)).ravel()
        assert np.allclose(
            got, batch_minmax_weights(scores, order(step)) / batch_minmax_weights(scores, order(step)).mean(), atol=1e-6
        )
    got = one.summarize_weights()
    assert got.num_drawn == 36 and got.num_equal_steps == 0
    assert np.allclose(got.weights[order(1)], np.arange(36)[order(1)] / 35, atol=1)
    assert one.score_records()[1]["with_first"] < -0.8


@pytest.mark.slow
def test_equal_scores_are_plain_training_bit_for_bit(made, tmp_path, monkeypatch):
    monkeypatch.setitem(SCORES, "random", lambda task, *rest: ScoreResult(np.full(task.num_examples, 7.0), 0.0))
    result = run(made, tmp_path / "run", "--weights.score", "random")
    run(made, tmp_path / "plain")
    one, other = ((tmp_path / name / "model/model.safetensors").read_bytes() for name in ("run", "plain"))
    assert one == other
    assert result["scoring"]["equal"] == result["steps"] and result["weights"]["mean"] == 1
    assert (
        "all examples had one score, which distinguishes none from another: weight 1"
        in (tmp_path / "run" / "report.html").read_text()
    )


# ---- scores that ask the model


def test_ica_is_the_change_of_the_plain_likelihood(made, tmp_path):
    """Of adapters over a base; stopped while the model answers, it goes on with what was answered, to the same bits."""
    flags = ("--lora.r", "2")
    task, settings = task_of(made, tmp_path, *flags), ScoresSection(k=2)
    params = jax.tree.map(lambda leaf: leaf + 0.05, task.init_params(0))
    with opened(tmp_path) as work:
        whole = compute_score("ica", task, params, settings, work)
        with pytest.raises(ValueError, match="4 holdout rows, and k = 9 of them are to be shown"):
            compute_score("ica", task, params, ScoresSection(k=9), work)
    decoder, model = task.decoder, assemble_params(params, task.base_params)

    @jax.jit
    def log_p(ids):
        here = jnp.arange(ids.shape[0])[None]
        logits = decoder.hidden(model, ids[None], here, jnp.ones_like(here))[0] @ decoder.head(model)
        return jnp.take_along_axis(jax.nn.log_softmax(logits[:-1]), ids[1:, None], 1)[:, 0]

    (rows_, holdout), form = (
        likelihoods.train_and_validation_rows(task),
        incontext.make_demonstration_format(task.tokenizer),
    )
    chosen = demonstration_selector("knn")(rows_, holdout, 2)
    for i in range(3):
        ids, asked, _ = rows_.sequences(i)[0]
        head = form.format_context([form.format_demonstration(holdout.sequences(int(j))[0]) for j in chosen[i]])
        said = len(ids) - int(asked.argmax())
        before, after = (log_p(jnp.asarray(x))[-said:].mean() for x in (ids, [*head, *ids[1:].tolist()]))
        assert whole.values[i] == pytest.approx(float(after - before), abs=2e-5)  # float32
    assert whole.passes > 0 and np.isfinite(whole.values).all()

    (tmp_path / "other").mkdir()
    with opened(tmp_path / "other") as work, pytest.raises(session.Interrupted):
        work.handle_signal(signal.SIGTERM, None)
        compute_score("ica", task, params, settings, work)
    kept = tmp_path / "other" / "checkpoints" / "answers.jsonl"
    assert kept.stat().st_size > 0
    kept.write_text(kept.read_text() + '{"torn')
    with opened(tmp_path / "other") as work, pytest.raises(session.Interrupted):
        work.handle_signal(signal.SIGTERM, None)
        compute_score("ica", task, params, settings, work)
    assert "torn" not in kept.read_text() and len(read_journal(kept)) == 2
    with opened(tmp_path / "other") as work:
        again = compute_score("ica", task, params, settings, work)
    assert np.array_equal(again.values, whole.values) and again.passes == whole.passes
    assert not kept.exists()


def test_several_sets_of_demonstrations_are_averaged(made, tmp_path):
    """Values and standard errors are those of the sets, asked one by one; the file keeps both."""
    task, settings = task_of(made, tmp_path), ScoresSection(k=1, demonstration_sets=3)
    params = jax.tree.map(lambda leaf: leaf + 0.05, task.init_params(0))
    with opened(tmp_path) as work:
        found = [load_or_compute_score("ica", "ica", task, params, settings, work) for _ in range(2)]
        with pytest.raises(ValueError, match=r"4 holdout rows, and scores.demonstration_sets = 3 disjoint .* take 6"):
            compute_score("ica", task, params, ScoresSection(k=2, demonstration_sets=3), work)
        (rows_, holdout), model = likelihoods.train_and_validation_rows(task), TaskLikelihoods(task, params, work)
        chosen = demonstration_selector("knn")(rows_, holdout, 3)
        form, length = incontext.make_demonstration_format(task.tokenizer), task.architecture.max_length
        by_set = []
        for place in range(3):
            shown = chosen[:, place : place + 1]
            plan = incontext.ica_score(form, lambda *given, shown=shown: shown, k=1, max_length=length)(rows_, holdout)
            by_set.append(plan.combine(model(plan.requests)))
    expected, errors = np.mean(by_set, axis=0), np.std(by_set, axis=0, ddof=1) / np.sqrt(3)
    assert errors.min() > 1e-4
    for scores in found:
        np.testing.assert_allclose(scores.values, expected, atol=2e-6)  # float32
        np.testing.assert_allclose(scores.standard_errors, errors, atol=2e-6)
    assert found[0].notes[-1].startswith("standard errors over 3 sets of demonstrations: median ")
    assert pq.read_table(tmp_path / SCORES_FILE).column_names[-2:] == ["ica", "ica_standard_error"]


# ---- whole runs


@pytest.mark.parametrize(
    "flags, at",
    [
        (("ica", "--scores.k", "2", "--weights.refresh", "3"), 6),
        pytest.param(
            ("perplexity", "--weights.refresh", "2", "--data.packing", "--lora.r", "2"), 5,
            marks=pytest.mark.slow,
        ),
        pytest.param(("ica", "--scores.k", "2", "--objective.name", "dpo", *PAIRS), 3, marks=pytest.mark.slow),
        # the holdout model of reducible is trained first, and a stop in there is before the first step
        pytest.param(("reducible", "--objective.name", "simpo", *PAIRS), 14, marks=pytest.mark.slow),
    ],
    ids=["sft", "lora, packed", "dpo", "simpo"],
)  # fmt: skip
@pytest.mark.slow
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
    one, other = (pq.read_table(tmp_path / name / SCORES_FILE) for name in ("run", "whole"))
    assert one.equals(other)
    report = (tmp_path / "run" / "report.html").read_text()
    assert "The scores of all rows" in report or "Bar: median" in report


@pytest.mark.slow
def test_select_compares_scores_and_starts_from_them(made, tmp_path):
    """The first training is uniform all the same; the second has the score's logits. What is written is read again."""
    flags = [
        "--outer.warm-start", "perplexity", "--outer.steps", "1", "--outer.learning-rate", "1e-6",
        "--certify.no-enabled", "--retrain.variants", "uniform", "reducible", "--retrain.seeds", "1",
        "--scores.holdout-steps", "4", "--train.max-steps", "6", "--outer.weighting", "softmax",
        "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    result = select(load_config(SelectConfig, made / "select.yaml", flags))
    assert [row["name"] for row in result["compare"]] == ["uniform", "reducible, top"]
    assert result["records"][0]["ess"] == pytest.approx(36) and result["records"][1]["ess"] < 30
    stored = pq.read_table(tmp_path / "run" / SCORES_FILE)
    assert stored.column_names == ["id", "row", "source", "label", "perplexity", "reducible"]
    values = stored["perplexity"].to_numpy()
    logits = np.clip((values - values.mean()) / values.std(), -2, 2)
    expected = np.exp(logits) / np.exp(logits).mean()
    assert np.allclose(pq.read_table(tmp_path / "run" / "weights.parquet")["weight"].to_numpy(), expected, rtol=1e-4)
    file = WeightsSection(file=str(tmp_path / "run" / SCORES_FILE), column="reducible", transform="minmax")
    examples = load_rows([str(made / "train.jsonl")])
    assert np.allclose(given_weights(file, examples).weights, minmax_weights(stored["reducible"].to_numpy()))


WRONG = {
    "both": (("--weights.score", "ica", "--weights.file", "w.parquet"), "give one of weights.file and weights.score"),
    "streamed": (
        ("--weights.score", "loss", "--data.streaming", "--train.max-steps", "4"),
        "which streaming does not hold",
    ),
    "no holdout": (("--weights.score", "ica", "--data.validation", "--data.dev"), "validation has none: give data"),
    "k": (("--weights.score", "ica", "--scores.k", "5"), "4 holdout rows, and k = 5 of them are to be shown"),
    "no vectors": (("--scores.embedding", "file"), "scores.embedding_file = '': scores.embedding = file reads it"),
    "vectors": (("--scores.embedding-file", "e.parquet"), "scores.embedding = file reads it: give both, or neither"),
    "way": (("--weights.score", "ica", "--scores.k", "2", "--scores.demonstrations", "near"), "they are 'knn'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_gets_one_clear_error(made, tmp_path, capsys, name):
    flags, said = WRONG[name]
    assert main(["train", str(made / "train.yaml"), *flags, "--out", str(tmp_path / "run")]) == 1
    told = capsys.readouterr().err
    assert said in told.replace("\n", " ") and "Traceback" not in told, told


def test_vectors_of_a_file_are_checked_before_training(made, tmp_path, capsys):
    examples = load_rows([str(made / "train.jsonl")])
    table = {"id": [e.id for e in examples], "embedding": np.eye(len(examples)).tolist()}
    pq.write_table(pa.table(table), tmp_path / "e.parquet")
    flags = ("--weights.score", "ica", "--scores.embedding", "file", "--scores.embedding-file", tmp_path / "e.parquet")
    assert main(["train", str(made / "train.yaml"), *map(str, flags), "--out", str(tmp_path / "run")]) == 1
    told = " ".join(capsys.readouterr().err.split())  # validation has no vectors
    assert re.search(
        r"e.parquet: no embedding for the example \w+#0 \(.*/test.jsonl:1\), one of 4; it has 36 ids", told
    )


def test_a_config_that_names_no_score_is_told_the_nearest(made, tmp_path):
    text = (made / "train.yaml").read_text() + "weights: {score: icaa}\n"
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"weights.score is 'icaa' .str.; wanted one of '', ica.*did you mean 'ica'"):
        load_config(TrainConfig, tmp_path / "c.yaml")
