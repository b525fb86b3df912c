"""What `export` writes: rows that others read as the same turns, settings as documented, a card that says how."""

import json
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from bilevel_jax.cli import main
from bilevel_jax.commands.export import run as export_run
from bilevel_jax.commands.export.formats import FORMATTERS, ExportTarget, choose_layout
from bilevel_jax.lm.data import examples
from bilevel_jax.lm.data.examples import Example, Turn
from bilevel_jax.runs.config.load import ExportConfig, load_config
from bilevel_jax.runs.scoring import difficulty

PROMPTS = [{"prompt": f"Question {i}?", "response": f"Answer {i}.", "source": "ab"[i % 2]} for i in range(8)]
CHATS = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            *({"role": role, "content": f"{role} {i} {k}"} for k in range(1 + i % 2) for role in ("user", "assistant")),
        ]
    }
    for i in range(8)
]
TEXTS = [{"text": f"A story, the {i}th.\nIts end."} for i in range(8)]
PAIRS = [{"prompt": f"Question {i}?", "chosen": f"Good {i}.", "rejected": f"Bad {i}."} for i in range(8)]
DEEP = [
    {
        "prompt": [*CHATS[1]["messages"], {"role": "user", "content": f"Question {i}?"}],
        "chosen": [{"role": "assistant", "content": f"Good {i}."}],
        "rejected": [{"role": "assistant", "content": f"Bad {i}."}],
    }
    for i in range(8)
]
KINDS = {"prompt": PROMPTS, "chat": CHATS, "text": TEXTS, "pairs": PAIRS, "deep pairs": DEEP}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """(rows, weights by row) -> flags that name files of them; the working folder is a fresh one."""
    monkeypatch.chdir(tmp_path)

    def write(rows, weights=None, **columns):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        ids = [example.id for example in examples.load_examples([str(tmp_path / "rows.jsonl")])]
        weights = np.linspace(0.25, 2, len(ids)) if weights is None else np.asarray(weights, float)
        pq.write_table(pa.table({"id": ids, "weight": weights, **columns}), tmp_path / "weights.parquet")
        (tmp_path / "config.yaml").write_text("data: {train: [rows.jsonl]}\nweights: {file: weights.parquet}\n")
        return ids

    return write


def export(capsys, *flags, code=0):
    assert main(["export", "config.yaml", "--out", "out", *flags]) == code
    told = capsys.readouterr()
    return told.out if code == 0 else told.err


def loaded(container):
    """The rows as `datasets` reads them."""
    if container == "datasets":
        return list(datasets.load_from_disk("out/train"))
    builder = "parquet" if container == "parquet" else "json"
    return list(datasets.load_dataset(builder, data_files=f"out/train.{container}", split="train", cache_dir="cache"))


def text(name):
    return Path("out", name).read_text(encoding="utf-8")


def first():
    return json.loads(text("train.jsonl").splitlines()[0])


COLUMNS = {
    ("trl", "prompt"): {"prompt", "completion"},
    ("trl", "chat"): {"messages"},
    ("trl", "text"): {"text"},
    ("trl", "pairs"): {"prompt", "chosen", "rejected"},
    ("trl", "deep pairs"): {"prompt", "chosen", "rejected"},
    ("axolotl", "prompt"): {"instruction", "input", "output"},
    ("axolotl", "chat"): {"messages"},
    ("axolotl", "text"): {"text"},
    ("axolotl", "pairs"): {"messages", "chosen", "rejected"},
    ("axolotl", "deep pairs"): {"messages", "chosen", "rejected"},
    ("llama_factory", "prompt"): {"instruction", "input", "output"},
    ("llama_factory", "chat"): {"conversations"},
    ("llama_factory", "text"): {"text"},
    ("llama_factory", "pairs"): {"instruction", "input", "chosen", "rejected"},
    ("llama_factory", "deep pairs"): {"conversations", "chosen", "rejected"},
    ("maxtext", "prompt"): {"prompt", "completion"},
    ("maxtext", "chat"): {"messages"},
    ("maxtext", "text"): {"text"},
    ("maxtext", "pairs"): {"prompt", "chosen", "rejected"},
}


