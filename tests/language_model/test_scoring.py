"""Scores from Python: each equals what the formula or the command of its name gives."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import bilevel_jax as bj
from bilevel_jax.commands.rank.run import rank
from bilevel_jax.language_model import inference
from bilevel_jax.language_model.scoring import SCORES
from bilevel_jax.runs.config.load import RankConfig, TrainConfig, load_config
from bilevel_jax.runs.config.schema import ScoresSection
from bilevel_jax.runs.infra.session import open_session
from bilevel_jax.runs.scoring.scores import compute_score
from bilevel_jax.runs.tasks import splits
from bilevel_jax.runs.tasks.text import prepare_text_task
from bilevel_jax.scores.embedding import hidden_states

SHORT = {"template": "{examples}{question}", "demonstration_template": "{answer}\n"}
"""For the small model, whose context has 32 tokens."""


def test_scores_of_likelihoods_are_their_formulas(lm, rows):
    losses = lm.score("loss", rows).values
    np.testing.assert_allclose(lm.score("perplexity", rows).values, -np.exp(losses), rtol=1e-6)
    alone = []  # the loss of the response behind BOS alone
    for row in rows:
        ids = [1, *lm.tokenizer.convert_tokens_to_ids(list(row["response"])), 2]
        array = jnp.array([ids[:-1]])
        hidden = lm.decoder.hidden(lm.params, array, jnp.arange(len(ids) - 1)[None], jnp.ones_like(array))
        log_p = jax.nn.log_softmax(hidden @ lm.decoder.head(lm.params))[0]
        alone.append(-np.mean([log_p[at, ids[at + 1]] for at in range(len(ids) - 1)]))
    np.testing.assert_allclose(lm.score("ifd", rows).values, losses / np.array(alone), rtol=1e-5)
    random = lm.score("random", rows, seed=1)
    assert ((random.values >= 0) & (random.values < 1)).all() and len(set(random.ids)) == 8
    turned = lm.score("random", rows[::-1], seed=1)
    assert turned.values.tolist() == random.values[::-1].tolist() and turned.ids == random.ids[::-1]


@pytest.mark.parametrize(
    "name, arguments",
    (
        ("ica", {"k": 1}),
        pytest.param("oneshot", {"anchors": 4}, marks=pytest.mark.slow),
        pytest.param("alignment", {}, marks=pytest.mark.slow),
        pytest.param("margin", {}, marks=pytest.mark.slow),
        pytest.param("perplexity", {}, marks=pytest.mark.slow),
    ),
)
def test_equals_the_score_of_the_commands(made, tmp_path, name, arguments):
    config = load_config(TrainConfig, made / "train.yaml", ["--data.split", "1", "0", "0"])
    loaded = splits.load_splits(config.data)
    task = prepare_text_task(config, loaded, tmp_path, num_steps=4, seeds=[0])
    with open_session(tmp_path, progress=False, save_seconds=600) as session:
        wanted = compute_score(name, task, task.init_params(0), ScoresSection(**arguments), session).values
    holdout = [loaded.held_out["validation"]] if SCORES[name].takes_holdout else []
    found = bj.lm.load(made / "model").score(name, loaded.train, *holdout, **arguments)
    np.testing.assert_allclose(found.values, wanted, rtol=2e-5, atol=1e-6)


def test_sppl_and_self_similarity_equal_those_of_rank(made, tmp_path):
    """With the model's own answers given, and all questions in one block."""
    rows = [json.loads(line) for line in (made / "train.jsonl").read_text().splitlines()][:6]
    own = {row["prompt"]: row["response"][::-1] for row in rows}
    table = [
        {"prompt": row["prompt"], "responses": {"given": row["response"], "turned": row["response"][1:] + "a"}}
        for row in rows
    ]
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    answers = [{"prompt": question, "response": answer} for question, answer in own.items()]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    (tmp_path / "rank.yaml").write_text(
        f"""
model: {{name_or_path: {made}/model}}
data: {{train: [{tmp_path}/table.jsonl]}}
rank:
  block_size: 6
  num_blocks: 1
  k: 2
  own_answers: {tmp_path}/own.jsonl
  metrics: [sppl, self_similarity]
  template: "{SHORT["template"]}"
  example_template: "{{answer}}\\n"
output: {{dir: {tmp_path}/run, progress: false}}
mesh: {{data: 1}}
"""
    )
    rank(load_config(RankConfig, tmp_path / "rank.yaml"))
    wanted = pq.read_table(tmp_path / "run" / "rank.parquet").to_pylist()
    lm = bj.lm.load(made / "model")
    examples = [{"prompt": row["question"], "response": row["response"]} for row in wanted]
    sppl = lm.score("sppl", examples, own_answers=own, **SHORT)
    np.testing.assert_allclose(-sppl.values, [row["sppl"] for row in wanted], rtol=1e-5)
    similarity = lm.score("self_similarity", examples, own_answers=own)
    np.testing.assert_allclose(similarity.values, [row["self_similarity"] for row in wanted], rtol=1e-5)


def test_own_answers_are_generated_and_do_not_depend_on_the_order(lm, rows):
    arguments = {"max_new_tokens": 5, "k": 1, **SHORT}
    scores = lm.score("sppl", rows, **arguments)
    assert np.isfinite(scores.values).sum() == 8 and (scores.values < -1).all()
    turned = lm.score("sppl", rows[::-1], **arguments)
    np.testing.assert_allclose(turned.values[::-1], scores.values, rtol=1e-5)
    assert all("own answers were cut" in note or "are empty" in note for note in scores.notes)


