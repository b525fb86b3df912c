"""What `inspect` counts and prints, against rows whose tokens, copies and faults are known; hostile text stays text."""

import json
import re

import pytest

from bilevel_jax.cli import main
from bilevel_jax.commands.inspect.run import to_plain_text
from bilevel_jax.commands.inspect.survey import MAX_TOKENIZER_CALLS, survey_part, tokenize_readable
from bilevel_jax.lm.builtin import cipher
from bilevel_jax.lm.data.examples import Example, Turn
from bilevel_jax.lm.data.tokens import load_tokenizer
from bilevel_jax.lm.data.vocabulary import spell_tokens
from bilevel_jax.runs.config.load import InspectConfig, load_config
from bilevel_jax.runs.config.schema import DataSection
from bilevel_jax.runs.tasks import builtin, splits
from tests.lm.data.test_tokens import CHATML, LLAMA2, bpe


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """The cipher's tokenizer and config, in a folder like a model's: 20 letters, context 32."""
    return cipher.write_cipher_data(
        tmp_path_factory.mktemp("letters"), clean=2, wrong=1, noise=1, validation=1, dev=1, test=1, copies=0
    ) / "untrained"  # fmt: skip


@pytest.fixture
def look(letters, tmp_path, monkeypatch, capsys):
    """(rows of training, of validation, more flags) -> what the command prints at 160 columns."""
    monkeypatch.setenv("COLUMNS", "160")

    def run(train, trusted=(), *flags, model=letters, code=0):
        config = tmp_path / "config.yaml"
        paths = {"train": train} | ({"validation": trusted} if trusted else {})
        for name, rows in paths.items():
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sections = "".join(f"  {name}: [{tmp_path}/{name}.jsonl]\n" for name in paths)
        config.write_text(
            f"model: {{name_or_path: {model}}}\ndata:\n{sections}  split: [1, 0, 0]\nouter: {{steps: 3}}\n"
        )
        assert main(["inspect", str(config), *flags]) == code
        told = capsys.readouterr()
        return told.out if code == 0 else told.err

    return run


def rows(count, start=0):
    """Different prompts of two letters, answers of three."""
    names = cipher.make_cipher_tokenizer().get_vocab()
    alphabet = sorted(name for name in names if len(name) == 1 and name.isalpha())
    size = len(alphabet)
    return [
        {"prompt": alphabet[i // size] + alphabet[i % size] + ">", "response": alphabet[i % size] * 3}
        for i in range(start, start + count)
    ]


def flat(text):
    return " ".join(text.split())


def test_what_training_would_see_of_rows_without_fault(look):
    out = look(rows(20), rows(16, 100))
    assert out.splitlines()[-1] == "OK: nothing to act on."
    table = flat(out)
    assert "rows 20 16" in table and "20 prompt from train.jsonl 16 prompt from validation.jsonl" in table
    assert "tokens 160 128 targets 80 (50.0%) 64 (50.0%)" in table  # BOS, 3 of the prompt, 3 letters and EOS
    assert "8 to 8" in table and "≤8 ████████ 20" in table
    assert "BOS in a row 1 in 20 1 in 16 EOS in a row 1 in 20 1 in 16" in table
    assert "No row stands twice: no copies, no leaks." in out
    assert re.search(
        r"train.jsonl:1  id [0-9a-f]{16}#0  source train  8 tokens, 4 targets\n<s>\|a\|a\|>⟦a\|a\|a\|</s>⟧", out
    )


def test_a_notebook_gets_the_same_text(look, monkeypatch):
    told = look(rows(20), rows(16, 100))
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert look(rows(20), rows(16, 100)) == told


def test_rows_are_shown_by_id_and_long_ones_lose_their_middle(look):
    out = look(rows(20), (), "--show.examples", "2")
    assert len(re.findall("⟦", out)) == 2 + 1  # the legend, too
    second = re.search(r"train.jsonl:2  id (\S+)", out)[1]
    out = look(rows(20), rows(16, 100), "--show.ids", second, "nobody#0")
    assert re.findall(r"\w+.jsonl:\d+  id", out) == ["train.jsonl:2  id"] and "no row has the id nobody#0" in out
    out = look(rows(20), (), "--show.examples", "1", "--show.max-tokens", "4")
    assert "<s>|a|a … 4 tokens, 3 of them targets … ⟦</s>⟧" in out
    assert "tokens between" not in look(rows(20), (), "--show.examples", "0")


def test_copies_leaks_and_overlaps_are_all_counted(look):
    train = [*rows(20), rows(1)[0], rows(1)[0], {"prompt": "ab>", "response": "cccc"}]
    trusted = [*rows(16, 100), *rows(2, 18), {"prompt": "ac>", "response": "dddd"}, rows(1, 100)[0]]
    out = look(train, trusted)
    assert "copies in training: 2\n    train.jsonl:1, train.jsonl:21, train.jsonl:22\n" in out
    assert "copies in the validation examples: 1\n    validation.jsonl:1, validation.jsonl:20\n" in out
    assert "also stand in the validation examples: 2\n    train.jsonl:19 equals validation.jsonl:17\n" in out
    assert "training examples on 1 prompt with several responses: 2\n    train.jsonl:2, train.jsonl:23\n" in out
    assert "but another response: 1\n    train.jsonl:3 asks what validation.jsonl:19 asks\n" in out
    assert (
        "2 training examples among the validation examples; the other commands stop: "
        "remove them, or set data.leaks to drop" in out
    )
    assert "the other commands leave them out" in look(train, trusted, "--data.leaks", "drop")


def test_parts_of_the_trusted_rows_that_overlap(look, tmp_path):
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(3, 100)))
    out = look(rows(20), rows(16, 100), "--data.test", str(tmp_path / "test.jsonl"))
    assert "rows in both validation and test: 3\n    validation.jsonl:1 equals test.jsonl:1\n" in out
    assert "3 rows in both validation and test; the other commands stop" in out