@pytest.mark.parametrize("container", ["jsonl", "parquet", "datasets"])
@pytest.mark.parametrize("form, kind", COLUMNS, ids=str)
def test_others_read_the_same_turns(files, capsys, form, kind, container):
    if (form, container) == ("llama_factory", "datasets"):
        pytest.skip("LLaMA-Factory reads files")
    ids = files(KINDS[kind])
    out = export(capsys, "--export.format", form, "--export.container", container, "--selection.top-share", "0.5")
    assert out.startswith("4 of 8 rows") and "the top 50% by weight" in out
    rows = loaded(container)
    assert [row["id"] for row in rows] == ids[4:] and [row["weight"] for row in rows] == [1.25, 1.5, 1.75, 2.0]
    assert set(rows[0]) == COLUMNS[form, kind] | {"id", "weight"}
    if (form, kind) in (("axolotl", "pairs"), ("axolotl", "deep pairs")):
        return  # its `messages` with two answers beside them are a layout that only axolotl has
    if (form, kind) == ("maxtext", "pairs"):  # the prompt as the template writes it
        assert rows[0]["prompt"] == "Question 4?\n"
        return
    path = {"datasets": "out/train"}.get(container, f"out/train.{container}")
    assert [example.id for example in examples.load_examples([path])] == ids[4:]  # an id is a hash of the turns


def test_the_hub_reads_the_folder_by_its_card(files, capsys):
    files(CHATS)
    for number, container in enumerate(("jsonl", "parquet", "datasets")):
        assert main(["export", "config.yaml", "--out", f"e{number}", "--export.container", container]) == 0
        rows = datasets.load_dataset(f"e{number}", split="train", cache_dir="cache")
        assert len(rows) == 6 and set(rows.column_names) == {"messages", "id", "weight"}
    capsys.readouterr()


# ---- the settings of each trainer


@pytest.mark.parametrize(
    "kind, formatting, columns, ranking",
    [
        ("prompt", "alpaca", {"prompt": "instruction", "query": "input", "response": "output"}, None),
        ("chat", "sharegpt", {"messages": "conversations"}, None),
        ("text", "alpaca", {"prompt": "text"}, None),
        (
            "pairs",
            "alpaca",
            {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"},
            True,
        ),
        ("deep pairs", "sharegpt", {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}, True),
    ],
)
def test_dataset_info_is_as_llama_factory_documents(files, capsys, kind, formatting, columns, ranking):
    files(KINDS[kind])
    export(capsys, "--export.format", "llama_factory")
    (name, info), *others = json.loads(text("dataset_info.json")).items()
    assert (name, others) == ("out", []) and info["file_name"] == "train.jsonl"
    assert (info["formatting"], info["columns"], info.get("ranking")) == (formatting, columns, ranking)
    row = first()
    assert set(columns.values()) <= set(row)
    if formatting == "alpaca":
        assert "tags" not in info
        return
    tags = info["tags"]  # once tags are given, none has a default
    assert set(tags) == {"role_tag", "content_tag", "user_tag", "assistant_tag", "system_tag"}
    said = row["conversations"]
    assert [message[tags["role_tag"]] for message in said[:3]] == ["system", "human", "gpt"]
    if ranking:  # the prompt ends with the user, and each answer is one message
        assert said[-1][tags["role_tag"]] == tags["user_tag"]
        assert row["chosen"] == {"from": "gpt", "value": "Good 2."}


def test_rows_that_llama_factory_would_skip_are_named(files, capsys):
    twice = {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, CHATS[0]["messages"][2]]}
    files([*CHATS, twice])
    export(capsys, "--export.format", "llama_factory", "--selection.top-share", "1")
    assert re.search("1 rows, the first rows.jsonl:9, do not go from user to assistant", text("README.md"))


