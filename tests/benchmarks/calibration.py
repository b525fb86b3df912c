"""Verdicts against what retraining does, over many settings: where their thresholds come from.

    python -m tests.benchmarks.calibration out/calibration.jsonl --shared ../shared
    python -m tests.benchmarks.calibration out/calibration.jsonl --table

One line of JSON a setting: the evidence that a verdict reads (finite differences, metasmoothness without a fifth and
without a half, numerical checks), and the truth that it does not read: retrains without a random tenth and without a
random half of the examples. A setting whose line is there is not measured again. `--table` judges all lines by the
thresholds of today and prints the table of README.md. `../shared` is the folder of real data and models that
tests/conftest.py describes.

Accept: no BELIEVE about changes of half of the data where their rank correlation is below .5, none about small changes
where that of a tenth is below .7; DO NOT BELIEVE where both are above .85 in at most 1 of 20.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax.core import certify
from bilevel_jax.core.certify import verdict
from bilevel_jax.core.certify.removals import average_draws, draw_key, smoothness_of_draw
from bilevel_jax.core.problem import weighted
from bilevel_jax.core.solve.solution import Status
from bilevel_jax.core.solve.unroll import unroll
from bilevel_jax.core.types import Checks, Params, PyTree
from bilevel_jax.lm import models
from bilevel_jax.lm.builtin import cipher, sums
from bilevel_jax.lm.data.tokens import load_tokenizer
from bilevel_jax.lm.losses import sft
from bilevel_jax.runs.tasks.builtin import BUILTIN_TASKS, pretrain_builtin_model

STEP_SIZES = (0.3, 0.1, 0.03, 0.01, 0.003)
REMOVED = (0.2, 0.5)
FRACTIONS = (0.1, 0.5)
KEY = jax.random.key(0)
MNIST_IMAGES, MNIST_TRUSTED = 600, 100


class Task(NamedTuple):
    """Per-example losses with a start and data, as `bj.unroll` takes them."""

    losses: Callable
    params: Params
    frozen: PyTree
    train: PyTree
    valid: PyTree
    steps: int
    batch: int
    retrains: int


class Setting(NamedTuple):
    """One cell of the grid."""

    task: str
    model: str
    optimizer: str
    rate: float
    weights: str

    @property
    def name(self) -> str:
        """What its line is found by."""
        return f"{self.task} {self.model}, {self.optimizer} {self.rate:g}, {self.weights}"


def list_settings() -> list[Setting]:
    """All settings; the kinds alternate, so that a part of them is a sample."""
    linear = [
        ("sgd", 0.1, "uniform"), ("sgd", 0.5, "collapsed"), ("sgd", 1.0, "uniform"), ("sgd", 3.0, "uniform"),
        ("momentum", 0.1, "skewed"), ("momentum", 0.5, "uniform"), ("adam", 1e-3, "uniform"),
        ("adam", 3e-3, "collapsed"), ("adam", 1e-2, "uniform"), ("adam", 1e-2, "skewed"), ("adam", 5e-2, "learned"),
        ("adam", 1e-1, "uniform"), ("sgd", 0.5, "learned"), ("adam", 3e-3, "learned"), ("sgd", 0.5, "skewed"),
        ("momentum", 0.1, "learned"), ("adam", 3e-2, "uniform"), ("sgd", 2.0, "uniform"),
    ]  # fmt: skip
    network = [
        ("tanh", "sgd", 0.1, "uniform"), ("relu", "sgd", 0.1, "uniform"), ("tanh", "sgd", 1.0, "uniform"),
        ("relu", "sgd", 0.5, "collapsed"), ("tanh", "momentum", 0.1, "collapsed"),
        ("relu", "momentum", 0.1, "uniform"), ("tanh", "adam", 1e-3, "uniform"), ("relu", "adam", 1e-3, "skewed"),
        ("tanh", "adam", 1e-2, "uniform"), ("relu", "adam", 1e-2, "uniform"), ("tanh", "adam", 3e-3, "skewed"),
        ("relu", "adam", 3e-3, "learned"), ("tanh", "momentum", 0.5, "uniform"), ("tanh", "adam", 1e-3, "learned"),
        ("tanh", "sgd", 0.3, "learned"), ("tanh", "sgd", 0.3, "skewed"),
    ]  # fmt: skip
    language = [
        ("stories", "full", 3e-4, "uniform"), ("cipher", "full", 2e-3, "uniform"), ("sums", "full", 1e-3, "uniform"),
        ("stories", "full", 3e-3, "uniform"), ("cipher", "full", 2e-3, "collapsed"), ("sums", "full", 5e-3, "uniform"),
        ("stories", "lora", 3e-3, "uniform"), ("cipher", "full", 1e-3, "learned"), ("sums", "lora", 5e-3, "uniform"),
        ("stories", "full", 1e-3, "learned"), ("cipher", "full", 5e-3, "uniform"), ("sums", "full", 1e-3, "skewed"),
        ("stories", "lora", 1e-2, "skewed"), ("cipher", "lora", 5e-3, "learned"), ("sums", "full", 1e-3, "learned"),
        ("stories", "full", 1e-2, "uniform"), ("cipher", "full", 1e-2, "uniform"),
    ]  # fmt: skip
    rule = [
        ("linear", "sgd", 0.3, "uniform"), ("gelu", "adam", 2e-3, "uniform"), ("linear", "adam", 2e-3, "learned"),
        ("gelu", "sgd", 0.3, "skewed"), ("linear", "momentum", 0.2, "uniform"), ("gelu", "sgd", 1.0, "learned"),
        ("linear", "adam", 2e-2, "uniform"), ("gelu", "adam", 5e-3, "uniform"), ("linear", "sgd", 1.5, "learned"),
        ("gelu", "momentum", 0.05, "learned"), ("linear", "adam", 5e-3, "skewed"), ("relu", "adam", 1e-3, "uniform"),
        ("linear", "sgd", 1.0, "collapsed"), ("gelu", "adam", 2e-2, "uniform"), ("relu", "sgd", 0.2, "learned"),
        ("linear", "momentum", 0.05, "collapsed"),
    ]  # fmt: skip
    parts = [
        [Setting("mnist", "linear", *cell) for cell in linear],
        [Setting("rule", *cell) for cell in rule],
        [Setting("mnist", *cell) for cell in network],
        [Setting(task, model, "adam", rate, weights) for task, model, rate, weights in language],
    ]
    length = max(map(len, parts))
    return [part[row] for row in range(length) for part in parts if row < len(part)]


def measure(setting: Setting, task: Task) -> dict[str, Any]:
    """One line: evidence and truth of one setting."""
    began = time.perf_counter()
    optimizer = make_optimizer(setting, task.steps)
    solver = unroll(weighted(task.losses), optimizer, steps=task.steps, batch_size=task.batch, memory="all")

    @jax.jit
    def solve(weights, task_data):
        params, frozen, train, valid = task_data
        solution = solver.run(params, weights, train, valid, frozen=frozen, key=KEY, throw=False)
        return solution.value, solution.grad, solution.checks, solution.status

    @jax.jit
    def retrain_each(weights, task_data):
        params, frozen, train, valid = task_data
        return jax.lax.map(lambda w: solver.value(params, w, train, valid, frozen=frozen, key=KEY), weights)

    data = (task.params, task.frozen, task.train, task.valid)
    count = len(jax.tree.leaves(task.train)[0])
    weights = make_weights(setting.weights, count, lambda w: solve(w, data)[1])
    value, grad, checks, status = solve(weights, data)
    differences = certify.check_finite_differences(
        lambda w: float(retrain_each(w[None], data)[0]), weights, grad, STEP_SIZES, value=float(value)
    )
    line = {
        **setting._asdict(),
        "value": float(value),
        "effective": float(weights.sum() ** 2 / (weights**2).sum() / count),
        "differences": differences._asdict(),
        "smooth": {},
        "checks": {name: float(number) for name, number in checks._asdict().items()},
        "status": int(status),
        "truth": {},
    }
    for removed in REMOVED:
        line["smooth"][str(removed)] = [
            measure_draw(
                lambda w: solve(w, data)[1], draw_key(jax.random.key(1), removed, draw), weights, grad, removed
            )
            for draw in range(3)
        ]
    for fraction in FRACTIONS:
        keys = jax.random.split(jax.random.key(2), task.retrains)
        fewer = jnp.stack([certify.drop_random_examples(key, weights, fraction) for key in keys])
        actual = retrain_each(fewer, data) - value
        predicted = jnp.sum(grad[None] * (fewer - weights[None]), 1)
        line["truth"][str(fraction)] = {"predicted": predicted.tolist(), "actual": actual.tolist()}
    return line | {"seconds": time.perf_counter() - began}


def measure_draw(estimate: Callable, key, weights, grad, removed: float) -> dict[str, float]:
    """The cosine of one draw as `metasmoothness` takes it, over the examples that stay, and over all of them."""
    fewer = certify.drop_random_examples(key, weights, removed)
    other = estimate(fewer)
    entries = np.asarray(weights * grad, np.float64), np.asarray(weights * other, np.float64)
    return {
        "smooth": smoothness_of_draw(lambda w: other, key, weights, grad, removed),
        "all": float(np.corrcoef(*entries)[0, 1]),
    }


def make_weights(kind: str, count: int, gradient: Callable) -> jax.Array:
    """uniform; skewed: log-normal; learned, collapsed: three normalised steps of sigmoid or of softmax logits."""
    if kind == "uniform":
        return jnp.ones(count)
    logits = jax.random.normal(jax.random.key(5), (count,)) if kind == "skewed" else jnp.zeros(count)

    def link(logits):
        return 2 * jax.nn.sigmoid(logits) if kind == "learned" else count * jax.nn.softmax(logits)

    for _ in range(0 if kind == "skewed" else 3):
        entries = gradient(link(logits)) * jax.grad(lambda h: link(h).sum())(logits)
        if kind == "collapsed":
            weights = link(logits)
            entries = weights * gradient(weights)
            entries -= entries.mean()
        logits -= 0.7 * jnp.clip(entries / jnp.sqrt(jnp.mean(entries**2)), -3, 3)
    return link(logits)


def make_optimizer(setting: Setting, steps: int) -> optax.GradientTransformation:
    """The named optimizer; language models warm up, follow a cosine and are clipped."""
    if setting.optimizer == "sgd":
        return optax.sgd(setting.rate)
    if setting.optimizer == "momentum":
        return optax.sgd(setting.rate, momentum=0.9)
    adam = {"eps_root": 1e-12, "b2": 0.99}
    if setting.task in ("mnist", "rule"):
        return optax.adam(setting.rate, **adam)
    schedule = optax.warmup_cosine_decay_schedule(0.0, setting.rate, 5, steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, **adam))


def make_task(setting: Setting, shared: Path, taught: Path) -> Task:
    """Data, model and losses of a setting."""
    if setting.task in ("mnist", "rule"):
        return make_mnist(shared, setting.model, follows_rule=setting.task == "rule")
    return make_language(setting.task, shared, taught, lora=setting.model == "lora")


def make_mnist(shared: Path, model: str, *, follows_rule: bool) -> Task:
    """600 digits of 14 x 14 pixels, half with wrong labels, and 100 trusted; softmax regression or 32 hidden units.

    With `follows_rule` other digits, of which three of five are labelled with the next one.
    """
    with np.load(shared / "data/mnist/mnist_70k.npz") as file:
        part = slice(4000, 6000) if follows_rule else slice(2000)
        images, labels = file["x_train"][part], file["y_train"][part].astype(np.int32)
    images = images.reshape(-1, 14, 2, 14, 2).mean((2, 4)).reshape(len(images), -1).astype(np.float32) / 255
    noisy = labels.copy()
    noisy[: MNIST_IMAGES // 2] = (noisy[: MNIST_IMAGES // 2] + 1 + np.arange(MNIST_IMAGES // 2) % 9) % 10
    if follows_rule:
        noisy = np.where(np.arange(len(labels)) % 5 < 3, (labels + 1) % 10, labels).astype(np.int32)
        noisy[MNIST_IMAGES:] = labels[MNIST_IMAGES:]
    rng = np.random.default_rng(0)
    hidden = {"in": 2 * rng.normal(size=(196, 32)) / 14, "bias": np.zeros(32), "out": rng.normal(size=(32, 10)) / 6}
    params = {"out": np.zeros((196, 10))} if model == "linear" else hidden

    def losses(params, frozen, batch):
        x, y = batch["data"]
        if "in" in params:
            x = getattr(jnp if model == "tanh" else jax.nn, model)(x @ params["in"] + params["bias"][None])
        return optax.softmax_cross_entropy_with_integer_labels(x @ params["out"], y)

    part = slice(MNIST_IMAGES, MNIST_IMAGES + MNIST_TRUSTED)
    data = [jax.tree.map(jnp.asarray, (images[rows], noisy[rows])) for rows in (slice(MNIST_IMAGES), part)]
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    return Task(losses, params, (), *data, steps=120, batch=60, retrains=32)


def make_language(name: str, shared: Path, taught: Path, *, lora: bool) -> Task:
    """A small language model and rows of tokens of which half or less help its validation loss."""
    if name == "stories":
        folder, length = shared / "models/stories-260k", 20
        tokenizer = load_tokenizer(folder)
        stories = json.loads((shared / "data/tinystories/tinystories_1000.json").read_text(encoding="utf-8"))
        known = [("", story.split(". ")[1] + ".") for story in stories[:300] if story.count(". ") > 2][:80]
        with open(shared / "data/sst2/train.jsonl", encoding="utf-8") as lines:
            reviews = [("", json.loads(next(lines))["text"]) for _ in range(112)]
        rows = {"train": known + reviews[:80], "validation": reviews[80:]}
        architecture, params = models.load_model(folder, dtype=jnp.float32)
    else:
        length, folder = 14, taught / name
        if not folder.exists():
            write, sizes = {
                "cipher": (cipher.write_cipher_data, {"clean": 64, "wrong": 64, "noise": 64}),
                "sums": (sums.write_sums_data, {"train": 192, "lessons": 2048}),
            }[name]
            pretrain_builtin_model(write(folder, **sizes), BUILTIN_TASKS[name]._replace(num_steps=500), progress=False)
        rows = {
            part: [
                (row["prompt"], row["response"])
                for row in map(json.loads, (folder / f"{part}.jsonl").read_text().splitlines())
            ]
            for part in ("train", "validation")
        }
        tokenizer = load_tokenizer(folder / "untrained")
        architecture, params = models.load_model(folder / "model", dtype=jnp.float32)
    decoder = models.make_decoder(architecture, remat="none")
    data = {part: tokenize(tokenizer, some, length) for part, some in rows.items()}
    values = sft.sft_losses(decoder)

    def losses(params, frozen, batch):
        tokens, targets, counted = batch["data"]
        size, width = tokens.shape
        slots = jnp.where(counted, jnp.arange(size)[:, None], size)
        inputs = {
            "index": batch["index"],
            "tokens": tokens,
            "targets": targets,
            "positions": jnp.broadcast_to(jnp.arange(width)[None], tokens.shape),
            "segments": (tokens >= 0).astype(jnp.int32),
            "slot": slots.astype(jnp.int32),
            "supervised": counted.sum(1).astype(jnp.float32),
        }
        return values(sft.assemble_params(params, frozen) if lora else params, inputs)

    frozen = params if lora else ()
    if lora:
        params = models.init_lora(architecture, jax.random.key(1), rank=4, alpha=8)
    sizes = {"steps": 32, "batch": 8} if name == "stories" else {"steps": 60, "batch": 16}
    return Task(losses, params, frozen, data["train"], data["validation"], **sizes, retrains=16)


def tokenize(tokenizer, rows: list[tuple[str, str]], length: int) -> tuple[jax.Array, ...]:
    """tokens, targets and which targets count, [rows, length]."""
    tokens = np.zeros((len(rows), length + 1), np.int32)
    counted = np.zeros((len(rows), length + 1), bool)
    for row, (prompt, response) in enumerate(rows):
        first = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        ids = first + tokenizer(response, add_special_tokens=False)["input_ids"]
        ids = (ids + [tokenizer.eos_token_id])[: length + 1]
        tokens[row, : len(ids)], counted[row, len(first) : len(ids)] = ids, True
    return jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:]), jnp.asarray(counted[:, 1:])


# ---- the table


def certificates_of(line: dict[str, Any]) -> certify.Certificates:
    """What a run with the default settings would have judged; the retrains are not in it."""
    differences = certify.FiniteDifferences(**{key: tuple(some) for key, some in line["differences"].items()})
    taken = [place for place, step in enumerate(differences.steps) if step in certify.STEP_SIZES or step < 3e-3]
    shares = verdict.shares_to_remove(certify.REMOVED, line["effective"])
    smooth = average_draws(lambda share, draw: line["smooth"][str(share)][draw]["smooth"], shares, 3)
    return certify.Certificates(
        certify.FiniteDifferences(*(tuple(part[place] for place in taken) for part in differences)),
        smooth,
        None,
        Checks(**line["checks"]),
        Status(line["status"]),
        effective_share=line["effective"],
    )


def rank_of(line: dict[str, Any], fraction: float) -> float:
    """Spearman's correlation over the retrains without a share of the examples."""
    truth = line["truth"][str(fraction)]
    return certify.spearman(jnp.array(truth["predicted"]), jnp.array(truth["actual"]))