LONG = {"prompt": "abc>", "response": "d" * 40}  # 46 tokens; the context has 32
DEEP = {"prompt": "e" * 40 + ">", "response": "dd"}  # 45 tokens, of which 41 are the prompt's


@pytest.mark.parametrize(
    "truncate, said",
    [
        ("error", "2 rows (9.1%) of more than 32 tokens, the first {}:21. data.truncation = error: "
                  "the other commands stop. "
                  "Instead: right loses 13.7% of the targets and leaves 1 row without any, which stops the other "
                  "commands; left loses 8.1% of the targets; drop loses 35.5% of the targets"),
        ("right", "data.truncation = right: right loses 13.7% of the targets and leaves 1 row without any"),
        ("left", "data.truncation = left: left loses 8.1% of the targets. Instead: right loses"),
        ("drop", "data.truncation = drop: drop loses 35.5% of the targets. Instead"),
    ],
)  # fmt: skip
def test_rows_that_are_too_long(look, tmp_path, truncate, said):
    # 20 rows of 4 targets, 41 and 3 targets: 124. right keeps 32 - 5 of 41 and none of 3; left 31 of 41 and all 3
    out = look([*rows(20), LONG, DEEP], rows(16, 100), "--data.truncation", truncate)
    assert said.format(tmp_path / "train.jsonl") in flat(out)
    assert "beyond 32 2 (9.1%) 0" in flat(out)
    seen = {"error": 160 + 46 + 45, "right": 160 + 64, "left": 160 + 64, "drop": 160}[truncate]
    assert f"tokens {seen} 128" in flat(out)


def test_rows_that_cannot_be_used_are_counted_and_the_first_is_named(look, tmp_path):
    bad = [{"prompt": "a</s>b>", "response": "c"}, {"prompt": "ab>", "response": " "}]
    out = flat(look([*rows(20), *bad, *bad[:1]], rows(16, 100)))
    assert (
        f"2 rows that cannot be tokenized; the other commands stop. The first: {tmp_path}/train.jsonl:21: the text"
        in out
    )
    assert (
        f"1 row with nothing to learn from, a stop for the other commands. The first: {tmp_path}/train.jsonl:22" in out
    )
    assert "unreadable 2 0" in out
    assert "1 row with nothing to learn from, left out" in flat(look([*rows(20), *bad], (), "--data.empty", "drop"))


