"""The command `rank`: its input, scores of blocks, its pick, resuming, and errors."""

import json
import math
import re

import numpy as np
import pyarrow.parquet as pq
import pytest

from bilevel_jax.cli import main
from bilevel_jax.commands.rank import metrics, model
from bilevel_jax.commands.rank.run import collect_remarks, rank
from bilevel_jax.commands.rank.strategies import draw_blocks, load_strategy_responses
from bilevel_jax.lm.builtin import cipher
from bilevel_jax.lm.data.tokens import TokenizedSequence, corpus_from_sequences
from bilevel_jax.lm.inference.generate import Response
from bilevel_jax.runs.config.load import RankConfig, load_config
from bilevel_jax.runs.config.schema import RankSection
from bilevel_jax.runs.infra import session
from bilevel_jax.runs.scoring import generation
from bilevel_jax.runs.stats import rank_correlation
from bilevel_jax.scores import selfaligned, strategies
from bilevel_jax.scores.requests import make_tokenized_examples
from tests.commands.typed_results import check_columns

CONFIG = """
model: {{name_or_path: {made}/model}}
lora: {{r: 0}}
data: {{train: [{folder}/table.jsonl]}}
rank:
  block_size: 6
  num_blocks: 3
  template: "{{question}} {{examples}} "
  example_template: "{{answer}} "
generate: {{max_new_tokens: 4, temperature: 1.0, top_p: 1.0, top_k: 0}}
output: {{progress: false}}
mesh: {{data: 1}}
"""
SHIFTS = {"next": 1, "previous": -1, "same <b>": 0}


@pytest.fixture(scope="module")
def inputs(made, tmp_path_factory):
    """20 questions of the cipher and three ways of answering them: as a table, as files, with results and rewards."""
    folder = tmp_path_factory.mktemp("strategies")
    asked = [json.loads(line)["prompt"] for line in (made / "train.jsonl").read_text().splitlines()[:20]]
    rows = [
        {
            "prompt": prompt,
            "responses": {name: cipher.rotate_letters(prompt[:4], by) for name, by in SHIFTS.items()},
            "rewards": {name: 1.0 - abs(by - 1) / 2 for name, by in SHIFTS.items()},
            "result": cipher.rotate_letters(prompt[:4], 1),
            "key": i,
        }
        for i, prompt in enumerate(asked)
    ]
    write(folder / "table.jsonl", rows)
    for name in SHIFTS:
        own = [{**row, "response": row["responses"][name], "rewards": row["rewards"][name]} for row in rows]
        write(folder / f"{name}.jsonl", [{k: v for k, v in row.items() if k != "responses"} for row in own][::-1])
    (folder / "rank.yaml").write_text(CONFIG.format(made=made, folder=folder))
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def config(inputs, *flags):
    return load_config(RankConfig, inputs / "rank.yaml", list(flags))


def run(inputs, out, *flags):
    return rank(config(inputs, *flags, "--out", str(out)))


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """One uninterrupted run: (its folder, its result, its table)."""
    out = tmp_path_factory.mktemp("whole") / "run"
    result = run(inputs, out, "--rank.reward-field", "rewards", "--generate.num-generations", "2")
    return out, result, pq.read_table(out / "rank.parquet").to_pandas()


def test_the_typed_result_holds_the_table(whole):
    columns = {"ids": "id", "strategies": "strategy", "blocks": "block"}
    columns |= {("measures", name): name for name in ("sppl", "perplexity", "ifd", "self_similarity", "rewards")}
    typed, _ = check_columns(whole[0], "rank.parquet", columns)
    assert set(typed.measures) == {name[1] for name in columns if isinstance(name, tuple)}
    assert typed.pick == whole[1]["verdict"]["use"] and typed.summary == whole[1]["verdict"]["sentence"]


# ---- what it reads