@pytest.mark.parametrize(
    "kind, wanted",
    [
        ("prompt", {"path": "out/train.jsonl", "ds_type": "json", "type": "alpaca"}),
        ("chat", {"type": "chat_template", "field_messages": "messages", "roles_to_train": ["assistant"]}),
        ("text", {"type": "completion"}),
        ("pairs", {"type": "chat_template.default", "field_messages": "messages", "field_chosen": "chosen"}),
    ],
)
def test_axolotl_settings(files, capsys, kind, wanted):
    files(KINDS[kind])
    export(capsys, "--export.format", "axolotl")
    settings = yaml.safe_load(text("axolotl.yaml"))
    assert wanted.items() <= settings["datasets"][0].items()
    assert settings.get("rl") == ("dpo" if kind == "pairs" else None)
    if kind == "pairs":
        row = first()
        assert row["chosen"]["role"] == "assistant" and row["messages"][-1]["role"] == "user"


@pytest.mark.parametrize(
    "kind, container, wanted",
    [
        ("chat", "jsonl", {"use_sft": True, "train_data_columns": ["messages"], "hf_path": "json"}),
        ("prompt", "parquet", {"use_sft": True, "train_data_columns": ["prompt", "completion"], "hf_path": "parquet"}),
        ("text", "datasets", {"hf_path": "arrow", "hf_train_files": "out/train/*.arrow"}),
        ("pairs", "json", {"use_dpo": True, "packing": False, "train_data_columns": ["prompt", "chosen", "rejected"]}),
    ],
)
def test_maxtext_settings_load_their_columns(files, capsys, kind, container, wanted):
    files(KINDS[kind])
    export(capsys, "--export.format", "maxtext", "--export.container", container)
    settings = yaml.safe_load(text("maxtext.yml"))
    assert wanted.items() <= settings.items()
    rows = datasets.load_dataset(  # as MaxText does
        settings["hf_path"], data_files=settings["hf_train_files"], split=settings["train_split"], streaming=True
    )
    assert len(list(rows.select_columns(settings["train_data_columns"]))) == 6


def test_a_template_makes_strings_that_join_to_what_was_trained_on(files, capsys):
    files(PROMPTS)
    export(capsys, "--data.template", "Q: {prompt}\nA: {response}", "--selection.top-share", "0.1")
    row = first()
    assert (row["prompt"], row["completion"]) == ("Q: Question 7?\nA: ", "Answer 7.")


# ---- which rows, and what is told


def test_weights_are_joined_by_id_and_repeats_are_whole(files, capsys):
    ids = files(PROMPTS, weights=[0, 0, 0, 1, 0, 3, 0, 0])
    out = export(capsys, "--selection.resample", "8", "--export.container", "parquet")
    assert out.startswith("8 of 8 rows (a 0 of 4, b 8 of 4), 8 rows drawn in proportion to their weight")
    rows = loaded("parquet")
    assert [row["id"] for row in rows] == [ids[3]] * 2 + [ids[5]] * 6
    assert {row["weight"] for row in rows} == {1.0}  # the repeats are the weight
    table = pq.read_table("out/selection.parquet").to_pydict()
    assert table["id"] == ids and table["repeats"] == [0, 0, 0, 2, 0, 6, 0, 0]
    assert table["weight"] == [0, 0, 0, 1, 0, 3, 0, 0] and table["source"] == ["a", "b"] * 4
    card = text("README.md")
    assert "| rows written | 8 (2 different ones) |" in card and "| b | 4 | 100.0% | 8 |" in card


