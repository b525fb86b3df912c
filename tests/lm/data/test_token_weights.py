"""Weights of turns and of single tokens: each stays with its token, through templates, limits and packing."""

import numpy as np
import pytest

from bilevel_jax.core.types import PADDING
from bilevel_jax.lm.data import batches
from bilevel_jax.lm.data.examples import example_to_row, load_examples, summarize_examples
from bilevel_jax.lm.data.targets import TokenWeights
from bilevel_jax.lm.data.tokens import Corpus, TokenizedSequence, corpus_from_sequences, tokenize
from bilevel_jax.lm.data.turns import Turn
from tests.lm.data.test_message_keys import chat, put
from tests.lm.data.test_tokens import BLOCKS, CHATML, LLAMA2, LLAMA3, PAIR, PLAIN, TALK, TEXT, bpe, example


def weighed(first, last):
    """TALK with weights of its two answers; None: no target."""
    turns = list(TALK.turns)
    for at, weight in ((1, first), (3, last)):
        turns[at] = turns[at]._replace(is_target=weight is not None, weight=weight or 1.0)
    return TALK._replace(turns=tuple(turns))


def split_runs(sequence):
    """The weights of each run of targets."""
    starts = np.flatnonzero(np.diff(sequence.target_mask.astype(int), prepend=0) == 1)
    stops = np.flatnonzero(np.diff(sequence.target_mask.astype(int), append=0) == -1)
    return [sequence.token_weights[a : b + 1].tolist() for a, b in zip(starts, stops, strict=True)]


@pytest.mark.parametrize("template", [LLAMA3, CHATML, BLOCKS, PLAIN, LLAMA2])
def test_all_tokens_of_a_turn_have_its_weight(template):
    tokenizer = bpe(template)
    plain = tokenize([TALK], tokenizer, max_length=200)[0]
    assert plain.token_weights is None and plain.get_sequence(0).token_weights is None
    corpus, report = tokenize([weighed(0.5, 3)], tokenizer, max_length=200)
    assert corpus.ids.tolist() == plain.ids.tolist() and corpus.target_mask.tolist() == plain.target_mask.tolist()
    first, last = split_runs(corpus.get_sequence(0))
    assert set(first) == {0.5} and set(last) == {3.0} and len(first + last) == report.num_targets
    assert set(corpus.token_weights[~corpus.target_mask]) == {1.0} and corpus.token_weights.dtype == np.float32


def test_weights_of_one_leave_no_trace():
    tokenizer = bpe(CHATML)
    given = {TALK.id: TokenWeights(np.ones(tokenize([TALK], tokenizer, max_length=99)[1].num_targets), "w.jsonl:1")}
    assert tokenize([weighed(1, 1)], tokenizer, max_length=99, token_weights=given)[0].token_weights is None
    assert tokenize([weighed(None, 1)], tokenizer, max_length=99)[0].token_weights is None
    # of a turn that is not trained on, neither
    assert tokenize([weighed(0.5, 1)], tokenizer, max_length=99, train_on="last_turn")[0].token_weights is None


@pytest.mark.parametrize("row", [TALK, PAIR, TEXT], ids=["talk", "pair", "text"])
@pytest.mark.parametrize("template", [CHATML, BLOCKS, None])
def test_each_target_has_the_weight_that_was_given_for_it(row, template):
    if template is None and row is TALK:
        pytest.skip("a dialogue needs a template")
    tokenizer = bpe(template)
    plain, report = tokenize([row], tokenizer, max_length=200)
    values = 1 + np.arange(report.num_targets) / 4
    given = {row.id: TokenWeights(values, "w.jsonl:1"), "another": TokenWeights(np.ones(3), "w.jsonl:2")}
    corpus, _ = tokenize([row], tokenizer, max_length=200, token_weights=given)
    assert corpus.token_weights[plain.target_mask].tolist() == values.tolist()
    other = example("Name", "A dog", line=9)  # not in the file: 1
    both, _ = tokenize([row, other], tokenizer, max_length=200, token_weights=given)
    assert set(both.get_sequence(1).token_weights) == {1.0}


