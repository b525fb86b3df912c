"""Supervised examples whose weights preference pairs judge (section `target`), on two sets.

    python -m tests.benchmarks.targets cipher OUT
    python -m tests.benchmarks.targets hh OUT --shared SHARED

cipher: the quickstart's examples (a third right, a third consistently wrong, a third random) and its model; 16 pairs of
the right and the consistently wrong answer judge by SimPO, and 128 others are the test. hh: 480 last turns of HH
dialogues, half of them the chosen and half the rejected answer, over stories-260k; 200 pairs judge, 83 are dev and 380
the test, the same for all seeds. Prints the pair accuracy on test of what is retrained, seed by seed.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

import bilevel_jax as bj
from bilevel_jax.lm.builtin.cipher import LETTERS

HH = {
    "model": {"name_or_path": ""},
    "lora": {"r": 0},
    "data": {
        "split": [1.0, 0.0, 0.0],
        "label_field": "quality",
        "good_label": "chosen",
        "template": "{prompt}\n\nAssistant: {response}",
        "max_length": 256,
        "truncation": "left",
    },
    "target": {"losses": ["simpo"], "beta": 2.0, "gamma_ratio": 0.25},
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 5},
    "train": {"max_steps": 40, "global_batch_size": 16},
    "outer": {"steps": 4, "learning_rate": 1.0, "reliability_every": 0, "patience": 0},
    "selection": {"top_share": 0.5},
    "certify": {"enabled": False},
    "retrain": {"seeds": 1, "variants": ["uniform", "learned", "selected", "oracle"]},
}


def main(task: str, out: Path, shared: Path | None, seeds: int) -> None:
    """Print a table."""
    rows: dict[str, list[float]] = {}
    for seed in range(seeds):
        result = (run_cipher if task == "cipher" else run_hh)(out / f"{task}{seed}", shared, seed)
        for line in result["compare"]:
            rows.setdefault(line["name"], []).append(line["mean"]["accuracy"])
    print(f"\n| trained on | {' | '.join(f'seed {seed}' for seed in range(seeds))} | minus uniform's |")
    print("|---" * (seeds + 2) + "|")
    for name, values in rows.items():
        gains = np.subtract(values, rows["uniform"])
        error = gains.std(ddof=1) / seeds**0.5 if seeds > 1 else float("nan")
        cells = [*(f"{value:.3f}" for value in values), f"{gains.mean():+.3f} ± {error:.3f}"]
        print(f"| {name} | {' | '.join(cells)} |")


def run_cipher(out: Path, shared: Path | None, seed: int) -> dict:
    """The quickstart with pairs as its judges."""
    out.mkdir(parents=True, exist_ok=True)
    for part, count in (("validation", 16), ("test", 128)):
        given = bj.lm.builtin_rows("cipher", part, seed=seed)[:count]
        write(out / f"{part}.jsonl", [cipher_pair(row["prompt"]) for row in given])
    bj.commands.select(
        "configs/quickstart.yaml",
        data={
            "validation": [str(out / "validation.jsonl")],
            "test": [str(out / "test.jsonl")],
            "train": ["builtin:cipher"],
            "seed": seed,
        },
        target={"losses": ["simpo"]},
        certify={"enabled": False},
        retrain={"seeds": 1, "variants": ["uniform", "learned", "selected", "low_loss", "random", "oracle"]},
        output={"dir": str(out / "run"), "progress": False},
    )
    return json.loads((out / "run" / "result.json").read_text(encoding="utf-8"))


def cipher_pair(prompt: str) -> dict[str, str]:
    """The right answer, each letter moved on by one, against that of the consistently wrong rule."""
    chosen, rejected = (
        "".join(LETTERS[(LETTERS.index(letter) + step) % len(LETTERS)] for letter in prompt.rstrip(">"))
        for step in (1, -1)
    )
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def run_hh(out: Path, shared: Path | None, seed: int) -> dict:
    """Answers of HH dialogues."""
    assert shared is not None, "hh needs --shared"
    out.mkdir(parents=True, exist_ok=True)
    pairs = read_hh(shared)
    test, others = pairs[-380:], pairs[:-380]
    random = np.random.default_rng(100 + seed)
    random.shuffle(others)
    train, validation, dev = others[:480], others[480:680], others[680:]
    is_bad = random.random(len(train)) < 0.5
    write(
        out / "train.jsonl",
        [
            {
                "prompt": prompt,
                "response": rejected if bad else chosen,
                "quality": "rejected" if bad else "chosen",
            }
            for (prompt, chosen, rejected), bad in zip(train, is_bad, strict=True)
        ],
    )
    for name, part in (("validation", validation), ("dev", dev), ("test", test)):
        write(out / f"{name}.jsonl", [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in part])
    files = {name: [str(out / f"{name}.jsonl")] for name in ("train", "validation", "dev", "test")}
    sections = HH | {
        "model": {"name_or_path": str(shared / "models" / "stories-260k")},
        "data": HH["data"] | files,
        "output": {"dir": str(out / "run"), "progress": False},
    }
    bj.commands.select(sections)
    return json.loads((out / "run" / "result.json").read_text(encoding="utf-8"))


def read_hh(shared: Path) -> list[list[str]]:
    """Last question, chosen and rejected answer of the pairs whose answers have less than 200 characters."""
    found = {}
    with open(shared / "data" / "hh_rlhf" / "harmless_test.jsonl", encoding="utf-8") as lines:
        for line in lines:
            sides = json.loads(line)
            (before, chosen), (other, rejected) = (last_turn(sides[side]) for side in ("chosen", "rejected"))
            if (
                before == other
                and chosen
                and rejected
                and chosen != rejected
                and max(map(len, (chosen, rejected))) < 200
            ):
                question = before[before.rindex("Human:") :]
                question = f"...{question[-100:]}" if len(question) > 100 else question
                found[question, chosen, rejected] = None
    pairs = [list(pair) for pair in found]
    np.random.default_rng(0).shuffle(pairs)
    return pairs


def last_turn(dialogue: str) -> tuple[str, str]:
    """(what stands before the last answer, that answer)."""
    before, _, answer = dialogue.rpartition("\n\nAssistant:")
    return before.strip(), answer.strip()


def write(path: Path, rows: Iterable[dict]) -> None:
    """As jsonl."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("cipher", "hh"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    main(**vars(parser.parse_args()))