def test_a_cap_on_repeats_gives_the_rest_to_the_others(files, capsys):
    ids = files(PROMPTS, weights=[0, 0, 0, 1, 0, 30, 0, 1])
    out = export(capsys, "--selection.resample", "8", "--selection.max-repeats", "4")
    assert "8 rows drawn in proportion to their weight, as whole repeats, none more than 4 times" in out
    table = pq.read_table("out/selection.parquet").to_pydict()
    assert table["id"] == ids and table["repeats"] == [0, 0, 0, 2, 0, 4, 0, 2]
    assert "none more than 4 times" in text("README.md")


def test_a_share_of_each_stratum_of_length(files, capsys):
    ids = files(PROMPTS, weights=[5, 6, 7, 8, 1, 2, 3, 4], tokens=[9, 8, 7, 6, 3, 4, 1, 2])
    strata = ("--selection.top-share", "0.5", "--selection.strata", "length", "--selection.num-strata", "2")
    assert "4 of 8 rows (a 2 of 4, b 2 of 4), the top 50% by weight in each of up to 2 strata" in export(
        capsys, *strata
    )
    assert pq.read_table("out/selection.parquet")["repeats"].to_pylist() == [0, 0, 1, 1, 0, 0, 1, 1]
    told = export(capsys, *strata, "--out", "other", "--selection.strata", "loss", code=1)
    assert "weights.parquet: no column 'start_loss', which selection.strata = loss reads; runs of select by an" in told
    assert "few rows" not in told and "Run select again" in told
    files(PROMPTS, tokens=[9.0, np.nan, 7, 6, 3, 4, 1, 2])
    told = " ".join(export(capsys, *strata, "--out", "third", code=1).split())
    assert "rows.jsonl:2: weights.parquet: its column 'tokens' is no number for this row" in told and len(ids) == 8
    files(PROMPTS, weights=[5, 6, 7, 8, 1, 2, 3, 4], tokens=[3] * 8)
    told = " ".join(export(capsys, *strata, "--out", "fourth").split())
    assert "selection.num_strata = 2: rows of equal length are in one stratum, so there is one, of all rows." in told
    told = " ".join(export(capsys, *strata, "--out", "fifth", "--selection.num-strata", "5", code=1).split())
    assert "selection.top_share = 0.5 of 8 rows selects 4, and selection.num_strata = 5 asks for at least" in told


def test_no_weight_key_when_none_is_wanted(files, capsys):
    files(PROMPTS)
    export(capsys, "--export.no-weight-key")
    assert "weight" not in first()


def test_a_mix_that_a_source_cannot_fill_is_told(files, capsys):
    files(PROMPTS, weights=[1, 9, 1, 9, 1, 9, 1, 9])
    out = export(capsys, "--selection.per-source", "8")
    assert "selection.per_source = 8: a source gave all it has, so 5 rows." in out and "5 of 8 rows" in out


def test_rows_without_a_weight(files, capsys):
    files(PROMPTS)
    with open("rows.jsonl", "a") as file:
        file.write(json.dumps({"prompt": "New?", "response": "Yes."}) + "\n")
    assert "no weight for 1 of 9 training examples" in export(capsys, code=1)
    assert "1 row was left out for having no weight" in export(capsys, "--weights.missing", "drop")


@pytest.mark.parametrize("validation", ["there", "gone", "says something else"])
def test_rows_that_the_run_dropped_as_leaks(files, capsys, validation):
    files(PROMPTS)
    leak = {"prompt": "Trusted?", "response": "Yes."}
    with open("rows.jsonl", "a") as file:
        file.write(json.dumps(leak) + "\n")
    if validation != "gone":
        trusted = leak if validation == "there" else PROMPTS[0]
        Path("trusted.jsonl").write_text(json.dumps(trusted) + "\n")
    flags = ["--data.leaks", "drop", "--data.validation", "trusted.jsonl", "--data.split", "1", "0", "0"]
    if validation == "says something else":
        assert "no weight for 1 of 9 training examples" in export(capsys, *flags, code=1)
        return
    out = export(capsys, *flags)
    assert "1 row was left out" in out and "6 of 8 rows" in out


