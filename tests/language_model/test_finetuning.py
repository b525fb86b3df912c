"""Fine-tuning from Python: its hypergradients are those of core and of the commands, and of plain JAX."""

import dataclasses
import doctest
import inspect
import tempfile

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import bilevel_jax as bj
from bilevel_jax.commands.select.run import select
from bilevel_jax.language_model import finetuning, model
from bilevel_jax.language_model.finetuning import FineTuned
from bilevel_jax.lm import models
from bilevel_jax.lm.data.files import write_rows
from bilevel_jax.runs.config.load import SelectConfig, load_config
from bilevel_jax.runs.engine.trainer import Trainer
from bilevel_jax.runs.infra.session import open_session
from bilevel_jax.runs.tasks import splits
from bilevel_jax.runs.tasks.optimizers import build_optimizer
from bilevel_jax.runs.tasks.text import prepare_text_task

ADAMW = optax.adamw(1e-2, eps_root=1e-12)


@pytest.fixture(scope="module")
def lm64(small_folder):
    with jax.enable_x64(True):
        return bj.lm.load(small_folder, dtype="float64")


@pytest.fixture(scope="module")
def trained(lm, rows, held_out):
    return lm.finetune(rows, held_out, ADAMW, steps=4, batch_size=4)


def token_losses(lm, params, examples):
    """The loss of each row, nats per token, one row at a time and without any of our batches."""

    def loss(params, prompt, response):
        ids = [1, *(lm.tokenizer.convert_tokens_to_ids(letter) for letter in prompt + response), 2]
        array = jnp.array([ids[:-1]])
        hidden = lm.decoder.hidden(params, array, jnp.arange(len(ids) - 1)[None], jnp.ones_like(array))
        log_p = jax.nn.log_softmax(hidden @ lm.decoder.head(params))[0]
        targets = range(len(prompt), len(ids) - 1)
        return -jnp.mean(jnp.stack([log_p[at, ids[at + 1]] for at in targets]))

    return jnp.stack([loss(params, row["prompt"], row["response"]) for row in examples])


# ---- exact


@pytest.mark.slow
@pytest.mark.parametrize("lora", (0, pytest.param(2, marks=pytest.mark.slow)))
def test_unrolled_equals_finite_differences(lm64, rows, held_out, lora):
    """Central differences in float64 along random directions of the weights; their error is of the order of h^2."""
    with jax.enable_x64(True):
        optimizer = optax.adamw(1e-2, eps_root=1e-6)  # with less, zero gradients have second derivatives of 1e6
        result = lm64.finetune(rows, held_out, optimizer, steps=5, batch_size=4, lora=lora, seed=3)
        plain = lm64.finetune(rows, held_out, optimizer, steps=5, batch_size=4, lora=lora, seed=3, solver=None)
        assert plain.value == result.value and result.grad.dtype == np.float64
        direction, step = np.random.default_rng(0).normal(size=8), 1e-5
        up, down = (plain.rerun(1 + sign * step * direction).value for sign in (1, -1))
        assert (up - down) / (2 * step) == pytest.approx(result.grad @ direction, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("lora", (pytest.param(0, marks=pytest.mark.slow), 1))
def test_implicit_gauss_newton_equals_a_dense_solve(lm64, rows, held_out, lora):
    """The whole Gauss-Newton matrix of the logits, by plain JAX: J^T (diag p - p p^T) J / N + delta I."""
    rows, held_out = rows[:4], held_out[:2]
    with jax.enable_x64(True):
        weights, delta = np.array([1.0, 0.5, 2.0, 0.1]), 0.3
        result = lm64.finetune(
            rows, held_out, optax.sgd(0.5), steps=3, batch_size=2, lora=lora, solver="implicit", proximal=delta,
            linear_solver=bj.solvers.cg(tolerance=1e-11, max_steps=2000), weights=weights,
        )  # fmt: skip
        trained = models.balance_adapters(result.lm.adapters) if lora else result.lm.params
        flat, unravel = ravel_pytree(trained)

        def whole(theta):
            return models.join_adapters(result.lm.params, unravel(theta)) if lora else unravel(theta)

        def logits(theta, row):
            ids = [
                1,
                *(result.lm.tokenizer.convert_tokens_to_ids(letter) for letter in row["prompt"] + row["response"]),
            ]
            array, params = jnp.array([ids]), whole(theta)
            hidden = result.lm.decoder.hidden(params, array, jnp.arange(len(ids))[None], jnp.ones_like(array))
            return (hidden @ result.lm.decoder.head(params))[0, len(row["prompt"]) :]  # of the response and its end

        matrix = delta * jnp.eye(len(flat))
        for weight, row in zip(weights, rows, strict=True):
            jacobian, p = jax.jacrev(logits)(flat, row), jax.nn.softmax(logits(flat, row))
            curvature = jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None, :]
            matrix += weight / 4 * jnp.einsum("tvi,tvw,twj->ij", jacobian, curvature, jacobian) / len(p)
        outer = jax.grad(lambda theta: token_losses(result.lm, whole(theta), held_out).mean())(flat)
        slopes = jax.jacrev(lambda theta: token_losses(result.lm, whole(theta), rows))(flat)
        expected = -slopes @ jnp.linalg.solve(matrix, outer) / 4
    np.testing.assert_allclose(result.grad, expected, rtol=1e-6, atol=1e-12)  # CG to 1e-11 of a condition below 1e3
    assert result.status is bj.Status.OK and result.checks.curvature > 0
    assert np.isnan(result.checks.gap) == bool(lora)


