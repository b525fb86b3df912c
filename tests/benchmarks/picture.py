"""A picture in a model's output head, drawn by nothing but training on generated stories.

    python -m tests.benchmarks.picture FOLDER SHARED/models/stories-260k SHARED/data/tinystories/tinystories_1000.json

A generator tells stories, a student is fine-tuned on them, and the target is a function of the student's parameters:
the sign of the change of 6 x 7 weights of its output head shall be a given picture. The generator sees neither the
picture nor the weights: only what each story's exact hypergradient says of it (`refine` with refine.generator =
reinforce). Prints every tenth round, the share of pixels that are right in the student of least loss, and the picture
that it holds. A run that was stopped goes on from FOLDER.
"""

import argparse
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from bilevel_jax.commands.refine.run import refine
from bilevel_jax.lm import models
from bilevel_jax.runs.config.load import RefineConfig, load_config

PICTURE = ("..##...", ".#.....", ".###..#", ".#..#.#", "..##..#", "......#")
FIRST_ROW = 259
"""The first token that is no byte: tokens that stories hold."""
SCALE = 1e-3
"""The change of a weight that counts as drawn."""
TARGET = '''"""The loss of a picture in the output head; written by tests.benchmarks.picture."""

import jax
import jax.numpy as jnp

START = jnp.array({start})
SIGNS = jnp.array({signs})


def picture(params):
    """Mean over the pixels of softplus(-sign * change / {scale})."""
    change = params["embed"][{first} : {first} + SIGNS.shape[0], : SIGNS.shape[1]] - START
    return jnp.mean(jax.nn.softplus(-SIGNS * change / {scale}))
'''


def main(folder: Path, model: Path, stories: Path, rounds: int, seed: int) -> None:
    """Write the task into the folder, run `refine`, print what came out."""
    folder.mkdir(parents=True, exist_ok=True)
    signs = np.array([[1.0 if pixel == "#" else -1.0 for pixel in line] for line in PICTURE])
    start = read_patch(model, signs.shape)
    target = folder / "target.py"
    text = TARGET.format(start=start.tolist(), signs=signs.tolist(), first=FIRST_ROW, scale=SCALE)
    target.write_text(text, encoding="utf-8")
    rows = [split_story(story) for story in json.loads(stories.read_text("utf-8"))[:16]]
    (folder / "stories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = folder / f"run-{seed}"
    given = {
        "model.name_or_path": model, "lora.r": 0, "data.train": folder / "stories.jsonl", "data.max_length": 64,
        "data.truncation": "right", "data.seed": seed, "target.losses": f"{target}:picture",
        "target.sources": "parameters", "refine.generator": "reinforce", "refine.rounds": rounds,
        "refine.questions": "all", "refine.methods": "uniform", "refine.ratio": "none", "refine.start_from": "last",
        "generate.num_generations": 8, "generate.max_new_tokens": 48, "generate.seed": seed,
        "reinforce.learning_rate": 3e-4, "optimizer.learning_rate": 5e-4, "optimizer.schedule": "constant",
        "optimizer.warmup_steps": 0, "optimizer.eps_root": 1e-8, "train.max_steps": 4, "train.global_batch_size": 32,
        "outer.reliability_every": 0, "mesh.data": 1, "output.dir": out,
    }  # fmt: skip
    flags = [text for key, value in given.items() for text in (f"--{key.replace('_', '-')}", str(value))]
    resumed = (out / "config.yaml").exists()
    if not (out / "result.json").exists():
        refine(load_config(RefineConfig, None, [*flags, "--output.no-progress", *(["--resume"] if resumed else [])]))
    records = json.loads((out / "result.json").read_text())["records"]
    minutes = sum(record["seconds"] for record in records) / 60
    print("| round | loss of the picture | reward's spread | KL | entropy | repeated 4-grams |")
    print("| --- | --- | --- | --- | --- | --- |")
    for record in records[::10] + records[-1:]:
        own = record["generator"]
        print(
            f"| {record['step']} | {own['target_loss']:.4f} | {own['reward_spread']:.1e} | {own['kl']:.3f} | "
            f"{own['entropy']:.2f} | {own['repeated']:.1%} |"
        )
    drawn = read_patch(out / "model", signs.shape) - start > 0
    right = (drawn == (signs > 0)).mean()
    print(f"\npixels right: {right:.3f} of {signs.size}, {len(records)} rounds, {minutes:.1f} minutes")
    print("\n".join("".join("#" if pixel else "." for pixel in line) for line in drawn))


def read_patch(model: Path, shape: tuple[int, int]) -> np.ndarray:
    """The weights of the output head that hold the picture; stories-260k ties them to its embedding."""
    _, params = models.load_model(model, dtype=jnp.float32)
    return np.asarray(params["embed"][FIRST_ROW : FIRST_ROW + shape[0], : shape[1]], float)


def split_story(story: str) -> dict[str, str]:
    """The first three words as prompt; the rest is not trained on, as the generator tells it anew."""
    words = story.split()
    return {"prompt": " ".join(words[:3]), "response": " ".join(words[3:])}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("stories", type=Path)
    parser.add_argument("--rounds", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    main(options.folder, options.model, options.stories, options.rounds, options.seed)