@pytest.mark.parametrize("demonstrations", ["knn", "clustered:2"])
def test_vectors_of_a_file_choose_demonstrations_as_the_same_of_the_model(lm, rows, held_out, tmp_path, demonstrations):
    """The model's hidden states, of any length, in any order, from a file."""
    parts = [inference.tokenize(lm, bj.lm.read_examples(part)) for part in (rows, held_out)]
    vectors = hidden_states(lm.decoder, lm.joined_params)(*parts)
    ids = [example.id for part in parts for example in part.examples]
    scaled = np.concatenate(vectors) * np.random.default_rng(0).uniform(0.1, 9, len(ids))[:, None]
    order = np.random.default_rng(1).permutation(len(ids))
    table = {"id": [ids[i] for i in order], "embedding": [scaled[i].tolist() for i in order]}
    path = str(tmp_path / "vectors.parquet")
    pq.write_table(pa.table(table), path)
    given = {
        "demonstrations": demonstrations,
        "k": 1,
        "template": "{demonstrations}{row}",
        "demonstration_template": "{demonstration}\n",
    }
    found = lm.score("ica", rows, held_out, embedding="file", embedding_file=path, **given)
    np.testing.assert_array_equal(found.values, lm.score("ica", rows, held_out, embedding="hidden", **given).values)
    with pytest.raises(ValueError, match=r"no embedding for the example \w+#0 \(examples:2\)"):
        lm.score(
            "ica",
            bj.lm.read_examples([*rows[:1], {"prompt": "ab>", "response": "ba"}]),
            held_out,
            embedding="file",
            embedding_file=path,
            **given,
        )


def test_reducible_is_the_difference_of_two_models(lm, rows, held_out):
    holdout_model = lm.finetune(held_out, optimizer=optax.sgd(0.5), steps=2, batch_size=5, solver=None).lm
    found = lm.score("reducible", rows, holdout_model=holdout_model).values
    expected = lm.score("loss", rows).values - holdout_model.score("loss", rows).values
    np.testing.assert_allclose(found, expected, atol=1e-6)


MISUSES = {
    "name": (("icl",), {}, "there is no score 'icl'; did you mean 'ica'? the scores: loss, perplexity"),
    "holdout": (("ica",), {}, "the score 'ica' compares with a holdout: give trusted examples as the third"),
    "no holdout": (("ifd", "held_out"), {}, "the score 'ifd' reads no holdout. Leave it out."),
    "argument": (("perplexity",), {"k": 2}, "the score 'perplexity' does not read k; it reads none of these"),
    "arguments": (("oneshot", "held_out"), {"k": 2}, "the score 'oneshot' does not read k; it reads anchors, max_"),
    "k": (("ica", "held_out"), {"k": 0}, "k is 0; a whole number of 1 or more is wanted."),
    "many": (("ica", "held_out"), {"k": 9}, "5 holdout rows, and k = 9 of them are to be shown."),
    "demonstrations": (("ica", "held_out"), {"demonstrations": "best"}, "demonstrations are 'best'; they are 'knn'"),
    "embedding": (("ica", "held_out"), {"embedding": "words"}, "embedding is 'words'; it is 'tfidf', 'hidden' or"),
    "no file": (("ica", "held_out"), {"embedding": "file"}, "embedding='file' reads embedding_file: give both, or nei"),
    "file": (("ica", "held_out"), {"embedding_file": "e"}, "embedding='file' reads embedding_file: give both, or nei"),
    "template": (("ica", "held_out"), {"template": "{row}"}, "must hold {demonstrations} and then {row}, once each"),
    "holdout model": (("reducible",), {}, "give holdout_model=lm.finetune(holdout, optimizer=..., steps=..., solver="),
    "few answers": (("sppl",), {"k": 7, "own_answers": "own"}, "8 of 8 questions have one that can be shown; 9 are"),
    "no answer": (("sppl",), {"own_answers": {}}, "own_answers has none to 8 of 8 questions, the first at examples:"),
    "long": (("sppl",), {"own_answers": "own"}, "own it takes 180 token places, and the model's context has 32"),
}  # fmt: skip


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_is_one_clear_sentence(lm, rows, held_out, misuse):
    (name, *holdout), arguments, sentence = MISUSES[misuse]
    if arguments.get("own_answers") == "own":
        arguments = arguments | {"own_answers": {row["prompt"]: "abcd" for row in rows}}
    with pytest.raises(ValueError) as error:
        lm.score(name, rows, *[held_out for _ in holdout], **arguments)
    assert sentence in str(error.value) and str(error.value).endswith(".")


def test_scores_with_own_answers_want_a_question_and_a_response(lm):
    with pytest.raises(ValueError, match=r"examples:1: a question and one response .* and this is text \(text\)\."):
        lm.score("sppl", [{"text": "abcd"}])


def test_examples_that_do_not_fit_are_dropped_where_the_model_says_so(lm, rows):
    long = [*rows, {"prompt": "dcba>", "response": "a" * 22}]
    own = {row["prompt"]: "abcd" for row in long}
    with pytest.raises(ValueError, match="so do 1 of 9 examples"):
        lm.score("sppl", long, own_answers=own, **SHORT)
    dropping = dataclasses.replace(lm, data=bj.lm.DataSection(truncation="drop"))
    for name, arguments in (("sppl", SHORT), ("self_similarity", {})):
        longest = [*rows, {"prompt": "dcba>", "response": "a" * (22 if name == "sppl" else 40)}]
        scores = dropping.score(name, longest, own_answers=own, **arguments)
        assert np.isnan(scores.values).tolist() == [False] * 8 + [True]
        assert scores.notes[-1] == f"1 of 9 examples have no {name}, the first examples:9."