METHODS = {
    "unrolled": ([], {}),
    "implicit": (
        ["--outer.proximal", "0.1", "--lora.r", "2", "--outer.curvature_batches", "99"],
        {"solver": "implicit", "proximal": 0.1, "lora": 2},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_equals_the_trainer_of_the_commands(made, tmp_path, method):
    """Bit for bit: the task of `select`, its stored states and its estimators, from a config and from Python."""
    lm, (flags, arguments) = bj.lm.load(made / "model"), METHODS[method]
    config = load_config(SelectConfig, made / "select.yaml", ["--outer.method", method, *flags])
    folder = tmp_path / method
    folder.mkdir()
    task = prepare_text_task(
        config, splits.load_splits(config.data), folder, num_steps=10, seeds=[0],
        proximal_strength=config.outer.proximal,
    )  # fmt: skip
    with open_session(folder, progress=False, save_seconds=600) as session:
        trainer = Trainer(task, config.outer, session)
        weights, stream = jnp.ones(task.num_examples), task.training_stream(0)
        run = trainer.run(weights, trainer.init_state(task.init_params(0)), stream, for_backward=True)
        estimate = trainer.estimate(run, weights, stream)
    result = lm.finetune(
        made / "train.jsonl", made / "validation.jsonl", build_optimizer(config.optimizer, 10), steps=10,
        batch_size=8, **arguments,
    )  # fmt: skip
    np.testing.assert_array_equal(result.grad, np.asarray(estimate.grad, float))
    assert result.value == float(estimate.validation_loss)


@pytest.mark.slow
def test_equals_the_first_step_of_select(made, tmp_path):
    """What weights.parquet of the command holds as first_hypergradient, through all of its run folder."""
    import pyarrow.parquet as pq

    flags = ["--out", str(tmp_path / "run"), "--outer.steps", "1", "--certify.no-enabled", "--retrain.no-enabled"]
    select(config := load_config(SelectConfig, made / "select.yaml", flags))
    table = pq.read_table(tmp_path / "run" / "weights.parquet").to_pydict()
    optimizer = build_optimizer(config.optimizer, 10)
    result = bj.lm.load(made / "model").finetune(
        made / "train.jsonl", made / "validation.jsonl", optimizer, steps=10, batch_size=8
    )
    stored = dict(zip(table["id"], table["first_hypergradient"], strict=True))
    np.testing.assert_allclose([stored[id] for id in result.hypergradients], result.grad, rtol=1e-6)


# ---- data


def layouts(rows):
    """The rows in each layout that a file may have."""
    return {
        "text": [{"text": row["prompt"] + row["response"]} for row in rows],
        "messages": [
            {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["response"]}]}
            for r in rows
        ],
        "prompt": [{"prompt": row["prompt"], "response": row["response"]} for row in rows],
        "preference": [{"prompt": r["prompt"], "chosen": r["response"], "rejected": "zz"} for r in rows],
    }


def sources(rows, folder):
    """The same rows in memory, as a data set and in files."""
    write_rows(folder / "rows.jsonl", rows, "jsonl")
    write_rows(folder / "rows.parquet", rows, "parquet")
    return rows, datasets.Dataset.from_list(rows), str(folder / "rows.jsonl"), [folder / "rows.parquet"]


