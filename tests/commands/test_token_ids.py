"""Every command refuses a token that the model's embedding lacks, before it trains."""

import json
import shutil

import pytest

from bilevel_jax.cli import main
from bilevel_jax.lm.builtin.cipher import make_cipher_tokenizer
from bilevel_jax.lm.models.source_files import write_tokenizer
from tests.conftest import ROOT

NEW = "<|tool|>"
SIZE = len(make_cipher_tokenizer())
ROWS = ("--data.train", "rows.jsonl", "--data.validation", "validation.jsonl")
COMMANDS = {  # name: (arguments, the row that is named)
    "train": (("train", "configs/train.yaml", "--data.train", "rows.jsonl"), "rows.jsonl:3"),
    "train, validation": (
        ("train", "configs/train.yaml", "--data.train", "validation.jsonl", "--data.validation", "rows.jsonl"),
        "rows.jsonl:3",
    ),
    "train, pairs": (
        ("train", "configs/train.yaml", "--data.train", "pairs.jsonl", "--objective.name", "dpo"),
        "pairs.jsonl:3",
    ),
    "train, streamed": (
        ("train", "configs/train.yaml", "--data.train", "rows.jsonl", "--data.streaming", "--data.no-packing")
        + ("--train.max-steps", "1", "--train.global-batch-size", "8", "--data.shuffle-buffer", "0"),
        "rows.jsonl:3",
    ),
    "select": (("select", "configs/select.yaml", *ROWS), "rows.jsonl:3"),
    "compare": (("compare", "configs/compare_sources.yaml", *ROWS, "--data.test"), "rows.jsonl:3"),
    "audit": (("audit", "configs/audit_stories.yaml", *ROWS, "--data.test"), "rows.jsonl:3"),
    "refine": (("refine", "configs/refine_offline.yaml", *ROWS, "--data.test"), "rows.jsonl:3"),
    "rank": (
        ("rank", "configs/rank.yaml", "--data.train", "questions.jsonl", "--data.prompt-field", "prompt")
        + ("--rank.block-size", "3", "--rank.num-blocks", "2", "--rank.k", "1"),
        "questions.jsonl:3",
    ),
    "inspect": (("inspect", "--data.train", "rows.jsonl"), "rows.jsonl:3"),
    "estimate": (("estimate", "configs/train.yaml", "--data.train", "rows.jsonl"), "rows.jsonl:3"),
}


@pytest.fixture(scope="module")
def inputs(made, tmp_path_factory):
    """The untrained model with a tokenizer of one token more, and files whose third row has it."""
    folder = tmp_path_factory.mktemp("beyond")
    shutil.copytree(made / "model", folder / "model")
    tokenizer = make_cipher_tokenizer()
    tokenizer.add_tokens([NEW])
    write_tokenizer(folder / "model", tokenizer)
    rows = [json.loads(line) for line in (made / "train.jsonl").read_text().splitlines()]
    rows = [{"prompt": row["prompt"], "response": row["response"]} for row in rows[:3]]
    rows[2]["prompt"] = f"a{NEW}>"
    write(folder / "rows.jsonl", rows)
    write(
        folder / "pairs.jsonl", [{**rows[0], "chosen": "a", "rejected": f"a{NEW}" if i == 2 else "b"} for i in range(3)]
    )
    asked = [rows[0], rows[1], rows[2], *({**rows[0], "prompt": prompt} for prompt in ("abcd>", "bcde>", "cdef>"))]
    write(folder / "questions.jsonl", [{**row, "responses": {"one": "a", "other": "b"}} for row in asked])
    shutil.copy(made / "validation.jsonl", folder)
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("arguments, where", COMMANDS.values(), ids=COMMANDS)
def test_refused_before_training(inputs, tmp_path, monkeypatch, capsys, arguments, where):
    monkeypatch.chdir(inputs)
    command, *rest = [str(ROOT / item) if item.startswith("configs/") else item for item in arguments]
    flags = ["--model.name-or-path", "model", "--data.max-length", "32", "--data.label-field", ""]
    if command not in ("inspect", "estimate"):
        flags += ["--out", str(tmp_path / "run"), "--output.no-progress"]
    if command == "rank":
        flags = [flag for flag in flags if flag not in ("--data.max-length", "32", "--data.label-field", "")]
    assert main([command, *rest, *flags]) == (0 if command == "inspect" else 1)
    printed = " ".join("".join(capsys.readouterr()).split())
    assert f"{where}: the token '{NEW}' has the id {SIZE}, and the model's embedding has {SIZE} rows" in printed
    assert command != "inspect" or "the other commands stop" in printed
    assert not [*tmp_path.rglob("step_*"), *tmp_path.rglob("model*")]  # no step was made
