"""`rank` with candidates.strategies: a service or a model writes the responses, which are then ranked."""

import json
import re

import pytest

from bilevel_jax.cli import main
from bilevel_jax.commands.rank import candidates, model, run
from bilevel_jax.commands.rank.run import rank
from bilevel_jax.commands.rank.strategies import Question
from bilevel_jax.lm.builtin import cipher
from bilevel_jax.runs.config.load import RankConfig, load_config
from tests.commands.chat_server import ChatServer

CONFIG = """
model: {{name_or_path: {made}/model}}
lora: {{r: 0}}
data: {{train: [{folder}/rows.jsonl]}}
rank:
  block_size: 4
  num_blocks: 2
  metrics: [perplexity]
  pick_by: perplexity
generate: {{max_new_tokens: 4, temperature: 1.0, top_p: 1.0, top_k: 0}}
output: {{progress: false}}
mesh: {{data: 1}}
"""
STRATEGIES = ("gold", "direct", "step_by_step", "concise", "rephrase", "own_style")
REFUSED = "bbbb>"


def answer(text):
    """The cipher of the question that a prompt holds, by 1 or 2 letters; nothing where it is asked to rephrase one."""
    question = re.search(r"\b([a-z]{4})>", text)[1]
    if f"{question}>" == REFUSED and "own words" in text:
        return " "
    return cipher.rotate_letters(question, 2 if "step by step" in text else 1)


def some(text):
    """As `answer`, to three questions alone."""
    return answer(text) if re.search(r"\b[cde]{4}>", text) else ""


@pytest.fixture(scope="module")
def server():
    chat = ChatServer({"writer": answer, "silent": lambda text: "", "special": lambda text: "bc</s>", "some": some})
    yield chat
    chat.close()