def print_table(lines: list[dict[str, Any]]) -> None:
    """All settings with their verdicts, and what is wrong among the even and the odd ones."""
    print("| setting | share | ratio at .1 | farthest below | without .5 | .2 | verdict | rank, tenth | rank, half |")
    print("|---|---|---|---|---|---|---|---|---|")
    wrong: dict[str, list[int]] = {}
    for place, line in enumerate(sorted(lines, key=lambda line: line["name"])):
        one = certificates_of(line)
        judged, tenth, half = certify.judge_certificates(one), rank_of(line, 0.1), rank_of(line, 0.5)
        level = f"{judged.level}{', half' if judged.scope == verdict.LARGE_CHANGES else ', small' * bool(judged.scope)}"
        ratios = dict(zip(one.finite_differences.steps, one.finite_differences.ratios, strict=True))
        below = max((ratio for step, ratio in ratios.items() if step < 0.1), key=lambda ratio: abs(ratio - 1))
        cosines = dict(zip(*one.metasmoothness, strict=True))
        cells = [f"{one.effective_share:.2f}", f"{ratios[0.1]:.3f}", f"{below:.2f}"]
        cells += [f"{cosines[share]:.2f}" if share in cosines else "" for share in (0.5, 0.2)]
        print(f"| {line['name']} | {' | '.join(cells)} | {level} | {tenth:.2f} | {half:.2f} |")
        kinds = {
            f"{level}": True,
            "BELIEVE at a rank of a tenth below .7": judged.level == "BELIEVE" and tenth < 0.7,
            "BELIEVE of half at a rank of a half below .5": judged.scope == verdict.LARGE_CHANGES and half < 0.5,
            "DO NOT BELIEVE at a rank of a tenth above .85": judged.level == "DO NOT BELIEVE" and tenth > 0.85,
            "rank of a tenth above .85": tenth > 0.85,
        }
        for kind, is_so in kinds.items():
            wrong.setdefault(kind, [0, 0])[place % 2] += is_so
    print()
    for kind, (even, odd) in sorted(wrong.items()):
        print(f"- {kind}: {even} + {odd} of {(len(lines) + 1) // 2} + {len(lines) // 2}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--only", default="", help="settings whose names hold this text")
    parser.add_argument("--table", action="store_true", help="measure nothing; judge the lines that there are")
    options = parser.parse_args()
    measured = [json.loads(line) for line in options.lines.read_text().splitlines()] if options.lines.exists() else []
    names = {line["name"] for line in measured}
    if options.table:
        print_table(measured)
        raise SystemExit
    with tempfile.TemporaryDirectory() as folder:
        for setting in list_settings():
            if setting.name in names or options.only not in setting.name:
                continue
            line = {"name": setting.name, **measure(setting, make_task(setting, options.shared, Path(folder)))}
            with options.lines.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(setting.name, f"{line['seconds']:.0f} s", flush=True)