@pytest.mark.parametrize("layout", ("text", "messages", "prompt", "preference"))
def test_dicts_and_data_sets_and_files_are_the_same_examples(lm, rows, tmp_path, layout):
    first, *others = [
        [(example.id, example.row, example.turns, example.rejected, example.format) for example in lm.read(source)]
        for source in sources(layouts(rows)[layout], tmp_path)
    ]
    assert len(first) == len(rows) and all(other == first for other in others)


def test_dicts_and_data_sets_and_files_give_the_same_bits(lm, rows, held_out, trained, tmp_path):
    for source in sources(rows, tmp_path):
        result = lm.finetune(source, lm.read(held_out), ADAMW, steps=4, batch_size=4)
        np.testing.assert_array_equal(result.grad, trained.grad)
        assert result.hypergradients == trained.hypergradients and result.value == trained.value


def test_strings_are_texts_and_keys_have_the_names_that_they_are_given(lm, rows):
    texts = [row["prompt"] for row in rows]
    assert [example.id for example in lm.read(texts)] == [e.id for e in lm.read([{"text": text} for text in texts])]
    asked = [{"question": row["prompt"], "answer": row["response"]} for row in rows]
    named = bj.lm.DataSection(prompt_field="question", response_field="answer")
    assert [example.id for example in lm.read(asked, named)] == [example.id for example in lm.read(rows)]
    again = dataclasses.replace(lm, data=named)
    assert [example.id for example in again.read(asked)] == [example.id for example in lm.read(rows)]


# ---- the result


def test_the_trained_model_is_another(lm, trained):
    before = lm.loglik(["abcd>"], ["bcde"]).nats
    assert trained.lm.loglik(["abcd>"], ["bcde"]).nats != before == lm.loglik(["abcd>"], ["bcde"]).nats
    assert repr(trained) == f"FineTuned({lm.folder!r}, 4 steps on 8 examples, value {trained.value:.4g}, status OK)"
    assert repr(lm) == f"LanguageModel({lm.folder!r}, llama, 768 parameters)"


@pytest.mark.slow
def test_adapters_go_on_and_are_merged(lm, rows, held_out, trained, tmp_path):
    adapted = trained.lm.finetune(rows, held_out, ADAMW, steps=2, batch_size=4, lora=2)
    assert adapted.lm.adapters is not None and adapted.losses[0] < trained.losses[0]
    merged = [adapted.lm.finetune(rows, held_out, ADAMW, steps=1, batch_size=4, lora=rank).losses[0] for rank in (0, 1)]
    assert merged[0] == pytest.approx(merged[1], rel=1e-5)
    adapted.lm.save(tmp_path / "saved")
    models.save_peft(tmp_path / "adapter", lm.architecture, adapted.lm.adapters)
    trained.lm.save(tmp_path / "base")
    nats = adapted.lm.loglik(["abcd>"], ["bcde"]).nats
    for again in (bj.lm.load(tmp_path / "saved"), bj.lm.load(tmp_path / "base", adapter=tmp_path / "adapter")):
        assert again.loglik(["abcd>"], ["bcde"]).nats == pytest.approx(nats, rel=1e-5)


def test_a_rerun_is_the_same_and_weights_are_read_by_place_and_by_id(trained):
    again = trained.rerun()
    np.testing.assert_array_equal(again.grad, trained.grad)
    values = np.linspace(0.5, 2, 8)
    by_place = trained.rerun(values)
    by_id = trained.rerun({example.id: value for example, value in zip(trained.examples, values, strict=True)})
    np.testing.assert_array_equal(by_place.grad, by_id.grad)
    assert (by_place.grad != trained.grad).any()
    assert (trained.rerun(seed=7).grad != trained.grad).any()


@pytest.mark.slow
def test_packing_and_parts_of_a_step_change_nothing_but_rounding(lm, rows, held_out, trained):
    packed = dataclasses.replace(lm, data=bj.lm.DataSection(packing=True))
    for one, parts in ((packed, 1), (lm, 2)):
        result = one.finetune(rows, held_out, ADAMW, steps=4, batch_size=4, gradient_accumulation_steps=parts)
        np.testing.assert_allclose(result.grad, trained.grad, rtol=2e-3, atol=1e-5 * abs(trained.grad).max())


