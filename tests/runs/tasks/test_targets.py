"""The validation loss of several targets: one number, whatever the devices, the layout and the order of the rows."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax.core.unrolled import validation_loss_and_grad_fn
from bilevel_jax.runs.config.load import SelectConfig, load_config
from bilevel_jax.runs.engine.trainer import Trainer
from bilevel_jax.runs.infra.placement import place_table
from bilevel_jax.runs.infra.session import open_session
from bilevel_jax.runs.tasks import reference, splits
from bilevel_jax.runs.tasks.text import prepare_text_task

pytestmark = pytest.mark.usefixtures("x64")
DISTANCE = '''
import jax.numpy as jnp


def distance(params):
    """Of the first weights from a picture."""
    return jnp.mean((params["norm"]["scale"] - jnp.linspace(-1, 1, params["norm"]["scale"].shape[0])) ** 2)
'''
COEFFICIENTS = {"pairs": 0.7, "singles": 0.4, "margins": -0.2, "parameters": 0.5}


@pytest.fixture(scope="module")
def rows(made):
    """Validation rows of three sources: pairs, single responses of several lengths, and pairs again."""
    pairs = [json.loads(line) for line in (made / "pairs_report.jsonl").read_text().splitlines()]
    singles = [json.loads(line) for line in (made / "validation.jsonl").read_text().splitlines()][:5]
    for place, row in enumerate(singles):
        row["response"] = row["response"][: 1 + place % 2]
    sources = ["pairs"] * 7 + ["margins"] * 4
    return [dict(row, source=source) for row, source in zip(pairs, sources, strict=False)] + [
        dict(row, source="singles") for row in singles
    ]


@pytest.fixture(scope="module")
def write_rows(rows, tmp_path_factory):
    """order -> the folder of the rows in that order, a file of pairs and one of single responses."""

    def write(order):
        folder = tmp_path_factory.mktemp("rows")
        for name, key in (("pairs", "chosen"), ("singles", "response")):
            lines = [json.dumps(rows[place]) for place in order if key in rows[place]]
            (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
        (folder / "own.py").write_text(DISTANCE)
        return folder

    return write


def prepare(made, data, folder, *more):
    """The task of three targets with examples and one without, whose training loss is a mean over tokens."""
    (folder / "select.yaml").write_text(re.sub(r"(?m)^  test:.*\n", "", (made / "select.yaml").read_text()))
    config = load_config(
        SelectConfig,
        folder / "select.yaml",
        [
            "--data.validation", f"{data}/pairs.jsonl", f"{data}/singles.jsonl",
            "--model.param-dtype", "float64", "--objective.reduction", "token_mean",
            "--train.max-steps", "3", "--optimizer.eps-root", "1e-6",
            "--target.sources", *COEFFICIENTS, "--target.losses", "dpo", "sft", "simpo", f"{data}/own.py:distance",
            "--target.coefficients", *map(str, COEFFICIENTS.values()), "--target.beta", "0.3", "0", "1.5", "0",
            "--target.gamma-ratio", "-1", "-1", "0.2", "-1", *more,
        ],
    )  # fmt: skip
    task = prepare_text_task(
        config, splits.load_splits(config.data), folder, num_steps=3, seeds=[0], target=config.target
    )
    return config, task


def read_loss(task):
    """L_v and its gradient away from where training starts, on the host."""
    params = jax.tree.map(
        lambda leaf: leaf + 0.05 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), task.init_params(0)
    )
    value, grad = validation_loss_and_grad_fn(task.problem)(
        params, task.frozen(params), task.held_out_streams["validation"]
    )
    return params, float(value), jax.tree.map(np.asarray, grad)


def distance_between(one, other):
    """The largest over the leaves, relative to the largest entry of the leaf."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in pairs)


@pytest.fixture(scope="module")
def whole(made, rows, write_rows, tmp_path_factory):
    """(task, parameters, L_v, its gradient): one device, one micro-batch, no packing."""
    with jax.enable_x64(True):
        _, task = prepare(made, write_rows(range(len(rows))), tmp_path_factory.mktemp("whole"))
        return task, *read_loss(task)