def test_weights_of_turns_and_tokens_multiply_and_0_is_no_target():
    tokenizer = bpe(CHATML)
    plain, report = tokenize([TALK], tokenizer, max_length=200)
    values = np.arange(report.num_targets, dtype=float)  # the first is 0
    given = {TALK.id: TokenWeights(values, "w.jsonl:1")}
    corpus, weighed_report = tokenize([weighed(0.5, 2)], tokenizer, max_length=200, token_weights=given)
    targets = np.flatnonzero(plain.target_mask)
    num_first = int(np.flatnonzero(np.diff(targets) > 1)[0]) + 1
    factors = np.where(np.arange(len(targets)) < num_first, 0.5, 2)
    assert weighed_report.num_targets == report.num_targets - 1 and not corpus.target_mask[targets[0]]
    assert corpus.token_weights[targets[1:]].tolist() == (values * factors)[1:].tolist()


@pytest.mark.parametrize("truncation", ["left", "right"])
def test_a_cut_leaves_every_token_its_weight(truncation):
    tokenizer = bpe(BLOCKS)
    plain, report = tokenize([TALK], tokenizer, max_length=200)
    weight_of = dict(zip(np.flatnonzero(plain.target_mask), 1 + np.arange(report.num_targets) / 8, strict=True))
    given = {TALK.id: TokenWeights(np.array([*weight_of.values()]), "w.jsonl:1")}
    num_cuts = 0
    for limit in range(int(plain.target_mask.argmax()) + 1, len(plain.ids)):
        cut, _ = tokenize([TALK], tokenizer, max_length=limit, truncation=truncation)
        corpus, cuts = tokenize([TALK], tokenizer, max_length=limit, truncation=truncation, token_weights=given)
        assert corpus.ids.tolist() == cut.ids.tolist() and corpus.target_mask.tolist() == cut.target_mask.tolist()
        # where each kept token stood: behind BOS from the end, or from the beginning, or both cuts
        removed = len(plain.ids) - limit
        if cuts.truncated_left and not cuts.truncated:
            places = np.r_[0, np.arange(1 + removed, len(plain.ids))]
        elif not cuts.truncated_left:
            places = np.arange(limit)
        else:
            gone = next(g for g in range(1, removed) if plain.ids[1 + g : g + limit].tolist() == cut.ids[1:].tolist())
            places = np.r_[0, np.arange(1 + gone, gone + limit)]
        expected = [
            weight_of.get(place, 1) if is_target else 1
            for place, is_target in zip(places, cut.target_mask, strict=True)
        ]
        found = np.ones(limit) if corpus.token_weights is None else corpus.token_weights
        assert found.tolist() == expected
        num_cuts += bool(cuts.truncated_left or cuts.truncated)
    assert num_cuts > 5


@pytest.mark.parametrize(
    "values, message",
    [
        ([1.0, 2.0], "w.jsonl:7: 2 token weights for the example 1#0 (rows.jsonl:1), which has {n} targets, its end"),
        ([-1.0] * 99, "w.jsonl:7: token weight 1 for the example 1#0 (rows.jsonl:1) is -1; a number from 0 to"),
        ([1.0, np.nan] * 99, "w.jsonl:7: token weight 2 for the example 1#0 (rows.jsonl:1) is nan; a number from 0 to"),
        ([0.0] * 99, "w.jsonl:7: all token weights for the example 1#0 (rows.jsonl:1) are 0, so there is nothing"),
    ],
)
def test_token_weights_that_do_not_fit(values, message):
    tokenizer = bpe(CHATML)
    number = tokenize([PAIR], tokenizer, max_length=200)[1].num_targets
    with pytest.raises(ValueError) as error:
        given = {PAIR.id: TokenWeights(np.array(values[:number]), "w.jsonl:7")}
        tokenize([PAIR], tokenizer, max_length=200, token_weights=given)
    assert str(error.value).startswith(message.format(n=number))


@pytest.mark.parametrize("key", ["weight", "loss_weight"])
def test_weights_of_turns_are_read_and_survive_a_file(tmp_path, key):
    rows = [{"messages": chat({key: 0.5}, {key: 2})}, {"messages": chat({key: 0.5, "train": True}, {key: 1})}]
    examples = load_examples(put(tmp_path, *rows))
    assert [[turn.weight for turn in one.turns[1::2]] for one in examples] == [[0.5, 2], [0.5, 1]]
    assert not any(one.unread_keys for one in examples)
    assert "3 answers have a weight of their own" in summarize_examples(examples)
    for row_format in ("auto", "sharegpt"):
        again = load_examples(put(tmp_path, *(example_to_row(one, row_format) for one in examples)))
        assert [(one.turns, one.id) for one in again] == [(one.turns, one.id) for one in examples]
    plain = load_examples(put(tmp_path, {"messages": chat()}))[0]
    assert len({plain.id, *(one.id for one in examples)}) == 3  # the weights belong to what an example says