@pytest.fixture(scope="module")
def inputs(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("candidates")
    letters = "bcdefghijklm"
    rows = [{"prompt": f"{letter * 4}>", "response": cipher.rotate_letters(letter * 4, 1)} for letter in letters]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rank.yaml").write_text(CONFIG.format(made=made, folder=folder))
    return folder


def config(inputs, out, *flags):
    return load_config(RankConfig, inputs / "rank.yaml", [*flags, "--out", str(out)])


def service(server, model="writer", strategies=STRATEGIES):
    return ("--candidates.strategies", *strategies, "--candidates.model", f"{model}@{server.url}")


def read(out):
    return [json.loads(line) for line in (out / candidates.STRATEGIES_FILE).read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(inputs, server, tmp_path_factory):
    """One uninterrupted run: (its folder, its result, what the service was asked)."""
    out = tmp_path_factory.mktemp("whole") / "run"
    before = len(server.requests)
    result = rank(config(inputs, out, *service(server), "--candidates.questions", "12"))
    return out, result, server.requests[before:]


def test_a_service_writes_what_rank_compares(whole):
    out, result, asked = whole
    rows = read(out)
    assert result["strategies"] == list(STRATEGIES) and len(rows) == 11 and len(asked) == 12 * 5
    for row in rows:
        question, responses = row["prompt"], row["responses"]
        by = {name: 2 if name == "step_by_step" else 1 for name in STRATEGIES}
        assert responses == {name: cipher.rotate_letters(question[:4], by[name]) for name in STRATEGIES}
    texts = [body["messages"][-1]["content"] for body in asked]
    assert len(set(texts)) == len(texts)  # nothing is asked twice
    assert sum("Correct answer:" in text for text in texts) == 2 * 12
    assert sum(text.count("Answer of the model to another question") for text in texts) == 2 * 12


def test_bad_responses_are_named_and_their_questions_left_out(whole, inputs):
    notes = "; ".join(whole[1]["notes"])
    where = f"{inputs}/rows.jsonl:1 (the message is empty"
    assert f"1 response of 'rephrase' could not be used, and the questions were left out: {where}" in notes, notes
    assert REFUSED not in {row["prompt"] for row in read(whole[0])}


def test_the_file_can_be_ranked_again(whole, inputs, tmp_path):
    again = rank(config(inputs, tmp_path / "run", "--data.train", str(whole[0] / candidates.STRATEGIES_FILE)))
    assert again["metrics"] == whole[1]["metrics"]


def test_a_stopped_run_asks_for_nothing_twice(whole, inputs, server, tmp_path):
    out = tmp_path / "run"
    before = len(server.requests)

    class Stopped(Exception):
        pass

    flags = (*service(server), "--candidates.questions", "12", "--candidates.concurrency", "1")
    patch = pytest.MonkeyPatch()
    real = candidates.make_service_generator

    def make(settings, session, section):
        generate = real(settings, session, section)

        def limited(prompts, draws):
            if "step_by_step" in prompts[0].id:
                raise Stopped
            return generate(prompts, draws)

        return limited

    patch.setattr(candidates, "make_service_generator", make)
    with pytest.raises(Stopped):
        rank(config(inputs, out, *flags))
    patch.undo()
    assert len(server.requests) - before == 12
    result = rank(config(inputs, out, *flags, "--resume"))
    assert len(server.requests) - before == 12 * 5  # as many as without the stop
    assert result["metrics"] == whole[1]["metrics"]
    assert (out / candidates.STRATEGIES_FILE).read_bytes() == (whole[0] / candidates.STRATEGIES_FILE).read_bytes()
    rank(config(inputs, out, *flags, "--resume"))
    assert len(server.requests) - before == 12 * 5


@pytest.mark.slow
def test_a_model_of_a_folder_writes(inputs, shared, tmp_path):
    folder = shared / "models" / "stories-260k"
    flags = ("--candidates.strategies", *STRATEGIES, "--candidates.max-new-tokens", "12", "--model", str(folder))
    rows = [{"prompt": text, "response": "A red ball."} for text in ("Who?", "What is it?", "Where?", "When?", "How?")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags += ("--data.train", str(tmp_path / "rows.jsonl"), "--rank.num-blocks", "1", "--generate.max-new-tokens", "12")
    itself = rank(config(inputs, tmp_path / "itself", *flags))
    named = rank(config(inputs, tmp_path / "named", *flags, "--candidates.model", str(folder)))
    assert itself["metrics"] == named["metrics"] and itself["strategies"] == list(STRATEGIES)
    assert read(tmp_path / "itself") == read(tmp_path / "named") and len(read(tmp_path / "named")) == 4


def test_own_answers_are_shown_and_an_empty_row_is_left_out(inputs, server, tmp_path):
    """own_style shows the answers of rank.own_answers; they must answer what is asked, before anything is written."""
    rows = [json.loads(line) for line in (inputs / "rows.jsonl").read_text().splitlines()]
    rows[0]["response"] = " "
    own = [{"prompt": row["prompt"], "response": f"own {row['prompt'][0]}"} for row in rows[1:]]
    for name, part in {"rows": rows, "own": own, "few": own[:3]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    flags = (*service(server, strategies=("gold", "own_style")), "--data.train", str(tmp_path / "rows.jsonl"))
    flags += ("--data.empty", "drop", "--rank.own-answers")
    before = len(server.requests)
    with pytest.raises(ValueError, match="few.jsonl has no answer to [0-9] of 8 questions that were drawn"):
        rank(config(inputs, tmp_path / "refused", *flags, str(tmp_path / "few.jsonl")))
    assert len(server.requests) == before
    result = rank(config(inputs, tmp_path / "run", *flags, str(tmp_path / "own.jsonl")))
    asked = [body["messages"][-1]["content"] for body in server.requests[before:]]
    assert len(asked) == 8 and all(len(re.findall(r"another question:\nown [a-z]\n", text)) == 2 for text in asked)
    where = f"{tmp_path}/rows.jsonl:1"
    assert f"1 questions with an empty response were left out, the first: {where}" in result["notes"]


def test_further_questions_need_no_written_responses(inputs, server, tmp_path, monkeypatch):
    """Six right answers do not suffice for two blocks that want four each: the four other questions are asked."""
    collected = []

    class Enough(Exception):
        pass

    def collect(*args, **options):
        collected.append((args[2], model.collect_own_answers(*args, **options)))
        raise Enough

    monkeypatch.setattr(run, "collect_own_answers", collect)
    rows = [json.loads(line) for line in (inputs / "rows.jsonl").read_text().splitlines()]
    own = [{"prompt": row["prompt"], "response": row["response"] if at < 6 else "zz"} for at, row in enumerate(rows)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    flags = (*service(server, strategies=("direct", "concise")), "--rank.metrics", "sppl", "--rank.pick-by", "sppl")
    flags += ("--rank.k", "2", "--rank.own-answers", str(tmp_path / "own.jsonl"))
    flags += ("--verifier.name", "exact", "--verifier.answer-field", "response")
    with pytest.raises(Enough):
        rank(config(inputs, tmp_path / "run", *flags))
    ((sample, answers),) = collected
    right = {row["prompt"] for row in rows[:6]} - {question.text for block in sample for question in block}
    assert {question.text for question, _ in answers.further} == right
    note = f"of 4 that were asked (rank.answer_questions) {len(right)} were answered right"
    assert any(note in one for one in answers.notes), answers.notes


def test_a_text_of_a_question_is_never_filled_in():
    question = Question("id", "What is {answer} in {examples}?", ("{question}",), None, (), "rows.jsonl", 1)
    filled = candidates._fill(candidates.PROMPTS["own_style"], question, ["{question}"])
    assert filled.count("What is {answer} in {examples}?") == 1
    assert "Correct answer:\n{question}\n" in filled and "another question:\n{question}\n" in filled


WRONG = {
    "one": (("--candidates.strategies", "direct"), "names one strategy, and ranking takes at least 2"),
    "unknown": (("--candidates.strategies", "direct", "consise"), "did you mean 'concise'"),
    "model alone": (("--candidates.model", "x@http://y/v1"), "say how strategies write responses, and none is named"),
    "keys alone": (
        ("--candidates.questions", "50", "--candidates.temperature", "0.1"),
        "say how strategies write responses, and none is named",
    ),
    "password": (
        ("--candidates.strategies", "direct", "concise", "--candidates.model", "x@http://user:word@h/v1"),
        "candidates.model = 'x@http://...@h/v1': a service is NAME@http",
    ),
    "scheme": (
        ("--candidates.strategies", "direct", "concise", "--candidates.model", "x@ftp://h/v1"),
        "a service is NAME@http",
    ),
    "no name": (
        ("--candidates.strategies", "direct", "concise", "--candidates.model", "@http://h/v1"),
        "a service is NAME@http",
    ),
    "less than a block": (
        ("--candidates.strategies", "direct", "concise", "--candidates.questions", "3"),
        "must be 0 .as many as blocks and trial trainings take., or at least rank.block_size",
    ),
    "few good": ("some", "3 of 12 questions got a response of every strategy that can be used, and a block has"),
    "special": ("special", "none of 8 responses of 'direct' can be used, the first to .*with a special token"),
    "two sources": (
        ("--candidates.strategies", "direct", "concise", "--rank.strategies", "direct", "concise"),
        "leave out rank.strategies",
    ),
    "no gold": (
        ("--candidates.strategies", "direct", "rephrase", "--data.response-field", "said"),
        "no 'said'; the keys are",
    ),
    "few": (("--candidates.strategies", "direct", "concise", "--rank.block-size", "20"), "12 questions can be asked"),
    "context": (
        ("--candidates.strategies", "direct", "step_by_step"),
        "the prompt of '[a-z_]+' has .* tokens and its answer up to candidates.max_new_tokens = 512.* which counts 6 "
        "tokens of this one: the question alone",
    ),
    "silent": (
        "silent",
        "none of 8 responses of 'direct' can be used, the first to .*rows.jsonl:[0-9]+ .the message is empty",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_gets_one_clear_error(inputs, server, tmp_path, capsys, name):
    flags, message = WRONG[name]
    flags = service(server, flags, ("direct", "concise")) if isinstance(flags, str) else flags
    code = 2 if name == "unknown" else 1  # a wrong command line
    assert main(["rank", str(inputs / "rank.yaml"), *flags, "--out", str(tmp_path / "run")]) == code
    told = capsys.readouterr().err.strip()
    assert re.search(message, told, re.DOTALL), told
    assert "Traceback" not in told
