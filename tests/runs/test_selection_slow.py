"""Selection with headroom on real text and a real model: how much of the way from uniform weights to the oracle."""

import json
import re

import numpy as np
import pytest

from bilevel_jax.lm import tokens
from tests.runs.command import run_verb
from tests.runs.problems_lm import MODEL

pytestmark = pytest.mark.slow


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def with_headroom(shared, folder):
    """400 training rows: 160 sentences of film reviews, 160 others whose token ids went through one fixed permutation,
    80 openings of school arithmetic; and 240 trusted sentences."""
    rng = np.random.default_rng(0)
    with open(shared / "data/sst2/train.jsonl", encoding="utf-8") as lines:
        texts = list(dict.fromkeys(json.loads(line)["text"] for line in lines))
    texts = [text for text in texts if 20 <= len(text) <= 110]
    texts = [texts[i] for i in rng.permutation(len(texts))]
    with open(shared / "data/gsm8k/train.jsonl", encoding="utf-8") as lines:
        arithmetic = [json.loads(next(lines))["question"][:100] for _ in range(80)]
    tokenizer = tokens.load_tokenizer(shared / "models" / MODEL)
    special = set(tokenizer.all_special_ids)
    plain = sorted(
        i for text, i in tokenizer.get_vocab().items() if i not in special and not re.fullmatch(r"<0x..>", text)
    )
    permuted = dict(zip(plain, rng.permutation(plain).tolist(), strict=True))

    def garbled(text):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokenizer.decode([permuted.get(i, i) for i in ids]).strip()

    parts = {"clean": texts[:160], "garbled": map(garbled, texts[160:320]), "off-domain": arithmetic}
    rows = [{"text": text, "label": label} for label, part in parts.items() for text in part]
    write(folder / "train.jsonl", [rows[i] for i in rng.permutation(len(rows))])
    write(folder / "validation.jsonl", [{"text": text} for text in texts[400:640]])


def test_most_of_the_headroom_is_won_and_believed(shared, tmp_path):
    """Measured: AUC .975, 82 % of the headroom with the weights and 101 % with the best 40 % of the rows; BELIEVE with
    ratio 1.002 and smooth .998. Alignment alone: AUC .966, 94 % with its best 40 %."""
    with_headroom(shared, tmp_path)
    flags = {
        "model.path": shared / "models" / MODEL, "model.lora-rank": 0, "data.train": tmp_path / "train.jsonl",
        "data.validation": tmp_path / "validation.jsonl", "data.label-field": "label", "data.max-length": 96,
        "optimizer.eps-root": 1e-8, "train.steps": 64, "outer.steps": 4, "keep.top-share": 0.4, "compare.seeds": 1,
        "certify.step-sizes": 0.1,
    }  # fmt: skip
    given = [text for flag, value in flags.items() for text in (f"--{flag}", value)]
    arms = ["--compare.rows", "uniform", "learned", "selected", "alignment", "oracle"]
    result = run_verb("select", "configs/select.yaml", tmp_path / "run", *given, *arms)
    loss = {row["name"]: row["mean"]["report"] for row in result["compare"]}
    assert loss["oracle"] < loss["uniform"] - 0.2  # else the labels mean nothing here
    headroom = (loss["uniform"] - loss["learned weights"]) / (loss["uniform"] - loss["oracle"])
    assert headroom >= 0.6 and result["auc"]["weights"] >= 0.85
    assert result["verdict"]["level"] == "BELIEVE"