def test_input_that_no_verb_could_begin_with_is_one_error(look):
    assert "cannot be tokenized" not in look([{"prompt": "</s>", "response": "a"}], code=1)
    assert "must hold {prompt} once" in look(rows(3), (), "--data.template", "x", code=1)
    assert "bilevel-jax: " in look([{"question": "a"}], code=1)


def test_a_kind_of_rows_that_the_tokenizer_refuses_does_not_hide_the_others():
    chat = tuple(Turn(role, "ab") for role in ("user", "assistant", "user", "assistant"))
    single = (Turn("user", "a>"), Turn("assistant", "b"))
    examples = [Example(f"{i}", i, single if i % 4 == 0 else chat, "s", None, "f", i + 1) for i in range(1000)]
    found = tokenize_readable(examples, bpe(), DataSection())
    assert found.indices == list(range(0, 1000, 4))
    assert found.problems[0].startswith("f:2: a dialogue of 4 turns") and len(found.problems) + found.num_untried == 750
    assert len(found.problems) >= MAX_TOKENIZER_CALLS // 4


@pytest.mark.parametrize(
    "template, bos, odd_bos, odd_eos",
    [
        (CHATML, "<|begin|>", [], []),
        (CHATML, None, [], []),
        (LLAMA2, "<|begin|>", [1], []),  # a BOS before each exchange
    ],
)
def test_special_tokens_that_stand_too_often(template, bos, odd_bos, odd_eos):
    one = (Turn("user", "Name a pet."), Turn("assistant", "A cat."))
    examples = [Example(f"{i}", i, turns, "s", None, "f", i + 1) for i, turns in enumerate((one, one + one))]
    part = survey_part("training", examples, bpe(template, bos=bos), DataSection(), 512, vocab_size=10**6)
    assert (part.bos.odd_rows, part.eos.odd_rows) == (odd_bos, odd_eos)


def test_preference_pairs_show_both_sides_and_want_their_objective(look):
    pairs = [{"prompt": row["prompt"], "chosen": row["response"], "rejected": "ef"} for row in rows(20)]
    out = look(pairs, (), "--show.examples", "1", "--objective.name", "dpo")
    assert "  chosen <s>|a|a|>⟦a|a|a|</s>⟧" in out and "rejected <s>|a|a|>⟦e|f|</s>⟧" in out
    assert "8 + 7 tokens, 7 targets" in out and "objective" not in out
    assert "a preference pair, and objective.name = sft reads single responses" in flat(look(pairs))


def test_what_a_person_should_act_on(look):
    out = flat(
        look([*rows(20), {**rows(1, 50)[0], "source": "tiny"}, {"prompt": "", "response": "abcdefg"}], rows(2, 100))
    )
    assert "sources with fewer than 5 training examples, which tell little: tiny (1)" in out
    assert "validation: 2 rows: too few to tell much" in out
    many = [{"prompt": "a" * 28 + ">", "response": name["prompt"][0]} for name in rows(20)]
    assert "only 6.2% of the tokens are targets" in flat(look(many))
    assert "is padding: data.packing = true" in flat(look([*rows(20), {"prompt": "a" * 20 + ">", "response": "b"}]))
    assert "no validation examples" in look(rows(20))


