"""The examples in the docstrings of lm and scores run, offline and with the builtin tiny model."""

import doctest
import importlib
import pkgutil

import pytest

import bilevel_jax.lm
import bilevel_jax.scores

MODULES = [
    module.name
    for package in (bilevel_jax.lm, bilevel_jax.scores)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
]
WITH_EXAMPLES = {  # what a newcomer calls first
    "bilevel_jax.lm.builtin.cipher": ["write_cipher_data"],
    "bilevel_jax.lm.builtin.scripts": ["write_scripts_data"],
    "bilevel_jax.lm.builtin.sums": ["write_sums_data"],
    "bilevel_jax.lm.data.batches": ["make_train_stream"],
    "bilevel_jax.lm.data.examples": ["load_examples"],
    "bilevel_jax.lm.data.tokens": ["tokenize"],
    "bilevel_jax.lm.inference.generate": ["make_sampler"],
    "bilevel_jax.lm.inference.loglik": ["make_loglik_scorer"],
    "bilevel_jax.lm.inference.openai": ["make_chat_client"],
    "bilevel_jax.lm.inference.prompts": ["make_prompts"],
    "bilevel_jax.lm.losses.importance": ["importance_weighted_losses"],
    "bilevel_jax.lm.losses.preferences": ["dpo_losses", "simpo_losses"],
    "bilevel_jax.lm.losses.sft": ["sft_losses"],
    "bilevel_jax.lm.models.decoder": ["make_decoder"],
    "bilevel_jax.lm.models.huggingface": ["load_model"],
    "bilevel_jax.scores.diversity": ["select_diverse"],
    "bilevel_jax.scores.ifd": ["ifd_score"],
    "bilevel_jax.scores.incontext": ["ica_score"],
    "bilevel_jax.scores.margin": ["el2n"],
    "bilevel_jax.scores.perplexity": ["loss_score", "perplexity_score", "reducible_loss"],
    "bilevel_jax.scores.random": ["random_score"],
    "bilevel_jax.scores.selfsimilarity": ["response_similarity"],
    "bilevel_jax.scores.strategies": ["alignment_score", "car_score"],
    "bilevel_jax.scores.weights": ["minmax_weights", "clipped_minmax_weights", "rank_weights", "batch_minmax_weights"],
}


def examples_of(name):
    return [test for test in doctest.DocTestFinder().find(importlib.import_module(name)) if test.examples]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in examples_of(name):
        report = []
        runner.run(test, out=report.append)
        assert not runner.failures, "".join(report)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_main_functions_have_an_example(name):
    functions = {test.name.rsplit(".", 1)[1] for test in examples_of(name)}
    assert set(WITH_EXAMPLES[name]) <= functions


@pytest.mark.parametrize("name", MODULES)
def test_the_first_line_is_a_short_noun_phrase(name):
    first_line = (importlib.import_module(name).__doc__ or "").splitlines()[:1]
    assert first_line != [""] and all(len(line.split()) <= 12 and line.endswith(".") for line in first_line)
