"""A run is resumed with the tokens and the versions that it began with, or not at all."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from bilevel_jax.commands.train.run import train
from bilevel_jax.lm.data import tokens
from bilevel_jax.runs.config.load import TrainConfig, load_config
from bilevel_jax.runs.infra import identity
from bilevel_jax.runs.infra.session import Interrupted


def test_a_run_is_resumed_with_its_tokens_and_versions_or_not_at_all(made, tmp_path, stop_at, monkeypatch, capsys):
    """`train`, stopped after 3 steps: nothing of it is changed by what is refused, and it goes on to its end."""

    def resume():
        config = load_config(TrainConfig, made / "train.yaml", ["--out", str(tmp_path / "run"), "--resume"])
        return train(config)

    stop_at(3)
    with pytest.raises(Interrupted):
        train(load_config(TrainConfig, made / "train.yaml", ["--out", str(tmp_path / "run")]))
    before = json.loads((tmp_path / "run" / "tokens.json").read_text())
    assert before["training and validation"]["sequences"] == 40 and set(before) > {"dev"}
    tokenize = tokens.tokenize

    def swap_letters(*arguments, **options):
        """Another tokenizer in the same files: two of its letters have changed places."""
        corpus, report = tokenize(*arguments, **options)
        first, second = corpus.ids[1:3]
        ids = np.where(corpus.ids == first, second, np.where(corpus.ids == second, first, corpus.ids))
        return replace(corpus, ids=ids), report

    with monkeypatch.context() as patch:
        patch.setattr(tokens, "tokenize", swap_letters)
        with pytest.raises(ValueError, match="other tokens, .*training and validation: other token ids. .*dev: other"):
            resume()
    with monkeypatch.context() as patch:
        patch.setattr(identity, "list_packages", lambda: {"jax": "0.9.0"})
        with pytest.raises(
            ValueError, match=f"jax {jax.__version__} then, 0.9.0 now.*pip install jax=={jax.__version__}"
        ):
            resume()
    with monkeypatch.context() as patch:
        patch.setattr(identity.platform, "python_version", lambda: "4.0")
        assert resume()["steps"] > 3
    assert "resumed with what changes no number beyond rounding: Python" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "tokens.json").read_text()) == before