def test_rows_that_the_run_left_out_as_too_long(files, capsys):
    files(PROMPTS, weights=np.ones(8), loss=[1.0] * 7 + [float("nan")])
    out = export(capsys, "--selection.top-share", "1")
    assert "1 row was too long for the run" in out and "7 of 7 rows" in out


def test_nothing_is_overwritten_and_nothing_is_left_behind(files, capsys, tmp_path, monkeypatch):
    files(PROMPTS)
    export(capsys)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert "out is there already, and an export never overwrites: choose another with --out" in export(capsys, code=1)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before

    def write_half(path, rows, file_format):
        path.write_bytes(b"PAR1")
        raise OSError(5, "the disk went away", str(path))

    monkeypatch.setattr(export_run, "write_rows", write_half)
    assert "the disk went away" in export(capsys, "--out", "half", code=1)
    assert sorted(path.name for path in tmp_path.iterdir() if "half" in path.name) == []


@pytest.mark.parametrize(
    "rows, flags, said",
    [
        (
            TEXTS,
            ["--export.layout", "chat"],
            "rows.jsonl:3: a row of the layout 'text' cannot be written as 'chat'. Set",
        ),
        (CHATS, ["--export.layout", "prompt"], "rows.jsonl:3: a row of the layout 'chat' .* Set export.layout to chat"),
        (PAIRS, ["--export.layout", "chat"], "a row of the layout 'preference' .* Set export.layout to auto"),
        (DEEP, ["--export.format", "maxtext"], "a dialogue of several messages, .* Set export.format to trl"),
        (
            PROMPTS,
            ["--export.container", "datasets", "--export.format", "llama_factory"],
            "choose jsonl, json or parquet",
        ),
        (TEXTS, ["--export.format", "llama_factory_v1"], "v1 read messages, .* Set export.format to llama_factory."),
        (TEXTS, ["--export.format", "openai"], "OpenAI-like services read messages, and the rows are plain text"),
        (PROMPTS, ["--export.format", "openai", "--export.container", "json"], "take JSON lines: choose jsonl"),
        (PROMPTS, ["--weights.tokens", "t.jsonl"], "weights.tokens = 't.jsonl': no trainer reads weights of tokens"),
        (PROMPTS, ["--weights.file", ""], "weights.file is empty, so every example weighs the same"),
        (PROMPTS, ["--weights.column", "score"], "no column 'score'"),
        (PROMPTS, ["--selection.threshold", "9"], "the largest is 2"),
        (PROMPTS, ["--selection.threshold", "1", "--selection.resample", "5"], "three ways to select"),
        (PROMPTS, ["--export.dir", ""], "export.dir = '': name the folder to write"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(files, capsys, rows, flags, said):
    files(rows)
    arguments = flags if "--export.dir" in flags else ["--out", "out", *flags]
    assert main(["export", "config.yaml", *arguments]) == 1
    assert re.search(said, capsys.readouterr().err, re.DOTALL)


@pytest.mark.parametrize("form, role, content", [("trl", "role", "content"), ("llama_factory", "from", "value")])
def test_marks_and_reasoning_of_messages_are_written_and_told(files, capsys, form, role, content):
    first = {"role": "assistant", "content": "B", "train": False, "name": "x"}
    last = {"role": "assistant", "content": "D", "reasoning": "hm"}
    said = [{"role": "user", "content": "A?"}, first, {"role": "user", "content": "C?"}, last]
    files([{"messages": said}] * 2)
    out = " ".join(export(capsys, "--export.format", form).split())
    assert "the key 'messages[].name' is not read: 2 rows, the first rows.jsonl:1" in out
    assert '2 answers are marked as no target ("weight": 0): see that the trainer leaves them out.' in out
    assert "2 answers have reasoning_content: see that" in out and "see that" in Path("out/README.md").read_text()
    row = json.loads(next(Path("out").glob("train*")).read_text().splitlines()[0])
    messages = row.get("messages", row.get("conversations"))
    assert [sorted(message.keys() - {role, content}) for message in messages] == [
        [], ["weight"], [], ["reasoning_content"],
    ]  # fmt: skip


def test_llama_factory_v1_has_the_weight_of_an_answer_in_its_message(files, capsys):
    answers = [{"role": "assistant", "content": "B", "weight": 0.5}, {"role": "assistant", "content": "D", "train": 0}]
    said = [{"role": "user", "content": "A?"}, answers[0], {"role": "user", "content": "C?"}, answers[1]]
    last = {"role": "assistant", "content": "F", "reasoning": "hm"}
    files([{"messages": [{"role": "system", "content": "S"}, *said, last]}] * 2, weights=[3, 0.25])
    out = export(capsys, "--export.format", "llama_factory_v1", "--selection.top-share", "1")
    assert "no target" not in out and "a weight of" not in out  # both are read
    rows = loaded("jsonl")
    assert [[message["loss_weight"] for message in row["messages"]] for row in rows] == [
        [0, 0, 1.5, 0, 0, 3],
        [0, 0, 0.125, 0, 0, 0.25],
    ]
    assert [row["weight"] for row in rows] == [3, 0.25]
    assert rows[0]["messages"][2]["content"] == [{"type": "text", "value": "B"}]
    assert rows[0]["messages"][5]["content"] == [
        {"type": "reasoning", "value": "hm"},
        {"type": "text", "value": "F"},
    ]
    assert yaml.safe_load(text("dataset_info.yaml")) == {"out": {"path": "out/train.jsonl", "source": "local"}}
    card = text("README.md")
    assert "train_dataset: out/dataset_info.yaml" in card and "`Σ w n / (Σ w + 1e-6)`" in card
    assert "`micro_batch_size: 1` it has no effect" in card and "`loss_weight` of its answers holds it" in card
    # without weights of rows, and as repeats
    for number, flags in enumerate((("--export.no-weight-key",), ("--selection.resample", "2"))):
        export(capsys, "--export.format", "llama_factory_v1", *flags, "--out", f"other{number}")
        row = json.loads(Path(f"other{number}/train.jsonl").read_text().splitlines()[0])
        assert [message["loss_weight"] for message in row["messages"]] == [0, 0, 0.5, 0, 0, 1]


def test_llama_factory_v1_reads_prompts_and_pairs(files, capsys):
    files(PROMPTS)
    export(capsys, "--export.format", "llama_factory_v1", "--selection.top-share", "0.1", "--export.container", "json")
    (row,) = json.loads(text("train.json"))
    assert [message["loss_weight"] for message in row["messages"]] == [0, 2]
    files(PAIRS)
    export(capsys, "--export.format", "llama_factory_v1", "--out", "pairs")
    row = json.loads(Path("pairs/train.jsonl").read_text().splitlines()[0])
    sides = row["chosen_messages"], row["rejected_messages"]
    assert [[message["loss_weight"] for message in side] for side in sides] == [[0, 1]] * 2
    assert [side[1]["content"][0]["value"] for side in sides] == ["Good 2.", "Bad 2."]
    assert "Its DPO reads no weights." in Path("pairs/README.md").read_text()


def test_services_read_weights_of_messages_and_of_rows(files, capsys):
    said = [*CHATS[1]["messages"][1:3], *CHATS[3]["messages"][1:3]]
    rows = [{"messages": [said[0], said[1] | {"weight": 0}, *said[2:]]}] * 2
    files(rows, weights=[3, 0.25])
    out = export(capsys, "--export.format", "openai", "--selection.top-share", "1")
    assert "no target" not in out
    written = loaded("jsonl")
    assert set(written[0]) == {"messages", "weight"} and [row["weight"] for row in written] == [3, 0.25]
    assert [message.get("weight") for message in first()["messages"]] == [None, 0, None, None]
    card = text("README.md")
    assert "no keys but those of the format" in card and "Fireworks does" in card
    assert "`weight` at the root of a row is the factor of its loss" in card
    table = pq.read_table("out/selection.parquet").to_pydict()  # where the ids are
    assert len(table["id"]) == 2
    export(capsys, "--export.format", "openai", "--export.no-weight-key", "--out", "bare")
    assert set(json.loads(Path("bare/train.jsonl").read_text().splitlines()[0])) == {"messages"}
    assert "Weights were left out" in Path("bare/README.md").read_text()


def test_services_read_pairs(files, capsys):
    files(DEEP)
    export(capsys, "--export.format", "openai")
    row = first()
    assert set(row) == {"input", "preferred_output", "non_preferred_output", "weight"}
    assert [message["content"] for message in row["input"]["messages"]][-1] == "Question 2?"
    assert row["preferred_output"] == [{"role": "assistant", "content": "Good 2."}]
    assert row["non_preferred_output"] == [{"role": "assistant", "content": "Bad 2."}]


def test_weights_of_answers_that_nobody_reads_are_told(files, capsys):
    rows = [{"messages": [*chat["messages"][:2], chat["messages"][2] | {"weight": 0.5}]} for chat in CHATS[::2]]
    files(rows)
    out = " ".join(export(capsys, "--export.format", "axolotl", "--selection.top-share", "1").split())
    assert "4 answers have a weight of their own, which Axolotl reads nowhere: llama_factory_v1 is the format" in out
    assert "4 answers have a weight of their own" in text("README.md")
    assert "Axolotl reads none and takes every row as one" in text("README.md")
    assert main(["export", "config.yaml", "--out", "o", "--export.format", "openai"]) == 1
    assert "rows.jsonl:2: an answer has the weight 0.5, and OpenAI-like services read 0 or 1" in capsys.readouterr().err


def test_mixed_rows():
    def row(*roles):
        return Example("x#0", 0, tuple(Turn(role, role) for role in roles), "s", None, "f", 1)

    short, long, text = row("user", "assistant"), row("user", "assistant", "user", "assistant"), row("text")
    assert [choose_layout(rows, "auto") for rows in ([short], [short, long], [long], [text])] == [
        "prompt", "chat", "chat", "text",
    ]  # fmt: skip
    assert choose_layout([short], "chat") == "chat"
    with pytest.raises(ValueError, match="in sets of their own"):
        choose_layout([short, text], "auto")
    for form in FORMATTERS.values():
        made = form([short, long], ExportTarget("chat", Path("out/t"), "jsonl", ""))
        assert len({tuple(row) for row in made.rows}) == 1  # one layout for all rows of a file


# ---- from a run


RUN = (
    *("--fast", "--outer.steps", "1", "--outer.method", "alignment"),  # which compiles no sweep
    *("--selection.strata", "loss", "--selection.num-strata", "4"),
)


@pytest.fixture(scope="module")
def run(made, tmp_path_factory):
    """A finished run of `select`."""
    out = tmp_path_factory.mktemp("export") / "run"
    assert main(["select", str(made / "select.yaml"), *RUN, "--out", str(out)]) == 0
    return out


def test_a_run_that_is_resumed_selects_by_the_losses_that_it_measured_first(run, made, tmp_path, monkeypatch):
    def measure_again(task, params):
        raise AssertionError("the losses before training are measured twice")

    monkeypatch.setattr(difficulty, "example_losses", measure_again)
    out = tmp_path / "run"
    shutil.copytree(run, out)
    (out / "weights.parquet").unlink()
    with pytest.warns(UserWarning, match="weights.parquet is missing"):
        assert main(["select", str(made / "select.yaml"), *RUN, "--out", str(out), "--resume"]) == 0
    assert pq.read_table(out / "weights.parquet").equals(pq.read_table(run / "weights.parquet"))


def test_a_runs_folder_is_enough(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(run), "--out", "e", "--export.format", "axolotl", "--export.layout", "chat"]) == 0
    out = capsys.readouterr().out
    rule = (
        "the top 50% by weight in each of up to 4 strata of like loss before training"  # section selection of the run
    )
    assert f"18 of 36 rows, {rule}: e/train.jsonl" in out
    table = pq.read_table(run / "weights.parquet").to_pydict()
    order = np.argsort(np.array(table["start_loss"]), kind="stable")
    assert [int(np.array(table["selected"])[order[begin : begin + 9]].sum()) for begin in range(0, 36, 9)] == [
        4,
        5,
        5,
        4,
    ]
    rows = [json.loads(line) for line in Path("e/train.jsonl").read_text().splitlines()]
    selected = [(i, w) for i, w, s in zip(table["id"], table["weight"], table["selected"], strict=True) if s]
    assert [(row["id"], row["weight"]) for row in rows] == selected
    card = Path("e/README.md").read_text()
    result = json.loads((run / "result.json").read_text())
    assert yaml.safe_load(card.split("---")[1])["size_categories"] == ["n<1K"]
    for said in (
        "| run | run |",
        "method alignment, weighting softmax",
        result["config_hash"],
        result["verdict"]["level"],
        f"`bilevel-jax export {run.name} --out e --export.format axolotl --export.layout chat`",
        "**Licence:** not stated",
        "| rows with a weight | 36 |",
    ):
        assert said in card, said
    assert str(run.parent) not in card  # the card goes where the rows go
    assert (
        main(["export", str(run), "--out", "f", "--selection.top-share", "0.25", "--weights.transform", "negate"]) == 1
    )
    assert "If it is a score" in capsys.readouterr().err  # the command line has the last word


def test_a_folder_without_a_run(tmp_path, capsys):
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "e")]) == 1
    assert "holds no run: config.yaml is missing" in capsys.readouterr().err


