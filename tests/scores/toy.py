"""Rows of single letters, and a model that learns in context exactly: what the tests of scores share.

The model is Bayesian: a Dirichlet prior on the frequencies of letters, updated by every letter that it reads. So what
demonstrations do to a response is what training on them would do.
"""

import math

import numpy as np

from bilevel_jax.lm.data.examples import Example, Turn, hash_content
from bilevel_jax.lm.data.tokens import TokenizedSequence, corpus_from_sequences
from bilevel_jax.lm.inference.loglik import LogLik
from bilevel_jax.scores.incontext import DemonstrationFormat
from bilevel_jax.scores.requests import make_tokenized_examples

BOS = 0
LETTERS = "abcdefghijklmnopqrstuvwxyz ?"
PLAIN = DemonstrationFormat((BOS,), (), (), ((), ()), (), ())
"""Nothing around demonstrations."""


def ids(text):
    return [LETTERS.index(letter) + 1 for letter in text.lower()]


def rows(*said):
    """Rows from (question, answer) or, for pairs, (question, chosen, rejected)."""
    examples, sequences = [], []
    for i, (question, *answers) in enumerate(said):
        sides = [(Turn("user", question), Turn("assistant", answer)) for answer in answers]
        key = f"{hash_content(*sides)}#0"
        examples.append(Example(key, i, sides[0], "toy", None, "toy.jsonl", i + 1, *sides[1:]))
        for answer in answers:
            whole = [BOS, *ids(question), *ids(answer)]
            sequences.append(TokenizedSequence(np.array(whole, np.int32), np.arange(len(whole)) > len(question)))
    return make_tokenized_examples(examples, corpus_from_sequences(sequences, len(said[0]) - 1))


def log_p(letters, given):
    """log p(letters | given) of the Bayesian model with counts of 1 for each letter before it reads anything."""
    counts, total = np.ones(len(LETTERS) + 1), 0.0
    np.add.at(counts, np.array(given, int), 1)
    for letter in letters:
        total += math.log(counts[letter] / counts.sum())
        counts[letter] += 1
    return total


def engine(requests):
    return [LogLik(log_p(request.response, request.prefix), len(request.response)) for request in requests]


def scores(score, one, holdout):
    plan = score(one, holdout)
    return plan.combine(engine(plan.requests))
