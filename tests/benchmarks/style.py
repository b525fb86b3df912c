"""A style as the target: a generator that learns to write it, beside weights of stories that are there.

    python -m tests.benchmarks.style FOLDER SHARED/models/stories-260k SHARED/data/tinystories/tinystories_1000.json

Validation, dev and test are passages of children's stories in which somebody speaks; the training examples are
passages of other stories, of which one in five has speech. The prompt of a passage is its first three words. The loss
of stories-260k on the rest, in nats per token of the test passages, is read before and after `refine`, by arm: plain
training, training on validation alone, the learned weights of the passages, with and without responses, and a
generator that is trained by its responses' exact hypergradients (its students see nothing but what it wrote). All arms
cost as many passes as four rounds of exact hypergradients, or as many whole rounds as are below that. Prints mean ±
standard deviation over the seeds, the differences from exact weights without responses by paired seeds, and how many
responses have speech in the first and the last round. What is finished in FOLDER is read there.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow.parquet as pq

from tests.benchmarks.refine import EXACT, FIXED, NONE, STEPS_ALONE, paired, run_refine, spread

SIZES = {"train": 128, "validation": 32, "dev": 64, "test": 128}
SPEECH_SHARE = 0.2
"""Of the training passages."""
WORDS = 30
"""Of a passage, with its prompt."""
COMMON = {
    "data.good_label": "speech", "data.max_length": 80, "data.truncation": "right", "verifier.name": "",
    "train.max_steps": 16, "train.global_batch_size": 16, "optimizer.learning_rate": 1e-3,
    "optimizer.warmup_steps": 2, "generate.max_new_tokens": 56, "generate.num_generations": 4,
}  # fmt: skip
MIXING = ("--single-loop.steps", "48", "--refine.rounds", "10")
GENERATOR = ("--train.max-steps", "32", "--refine.rounds", "4", "--reinforce.learning-rate", "3e-4")
ARMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "plain training": ("refine_self_training", (*NONE, "--train.max-steps", "96", "--refine.rounds", "10")),
    "validation alone": ("refine_mixing", ("--single-loop.validation-shares", "1.0", *MIXING)),
    "direct mixing": ("refine_mixing", MIXING),
    "exact, offline": ("refine_exact", (*NONE, *STEPS_ALONE, *EXACT)),
    "exact + online fixed": ("refine_exact", (*FIXED, *STEPS_ALONE, *EXACT)),
    "trained generator": ("refine_reinforce", GENERATOR),
}
REFERENCE = "exact, offline"


def main(folder: Path, model: Path, stories: Path, seeds: int, arms: list[str]) -> None:
    """Run what is not there, and print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    texts = json.loads(stories.read_text("utf-8"))
    cells: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for seed in range(seeds):
        made = write_passages(folder / f"rows-{seed}", texts, seed)
        for name in arms:
            config, own = ARMS[name]
            given = COMMON | {"model.name_or_path": model, "data.seed": seed, "generate.seed": seed}
            flags = [text for key, value in given.items() for text in (f"--{key.replace('_', '-')}", str(value))]
            out = folder / f"{seed}-{name.replace(' ', '_')}"
            result = run_refine(out, config, made, [*flags, *own])
            cells[name].append(result | {"speech": count_speech(out, result)})
            print(f"seed {seed}  {name}: {result['sentence']}", flush=True)
    print("\n" + table(cells))


def write_passages(folder: Path, stories: list[str], seed: int) -> Path:
    """The files of a seed: no story is in two of them."""
    folder.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(seed).permutation(len(stories))
    passages = [passage for at in order if (passage := cut_passage(stories[at], seed))]
    spoken = [passage for passage in passages if has_speech(passage)]
    narrated = [passage for passage in passages if not has_speech(passage)]
    num_spoken = round(SPEECH_SHARE * SIZES["train"])
    rows = {"train": spoken[:num_spoken] + narrated[: SIZES["train"] - num_spoken]}
    taken = num_spoken
    for part in ("validation", "dev", "test"):
        rows[part] = spoken[taken : taken + SIZES[part]]
        taken += SIZES[part]
    for part, texts in rows.items():
        if len(texts) < SIZES[part]:
            raise ValueError(f"{len(texts)} passages for {part}, and {SIZES[part]} are wanted: give more stories.")
        lines = [json.dumps(split_passage(text)) for text in texts]
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def cut_passage(story: str, seed: int) -> str:
    """So many words from the beginning of one of its sentences on; nothing where the story is too short."""
    starts = [match.end() for match in re.finditer(r'[.!?]"?\s+(?=[A-Z"])', story)]
    starts = [at for at in starts if len(story[at:].split()) >= WORDS]
    if not starts:
        return ""
    at = int(np.random.default_rng((seed, len(story))).choice(starts))
    return " ".join(story[at:].split()[:WORDS])


def has_speech(text: str) -> bool:
    """Whether somebody speaks beyond the prompt."""
    return '"' in split_passage(text)["response"]


def split_passage(text: str) -> dict[str, str]:
    """The first three words as prompt, the rest as response."""
    words = text.split()
    response = " ".join(words[3:])
    return {"prompt": " ".join(words[:3]), "response": response, "label": "speech" if '"' in response else "none"}


def count_speech(folder: Path, result: dict[str, Any]) -> list[float]:
    """The share of responses with speech, by round."""
    paths = [folder / "rounds" / f"responses-{record['step']}.parquet" for record in result["records"]]
    texts = [pq.read_table(path)["text"].to_pylist() for path in paths if path.exists()]
    return [float(np.mean(['"' in text for text in each])) for each in texts if each]


def table(cells: dict[str, list[dict[str, Any]]]) -> str:
    """The table as markdown."""
    losses = {name: [run["test"]["last"] for run in runs] for name, runs in cells.items()}
    lines = [["arm", "test loss", f"minus {REFERENCE} [95 %]", "rounds accepted", "speech, first and last", "passes"]]
    lines.append(["---"] * len(lines[0]))
    first = [run["test"]["first"] for run in next(iter(cells.values()))]
    lines.append(["the model as given", spread(first, 4), "", "", "", ""])
    for name, runs in cells.items():
        difference = "" if name == REFERENCE else paired(losses[name], losses.get(REFERENCE, []), 4)
        speech = [run["speech"] for run in runs if run["speech"]]
        ends = f"{np.mean([s[0] for s in speech]):.0%}, {np.mean([s[-1] for s in speech]):.0%}" if speech else ""
        lines.append(
            [
                name,
                spread(losses[name], 4),
                difference,
                f"{sum(run['accepted'] for run in runs)} of {sum(len(run['records']) for run in runs)}",
                ends,
                f"{np.mean([sum(one['work'] for one in run['records']) for run in runs]):,.0f}",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("stories", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    options = parser.parse_args()
    main(options.folder, options.model, options.stories, options.seeds, options.arms)