def test_weights_of_tokens_stay_behind_and_that_is_told(tmp_path):
    (tmp_path / "config.yaml").write_text("weights: {tokens: t.jsonl}\n")
    (said,) = export_run._warn_of_token_weights(tmp_path)
    assert "(weights.tokens) are not written: no trainer reads them" in said
    assert "--weights.tokens" in export_run.flags_for_run(tmp_path)
    (tmp_path / "config.yaml").write_text("weights: {}\n")
    assert export_run._warn_of_token_weights(tmp_path) == export_run._warn_of_token_weights(None) == []


def test_hostile_names_stay_text_in_the_card(files, capsys):
    evil = "| x | `y` <script>alert(1)</script> [z](http://e) \x1b[31m\n# head"
    files([{**row, "source": evil} for row in PROMPTS[:4]] + PROMPTS[4:])
    out = export(capsys)
    card = text("README.md")
    assert "<script>" not in card and "\x1b" not in card + out and "\n# head" not in card
    assert "\\| x \\| \\`y\\` &lt;script>" in card


def test_defaults_are_those_of_the_help():
    config = load_config(ExportConfig, None, ["--data.train", "t", "--out", "there"])
    assert config.export.dir == "there" and config.selection.top_share == 0.8


def test_real_pairs(files, capsys, shared, tmp_path):
    files(PAIRS)
    flags = ["--data.train", str(shared / "data" / "hh_rlhf" / "harmless_test.jsonl"), "--data.empty", "drop"]
    flags += ["--weights.file", "", "--selection.top-share", "1"]
    out = export(capsys, *flags)
    assert "4 rows were left out (data.empty = drop)" in out and "2,308 of 2,308 rows" in out
    ids = [example.id for example in examples.load_examples(flags[1:2], examples.DataOptions(empty="drop"))]
    assert [example.id for example in examples.load_examples(["out/train.jsonl"])] == ids