def test_a_table_and_files_say_the_same(inputs):
    flags = ("--rank.reward-field", "rewards", "--verifier.answer-field", "result")
    one = load_strategy_responses(config(inputs, *flags))
    paths = [str(inputs / f"{name}.jsonl") for name in SHIFTS]
    for more in ((), ("--rank.id-field", "key")):
        other = load_strategy_responses(config(inputs, *flags, *more, "--data.train", *paths))
        assert other.strategies == one.strategies == tuple(SHIFTS)
        mine, theirs = ({q.id: q._replace(file="", line=0) for q in some.questions} for some in (one, other))
        assert mine == theirs and len(mine) == 20
    some = load_strategy_responses(config(inputs, "--rank.strategies", "same <b>", "next"))
    assert some.strategies == ("same <b>", "next") and some.questions[0].responses[1] == one.questions[0].responses[0]


def test_questions_are_joined_by_ids_whatever_their_type(inputs, tmp_path):
    paths = []
    for name, to_id in zip(SHIFTS, (int, float, str), strict=True):  # of pandas, ids beside a null are floats
        rows = [json.loads(line) for line in (inputs / f"{name}.jsonl").read_text().splitlines()]
        rows = [{**row, "number": to_id(i)} for i, row in enumerate(sorted(rows, key=lambda row: row["prompt"]))]
        paths.append(str(tmp_path / f"{name}.jsonl"))
        write(tmp_path / f"{name}.jsonl", rows)
    flags = ("--rank.id-field", "number", "--data.train", *paths)
    assert len(load_strategy_responses(config(inputs, *flags)).questions) == 20
    write(tmp_path / "next.jsonl", [{**rows[0], "number": ""}])
    with pytest.raises(ValueError, match=r"next.jsonl:1: 'number' is empty. Fill it, or remove the row."):
        load_strategy_responses(config(inputs, *flags))


def test_blocks_are_disjoint_and_follow_ids(inputs):
    questions = load_strategy_responses(config(inputs)).questions
    blocks = draw_blocks(questions, 6, 3, seed=0)
    ids = [one.id for block in blocks for one in block]
    assert [len(block) for block in blocks] == [6, 6, 6] and len(set(ids)) == 18
    assert draw_blocks(questions[::-1], 6, 3, seed=0) == blocks
    fewer = [one for one in questions if one.id not in ids[:1]]
    assert [one.id for one in draw_blocks(fewer, 6, 3, seed=0)[0]] == ids[1:7]
    assert len(draw_blocks(questions, 6, 9, seed=0)) == 3
    assert [one.id for block in draw_blocks(questions, 6, 3, seed=1) for one in block] != ids


# ---- what it computes


def test_scores_are_means_of_blocks_of_what_the_table_holds(whole):
    _, result, table = whole
    assert list(result["metrics"]) == ["sppl", "perplexity", "ifd", "self_similarity", "mix", "car"]
    assert len(table) == 3 * 6 * 3 and result["counts"]["cut"] == 0
    values = {key: table[key].to_numpy().reshape(3, 6, 3) for key in ("sppl", "perplexity", "self_similarity")}
    for key, found in values.items():
        lines = result["metrics"][key]
        for s in range(3):
            each = [sum(found[b, :, s]) / 6 for b in range(3)]
            np.testing.assert_allclose(lines[s]["blocks"], each, rtol=1e-12)
            assert lines[s]["score"].value == pytest.approx(sum(each) / 3)
            assert lines[s]["spread"] == pytest.approx(np.std(each, ddof=1))
            assert lines[s]["score"].low < lines[s]["score"].value < lines[s]["score"].high
    mixed = [strategies.alignment_score(values["perplexity"][b], 1 - values["self_similarity"][b]) for b in range(3)]
    np.testing.assert_allclose([line["score"].value for line in result["metrics"]["mix"]], np.mean(mixed, 0))
    rewards = np.array([1 - abs(by - 1) / 2 for by in SHIFTS.values()])
    car = [rewards / (1 + 3 * np.log(values["perplexity"][b]).mean(0)) for b in range(3)]
    np.testing.assert_allclose([line["score"].value for line in result["metrics"]["car"]], np.mean(car, 0))
    scores = {key: [line["score"].value for line in result["metrics"][key]] for key in ("sppl", "ifd")}
    expected = rank_correlation(-np.array(scores["sppl"]), -np.array(scores["ifd"]))  # of both the least wins
    assert result["agreement"]["sppl"]["ifd"] == pytest.approx(expected, nan_ok=True)