@pytest.mark.slow
@pytest.mark.parametrize("objective", ("dpo", "simpo", bj.lm.ObjectiveSection(name="dpo", beta=0.5)))
def test_pairs(lm, pairs, objective):
    result = lm.finetune(pairs[:6], pairs[6:], ADAMW, steps=2, batch_size=3, objective=objective, lora=1)
    assert result.status is bj.Status.OK and np.isfinite(result.grad).all() and (result.grad != 0).any()
    if objective != "simpo":  # at the reference every margin is 0
        assert result.losses[0] == pytest.approx(np.log(2), rel=1e-6)


def test_certificates_follow_a_run(trained):
    result = trained.rerun(certify=True)
    np.testing.assert_array_equal(result.grad, trained.grad)
    assert result.certificates.finite_differences.steps[:4] == (0.1, 0.03, 0.01, 0.003)
    assert np.isfinite(result.certificates.finite_differences.ratios).all()
    assert trained.certificates is None and trained.verdict.level == "UNDECIDED"
    assert result.verdict == result.certificates.verdict and "certify=True" in str(trained.verdict)


def test_certificates_measure_what_lower_products_change(lm, rows, held_out, trained):
    result = lm.finetune(rows, held_out, ADAMW, steps=4, batch_size=4, product_precision="default", certify=True)
    np.testing.assert_allclose(result.grad, trained.grad, rtol=1e-5, atol=1e-7 * abs(trained.grad).max())
    assert result.certificates.checks.product_error < 1e-5  # on a CPU all precisions are one
    assert np.isnan(trained.rerun(certify=True).certificates.checks.product_error)


@pytest.mark.slow
def test_a_gentle_run_is_believed_and_is_alignment(lm, rows, held_out):
    """Four steps on halves of the rows: each row is in two, so to first order in the rate the hypergradient of sgd is
    rate * 2 / 4 * <grad l_i, grad L_v>, with a minus."""
    rate, arguments = 1e-3, {"steps": 4, "batch_size": 4}
    result = lm.finetune(rows, held_out, optax.sgd(rate), certify=True, **arguments)
    assert result.verdict.level == "BELIEVE"
    assert result.certificates.finite_differences.ratios[0] == pytest.approx(1, abs=0.02)
    window = lm.finetune(rows, held_out, optax.sgd(rate), window=4, **arguments)
    np.testing.assert_allclose(window.grad, result.grad, rtol=1e-6)
    aligned = lm.finetune(rows, held_out, optax.sgd(rate), solver="alignment", **arguments)
    scores = aligned.lm.score("alignment", rows, held_out)
    np.testing.assert_allclose(-8 * aligned.grad, scores.values, rtol=1e-4)
    np.testing.assert_allclose(result.grad, rate / 2 * 8 * aligned.grad, rtol=0.05, atol=0.01 * abs(result.grad).max())


# ---- one sentence for each misuse

