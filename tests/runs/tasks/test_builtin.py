"""The built-in tasks in a config: their files and options, and what their models know before the run."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from bilevel_jax.language_model.model import load
from bilevel_jax.lm import models
from bilevel_jax.lm.data.examples import load_examples
from bilevel_jax.lm.data.tokens import load_tokenizer
from bilevel_jax.lm.data.turns import DataOptions
from bilevel_jax.lm.inference.generate import SamplingParams, make_detokenizer, make_sampler
from bilevel_jax.lm.inference.prompts import make_prompts
from bilevel_jax.runs.config.load import InspectConfig, SelectConfig
from bilevel_jax.runs.config.schema import DataSection, ModelSection, OutputSection, VerifierSection
from bilevel_jax.runs.scoring.verifiers import make_verifier
from bilevel_jax.runs.tasks import builtin
from bilevel_jax.runs.tasks.builtin import parse_builtin_reference, resolve_builtin, resolve_builtin_untrained

SUMS = DataSection(
    train=("builtin:sums?corrupted=0.7&train=30",),
    validation=("builtin:sums",),
    dev=("builtin:sums",),
    test=("builtin:sums",),
)


def test_files_and_options(tmp_path, monkeypatch):
    monkeypatch.setattr(builtin, "pretrain_builtin_model", None)  # nothing is trained
    rows = InspectConfig(data=replace(SUMS, train=(*SUMS.train, "own.jsonl")))
    found = resolve_builtin(rows, tmp_path).data
    assert found.train == (str(tmp_path / "input" / "train.jsonl"), "own.jsonl")
    assert [Path(*paths).name for paths in (found.validation, found.dev, found.test)] == [
        "validation.jsonl",
        "dev.jsonl",
        "test.jsonl",
    ]
    labels = [example.label for example in load_examples(found.train[:1], DataOptions(label_field="label"))]
    assert (len(labels), labels.count("wrong")) == (30, 21)
    assert resolve_builtin(InspectConfig(data=DataSection(train=("own.jsonl",))), tmp_path / "new").data.train == (
        "own.jsonl",
    )
    assert not (tmp_path / "new").exists()
    model = resolve_builtin_untrained(
        InspectConfig(model=ModelSection(name_or_path="builtin:sums"), data=SUMS), tmp_path
    ).model
    assert models.read_config(model.name_or_path).vocab_size == 18


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            DataSection(train=("builtin:sum",)),
            r"builtin:sum is no built-in task; they are \['builtin:cipher', 'builtin:sums', .*'builtin:sources'\]",
        ),
        (replace(SUMS, train=("builtin:cipher",)), "are two built-in tasks; a run has room for one"),
        (replace(SUMS, test=("builtin:sums?train=9",)), r"train=9: options of a built-in task are set in data.train"),
        (replace(SUMS, train=("builtin:sums?corupted=1",)), "has no option 'corupted'; .* Did you mean corrupted?"),
        (replace(SUMS, train=("builtin:sums?select=9",)), "has no option .select.; .* Did you mean dev?"),
        (replace(SUMS, train=("builtin:sums?train=few",)), "train='few' is no int"),
        (replace(SUMS, train=("builtin:sums", "builtin:sums?train=9")), "with two sets of options"),
    ],
)
def test_refused(data, said):
    with pytest.raises(ValueError, match=said):
        parse_builtin_reference(InspectConfig(data=data))


@pytest.mark.slow  # teaches the model for some minutes
def test_the_model_of_sums_knows_both_rules(tmp_path):
    config = SelectConfig(
        model=ModelSection(name_or_path="builtin:sums"), data=SUMS, output=OutputSection(progress=False)
    )
    found = resolve_builtin(config, tmp_path)
    architecture, params = models.load_model(found.model.name_or_path)
    tokenizer = load_tokenizer(found.model.name_or_path)
    rows = load_examples(found.data.test)
    asked = make_prompts(rows, tokenizer)
    judge = make_verifier(VerifierSection("numeric"), rows)

    def right(sampling, draws):
        sample = make_sampler(
            models.make_decoder(architecture),
            sampling,
            make_detokenizer(tokenizer),
            end_tokens=[tokenizer.eos_token_id],
        ).sample
        drawn = sample(params, asked, range(draws))
        return np.array([[judge(row, one.text) for one in some] for row, some in zip(rows, drawn, strict=True)])

    greedy, four = right(SamplingParams(temperature=0, max_new_tokens=6), 1), right(SamplingParams(max_new_tokens=6), 4)
    print(f"greedy {greedy.mean():.3f}, drawn {four.mean():.3f}, one of four {four.max(1).mean():.3f}")
    assert 0.2 < greedy.mean() < 0.7 and 0.25 < four.mean() < 0.6
    assert four.max(1).mean() > four.mean() + 0.25


@pytest.mark.slow  # teaches the model for a minute
def test_the_model_of_scripts_learns_in_context(tmp_path):
    """The loss of held-out examples falls with each demonstration, as the scorer renders them; the key is not known
    before, and examples by another key become less likely."""
    scripts = DataSection(train=("builtin:scripts?noise=0.25",), validation=("builtin:scripts",))
    config = SelectConfig(
        model=ModelSection(name_or_path="builtin:scripts"),
        data=replace(scripts, test=("builtin:scripts",)),
        output=OutputSection(progress=False),
    )
    found = resolve_builtin(config, tmp_path)
    lm = load(found.model.name_or_path)
    train, validation, test = (
        [json.loads(line) for line in Path(*paths).read_text("utf-8").splitlines()]
        for paths in (found.data.train, found.data.validation, found.data.test)
    )
    alone = lm.loglik([row["prompt"] for row in test], [row["response"] for row in test])
    losses = [float(-(alone.nats / alone.num_tokens).mean())]
    losses += [losses[0] - lm.score("ica", test, validation, k=k).values.mean() for k in (1, 3, 5, 10)]
    print("loss with 0, 1, 3, 5, 10 demonstrations: " + ", ".join(f"{loss:.3f}" for loss in losses))
    assert losses[0] == pytest.approx(3 * np.log(3) / 4, abs=0.15)  # three letters in three scripts, and the end
    assert all(after < before - 0.01 for before, after in pairwise(losses)) and losses[-1] < 0.1 * losses[0]
    scores, labels = lm.score("ica", train, validation).values, np.array([row["label"] for row in train])
    clean, others = scores[labels == "clean"], scores[labels != "clean"]
    assert clean.mean() > 0.3 and all(
        others[labels[labels != "clean"] == kind].mean() < -1 for kind in ("wrong", "noise")
    )
    assert (clean[:, None] > others).mean() > 0.97  # the area under the curve