def test_the_report_shows_text_as_text(whole):
    text = (whole[0] / "report.html").read_text()
    assert text.count("<svg") == 6 and "same &lt;b&gt;" in text and "same <b>" not in text
    assert "Which responses will train this model best" in text


def test_stopped_and_resumed_changes_no_number(inputs, whole, tmp_path, stop_at):
    """SIGTERM while scoring; the answers of the model and the likelihoods that were there are kept."""
    flags = ("--rank.reward-field", "rewards", "--generate.num-generations", "2")
    stop_at(1)
    with pytest.raises(session.Interrupted, match="SIGTERM; everything is saved. Go on with --resume"):
        run(inputs, tmp_path / "run", *flags)
    kept = (tmp_path / "run" / "checkpoints" / "responses.jsonl").read_text()
    assert kept and (tmp_path / "run" / "checkpoints" / "answers.jsonl").exists()
    again = run(inputs, tmp_path / "run", *flags, "--resume")
    assert (tmp_path / "run" / "checkpoints" / "responses.jsonl").read_text() == kept
    assert pq.read_table(tmp_path / "run" / "rank.parquet").equals(pq.read_table(whole[0] / "rank.parquet"))
    assert again["metrics"] == whole[1]["metrics"] and again["verdict"] == whole[1]["verdict"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [("--mesh.data", "8"), ("--generate.max-batch-tokens", "20")], ids=["devices", "batch"]
)
def test_neither_devices_nor_batches_change_the_ranking(inputs, whole, tmp_path, flags):
    result = run(inputs, tmp_path / "run", "--rank.reward-field", "rewards", "--generate.num-generations", "2", *flags)
    table = pq.read_table(tmp_path / "run" / "rank.parquet").to_pandas()
    assert (table["own_answer"] == whole[2]["own_answer"]).all()
    for key in ("sppl", "perplexity", "ifd", "self_similarity"):
        np.testing.assert_allclose(table[key], whole[2][key], rtol=1e-5)  # float32, another order of sums
    for name, lines in result["metrics"].items():
        assert [line["ranks"] for line in lines] == [line["ranks"] for line in whole[1]["metrics"][name]]
    assert result["verdict"]["use"] == whole[1]["verdict"]["use"]


@pytest.mark.slow
def test_given_answers_are_checked_and_their_result_is_shown(inputs, made, tmp_path, monkeypatch):
    """The prompts that are scored hold what the file says; a wrong answer is shown to nobody."""
    rows = [json.loads(line) for line in (inputs / "table.jsonl").read_text().splitlines()]
    wrong = {row["prompt"] for row in rows[:4]}
    write(
        tmp_path / "own.jsonl",
        [{"prompt": r["prompt"], "response": "zz" if r["prompt"] in wrong else r["result"]} for r in rows],
    )
    seen = []
    write_prompt = selfaligned.prompt_writer

    def spy(*templates):
        inner = write_prompt(*templates)
        return lambda question, answers: seen.append((question, list(answers))) or inner(question, answers)

    monkeypatch.setattr(selfaligned, "prompt_writer", spy)
    flags = (
        "--rank.own-answers",
        str(tmp_path / "own.jsonl"),
        "--verifier.name",
        "exact",
        "--verifier.answer-field",
        "result",
    )
    flags += ("--rank.final-answer", " ")  # the small model knows no colon, and has 32 places
    result = run(inputs, tmp_path / "run", *flags, "--rank.block-size", "18", "--rank.num-blocks", "1", "--rank.k", "1")
    table = pq.read_table(tmp_path / "run" / "rank.parquet").to_pandas()[::3]
    assert (table["own_answer_kept"] == ~table["question"].isin(wrong)).all()
    kept = [f"{row.own_answer} {row.own_answer}" for row in table.itertuples() if row.own_answer_kept]
    before = np.cumsum(table["own_answer_kept"]) - table["own_answer_kept"]
    expected = [[kept[(p + 1) % (len(kept) - 1)]] for p in before]
    assert [answers for _, answers in seen] == expected
    assert any(f"{len(kept)} of 18 answers of the model are right" in note for note in result["notes"])


