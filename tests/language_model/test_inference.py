"""Reading and writing from Python: likelihoods are those of training, and draws depend on their prompt alone."""

import jax
import numpy as np
import optax
import pytest

import bilevel_jax as bj

QUESTION = [{"role": "user", "content": "abcd>"}]


def test_likelihoods_are_the_losses_of_training(lm, rows):
    logliks = lm.loglik([row["prompt"] for row in rows], [row["response"] for row in rows])
    losses = lm.score("loss", rows).values
    np.testing.assert_allclose(-logliks.nats / logliks.num_tokens, losses, rtol=1e-5)
    whole = lm.finetune(rows, optimizer=optax.sgd(0.1), steps=1, batch_size=8, solver=None).losses[0]
    assert whole == pytest.approx(losses.mean(), rel=1e-5)
    assert logliks.num_tokens.tolist() == [5] * 8  # four letters and the end token


@pytest.mark.slow
def test_draws_depend_on_their_prompt_alone(lm, rows):
    drawn = lm.generate(["abcd>", "bcda>"], max_new_tokens=6, num_generations=2, seed=3)
    assert [len(responses) for responses in drawn] == [2, 2] and drawn[0][0] != drawn[0][1]
    again = lm.generate([[{"role": "user", "content": "bcda>"}], QUESTION], max_new_tokens=6, num_generations=2, seed=3)
    assert [[one.text for one in responses] for responses in again] == [
        [one.text for one in responses] for responses in (drawn[1], drawn[0])
    ]
    asked = lm.read([{"prompt": "abcd>", "response": "z"}])  # an example: its response is generated anew
    assert lm.generate(asked, max_new_tokens=6, num_generations=2, seed=3)[0][0].text == drawn[0][0].text
    assert lm.generate(["abcd>"], max_new_tokens=6, seed=4)[0][0].text != drawn[0][0].text


def test_likelihoods_of_a_draw_are_those_that_it_was_drawn_with(lm):
    """Of draws that ended and hold no other special token, so that their text is read as the same tokens."""
    [drawn] = lm.generate(["abcd>"], max_new_tokens=6, num_generations=64, seed=1)
    special = set(lm.tokenizer.all_special_ids)
    whole = [one for one in drawn if one.ended and one.text and not special & set(one.tokens[:-1])]
    assert len(whole) >= 3
    nats = lm.loglik(["abcd>"] * len(whole), [one.text for one in whole]).nats
    np.testing.assert_allclose(nats, [sum(one.log_probs) for one in whole], rtol=1e-5)


def test_a_model_is_saved_and_loaded(lm, tmp_path):
    lm.save(tmp_path / "model")
    again = bj.lm.load(tmp_path / "model")
    for one, other in zip(jax.tree.leaves(again.params), jax.tree.leaves(lm.params), strict=True):
        np.testing.assert_array_equal(one, other)


def test_loading_is_refused_in_one_sentence(lm, small_folder, tmp_path):
    for arguments, error, sentence in (
        (
            {"folder": tmp_path / "nothing"},
            FileNotFoundError,
            "nothing: no such file; give a Hugging Face model folder.",
        ),
        ({"folder": small_folder, "dtype": "float16"}, ValueError, "dtype is 'float16'; it is float32, bfloat16 or"),
        ({"folder": small_folder, "dtype": "float64"}, ValueError, 'jax.config.update("jax_enable_x64", True) first.'),
        ({"folder": small_folder, "data": bj.lm.DataSection(train=("a",))}, ValueError, "Give examples to the methods"),
        ({"folder": "builtin:stories"}, ValueError, "builtin:stories is no built-in model; they are"),
        ({"folder": small_folder, "adapter": small_folder}, FileNotFoundError, "give a PEFT adapter folder."),
    ):
        with pytest.raises(error) as told:
            bj.lm.load(**arguments)
        assert sentence in str(told.value)
    base = bj.lm.load(small_folder, dtype="bfloat16")
    with pytest.raises(ValueError, match="the parameters are bfloat16, which only a frozen base can be: give lora"):
        base.finetune([{"text": "ab"}], steps=1, solver=None)


def test_prompts_are_refused_in_one_sentence(lm):
    for prompts, sentence in (
        ("abcd>", "the prompts are the string 'abcd>'; a list is wanted: ['abcd>']."),
        ([], "there are no prompts; give at least one."),
        ([[{"role": "assistant", "content": "a"}]], "prompts:1: list"),
        ([[]], "prompts:1: list []; a string or messages that end with the user's are wanted."),
        (["abcd>", 3], "prompts:2:"),
        (["a" * 30], "has 31 tokens; with max_new_tokens = 6 the model's context of 32 has room for 27."),
        (7, "the prompts are a int; a path, a list of rows or a datasets.Dataset is wanted."),
    ):
        with pytest.raises(ValueError) as told:
            lm.generate(prompts, max_new_tokens=6)
        assert sentence in str(told.value)
    for arguments, sentence in (
        ({"max_new_tokens": 0}, "max_new_tokens is 0; a whole number of 1 or more is wanted."),
        ({"num_generations": 1.5}, "num_generations is 1.5; a whole number of 1 or more is wanted."),
        ({"max_new_tokens": 2, "temperature": -1.0}, "temperature and top_k must be 0 or more"),
    ):
        with pytest.raises(ValueError) as told:
            lm.generate(["abcd>"], **arguments)
        assert sentence in str(told.value)
    for pair, sentence in (
        ((["ab>"], []), "1 prompts and 0 responses; give a response to each prompt."),
        (("ab>", "bc"), "prompts and responses are lists of the same length"),
        ((["ab>"], [3]), "responses:1: int 3; a string is wanted."),
        ((["ab>"], ["b" * 40]), "the model's context has 32"),
    ):
        with pytest.raises(ValueError) as told:
            lm.loglik(*pair)
        assert sentence in str(told.value)
