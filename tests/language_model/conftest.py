"""A model of 768 parameters on the cipher's tokens, and some of its rows."""

import jax
import pytest

import bilevel_jax as bj
from bilevel_jax.lm import models
from bilevel_jax.lm.builtin import cipher
from tests.tiny_task import made  # noqa: F401

SMALL = {
    "hidden_size": 8, "intermediate_size": 8, "head_dim": 8, "num_attention_heads": 1, "num_key_value_heads": 1,
    "num_hidden_layers": 1,
}  # fmt: skip


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory):
    """A folder of an untrained model, small enough for a matrix of its second derivatives."""
    folder = tmp_path_factory.mktemp("small") / "model"
    config = models.read_config(cipher.make_cipher_config() | SMALL)
    models.save_model(
        folder, config, models.init_params(config, jax.random.key(0)), tokenizer=cipher.make_cipher_tokenizer()
    )
    return folder


@pytest.fixture(scope="session")
def lm(small_folder):
    """That model, in float32."""
    return bj.lm.load(small_folder)


@pytest.fixture(scope="session")
def rows():
    """Eight training rows of the cipher."""
    return bj.lm.builtin_rows("cipher", sizes={"clean": 4, "wrong": 2, "noise": 2})


@pytest.fixture(scope="session")
def held_out():
    """Five validation rows."""
    return bj.lm.builtin_rows("cipher", "validation", sizes={"clean": 4, "wrong": 2, "noise": 2, "validation": 5})


@pytest.fixture(scope="session")
def pairs(rows):
    """Preference pairs of the same prompts: the row's answer against one without its first letter."""
    return [{"prompt": row["prompt"], "chosen": row["response"], "rejected": "z" + row["response"][1:]} for row in rows]