def test_a_hard_task_asks_further_questions_and_then_shows_what_there_is(inputs):
    """4 right answers are wanted (k = 2), the blocks have 1 and 6; every third further question is answered right."""
    options = config(inputs, "--verifier.name", "exact", "--verifier.answer-field", "result")
    questions = load_strategy_responses(options).questions
    accepted = np.array([[True] + 5 * [False], 6 * [True]])
    asked = []

    def answer(chunk):
        asked.append(len(chunk))
        return [(one, one.reference_answer if at % 3 == 0 else "zz") for at, one in enumerate(chunk)], []

    further, notes = model._find_further_answers(options, accepted, questions, answer)
    assert len(further) == 4 and asked == [6, 6]
    assert all(text == one.reference_answer for one, text in further)
    assert len(notes) == 1 and "of 12 that were asked (rank.answer_questions) 4 were answered right" in notes[0]
    few = config(
        inputs, "--verifier.name", "exact", "--verifier.answer-field", "result", "--rank.answer-questions", "14"
    )
    further, notes = model._find_further_answers(few, accepted, questions, answer)
    assert len(further) == 1 and "of 2 that were asked" in notes[0]
    assert notes[1].endswith("there are fewer for block 1: there all answers are shown, right or wrong")


@pytest.mark.slow
@pytest.mark.parametrize("right", [0, 3])
def test_too_few_right_answers_do_not_stop_the_ranking(inputs, tmp_path, right):
    """20 questions, of which 18 are in blocks: all that is there is shown, and it is said."""
    rows = [json.loads(line) for line in (inputs / "table.jsonl").read_text().splitlines()]
    own = [{"prompt": row["prompt"], "response": row["result"] if at < right else "zz"} for at, row in enumerate(rows)]
    write(tmp_path / "own.jsonl", own)
    flags = ("--rank.own-answers", str(tmp_path / "own.jsonl"), "--verifier.name", "exact", "--verifier.answer-field")
    result = run(inputs, tmp_path / "run", *flags, "result", "--rank.final-answer", "", "--rank.metrics", "sppl")
    assert sum("there all answers are shown, right or wrong" in note for note in result["notes"]) == 1
    assert pq.read_table(tmp_path / "run" / "rank.parquet")["own_answer_kept"].to_pylist().count(True) <= 3 * right
    assert all(math.isfinite(line["score"].value) for line in result["metrics"]["sppl"])


@pytest.mark.slow
def test_train_then_test_finds_the_strategy_that_the_validation_rows_follow(inputs, made, tmp_path):
    flags = (
        "--rank.train-examples", "16", "--rank.train-seeds", "2", "--data.validation", str(made / "validation.jsonl"),
        "--optimizer.learning-rate", "3e-3", "--optimizer.warmup-steps", "2", "--train.max-steps", "40",
        "--train.global-batch-size", "8",
        "--rank.accuracies", "next=.9", "previous=.1", "same <b>=.2",
    )  # fmt: skip
    result = run(inputs, tmp_path / "run", *flags)
    means = {line["name"]: line["mean"]["loss"][0] for line in result["tested"]["strategies"]}
    assert min(means, key=means.get) == "next" and means["next"] < result["tested"]["before"]["loss"]
    assert result["tested"]["strategies"][0]["runs"][0] != result["tested"]["strategies"][0]["runs"][1]
    values = [line["score"].value for line in result["metrics"]["sppl"]]
    assert result["against"]["accuracy"]["sppl"] == rank_correlation(-np.array(values), np.array([0.9, 0.1, 0.2]))
    assert "Train-then-test" in (tmp_path / "run" / "report.html").read_text()