MISUSES = {
    "solver": ({"solver": "unrolled"}, "solver is 'unrolled'; it is one of 'unroll', 'implicit', 'alignment', or None"),
    "no validation": ({"validation": None}, "solver='unroll' differentiates the validation loss, and there are no"),
    "no prior": ({"solver": "implicit"}, "give proximal above 0 (try 0.1), or solver='unroll'"),
    "prior": ({"proximal": -1.0}, "proximal is -1.0; 0 or a positive number is wanted"),
    "steps": ({"steps": 5.0}, "steps is 5.0; a whole number of 1 or more is wanted"),
    "no steps": ({"steps": 0}, "steps is 0; a whole number of 1 or more is wanted"),
    "batch": ({"batch_size": 0}, "batch_size is 0"),
    "parts": ({"gradient_accumulation_steps": 3}, "must be 1 or more and divide train.global_batch_size"),
    "precision": ({"product_precision": "hihg"}, "product_precision is 'hihg'; choose 'highest', 'high' or 'default'"),
    "no products": ({"solver": "alignment", "product_precision": "high"}, "product_precision is an argument of"),
    "window": ({"solver": "implicit", "proximal": 0.1, "window": 2}, "window is an argument of solver='unroll'"),
    "linear solver": ({"linear_solver": bj.solvers.cg()}, "linear_solver is an argument of solver='implicit'"),
    "curvature": ({"curvature": "fisher"}, "curvature is 'fisher'; it is 'gauss_newton' or 'hessian'"),
    "optimizer": ({"optimizer": "adamw"}, "the optimizer is 'adamw'; one of optax is wanted"),
    "adam": ({"optimizer": optax.adamw(1e-2), "lora": 1}, "Adam and its kin need eps_root > 0"),
    "lion": ({"optimizer": optax.lion(1e-2)}, "does not depend on the gradient's size"),
    "lora": ({"lora": 1.5}, "lora is 1.5; a rank or lm.LoraSection"),
    "rank": ({"lora": -1}, "lora.r = -1"),
    "modules": ({"lora": bj.lm.LoraSection(r=1, target_modules=("query",))}, "query"),
    "objective": ({"objective": "ppo"}, "objective is 'ppo'; it is 'sft', 'dpo', 'simpo'"),
    "pairs": ({"objective": "dpo"}, "examples:1: one response, and objective.name = dpo compares a chosen"),
    "weights": ({"weights": np.ones(3)}, "weights (3,) for 8 examples; give one for each"),
    "whole weights": ({"weights": np.ones(8, int)}, "weights are int64; floats are wanted"),
    "nan": ({"weights": np.array([np.nan] + [1.0] * 7)}, "the weight of examples:1 is nan; give finite numbers"),
    "ids": ({"weights": {"a": 1.0}}, "8 examples, the first examples:1, have none"),
    "certify": ({"solver": None, "certify": True}, "with solver=None there is none: give a solver"),
    "rows": ({"examples": []}, "the examples have no rows; at least one is wanted"),
    "column": ({"examples": [{"prompt": "ab>"}]}, "examples:1: no 'response'"),
    "names": ({"examples": ["train.jsonl"]}, "the examples hold the string 'train.jsonl', and strings in a list are"),
    "dict": ({"examples": {"prompt": "ab>", "response": "bc"}}, "the examples are a dict; a path, a list of rows or a"),
    "number": ({"examples": 3}, "the examples are a int; a path, a list of rows or a datasets.Dataset is wanted"),
    "file": ({"examples": "nothing.jsonl"}, "nothing.jsonl: no such file"),
    "leaks": ({"leaks": "drop"}, "leaks is 'drop'; it is 'error' or 'keep'"),
}  # fmt: skip


TRAINS = ("adam", "lion", "modules", "pairs")
"""Those that are found only after something was compiled."""


@pytest.mark.parametrize(
    "misuse", [pytest.param(name, marks=[pytest.mark.slow] * (name in TRAINS)) for name in MISUSES]
)
def test_misuse_is_one_clear_sentence(lm, rows, held_out, misuse):
    changed, sentence = MISUSES[misuse]
    arguments = {"examples": rows, "validation": held_out, "optimizer": ADAMW, "steps": 4, "batch_size": 4}
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        lm.finetune(**arguments | changed)
    assert sentence in str(error.value)
    assert str(error.value).count("\n") <= 1 and str(error.value).endswith((".", ")", "optimizer"))


def test_leaks_are_named_or_kept(lm, rows):
    with pytest.raises(ValueError, match="1 training example also stands in the validation examples, the first: ex"):
        lm.finetune(rows, rows[:1], ADAMW, steps=4, batch_size=4)
    assert lm.finetune(rows, rows[:1], ADAMW, steps=4, batch_size=4, leaks="keep").status is bj.Status.OK


def test_examples_that_were_read_apart(lm, rows):
    examples = lm.read(rows[:2]) + lm.read(rows[1:3])
    with pytest.raises(ValueError, match=r"examples:3: the id \w+#0 stands twice"):
        lm.read(examples)
    with pytest.raises(ValueError, match="examples:2: dict .* among examples that are read already"):
        lm.read([*lm.read(rows[:1]), rows[1]])
    assert [example.row for example in lm.read(lm.read(rows)[3:])] == [0, 1, 2, 3, 4]
    frame, split = type("DataFrame", (), {})(), type("DatasetDict", (), {})()
    for source, remedy in ((frame, r"df.to_dict\('records'\)"), (split, r"data\['train'\]")):
        with pytest.raises(ValueError, match=remedy):
            lm.read(source)