def test_messages_of_llama_factory(tmp_path):
    """Its standard format: content in parts of type and value, 0 for what is not learned."""
    messages = [
        {"role": role, "content": [{"type": "text", "value": text}], "loss_weight": weight}
        for role, text, weight in (("system", "s", 0.0), ("user", "A?", 0.0), ("assistant", "B", 0.25))
    ]
    (one,) = load_examples(put(tmp_path, {"messages": messages}))
    assert one.turns == (Turn("system", "s"), Turn("user", "A?"), Turn("assistant", "B", weight=0.25))
    assert one.unread_keys == ()
    messages[1]["loss_weight"] = 0.5
    assert load_examples(put(tmp_path, {"messages": messages}))[0].unread_keys == ("messages[].loss_weight",)


def test_a_preference_pair_has_no_weights_of_turns(tmp_path):
    pair = {"prompt": chat()[:1], "chosen": chat({"weight": 0.5})[1:2], "rejected": chat()[3:]}
    with pytest.raises(
        ValueError, match="rows.jsonl:1: an answer has the weight 0.5, and a preference compares the lo"
    ):
        load_examples(put(tmp_path, pair))
    pair["chosen"][0]["weight"] = 1
    assert load_examples(put(tmp_path, pair))[0].rejected
    sides = example("A", "B")._replace(rejected=example("A", "C").turns)
    with pytest.raises(ValueError, match="w:1: token weights for the example .* which is a preference pair"):
        tokenize([sides], bpe(CHATML), max_length=99, token_weights={sides.id: TokenWeights(np.ones(2), "w:1")})


# ---- batches


def make_corpus(num_rows, with_weights=True):
    """All tokens different; the weight of a target is a function of it."""
    rng, out, at = np.random.default_rng(0), [], 1
    for n in rng.integers(2, 13, num_rows):
        ids = np.arange(at, at + n, dtype=np.int32)
        out.append(TokenizedSequence(ids, np.arange(n) >= max(n // 2, 1), ids / 64 if with_weights else None))
        at += n
    return corpus_from_sequences(out)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("num_micro_batches", [1, 4])
def test_batches_hold_the_weight_of_each_target(packing, num_micro_batches):
    corpus = make_corpus(21)
    order = batches.shuffled_order(21, 8, 0)
    shape = batches.fit_batch_shape(corpus, [order], 3, num_micro_batches=num_micro_batches, length=24, packing=packing)
    assert not packing or shape.rows < shape.examples or num_micro_batches == 4
    seen = 0
    for step in range(3):
        batch = batches.make_train_stream(corpus, order, 3, shape).batch(step)
        is_target = batch["slot"] < shape.examples
        assert batch["token_weights"].dtype == np.float32 and (batch["token_weights"][~is_target] == 1).all()
        expected = (batch["targets"] / 64).astype(np.float32)
        assert (batch["token_weights"][is_target] == expected[is_target]).all()
        plain = batches.make_train_stream(make_corpus(21, with_weights=False), order, 3, shape).batch(step)
        assert "token_weights" not in plain
        for name, leaf in plain.items():
            np.testing.assert_array_equal(batch[name], leaf, err_msg=name)
        seen += int((batch["index"] != PADDING).sum())
    assert seen == 21


def test_a_corpus_checks_its_weights():
    ids, mask, offsets = np.arange(4, dtype=np.int32), np.array([False, True, True, True]), np.array([0, 4])
    assert Corpus(ids, mask, offsets, token_weights=np.array([0, 1, 2, 3.0])).token_weights is not None
    for bad in (np.ones(3), np.array([1, 1, 0, 1.0]), np.array([1, np.inf, 1, 1]), np.array([1, -1.0, 1, 1])):
        with pytest.raises(ValueError, match="token_weights .* for 4 tokens; give each one number, and each target"):
            Corpus(ids, mask, offsets, token_weights=bad)
    with pytest.raises(ValueError, match="token_weights of preference pairs, whose losses compare whole responses"):
        Corpus(ids, mask, np.array([0, 2, 4]), 2, token_weights=np.ones(4))