def test_a_response_that_makes_a_mean_alone_is_named(inputs, whole):
    found = load_strategy_responses(config(inputs))
    blocks = draw_blocks(found.questions, 6, 3, 0)
    some = [one.with_response(text) for block in blocks for one in block for text in one.responses]
    values = np.ones((3, 6, 3))
    values[1, 2, 2] = 40.0
    notes = collect_remarks(config(inputs, "--rank.metrics", "sppl"), {"sppl": values}, found, rows_of_nothing(some), 0)
    worst = f"half of the SPPL of 1 of 3 strategies, at worst 70% of that of same <b> ({blocks[1][2].where}): see"
    assert len(notes) == 1 and worst in notes[0]
    flags = ("--rank.metrics", "sppl", "--rank.mean", "geometric")
    assert collect_remarks(config(inputs, *flags), {"sppl": values}, found, rows_of_nothing(some), 0) == []


def rows_of_nothing(examples):
    """Rows whose tokens nobody reads."""
    return make_tokenized_examples(
        [], corpus_from_sequences([TokenizedSequence(np.zeros(0, np.int32), np.zeros(0, bool))])
    )._replace(examples=examples)


# ---- the pick


def measured(gap, noise, seed=0):
    """SPPL of 3 blocks of 30 questions: strategy b is `gap` above a, c far above; `noise` sets a and b apart."""
    rng = np.random.default_rng(seed)
    hard = rng.gamma(2, 10, (3, 30))  # questions differ much more than strategies
    values = [hard, hard + gap + noise * rng.normal(size=hard.shape), hard + 50]
    return {"sppl": np.stack(values, -1) + 1}


def test_the_pick_is_paired_or_there_is_none():
    options = RankSection(metrics=("sppl",))
    clear = metrics.rank_strategies(options, "abc", measured(1.0, 1.0), 0)
    intervals = [line["score"] for line in clear["metrics"]["sppl"]]
    assert clear["verdict"]["use"] == "a" and clear["verdict"]["close"] == []
    assert intervals[0].high > intervals[1].low  # unpaired, the two would not be told apart
    assert clear["metrics"]["sppl"][1]["behind"].low > 0 and clear["metrics"]["sppl"][0]["behind"] is None
    none = metrics.rank_strategies(options, "abc", measured(0.1, 3.0), 0)["verdict"]
    assert none["use"] is None and none["close"] and "That difference may be 0" in none["sentence"]
    assert "c" not in none["close"]


def test_no_pick_by_a_model_that_examples_confuse():
    clear = measured(1.0, 1.0)
    for factor, use in ((1.9, "a"), (2.1, None)):
        both = clear | {"perplexity": clear["sppl"] / factor}
        verdict = metrics.rank_strategies(RankSection(metrics=("sppl", "perplexity")), "abc", both, 0)["verdict"]
        assert verdict["use"] == use
    assert "No pick by SPPL: " in verdict["sentence"] and "perplexity 2.10), so it does not" in verdict["sentence"]
    assert (
        metrics.rank_strategies(RankSection(pick_by="perplexity", metrics=("sppl",)), "abc", both, 0)["verdict"]["use"]
        == "a"
    )


def test_a_pick_among_equals_is_rare():
    """Two strategies that do not differ: the rule picks one in about 1 of 20 samples, whichever it is."""
    options = RankSection(metrics=("sppl",))
    picked = [
        metrics.rank_strategies(options, "abc", measured(0.0, 1.0, seed), 0)["verdict"]["use"] for seed in range(40)
    ]
    assert sum(one is not None for one in picked) <= 8  # 5 % of 40: 9 or more once in 7,000


def test_spreads_and_means_by_option():
    made = measured(1.0, 1.0)
    for mean, of in (("geometric", strategies.geometric_mean), ("trimmed", strategies.trimmed_mean(0.1))):
        lines = metrics.rank_strategies(RankSection(metrics=("sppl",), mean=mean), "abc", made, 0)["metrics"]["sppl"]
        np.testing.assert_allclose([line["score"].value for line in lines], of(made["sppl"]).mean(0))
    one = metrics.rank_strategies(RankSection(metrics=("sppl",)), "abc", {"sppl": made["sppl"][:1]}, 0)["metrics"][
        "sppl"
    ][0]
    assert math.isnan(one["spread"]) and len(one["blocks"]) == 1