@pytest.mark.slow
def test_numbers_that_are_not_finite_are_named(lm, rows, held_out):
    with pytest.raises(FloatingPointError, match="training is not finite any more within 2 of 2 steps: .*ex"):
        lm.finetune(rows, held_out, optax.sgd(1e38), steps=2, batch_size=4)


STATUSES = {
    "OK": ({}, "gauss_newton"),
    "NOT_FINITE": ({}, "gauss_newton"),
    "NOT_POSITIVE_DEFINITE": ({"curvature": -0.1}, "gauss_newton"),
    "NOT_SOLVED": ({"residual": 0.5, "steps": 3}, "gauss_newton"),
    "NOT_STATIONARY": ({"gap": 0.1}, "hessian"),
}


@pytest.mark.parametrize("name", STATUSES)
def test_each_status_has_its_error(name):
    numbers, curvature = STATUSES[name]
    checks = bj.Checks(**{"curvature": 1.0, "residual": 0.0, "gap": 0.0} | numbers)
    estimate = bj.Estimate(None, 0.5, None, checks)
    options = finetuning.SolverOptions("implicit", None, 0.1, curvature, None, None, 0.0)
    status = finetuning.judge_status(estimate, options, grad_is_finite=name != "NOT_FINITE")
    assert status.name == name
    if name != "OK":
        with pytest.raises(FloatingPointError, match=rf"{name}: .*\. throw=False returns the numbers\."):
            finetuning.raise_if_bad(status, checks)
    for solver in ("unroll", "alignment"):
        assert finetuning.judge_status(estimate, dataclasses.replace(options, name=solver), grad_is_finite=True) == 0


@pytest.mark.slow
def test_a_bad_solve_is_an_error_or_a_status(lm, rows, held_out):
    arguments = {"steps": 1, "batch_size": 4, "solver": "implicit", "proximal": 1e-6}
    stopped = bj.solvers.cg(tolerance=1e-9, max_steps=1)
    with pytest.raises(FloatingPointError, match="NOT_SOLVED: the linear system was not solved"):
        lm.finetune(rows, held_out, optax.sgd(0.1), linear_solver=stopped, **arguments)
    result = lm.finetune(rows, held_out, optax.sgd(0.1), linear_solver=stopped, throw=False, **arguments)
    assert result.status is bj.Status.NOT_SOLVED
    with pytest.raises(FloatingPointError, match="NOT_POSITIVE_DEFINITE: the curvature is not positive definite"):
        lm.finetune(rows, held_out, optax.sgd(0.1), curvature="hessian", **arguments)


@pytest.mark.slow
def test_the_derivative_by_the_learning_rate(lm64, rows, held_out):
    with jax.enable_x64(True):

        def train(rate):
            optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=rate)
            return lm64.finetune(rows, held_out, optimizer, steps=3, batch_size=4)

        up, down = (train(0.1 + step).value for step in (1e-5, -1e-5))
        assert float(train(0.1).grad_optimizer["learning_rate"]) == pytest.approx((up - down) / 2e-5, rel=1e-6)


# ---- documented, with examples that run

FUNCTIONS = {
    f"{owner.__name__}.{name}": value
    for owner in (bj.lm.LanguageModel, FineTuned)
    for name, value in vars(owner).items()
    if inspect.isfunction(value) and not name.startswith("_")
} | {"load": model.load, "builtin_rows": model.builtin_rows, "read_examples": bj.lm.read_examples}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_is_documented_with_an_example_that_runs(name, lm, rows, held_out, trained):
    doc = inspect.getdoc(FUNCTIONS[name])
    described = doc.partition("\nArgs:\n")[2].partition("\n\n")[0]
    parameters = [parameter for parameter in inspect.signature(FUNCTIONS[name]).parameters if parameter != "self"]
    missing = [parameter for parameter in parameters if f"    {parameter}: " not in described + "\n"]
    assert missing == [] and "\nRaises:\n" in doc and ("\nReturns:\n" in doc or name.endswith("save"))
    names = {"bj": bj, "jax": jax, "jnp": jnp, "optax": optax, "tempfile": tempfile}
    names |= {"lm": lm, "rows": rows, "held_out": held_out, "result": trained, "read_examples": bj.lm.read_examples}
    examples = doctest.DocTestParser().get_doctest(doc, names, name, None, None)
    assert examples.examples
    report: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(examples, out=report.append)
    assert not report, "".join(report)
