"""`refine` with a generator that is trained: rewards, advantages, what a run writes, that it stops and goes on."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest

from bilevel_jax.commands.refine.advantages import compute_advantages, share_rewards_of_equal_responses
from bilevel_jax.commands.refine.generator import check_same_tokens, prepare_generator, update_generator
from bilevel_jax.commands.refine.rewards import Rewards, _differentiate, check_responses, compute_rewards
from bilevel_jax.commands.refine.rollouts import build_round_task, choose_questions, collect_rollouts
from bilevel_jax.commands.refine.run import count_rounds_work, prepare_refine_task, refine
from bilevel_jax.commands.refine.text_statistics import (
    describe_degeneration,
    describe_overfitting,
    share_of_duplicates,
    share_of_repeated_ngrams,
)
from bilevel_jax.core.training import init_train_state
from bilevel_jax.lm import models
from bilevel_jax.lm.data.tokens import load_tokenizer
from bilevel_jax.lm.losses import sft
from bilevel_jax.runs.config.load import RefineConfig, load_config
from bilevel_jax.runs.engine.trainer import Trainer
from bilevel_jax.runs.infra import session
from bilevel_jax.runs.scoring.generation import make_generator_factory
from bilevel_jax.runs.scoring.likelihoods import fingerprint_params
from tests.commands.typed_results import check_columns
from tests.tiny_task import count_traces_by_round, stop_session_at

REINFORCE = {
    "--refine.generator": "reinforce", "--refine.methods": "uniform", "--refine.ratio": "none",
    "--refine.questions": "redrawn", "--refine.share": "0.25", "--generate.num-generations": "4",
    "--train.max-steps": "8",
    "--reinforce.learning-rate": "3e-3", "--reinforce.kl-coefficient": "0.01",
}  # fmt: skip


SMOOTH = ("--optimizer.name", "momentum", "--optimizer.learning-rate", "0.05")  # adam's first steps are signs


def load(made, *flags):
    given = [text for key, value in REINFORCE.items() if key not in flags for text in (key, value)]
    return load_config(RefineConfig, made / "refine.yaml", [*given, *flags])


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """One uninterrupted run: (its folder, its result, how often the model had been traced after each round)."""
    out = tmp_path_factory.mktemp("reinforce") / "run"
    config = load(made, "--out", str(out), "--refine.rounds", "3", "--refine.start-from", "last")
    result, counts = count_traces_by_round(lambda: refine(config))
    return out, result, counts


@pytest.fixture(scope="module")
def round_of(made, tmp_path_factory):
    """(config, offline task, round's task, its responses, session) without a run, by the kind of reward."""
    folder = tmp_path_factory.mktemp("round")
    (folder / "checkpoints").mkdir()
    config = load(made, *SMOOTH)
    task = prepare_refine_task(config, folder)
    with session.open_session(folder, progress=False, save_seconds=1e9) as work:
        params = task.init_params(0)
        write = make_generator_factory(config.generate, task.decoder, task.tokenizer, task.mesh, work)(params)
        chosen = choose_questions(config, task.trainable_indices(), np.ones(task.num_examples))
        path, fingerprint = folder / "responses.parquet", fingerprint_params(params)
        rollouts = collect_rollouts(config, task, chosen, 0, path, write, fingerprint, None)
        yield config, task, build_round_task(config, task, rollouts, 0), rollouts, work


# ---- rewards


def test_a_reward_is_what_less_of_the_response_does_to_the_student(round_of):
    """By differences: the student trained with the response of largest reward at weight 1 - h and 1 + h."""
    config, task, round_task, rollouts, work = round_of
    rewards = compute_rewards(config, round_task, task.init_params(0), work, 0)
    trainer = Trainer(round_task.task, config.outer, work)
    start = init_train_state(task.optimizer, task.init_params(0))
    stream, step = round_task.task.training_stream(config.data.seed), 0.05
    rows = np.flatnonzero(round_task.response_numbers >= 0)
    place = int(np.argmax(np.abs(rewards.responses)))

    def loss(row, weight):
        weights = jnp.ones(round_task.task.num_examples).at[row].set(weight)
        outer = trainer.task.problem.outer
        validation = round_task.task.held_out_streams["validation"]
        end = trainer.run(weights, start, stream).end.params
        frozen = round_task.task.frozen(end)
        total = 0.0
        for at in range(validation.steps):
            batch = validation.batch(at)
            for micro in range(batch["index"].shape[0]):
                part = {key: leaf[micro] for key, leaf in batch.items()}
                total += float(outer(end, frozen, part))
        return total

    row = rows[place]
    slope = (loss(row, 1 + step) - loss(row, 1 - step)) / (2 * step) / round_task.multiplicity[row]
    assert -slope == pytest.approx(rewards.responses[place], rel=0.05)


def test_rewards_of_tokens_sum_to_that_of_their_response(round_of, made):
    _, task, round_task, rollouts, work = round_of
    by_token = compute_rewards(
        load(made, *SMOOTH, "--reinforce.reward", "token"), round_task, task.init_params(0), work, 2
    )
    assert [len(own) for own in by_token.tokens] == [len(own) for own in rollouts.tokens]
    scale = np.abs(by_token.responses).max()
    np.testing.assert_allclose([own.sum() for own in by_token.tokens], by_token.responses, atol=1e-5 * scale)
    part = work.part_session("again")
    _, estimate, *_ = _differentiate(load(made, *SMOOTH), round_task, task.init_params(0), part, 2)
    rows = np.flatnonzero(round_task.response_numbers >= 0)
    plain = -np.asarray(estimate.grad)[rows] / round_task.multiplicity[rows]
    np.testing.assert_allclose(plain, by_token.responses, atol=1e-4 * scale)


def test_the_reliability_of_rewards_is_that_of_differences_within_questions(round_of, made):
    """By hand, from the hypergradients of the two halves; by tokens and by responses it is one."""
    _, task, round_task, _, work = round_of
    start, rows = task.init_params(0), np.flatnonzero(round_task.response_numbers >= 0)
    _, estimate, _, stored = _differentiate(load(made, *SMOOTH), round_task, start, work.part_session("c"), 0)

    def groups(table):
        return [np.asarray(table, float)[rows[at : at + 4]] for at in range(0, len(rows), 4)]

    pairs = list(zip(groups(estimate.half_difference), groups(estimate.grad), strict=True))
    noise = sum(half.var() / group.var() for half, group in pairs) / len(pairs)  # each question counts the same
    assert stored["first"]["noise"] == pytest.approx(noise, rel=1e-4) and stored["steps"] == 1
    tokens = load(made, *SMOOTH, "--reinforce.reward", "token")
    *_, by_token = _differentiate(tokens, round_task, start, work.part_session("d"), 0)
    assert by_token["first"]["noise"] == pytest.approx(noise, rel=1e-2)
    fitted = round_task._replace(is_fitted=True)
    *_, by_dev = _differentiate(load(made, *SMOOTH), fitted, start, work.part_session("e"), 0)
    assert by_dev["first"]["agreement"] is not None and not by_dev["first"]["is_fitted"]
    batch = load(made, *SMOOTH, "--reinforce.advantages", "batch")
    *_, by_size = _differentiate(batch, round_task, start, work.part_session("f"), 0)
    noise = sum(half.var() for half, _ in pairs) / sum(group.var() for _, group in pairs)
    assert by_size["first"]["noise"] == pytest.approx(noise, rel=1e-4)


def test_responses_to_one_question_share_their_batches(round_of):
    """Else a reward would tell where in training its response stood."""
    config, _, round_task, rollouts, _ = round_of
    order = round_task.task.data_order(config.data.seed)
    seen = {}
    for step in range(config.train.max_steps):
        for row in order(step):
            if row < round_task.task.num_examples and round_task.response_numbers[row] >= 0:
                question = round_task.response_numbers[row] // rollouts.num_generations
                seen.setdefault(question, []).append(step)
    assert len(seen) == len(rollouts.questions)
    assert all(len(steps) % 4 == 0 and set(np.bincount(steps)) <= {0, 4} for steps in seen.values())


def test_a_response_that_is_rewarded_becomes_likelier(round_of, made):
    """The policy step has the sign of the reward, for whichever response of each group is rewarded."""
    config, task, round_task, rollouts, work = round_of
    generator = prepare_generator(load(made, *SMOOTH, "--reinforce.kl-coefficient", "0"), task)
    state = generator.init_state(task)
    for chosen in (0, 3):
        worth = np.zeros((len(rollouts.questions), 4))
        worth[:, chosen] = 1
        rewards = Rewards(worth.ravel(), None, state.params, 0.0, {}, {})
        moved = update_generator(config, generator, state, round_task, rollouts, rewards, work, 0)
        assert moved.record["kl"] == pytest.approx(0, abs=1e-6) and moved.record["kl_after"] > 1e-6
        likelihoods = [
            -sft.sft_losses(task.decoder)(
                params, {key: leaf[0] for key, leaf in round_task.task.full_pass_stream(0).batch(0).items()}
            )
            for params in (state.params, moved.state.params)
        ]
        batch = round_task.task.full_pass_stream(0).batch(0)
        numbers = np.array([
            round_task.response_numbers[row] if row >= 0 and row < len(round_task.response_numbers) else -1
            for row in np.asarray(batch["index"][0])
        ])  # fmt: skip
        change = np.asarray(likelihoods[1] - likelihoods[0])
        is_chosen = (numbers >= 0) & (numbers % 4 == chosen)
        assert change[is_chosen].mean() > change[(numbers >= 0) & ~is_chosen].mean()


def test_a_target_that_nothing_moves_is_told(round_of):
    config, task, round_task, _, work = round_of
    still = round_task._replace(
        task=round_task.task._replace(
            problem=round_task.task.problem._replace(
                outer=lambda params, frozen, batch: 0 * round_task.task.problem.outer(params, frozen, batch)
            )
        )
    )
    with pytest.raises(ValueError, match="every reward of round 3 is 0: nothing that the model was trained on moves"):
        compute_rewards(config, still, task.init_params(0), work, 3)


def test_responses_without_text_are_told():
    with pytest.raises(ValueError, match="all 2 responses of round 4 are empty"):
        check_responses(SimpleNamespace(texts=["", " \n"]), 4)
    check_responses(SimpleNamespace(texts=["", "a"]), 4)


# ---- advantages


def spread_over_tokens(values, counts):
    return [np.full(count, value / count) for value, count in zip(values, counts, strict=True)]


def test_advantages_compare_the_responses_to_one_question():
    counts = [1, 2, 2, 3, 1, 4]
    rewards = np.array([1.0, 3.0, 10.0, 14.0, 5.0, 5.0])
    found = compute_advantages(spread_over_tokens(rewards, counts), 2, "group", by_token=False)
    assert [len(own) for own in found.tokens] == counts and found.num_equal == 1
    np.testing.assert_allclose([own[0] for own in found.tokens], [-1, 1, -1, 1, 0, 0], atol=1e-12)
    batch = compute_advantages(spread_over_tokens(rewards, [1] * 6), 2, "batch", by_token=False)
    np.testing.assert_allclose(np.concatenate(batch.tokens), np.array([-2, 2, -4, 4, 0, 0]) / np.sqrt(40 / 6))
    moved = compute_advantages(spread_over_tokens(1e-9 * rewards + 7e-9, counts), 2, "group", by_token=False)
    for own, wanted in zip(moved.tokens, found.tokens, strict=True):  # neither unit nor level of rewards counts
        np.testing.assert_allclose(own, wanted, atol=1e-5)
    assert not np.concatenate(compute_advantages([np.zeros(2)] * 2, 2, "group", by_token=True).tokens).any()


def test_a_token_is_judged_by_what_comes_from_it_on():
    rewards = [np.array([0.0, 0.0, 0.0, 5.0, 5.0]), np.array([1.0, 1.0])]
    found = compute_advantages(rewards, 2, "group", by_token=True)
    differences = [np.array([8.0, 9.0, 10.0, 10.0, 5.0]), np.array([-8.0, -9.0])]  # an ended response earns nothing
    scale = np.sqrt(np.mean(np.concatenate(differences) ** 2))
    for own, wanted in zip(found.tokens, differences, strict=True):
        np.testing.assert_allclose(own, wanted / scale)


def test_what_is_taken_off_changes_no_expectation():
    """E[A_t d log pi(y_t)] = E[R_t d log pi(y_t)] for two-token responses that may end, by all pairs of them."""
    stop, worth = 0.4, {(0,): 1.0, (1, 0): -2.0, (1, 1): 3.0}
    chance = {(0,): stop, (1, 0): (1 - stop) * 0.5, (1, 1): (1 - stop) * 0.5}
    slope = {0: 1 / stop, 1: -1 / (1 - stop)}  # of log pi of the first token, by the chance to stop
    plain = sum(chance[y] * worth[y] * slope[y[0]] for y in worth)
    baseline = 0.0
    for first in worth:
        for second in worth:
            rewards = [np.array([0.0] * (len(y) - 1) + [worth[y]]) for y in (first, second)]
            credit = [own.sum() for own in rewards]
            baseline += chance[first] * chance[second] * (credit[0] - credit[1]) * slope[first[0]]
            advantages = compute_advantages(rewards, 2, "batch", by_token=True).tokens
            assert np.sign(advantages[0][0]) == np.sign(round(credit[0] - credit[1], 9))
    assert baseline == pytest.approx(plain)


def test_equal_responses_share_their_reward():
    same, other = np.array([4, 2]), np.array([5, 2])
    rewards = [np.array([1.0, 0.0]), np.array([3.0, 2.0]), np.array([7.0, 7.0]), np.array([9.0, 9.0])]
    shared = share_rewards_of_equal_responses(rewards, [same, same, same, other], 2)
    np.testing.assert_array_equal(shared, [[2, 1], [2, 1], [7, 7], [9, 9]])  # those to another question stay apart
    assert compute_advantages(shared[:2], 2, "group", by_token=False).num_equal == 1


# ---- a run


def test_compiles_in_the_first_rounds_only(whole):
    counts = whole[2]
    assert counts[0] > 0 and counts[1] == counts[2]  # the second round is the first with a generator of its own


def test_the_generator_moves_and_is_written(whole, made):
    out, result, _ = whole
    records = result["records"]
    assert records[0]["generator"]["kl"] == pytest.approx(0, abs=1e-6) and records[2]["generator"]["kl"] > 1e-5
    assert len({record["model"] for record in records}) == 3  # every round was answered by another model
    given = load(made).model.name_or_path
    before, after = (models.load_model(path, dtype=jnp.float32)[1] for path in (given, out / "generator"))
    assert fingerprint_params(before) != fingerprint_params(after)
    assert (out / "generator" / "tokenizer.json").exists()
    typed, _ = check_columns(out, "weights.parquet", {"ids": "id", "generated": "generated", "rewards": "reward"})
    assert typed.generator == out / "generator" and np.array_equal(np.isfinite(typed.rewards), typed.generated)
    stored = pq.read_table(out / "responses.parquet")["reward"].to_pylist()
    np.testing.assert_array_equal(stored, typed.rewards[typed.generated])
    report = (out / "report.html").read_text()
    assert "What the generator learned" in report and "KL from the start" in report
    assert not list((out / "parts").glob("round*"))


def test_questions_are_redrawn_without_repetition(made, tmp_path):
    config = load(made)
    kept = np.arange(3, 20)
    rounds = [choose_questions(config, kept, np.ones(20), number) for number in range(5)]
    assert len(np.unique(np.concatenate(rounds[:4]))) == 16  # 17 questions, 4 each
    assert {len(own) for own in rounds} == {4} and not np.array_equal(rounds[0], rounds[4])


@pytest.mark.parametrize(
    "count", [pytest.param(count, marks=[pytest.mark.slow] * (count != 14)) for count in (4, 9, 14, 20, 27, 33)]
)
def test_stopped_anywhere_and_resumed_changes_no_bit(made, whole, tmp_path, stop_at, count):
    flags = ("--out", str(tmp_path / "run"), "--refine.rounds", "3", "--refine.start-from", "last")
    stop_at(count)
    with pytest.raises(session.Interrupted):
        refine(load(made, *flags))
    refine(load(made, *flags, "--resume"))
    names = ("model/model.safetensors", "generator/model.safetensors", "responses.parquet", "weights.parquet")
    for name in names:
        assert (whole[0] / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name
    results = [json.loads((folder / "result.json").read_text()) for folder in (whole[0], tmp_path / "run")]
    assert [[record["generator"] for record in result["records"]] for result in results][0] == [
        record["generator"] for record in results[1]["records"]
    ]


VARIANTS = {
    "tokens": ("--reinforce.reward", "token", "--reinforce.advantages", "batch", "--reinforce.reduction", "token_sum"),
    "adapters": ("--lora.r", "2", "--model.base-dtype", "float32"),
    "judged by pooled steps": ("--refine.methods", "uniform", "unrolled", "--outer.estimate", "pooled"),
    "judged by an unrolled candidate": ("--refine.methods", "uniform", "unrolled", "--refine.start-from", "first"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_runs_and_resumes(made, tmp_path, name, monkeypatch):
    result = refine(load(made, *VARIANTS[name], "--out", str(tmp_path / "run")))
    with monkeypatch.context() as patch:
        stop_session_at(patch, 14)
        with pytest.raises(session.Interrupted):
            refine(load(made, *VARIANTS[name], "--out", str(tmp_path / "stopped")))
    resumed = refine(load(made, *VARIANTS[name], "--out", str(tmp_path / "stopped"), "--resume"))
    assert [one["generator"] for one in resumed["records"]] == [one["generator"] for one in result["records"]]
    assert all(np.isfinite(record["generator"]["target_loss"]) for record in result["records"])


@pytest.mark.slow
def test_another_model_generates(made, tmp_path):
    """The same architecture from a folder of its own: the same run, bit for bit."""
    given = load(made).model.name_or_path
    own, other = (
        refine(load(made, *flags, "--out", str(tmp_path / name)))
        for name, flags in (("own", ()), ("other", ("--reinforce.model", str(given))))
    )
    assert [record["generator"] for record in own["records"]] == [record["generator"] for record in other["records"]]


@pytest.mark.slow
def test_a_model_of_another_architecture_generates(made, tmp_path):
    """Wider, deeper and of another family: it is moved, written as what it is, and resumed."""
    own = models.read_config(load(made).model.name_or_path)
    other = replace(own, family="qwen3", qk_norm=True, width=2 * own.width, layers=own.layers + 1)
    tokenizer, start = load_tokenizer(load(made).model.name_or_path), models.init_params(other, jax.random.key(1))
    models.save_model(tmp_path / "other", other, start, tokenizer=tokenizer)
    flags = ("--reinforce.model", str(tmp_path / "other"))
    result = refine(load(made, *flags, "--out", str(tmp_path / "run")))
    assert all(np.isfinite(record["generator"]["target_loss"]) for record in result["records"])
    written, params = models.load_model(tmp_path / "run" / "generator")
    assert (written.family, written.width, written.layers) == ("qwen3", other.width, other.layers)
    assert any(not np.allclose(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(start), strict=True))
    assert models.read_config(tmp_path / "run" / "model").width == own.width


@pytest.mark.slow
def test_a_function_of_the_parameters_needs_no_held_out_rows(made, tmp_path):
    """The norm of one matrix falls from round to round, though no text says so."""
    (tmp_path / "norm.py").write_text(
        "import jax.numpy as jnp\ndef norm(params):\n    return jnp.sum(params['embed'] ** 2)\n"
    )
    flags = ("--data.validation", "--data.dev", "--data.test", "--target.losses", f"{tmp_path}/norm.py:norm",
             "--target.sources", "parameters", "--refine.start-from", "last", "--refine.rounds", "4")  # fmt: skip
    result = refine(load(made, *flags, "--out", str(tmp_path / "run")))
    losses = [record["generator"]["target_loss"] for record in result["records"]]
    assert losses[-1] < losses[0] and result["test"]["first"] > 0


# ---- what is refused, and told

REFUSED = {
    "asks for none": ("--refine.questions", "none"),
    "imitates what the generator wrote": ("--refine.ratio", "token"),
    "leave bmo out": ("--refine.methods", "bmo"),
    "leave temperature at 1": ("--generate.top-k", "5"),
    "ask for 2 at least": ("--generate.num-generations", "1"),
    "fixed does not train it": ("--refine.generator", "fixed"),
    "has no reward": ("--refine.verifier-use", "filter"),
    "is that of uniform": ("--refine.methods", "mixing"),
    "a multiple of generate.num_generations": ("--generate.num-generations", "3"),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_is_refused(made, words):
    with pytest.raises(ValueError, match=words):
        load(made, *REFUSED[words])


def test_last_needs_a_student(made):
    with pytest.raises(ValueError, match="last goes on with the student"):
        load_config(RefineConfig, made / "refine.yaml", ["--refine.start-from", "last"])


def test_a_student_that_would_not_see_all_responses_is_refused(made, tmp_path):
    with pytest.raises(ValueError, match=r"= 24 is less than the 64 examples of a round.*max_steps to at least 8"):
        refine(load(made, "--train.max-steps", "3", "--out", str(tmp_path / "run")))


def test_another_tokenizer_is_told():
    def make_tokenizer(vocabulary, template=""):
        return SimpleNamespace(get_vocab=lambda: vocabulary, chat_template=template, get_chat_template=lambda: template)

    tokenizer = make_tokenizer({"a": 0, "b": 1})
    check_same_tokens(tokenizer, tokenizer, "there")
    other = make_tokenizer({"a": 0, "b": 2})
    with pytest.raises(ValueError, match="the token 'b' is 2 there and 1 here"):
        check_same_tokens(other, tokenizer, "there")
    templated = make_tokenizer({"a": 0, "b": 1}, "{{ messages }}")
    with pytest.raises(ValueError, match="another chat template"):
        check_same_tokens(templated, tokenizer, "there")


def test_every_round_says_how_far_its_rewards_speak_for_others(whole):
    """The first by halves of validation, later ones, whose generator follows it, by dev."""
    out, result, _ = whole
    draws = [record["generator"]["reliability"]["last"] for record in result["records"]]
    assert draws[0]["noise"] is not None and all(draw["agreement"] is not None for draw in draws[1:])
    page = " ".join((out / "report.html").read_text().split())
    assert "Round 0, rewards: in the one step, where all weights are equal, " in page
    assert "How far the weights and rewards speak for other examples" in page


def test_the_work_is_counted(whole, made, tmp_path):
    """What the bar promises is what a run does."""
    (tmp_path / "checkpoints").mkdir()
    config = load(made, "--refine.rounds", "3", "--refine.start-from", "last")
    task = prepare_refine_task(config, tmp_path)
    assert sum(record["work"] for record in whole[1]["records"]) == pytest.approx(count_rounds_work(config, task))


def test_a_generator_that_follows_validation_alone_is_told():
    def rounds(*pairs):
        return [{"target_loss": validation, "dev_loss": dev} for validation, dev in pairs]

    assert describe_overfitting(rounds((1.0, 1.0), (0.8, 0.9), (0.7, 0.91))) == []
    [told] = describe_overfitting(rounds((1.0, 1.0), (0.8, 0.9), (0.7, 1.0)))
    assert "After round 1" in told and "from 0.9000 to 1.0000" in told
    assert describe_overfitting(rounds((1.0, 1.0), (0.8, 0.9), (0.9, 1.0))) == []  # both rose


def test_degenerate_text_is_told():
    first = {
        "repeated": 0.1, "duplicates": 0.1, "entropy": 2.0, "length": 20.0, "reward_by_length": 0.1,
    }  # fmt: skip
    assert describe_degeneration(first, first) == []
    last = {"repeated": 0.6, "duplicates": 0.5, "entropy": 0.1, "length": 40.0, "reward_by_length": -0.95}
    told = " ".join(describe_degeneration(first, last))
    for words in ("repeat themselves: 60%", "50% of the responses equal", "from 2.00 to 0.10", "40 tokens", "-0.95"):
        assert words in told
    assert share_of_repeated_ngrams(np.array([1, 2, 1, 2, 1, 2]), 2) == pytest.approx(3 / 5)
    assert share_of_repeated_ngrams(np.array([1]), 2) == 0
    same = [np.array([1]), np.array([1]), np.array([2]), np.array([1])]
    assert share_of_duplicates(same, 2) == 0.5  # the last equals a response to another question only