# ---- wrong input


def changed(change):
    """A table in which row 3 is changed."""

    def make(rows):
        change(rows[2])
        return rows

    return make


OWN = ["--rank.own-answers", "NEXT"]
WRONG = {
    "missing": (changed(lambda row: row["responses"].pop("next")), [], r"table.jsonl:3: no response of 'next'; there"),
    "empty": (changed(lambda row: row["responses"].update(next=" ")), [], r"l:3: the response of 'next' is empty. F"),
    "no text": (changed(lambda row: row["responses"].update(next=3)), [], r"l:3: 'next' is int 3; a string is wanted"),
    "no map": (changed(lambda row: row.update(responses="x")), [], r"l:3: 'responses' is str 'x'; a map from strat"),
    "no question": (changed(lambda row: row.pop("prompt")), [], r"table.jsonl:3: no 'prompt'; the keys are"),
    "twice": (lambda rows: [*rows, rows[1]], [], r"table.jsonl:21: the question stands at .*table.jsonl:2, too"),
    "few questions": (lambda rows: rows[:5], [], "5 questions can be asked, and a block has rank.block_size = 6"),
    "long questions": (
        None,
        ["--rank.max-question-tokens", "3"],
        "0 questions can be asked, .* or raise rank.max_question_tokens",
    ),
    "unknown strategy": (None, ["--rank.strategies", "nxt", "same <b>"], "names 'nxt', .* did you mean 'next'"),
    "one strategy": (None, ["--rank.strategies", "next"], "1 strategy; ranking takes at least 2"),
    "one file": (None, ["--rank.responses-field", "said"], "no 'response'; the keys are .* table of strategies has"),
    "no rewards": (None, ["--rank.reward-field", "prize"], "table.jsonl:1: the reward of 'next' is NoneType None"),
    "car": (None, ["--rank.metrics", "car", "--rank.pick-by", "car"], "car needs rewards: name rank.reward_field"),
    "k": (None, ["--rank.k", "5"], "rank.k = 5: must be 1 or more, and at most rank.block_size - 2"),
    "decide": (None, ["--rank.metrics", "ifd"], "rank.pick_by = 'sppl': must be among rank.metrics"),
    "template": (None, ["--rank.template", "{question}"], "must hold {question} and then {examples}, once each"),
    "too long": (
        None,
        [*OWN, "--rank.example-template", 9 * "x " + "{answer}"],
        "and a response take .* Set rank.max_response_tokens",
    ),
    "long answers": (
        None,
        ["--generate.max-new-tokens", "30"],
        "its answer up to generate.max_new_tokens = 30; .* Lower generate",
    ),
    "accuracies": (None, ["--rank.accuracies", "next=1"], "has no number for previous, same <b>. Give one for each"),
    "accuracy of whom": (None, ["--rank.accuracies", "nxt=1"], "names 'nxt', which is no strategy; did you mean 'nex"),
    "nothing to test on": (None, ["--rank.train-examples", "5"], "name the examples to test on in data.validation"),
    "checker without results": (None, ["--verifier.name", "exact"], "name the key of the correct answer"),
    "no answers given": (None, ["--rank.own-answers", "TABLE"], "no 'response'; the keys are"),
    "answers to others": (lambda rows: [{**row, "prompt": "z" + row["prompt"]} for row in rows], OWN, "to 18 of 18 qu"),
    "folder exists": (None, ["--out", "EXISTS"], "--resume"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_gets_one_clear_error(inputs, whole, tmp_path, capsys, name):
    change, flags, message = WRONG[name]
    rows = [json.loads(line) for line in (inputs / "table.jsonl").read_text().splitlines()]
    write(tmp_path / "table.jsonl", change(rows) if change else rows)
    known = {"EXISTS": str(whole[0]), "TABLE": str(tmp_path / "table.jsonl"), "NEXT": str(inputs / "next.jsonl")}
    flags = [known.get(flag, flag) for flag in flags]
    out = ["--data.train", str(tmp_path / "table.jsonl"), "--out", str(tmp_path / "run")]
    assert main(["rank", str(inputs / "rank.yaml"), *out, *flags]) == 1
    told = capsys.readouterr().err.strip()
    assert re.search(message, told, re.DOTALL), told
    assert "Traceback" not in told


# ---- what a service does not answer


def answer_by(monkeypatch, choose):
    """A service whose response to (the number of a prompt, draw) is `choose` of them; returns what it was asked."""
    asked = []

    def make_chat_client(*args, **options):
        def generate(prompts, draws, store):
            asked.append((len(prompts), list(draws)))
            return [[choose(at, draw) for draw in draws] for at in range(len(prompts))]

        return generate

    monkeypatch.setattr(generation.openai, "make_chat_client", make_chat_client)
    return asked


SERVICE = ("--generate.backend", "service", "--generate.url", "http://127.0.0.1:1/v1", "--generate.model", "m")
SPENT = Response("", (), (), False, "generate.max_new_tokens = 4 was spent on reasoning")
BY_PERPLEXITY = ("--rank.metrics", "perplexity", "--rank.pick-by", "perplexity")
REFUSED = Response("", (), (), False, "the model refused: I cannot")


def test_a_service_that_answers_nothing_is_named_and_not_asked_again(inputs, tmp_path, monkeypatch):
    asked = answer_by(monkeypatch, lambda at, draw: SPENT)
    with pytest.raises(ValueError, match=r"table.jsonl:\d+: .*the service gave none, 1 time, generate.max_new_tokens = 4 was spent on reasoning\)\. Raise generate.max_new_tokens, or let the service answer without reasoning") as caught:  # fmt: skip # noqa: E501
        run(inputs, tmp_path / "out", *SERVICE)
    assert "temperature" not in str(caught.value)
    assert {draws[0] for _, draws in asked} == {0}


def test_a_question_that_is_always_refused_is_named(inputs, tmp_path, monkeypatch):
    answer_by(monkeypatch, lambda at, draw: Response("abcd", (), (), True) if at or draw else REFUSED)
    out = run(inputs, tmp_path / "out", *SERVICE, *BY_PERPLEXITY)
    assert any("1 request got no answer from the service: 1 time, the model refused: I can" in n for n in out["notes"])
    assert not any("could not be used" in note for note in out["notes"])
    assert pq.read_table(tmp_path / "out" / "rank.parquet")["own_answer"].to_pylist() == ["abcd"] * 54
    answer_by(monkeypatch, lambda at, draw: Response("abcd", (), (), True) if at else REFUSED)
    with pytest.raises(ValueError, match=r"gave none, 5 times, the model refused: I cannot\)\. Remove the question"):
        run(inputs, tmp_path / "again", *SERVICE, *BY_PERPLEXITY)


def test_questions_with_fewer_answers_than_others_do_not_shift_them(inputs, tmp_path, monkeypatch):
    """Of 2 wanted answers one question has 1: all are compared with 1, and it is told."""

    def choose(at, draw):
        return REFUSED if at == 0 and draw else Response("abcd", (), (), True)

    # of the spare draws only the first question is asked, as number 0 again
    answer_by(monkeypatch, choose)
    flags = ("--rank.metrics", "self_similarity", "--rank.pick-by", "self_similarity", "--generate.num-generations")
    out = run(inputs, tmp_path / "two", *SERVICE, *flags, "2")
    assert any(note.startswith("1 own answers to each question are used") for note in out["notes"])
    answer_by(monkeypatch, lambda at, draw: Response("abcd", (), (), True))
    one = run(inputs, tmp_path / "one", *SERVICE, *flags, "1")
    assert out["metrics"] == one["metrics"]
