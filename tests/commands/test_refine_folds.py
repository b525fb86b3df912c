"""outer.validation_folds in `refine`: the steps of `select`, exact slopes, resuming, what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax.commands.refine.candidates import ROUND_SEED_STRIDE, _OuterSteps
from bilevel_jax.commands.refine.rollouts import build_round_task, choose_questions, collect_rollouts
from bilevel_jax.commands.refine.run import (
    count_rounds_work,
    make_generator_factory,
    prepare_refine_task,
    refine,
)
from bilevel_jax.core.unrolled import validation_loss_fn
from bilevel_jax.runs.config.load import RefineConfig, load_config
from bilevel_jax.runs.config.schema import ScoresSection
from bilevel_jax.runs.engine.folds import take_turn, turn_training_stream, turn_validation_stream
from bilevel_jax.runs.engine.outer_loop import OuterLoop
from bilevel_jax.runs.engine.trainer import Trainer
from bilevel_jax.runs.infra.session import Interrupted
from bilevel_jax.runs.scoring.likelihoods import fingerprint_params
from tests.commands.test_refine import same
from tests.commands.test_refine_pooled import NO_RESPONSES, opened

FOLDS = ("--outer.validation-folds", "2", "--outer.reliability-every", "1", "--refine.methods", "unrolled")


@pytest.fixture(scope="module")
def config(made):
    return made / "refine.yaml"


def run(config, out, *flags):
    return refine(load_config(RefineConfig, config, [*FOLDS, "--outer.steps", "2", *flags, "--out", str(out)]))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """One uninterrupted run: (its folder, its result)."""
    out = tmp_path_factory.mktemp("folds") / "run"
    return out, run(config, out)


def test_the_steps_are_those_of_select(config, tmp_path):
    """Without responses and at multiplicity 1: the weights of the rows, and that of validation in every step."""
    settings = load_config(
        RefineConfig, config, [*FOLDS, *NO_RESPONSES, "--outer.steps", "3", "--outer.reliability-floor", "0"]
    )
    task = prepare_refine_task(settings, tmp_path)
    with opened(tmp_path / "select") as session:
        loop = OuterLoop(
            task, Trainer(task, settings.outer, session), session,
            data=settings.data, train_seed=0, scores=ScoresSection(),
        )  # fmt: skip
        for _ in range(3):
            loop.take_step()
        expected = np.asarray(loop._weights_of(loop.state.hyper))
    empty = collect_rollouts(settings, task, np.zeros(0, int), 0, tmp_path / "none.parquet", lambda *_: [], "x", None)
    with opened(tmp_path / "refine") as session:
        found = _OuterSteps(settings, build_round_task(settings, task, empty, 0), session, 0)
        while not found.is_done():
            found.take_step()
    assert expected[:-8].std() > 0.1 and expected[-1] != 1 and len(expected) == task.corpus.num_examples
    np.testing.assert_allclose(np.asarray(found._weights()), expected, rtol=1e-5)
    before = [record["validation_weight"] for record in loop.records]
    assert [record["validation_weight"] for record in found.records] == pytest.approx(before, rel=1e-6)


@pytest.fixture(scope="module")
def round_of(config, tmp_path_factory):
    """(config, a round's task with responses of multiplicity below 1)."""
    folder = tmp_path_factory.mktemp("round")
    settings = load_config(RefineConfig, config, [*FOLDS, "--refine.ratio", "none"])
    task = prepare_refine_task(settings, folder)
    params, chosen = task.init_params(0), choose_questions(settings, task.trainable_indices(), np.ones(36))
    with opened(folder) as session:
        write = make_generator_factory(settings.generate, task.decoder, task.tokenizer, task.mesh, session)(params)
        found = collect_rollouts(
            settings, task, chosen, 0, folder / "rows.parquet", write, fingerprint_params(params), None
        )
    return settings, build_round_task(settings, task, found, 0)


def test_the_weight_of_validation_has_the_slope_of_its_examples_together(round_of, tmp_path):
    """Against retraining with another weight, central differences; the judges did not train."""
    settings, made = round_of
    task = made.task
    with opened(tmp_path) as session:
        steps = _OuterSteps(settings, made, session, 0)
        turn = take_turn(task, 2, settings.data.seed, 0)
        trainer, stream = steps.trainer, turn_training_stream(task, steps.seed, turn)
        judging = turn_validation_stream(task, turn)

        def loss(log_weight):
            variable = steps.validation_weight._replace(log_weight=jnp.array(log_weight))
            steps.validation_weight, kept = variable, steps.validation_weight
            weights, steps.validation_weight = steps._weights(), kept
            assert weights.shape == (task.corpus.num_examples,)
            return trainer.validation_loss(weights, steps.start, stream, judging, validation_loss_fn(task.problem))

        weights = steps._weights()
        run_ = trainer.run(weights, steps.start, stream, for_backward=True)
        grad = np.asarray(trainer.estimate(run_, weights, stream, turn=turn).grad)
        behind = grad[task.num_examples :]
        assert not behind[turn.judges].any() and np.count_nonzero(behind) == 4
        slope = (loss(0.05) - loss(-0.05)) / 0.1
        assert behind.sum() == pytest.approx(slope, rel=0.03)  # float32 losses, and curvature at this step size
        steps.take_step()
        moved = float(steps.validation_weight.log_weight)
        assert moved == pytest.approx(-np.sign(slope) * settings.outer.learning_rate)


def test_the_last_training_is_on_rows_and_validation(round_of, tmp_path):
    """The candidate is what training on all of both with these weights gives, bit for bit."""
    settings, made = round_of
    task = made.task
    with opened(tmp_path) as session:
        steps = _OuterSteps(settings, made, session, 1)
        while not steps.is_done():
            steps.take_step()
        candidate = steps.train_candidate()
        weights = jnp.concatenate([candidate.weights, jnp.full(8, candidate.validation_weight)])
        assert candidate.weights.shape == (task.num_examples,) and candidate.validation_weight != 1
        seed, everyone = settings.data.seed + ROUND_SEED_STRIDE + 1, np.arange(task.corpus.num_examples)
        end = steps.trainer.run(weights, steps.start, task.training_stream(seed, everyone)).end.params
    for ours, theirs in zip(jax.tree.leaves(candidate.params), jax.tree.leaves(end), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_a_run_tells_the_weight_and_takes_the_passes_that_were_planned(whole, config, tmp_path):
    out, result = whole
    stored = [record["candidates"][0]["validation_weight"] for record in result["records"]]
    assert all(value > 0 for value in stored) and stored[0] != 1
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    before = [line["validation_weight"] for line in log if line["event"] == "outer"]
    assert len(before) == 4 and before[0] == before[2] == 1 and before[1] != 1
    page = " ".join((out / "report.html").read_text().split())
    assert page.count("unrolled is trained on the validation examples, too, each with weight") == 2
    draws = [line["reliability_draw"]["num_validation"] for line in log if line["event"] == "outer"]
    assert draws == [4, 4, 4, 4]  # a fold judges
    settings = load_config(RefineConfig, config, [*FOLDS, "--outer.steps", "2"])
    planned = count_rounds_work(settings, prepare_refine_task(settings, tmp_path))
    assert planned == sum(record["work"] for record in result["records"])


@pytest.mark.parametrize(
    "count", [pytest.param(count, marks=[pytest.mark.slow] * (count != 22)) for count in (4, 14, 22, 40)]
)
def test_stopped_anywhere_and_resumed_changes_no_bit(config, whole, tmp_path, stop_at, count):
    stop_at(count)
    with pytest.raises(Interrupted):
        run(config, tmp_path / "run")
    run(config, tmp_path / "run", "--resume")
    same(whole[0], tmp_path / "run")
    results = [json.loads((folder / "result.json").read_text()) for folder in (whole[0], tmp_path / "run")]
    one, other = ([record["candidates"][0]["validation_weight"] for record in result["records"]] for result in results)
    assert one == other


REFUSED = {
    "which refine.methods does not name": ("--refine.methods", "uniform", "--refine.questions", "fixed"),
    "the responses to a question share every batch": (
        "--refine.generator", "reinforce", "--refine.questions", "fixed", "--refine.methods", "uniform", "unrolled",
        "--refine.ratio", "none",
    ),
    "one fold would judge every step and none would train": ("--outer.validation-folds", "1"),
    "section target judges by another": ("--target.sources", "parameters", "--target.losses", "x.py:f"),
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_is_refused(config, words):
    flags = REFUSED[words]
    with pytest.raises(ValueError, match=words):
        load_config(RefineConfig, config, [*(() if "--outer.validation-folds" in flags else FOLDS[:2]), *flags])


def test_more_folds_than_examples_are_refused_before_any_work(config, tmp_path):
    with pytest.raises(ValueError, match="validation_folds = 9, and each fold needs a validation example, of which"):
        run(config, tmp_path / "run", "--outer.validation-folds", "9")
    assert not (tmp_path / "run").exists()
