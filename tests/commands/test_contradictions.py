"""Validation examples that the others make worse: their gains, what is dropped, and that a stop changes nothing."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest

from bilevel_jax.commands.select.contradictions import (
    FIRST_ORDER_SEED,
    LARGEST_STEP,
    STEP,
    Contradictions,
    divide_validation,
    measure_contradictions,
    summarize_contradictions,
)
from bilevel_jax.commands.select.run import select
from bilevel_jax.core.unrolled import validation_loss_fn
from bilevel_jax.lm.builtin import scripts
from bilevel_jax.lm.data.tokens import TokenizedSequence, corpus_from_sequences
from bilevel_jax.runs.config.load import SelectConfig, load_config
from bilevel_jax.runs.engine.trainer import Trainer
from bilevel_jax.runs.infra import session
from bilevel_jax.runs.tasks import splits
from bilevel_jax.runs.tasks.builtin import BUILTIN_TASKS, pretrain_builtin_model
from bilevel_jax.runs.tasks.evaluation import evaluate_per_example, num_judges
from bilevel_jax.runs.tasks.text import prepare_text_task

FOLDS = 2
MEASURED = ("--contradictions.draws", "2", "--contradictions.folds", str(FOLDS))
DROPPED = (*MEASURED, "--contradictions.action", "drop")
SMALL = ("--train.max-steps", "4", "--outer.steps", "1", "--fast")


def config_of(made, *flags):
    return load_config(SelectConfig, made / "select.yaml", flags)


def task_of(config, folder):
    folder.mkdir(exist_ok=True)
    seeds = [config.data.seed]
    return prepare_text_task(config, splits.load_splits(config.data), folder, num_steps=4, seeds=seeds)


def keep_rows(path, new, places):
    lines = path.read_text().splitlines()
    new.write_text("".join(lines[at] + "\n" for at in places))
    return new


def test_a_gain_is_what_training_by_the_weights_of_other_rows_does(made, tmp_path):
    """Against files that hold the other rows alone, and the step in numpy."""
    with jax.enable_x64(True):
        config = config_of(made, "--model.param-dtype", "float64", *MEASURED)
        task = task_of(config, tmp_path / "whole")
        with session.open_session(tmp_path / "whole", progress=False, save_seconds=600) as run:
            trainer = Trainer(task, config.outer, run)
            measured = measure_contradictions(task, config, trainer, run)
            assert measured.gains.shape == (2, 8) and np.abs(measured.gains).min() > 1e-7
            for draw in range(2):
                fold_of = divide_validation(8, FOLDS, (0, draw))
                assert np.bincount(fold_of).tolist() == [4, 4]
                stream = task.training_stream(FIRST_ORDER_SEED + draw, packed=False)
                start = trainer.init_state(task.init_params(0))
                for fold in range(FOLDS):
                    rows = keep_rows(
                        made / "validation.jsonl", tmp_path / f"{draw}{fold}.jsonl", np.flatnonzero(fold_of != fold)
                    )
                    alone = config_of(made, "--model.param-dtype", "float64", "--data.validation", str(rows))
                    others = task_of(alone, tmp_path / f"{draw}{fold}")
                    own = Trainer(others, config.outer, run)
                    ones = jnp.ones(task.num_examples)
                    trained = own.run(ones, start, stream, for_backward=True)
                    grad = np.asarray(own.estimate(trained, ones, stream).grad)
                    slope = grad - grad.mean()
                    logits = -np.clip(STEP * slope / np.sqrt((slope**2).mean()), -LARGEST_STEP, LARGEST_STEP)
                    weights = len(logits) * np.exp(logits) / np.exp(logits).sum()
                    losses = [
                        evaluate_per_example(
                            task.outer_objective.losses,
                            trainer.run(jnp.asarray(one), start, stream).end.params,
                            task.frozen(start.params),
                            task.held_out_streams["validation"],
                            8,
                        )
                        for one in (np.ones_like(weights), weights)
                    ]
                    expected = (losses[0] - losses[1])[fold_of == fold]
                    assert np.allclose(measured.gains[draw][fold_of == fold], expected, rtol=1e-6, atol=1e-12)


def test_a_task_without_some_validation_rows_is_that_of_a_file_without_them(made, tmp_path):
    with jax.enable_x64(True):
        whole = config_of(made, "--model.param-dtype", "float64")
        kept = [0, 2, 3, 5, 7]
        rows = keep_rows(made / "validation.jsonl", tmp_path / "kept.jsonl", kept)
        alone = task_of(
            config_of(made, "--model.param-dtype", "float64", "--data.validation", str(rows)), tmp_path / "alone"
        )
        dropped = task_of(whole, tmp_path / "whole").without_validation(np.array([1, 4, 6]))
        assert num_judges(dropped) == num_judges(alone) == 5 and len(dropped.held_out_examples["validation"]) == 8
        assert [dropped.held_out_examples["validation"][at - 36].id for at in dropped.validation_indices()] == [
            example.id for example in alone.held_out_examples["validation"]
        ]
        grads = []
        with session.open_session(tmp_path / "whole", progress=False, save_seconds=600) as run:
            for task in (dropped, alone):
                trainer, ones = Trainer(task, whole.outer, run), jnp.ones(task.num_examples)
                stream = task.training_stream(0, packed=False)
                start = trainer.init_state(task.init_params(0))
                trained = trainer.run(ones, start, stream, for_backward=True)
                grads.append(np.asarray(trainer.estimate(trained, ones, stream).grad))
                loss = validation_loss_fn(task.problem)
                grads.append(
                    float(
                        loss(trained.end.params, task.frozen(trained.start.params), task.held_out_streams["validation"])
                    )
                )
        assert np.allclose(grads[0], grads[2], rtol=1e-9, atol=1e-14) and abs(grads[1] - grads[3]) < 1e-12


def test_dropped_examples_of_a_corpus_are_there_but_empty():
    sequences = [TokenizedSequence(np.arange(n, dtype=np.int32), np.arange(n) > 0) for n in (3, 4, 2, 5, 6, 1)]
    pairs = corpus_from_sequences(sequences, 2).with_reference_margins(np.array([1.0, 2.0, 3.0]))
    smaller = pairs.without_examples(np.array([1]))
    assert smaller.kept_indices.tolist() == [0, 2] and smaller.num_examples == 3
    assert smaller.lengths.tolist() == [3, 4, 0, 0, 6, 1]
    for row in (0, 2):
        for side in (0, 1):
            assert np.array_equal(smaller.get_sequence(row, side).ids, pairs.get_sequence(row, side).ids)
            assert np.array_equal(
                smaller.get_sequence(row, side).target_mask, pairs.get_sequence(row, side).target_mask
            )
    single = corpus_from_sequences(sequences)
    sampled = single.with_sampler_log_probs(np.arange(21.0), np.ones(6)).with_advantages(np.arange(21.0))
    smaller = sampled.without_examples(np.array([0, 3]))
    assert smaller.sampler_log_probs.tolist() == smaller.advantages.tolist() == [*range(3, 9), *range(14, 21)]
    assert single.without_examples(np.array([], int)).ids.tolist() == single.ids.tolist()


def test_an_example_contradicts_where_its_gain_is_clearly_below_0(made):
    gains = np.array([[0.3, -0.1, -0.5], [0.1, 0.0, -0.7]])
    measured = Contradictions(np.array([0, 2, 5]), gains)
    assert np.allclose(measured.gain, [0.2, -0.05, -0.6])
    variances = np.array([0.02, 0.005, 0.02])  # half of it, half of their mean, .015; over 2 draws
    assert np.allclose(measured.standard_errors, np.sqrt((variances + 0.015) / 4))
    assert measured.contradicts.tolist() == [False, False, True]
    config = config_of(made, *DROPPED)
    assert summarize_contradictions(measured, config)["is_dropped"]
    folds = config_of(made, *DROPPED, "--outer.validation-folds", "3")
    kept = summarize_contradictions(measured, folds)
    assert not kept["is_dropped"] and "not dropped: that would leave 2, and the run needs 3 or more" in kept["sentence"]
    bad = summarize_contradictions(Contradictions(measured.places, gains - 1), config)
    assert bad["contradicting"] == 3 and not bad["is_dropped"]
    assert "That is more than 30%: read them" in bad["sentence"]


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_few_examples_without_an_effect_contradict(spread):
    """One in 20 or so, also where examples differ in how noisy they are; of the noisiest quarter one in 8 at most."""
    random, shares, noisiest = np.random.default_rng(0), [], []
    for _ in range(300):
        scale = np.exp(spread * random.normal(size=32))
        measured = Contradictions(np.arange(32), scale * random.normal(size=(4, 32)))
        shares.append(measured.contradicts.mean())
        noisiest.append(measured.contradicts[scale >= np.quantile(scale, 0.75)].mean())
    assert 0.01 < np.mean(shares) < 0.08 and (spread == 0 or np.mean(noisiest) < 0.125)


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("contradictions") / "run"
    return out, select(config_of(made, *DROPPED, *SMALL, "--out", str(out)))


def test_the_command_drops_what_it_writes_down(made, whole, tmp_path):
    out, result = whole
    table = pq.read_table(out / "validation.parquet").to_pydict()
    judges = [json.loads(line) for line in (out / "judges.jsonl").read_text().splitlines()]
    assert [row["id"] for row in judges] == [
        one for one, contradicts in zip(table["id"], table["contradicts"], strict=True) if not contradicts
    ]
    summary = result["contradictions"]
    assert 0 < summary["contradicting"] == 8 - len(judges) < 8 and summary["examples"] == 8 and summary["is_dropped"]
    assert summary["sentence"].startswith(f"{summary['contradicting']} of 8 validation examples ha")
    assert result["judges"] == len(judges) and result["rows"]["validation"] == 8
    assert np.allclose(np.mean([table["gain_0"], table["gain_1"]], 0), table["gain"])
    assert not list((out / "parts").glob("contradictions*"))
    page = (out / "report.html").read_text()
    assert "Do the validation examples agree?" in page and summary["sentence"].split(";")[0] in page
    assert result["measured"]["passes"] == result["estimate"]["passes"]  # what is planned is done
    again = select(
        config_of(made, "--data.validation", str(out / "judges.jsonl"), *SMALL, "--out", str(tmp_path / "a"))
    )
    assert again["contradictions"] is None
    first, second = (pq.read_table(folder / "weights.parquet")["weight"] for folder in (out, tmp_path / "a"))
    assert np.allclose(first, second, rtol=1e-5)


@pytest.mark.slow
def test_a_report_alone_changes_no_bit(made, tmp_path):
    reported = select(config_of(made, *MEASURED, *SMALL, "--out", str(tmp_path / "reported")))
    select(config_of(made, *SMALL, "--out", str(tmp_path / "plain")))
    tables = [pq.read_table(tmp_path / name / "weights.parquet") for name in ("reported", "plain")]
    assert tables[0].equals(tables[1]) and not reported["contradictions"]["is_dropped"]
    assert "steer the weights even so" in reported["contradictions"]["sentence"]


@pytest.mark.parametrize("at", [7, *(pytest.param(at, marks=pytest.mark.slow) for at in (3, 11, 17))])
def test_a_stop_in_a_draw_changes_no_bit(made, whole, tmp_path, stop_at, at):
    """In training, in the backward pass, in a training of the chosen weights, in the next draw."""
    stop_at(at)
    out = tmp_path / "run"
    flags = (*DROPPED, *SMALL, "--out", str(out))
    with pytest.raises(session.Interrupted, match="everything is saved"):
        select(config_of(made, *flags))
    resumed = select(config_of(made, *flags, "--resume"))
    for name in ("weights.parquet", "validation.parquet"):
        assert pq.read_table(out / name).equals(pq.read_table(whole[0] / name)), name
    assert resumed["contradictions"] == whole[1]["contradictions"]
    assert not list((out / "parts").glob("contradictions*"))


def test_what_cannot_be_measured_is_refused(made, tmp_path):
    for flags, words in (
        (("--outer.method", "bmo"), "hypergradients, which outer.method has none of"),
        (("--target.sources", "a", "b"), "divides one validation set, and section target has several"),
        (("--contradictions.draws", "0"), "is 0, so nothing reads the other keys of the section"),
        (("--contradictions.draws", "1"), "contradictions.draws"),
        (("--contradictions.folds", "1"), "contradictions.folds"),
    ):
        with pytest.raises(ValueError, match=words):
            config_of(made, *MEASURED, *flags)
    folds = ("--contradictions.folds", "5", "--out", str(tmp_path / "run"))
    with pytest.raises(ValueError, match="folds = 5 parts of 8 validation examples: each part needs two. Give 10"):
        select(config_of(made, *MEASURED, *SMALL, *folds))


@pytest.mark.slow
def test_preference_pairs_and_hostile_text(made, tmp_path):
    """Pairs judge by their own loss; the report escapes what it shows; rows that are too long have no gain."""
    rows = [json.loads(line) for line in (made / "pairs_validation.jsonl").read_text().splitlines()]
    for row in rows:
        row["chosen"] = f"<script>{row['chosen']}</script>"
    rows[0]["prompt"] *= 40
    (tmp_path / "hostile.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        "data.train": made / "pairs.jsonl", "data.validation": tmp_path / "hostile.jsonl",
        "data.test": made / "pairs_report.jsonl", "objective.name": "simpo", "data.max-length": 64,
        "data.truncation": "drop", "out": tmp_path / "run",
    }  # fmt: skip
    words = [text for key, value in given.items() for text in (f"--{key}", str(value))]
    result = select(config_of(made, *words, *DROPPED, *SMALL))
    table = pq.read_table(tmp_path / "run" / "validation.parquet").to_pydict()
    assert np.isnan(table["gain"][0]) and np.isfinite(table["gain"][1:]).all() and not table["contradicts"][0]
    page = (tmp_path / "run" / "report.html").read_text()
    assert result["contradictions"]["examples"] == 7 and "<script>" not in page.split("</style>")[1]
    judges = [json.loads(line) for line in (tmp_path / "run" / "judges.jsonl").read_text().splitlines()]
    assert all("chosen" in row and "rejected" in row for row in judges)


def test_a_loss_that_is_not_finite_names_its_row(made, tmp_path):
    task, config = task_of(config_of(made), tmp_path / "run"), config_of(made, *MEASURED)
    losses = task.outer_objective.losses
    spoiled = task.outer_objective._replace(
        losses=lambda params, frozen, batch: jnp.where(batch["index"] == 5, jnp.nan, losses(params, frozen, batch))
    )
    with session.open_session(tmp_path / "run", progress=False, save_seconds=600) as run:
        trainer = Trainer(task, config.outer, run)
        with pytest.raises(FloatingPointError, match=r"the validation loss of .*validation.jsonl:6 is not finite"):
            measure_contradictions(task._replace(outer_objective=spoiled), config, trainer, run)


@pytest.mark.slow
def test_most_wrong_validation_examples_are_found(tmp_path):
    """A quarter of 32 follow another key."""
    made = scripts.write_scripts_data(tmp_path / "data")
    pretrain_builtin_model(made, BUILTIN_TASKS["scripts"])
    rows = [json.loads(line) for line in (made / "validation.jsonl").read_text().splitlines()]
    for row in rows[:8]:
        places = [next((s, script.index(sign)) for s, script in enumerate(scripts.SCRIPTS) if sign in script)
                  for sign in row["answer"]]  # fmt: skip
        row["response"] = "".join(scripts.SCRIPTS[(s + 1) % len(scripts.SCRIPTS)][place] for s, place in places)
    (made / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {
        "model.name-or-path": made / "model", "lora.r": 0, "data.train": made / "train.jsonl",
        "data.validation": made / "mixed.jsonl", "optimizer.learning-rate": 1e-3, "optimizer.schedule": "constant",
        "optimizer.warmup-steps": 0, "train.max-steps": 64, "train.global-batch-size": 16, "outer.steps": 1,
        "contradictions.draws": 4, "out": tmp_path / "run",
    }  # fmt: skip
    words = [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]
    select(load_config(SelectConfig, None, [*words, "--data.split", "1", "0", "0", "--fast", "--output.no-progress"]))
    table = pq.read_table(tmp_path / "run" / "validation.parquet").to_pydict()
    assert sum(table["contradicts"][:8]) >= 5 and sum(table["contradicts"][8:]) <= 2