def test_equals_plain_jax(whole, rows):
    """Each row by itself, by the decoder's own functions: no batch of ours, no padding."""
    task, params, value, grad = whole
    steps = map(task.held_out_streams["validation"].batch, range(4))
    assert [batch.get("tokens", np.zeros(0)).shape for batch in steps] == [(1, 16, 10), (1, 8, 8), (1, 16, 10), (0,)]

    def log_probs(params, prompt, response):
        ids = jnp.array([[1, *map(task.tokenizer.convert_tokens_to_ids, prompt + response), 2]])
        places = jnp.arange(ids.shape[1] - 1)[None]
        hidden = task.decoder.hidden(params, ids[:, :-1], places, jnp.ones_like(places))
        log_p = jax.nn.log_softmax(hidden @ task.decoder.head(params))
        return jnp.take_along_axis(log_p, ids[:, 1:, None], 2)[0, len(prompt) :, 0]

    def margin(params, row, reduce):
        chosen, rejected = (reduce(log_probs(params, row["prompt"], row[side])) for side in ("chosen", "rejected"))
        return chosen - rejected

    start = task.init_params(0)

    def outer(params):
        of = lambda source: [row for row in rows if row["source"] == source]  # noqa: E731
        gains = [margin(params, row, jnp.sum) - margin(start, row, jnp.sum) for row in of("pairs")]
        dpo = -jax.nn.log_sigmoid(0.3 * jnp.stack(gains)).mean()
        margins = jnp.stack([margin(params, row, jnp.mean) for row in of("margins")])
        simpo = -jax.nn.log_sigmoid(1.5 * (margins - 0.2)).mean()
        tokens = jnp.concatenate([log_probs(params, row["prompt"], row["response"]) for row in of("singles")])
        scale = params["norm"]["scale"]
        distance = jnp.mean((scale - jnp.linspace(-1, 1, scale.shape[0])) ** 2)
        return 0.7 * dpo - 0.4 * tokens.mean() - 0.2 * simpo + 0.5 * distance

    plain_value, plain_grad = jax.jit(jax.value_and_grad(outer))(params)
    assert value == pytest.approx(float(plain_value), rel=1e-12)
    assert distance_between(grad, jax.tree.map(np.asarray, plain_grad)) < 1e-10


def test_a_stored_reference_is_read(made, rows, write_rows, whole, tmp_path, monkeypatch):
    """By a target, too, where training has none: by the ids of the pairs, whatever their order."""
    margins = {
        part[0].corpus.num_examples: part[0].corpus.reference_margins for part in whole[0].target_corpora.values()
    }
    (tmp_path / "first").mkdir()
    prepare(made, write_rows(range(len(rows))), tmp_path / "first")
    monkeypatch.setattr(reference, "compute_pair_log_probs", None)
    stored = str(tmp_path / "first" / "reference.parquet")
    _, task = prepare(made, write_rows(range(len(rows))[::-1]), tmp_path, "--objective.reference", stored)
    [corpora] = task.target_corpora.values()
    np.testing.assert_array_equal(corpora[0].corpus.reference_margins, margins[7][::-1])


WAYS = {
    "eight devices": ("--mesh.data", "8"),
    "devices share a model": ("--mesh.data", "4", "--mesh.fsdp", "2"),
    "packed": ("--data.packing",),
    "micro-batches": ("--train.gradient-accumulation-steps", "4"),
    "one row at a time": ("--train.global-batch-size", "1"),
    "recomputed layers": ("--model.remat", "full"),
    "all of it": ("--mesh.data", "2", "--mesh.fsdp", "2", "--data.packing", "--train.gradient-accumulation-steps", "2"),
}


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[] if way == "all of it" else pytest.mark.slow) for way in WAYS]
)
def test_is_the_same_number_in_every_layout(made, rows, write_rows, whole, tmp_path, way):
    """And in another order of the rows."""
    order = np.random.default_rng(0).permutation(len(rows))
    _, task = prepare(made, write_rows(order), tmp_path, *WAYS[way])
    _, value, grad = read_loss(task)
    assert value == pytest.approx(whole[2], rel=1e-12)
    assert distance_between(grad, whole[3]) < 1e-10


def hypergradient(made, data, folder, *more):
    config, task = prepare(made, data, folder, *more)
    with open_session(folder, progress=False, save_seconds=1e9) as session:
        trainer = Trainer(task, config.outer, session)
        weights = place_table(task.mesh, np.linspace(0.5, 1.5, task.num_examples))
        run = trainer.run(weights, trainer.init_state(task.init_params(0)), task.training_stream(0), for_backward=True)
        return np.asarray(trainer.estimate(run, weights, task.training_stream(0)).grad)


@pytest.fixture(scope="module")
def whole_hypergradient(made, rows, write_rows, tmp_path_factory):
    with jax.enable_x64(True):
        return hypergradient(made, write_rows(range(len(rows))), tmp_path_factory.mktemp("hypergradient"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        *(more for way, more in WAYS.items() if way != "one row at a time"),  # which is another training
        ("--outer.linearize",),
        ("--outer.memory-gib", "2e-3"),
    ],
    ids=" ".join,
)
def test_gives_the_same_hypergradient_in_every_layout(made, rows, write_rows, whole_hypergradient, tmp_path, more):
    found = hypergradient(made, write_rows(range(len(rows))[::-1]), tmp_path, *more)
    far = np.linalg.norm(found - whole_hypergradient) / np.linalg.norm(whole_hypergradient)
    assert far < 1e-10 and np.abs(whole_hypergradient).max() > 0