def test_keys_of_messages_are_shown_in_the_mask_and_in_the_list(look, letters, tmp_path):
    bpe(CHATML).save_pretrained(str(tmp_path / "chat"))
    config = json.loads((letters / "config.json").read_text()) | {"vocab_size": 999, "max_position_embeddings": 99}
    (tmp_path / "chat" / "config.json").write_text(json.dumps(config))
    first, last = {"role": "assistant", "content": "B", "weight": 0}, {"role": "assistant", "content": "D", "name": "x"}
    said = [{"role": "user", "content": "A?"}, first, {"role": "user", "content": "C?"}, last]
    out = look([{"messages": said, "weight": 0.5}] * 2, (), "--show.examples", "1", model=tmp_path / "chat")
    assert out.count("⟦") == out.count("⟦D|<|eot|>⟧") + 1 == 2  # the other is the line that explains the marks
    table = flat(out)
    assert "answers marked as no target 2" in table
    assert (
        "training: the key 'weight' is not read: 2 rows, the first" in table and "weights come from weights.f" in table
    )
    assert "training: the key 'messages[].name' is not read: 2 rows, the first" in table
    notes = splits.load_splits(DataSection(train=[str(tmp_path / "train.jsonl")])).notes
    assert any(note.startswith("the key 'messages[].name' is not read: 2 rows, the first") for note in notes)
    assert "answers with a weight" not in table
    weighed = look([{"messages": [*said[:3], last | {"weight": 0.5}]}] * 2, model=tmp_path / "chat")
    assert "answers with a weight 2" in flat(weighed)
    wrong = look([{"messages": [*said[:3], last | {"train": 0.5}]}], model=tmp_path / "chat", code=1)
    assert "train.jsonl:1: 'train' of message 4 of messages is float 0.5; 0 or false, or 1 or true, is read" in wrong


HOSTILE = "\x1b[31mred\x1b[0m \x9b31m [bold red]markup[/] :smile: \u202eback\r\x07"


def test_hostile_text_reaches_no_terminal(look, shared):
    train = [{"prompt": HOSTILE, "response": "ok\n\n\tok", "source": HOSTILE, "label": HOSTILE}, *rows(5)]
    flags = ("--data.label-field", "label", "--show.ids", HOSTILE)
    out = look(train, (), *flags, model=shared / "models" / "stories-260k")
    out += look(train, (), *flags[:2], "--show.examples", "1", model=shared / "models" / "stories-260k")
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", out)
    assert "[bold red]markup[/]" in flat(out) and "␛[31mred" in out and "⟨U+9B⟩" in out
    assert re.search(r"⏎\n⟦o\|k\|⏎\n\|⏎\n\|⇥\|o\|k\|</s>⟧", out)
    assert str(to_plain_text("[red]x[/]\x1b")) == "[red]x[/]␛"


def test_every_token_is_spelled_and_together_they_are_the_text(shared):
    tokenizer = load_tokenizer(shared / "models" / "stories-260k")
    text = "Once upon a time, 日本 é."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = spell_tokens([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id], tokenizer)
    assert pieces[0] == ("<s>", True) and pieces[-1] == ("</s>", True) and len(pieces) == len(ids) + 2
    assert "".join(piece for piece, _ in pieces[1:-1] if not piece.startswith("‹")) == text
    assert ("‹<0xE6>›", False) in pieces  # the first byte of a character that only the third one completes


def test_real_data(look, shared, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    flags = ["--model.name-or-path", str(shared / "models" / "stories-260k"), "--data.max-length", "256"]
    for name, objective in (("hh_rlhf/harmless_test.jsonl", "dpo"), ("sst2/dev.jsonl", "sft")):
        data = ["--data.train", str(shared / "data" / name), "--data.empty", "drop", "--objective.name", objective]
        assert main(["inspect", *flags, *data]) == 0
        out = capsys.readouterr().out
        assert "to act on" in out.splitlines()[-1] and max(map(len, out.splitlines())) <= 100


def test_the_embedded_task_needs_no_training(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(builtin, "pretrain_builtin_model", None)
    assert main(["inspect", "configs/quickstart.yaml"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "OK: nothing to act on."


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--show.examples", "-1"], "show.examples = -1: must be 0 (show none) or more"),
        (["--show.max-tokens", "1"], "show.max_tokens = 1: must be 2 or more"),
        (["--show.width", "20"], "show.width = 20: must be 0 (the terminal's), or 40 or more"),
        ([], "data.train = ()"),
    ],
)
def test_rules(flags, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        load_config(
            InspectConfig, None, ["--model.name-or-path", "m", *(["--data.train", "t"] if flags else []), *flags]
        )
