"""The difficulty trap: the best of clean, graded examples by exact hypergradients, beside as many at random.

    python -m tests.benchmarks.difficulty ../shared out/difficulty.jsonl --seeds 5
    python -m tests.benchmarks.difficulty ../shared out/difficulty.jsonl --print

256 snippets of children's stories (3 to 22 words, all of them as they were written) of three grades: the easiest
quarter, the middle and the hardest quarter by the loss of stories-260k, a model of such stories. A small decoder of its
family (one layer of width 32) learns them from nothing, in 48 steps of 16 examples; the mean loss of |V| other
snippets, of no grade, judges. One exact hypergradient at weight 1 ranks the examples. A tenth, three tenths or half of
them by each rule are then trained on from the same start for as many steps, and, where they are longer than the
average, for as many tokens, too. The loss on 256 other snippets, in nats per token, is held against the mean of five
random choices of the same seed: below 0 is better than random.

Each (setting, seed) is a line of the file; what stands there is not run again.
"""

import argparse
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

import bilevel_jax as bj
from bilevel_jax.core import tree
from bilevel_jax.core.types import Batch, Params, Stream
from bilevel_jax.lm import models
from bilevel_jax.runs.config.schema import SelectionSection
from bilevel_jax.runs.engine.selection import divide_into_strata, select_examples
from bilevel_jax.runs.stats import rank_correlation
from tests.benchmarks.recommendation import read_lines

TRAIN, TEST, POOL, LENGTH, STEPS, BATCH = 256, 256, 2000, 40, 48, 16
FRACTIONS = (0.1, 0.3, 0.5)
RANDOM_DRAWS = 5


class Setting(NamedTuple):
    """What is varied: the optimizer, its learning rate, and how many examples judge."""

    optimizer: str
    learning_rate: float
    validation: int

    def make_optimizer(self) -> optax.GradientTransformation:
        """Constant rates."""
        if self.optimizer == "adam":
            return optax.adam(self.learning_rate, b2=0.99, eps_root=1e-10)
        return optax.sgd(self.learning_rate, momentum=0.9)


SETTINGS = {
    "sgd .05, V 16": Setting("sgd", 0.05, 16),
    "sgd .05, V 64": Setting("sgd", 0.05, 64),
    "sgd .1, V 16": Setting("sgd", 0.1, 16),
    "adam, V 16": Setting("adam", 5e-3, 16),
}


class Rows(NamedTuple):
    """Tokenized snippets, padded: an example a row."""

    tokens: Int[np.ndarray, "examples length"]
    """What the model reads, and one more."""
    is_target: Float[np.ndarray, "examples length"]
    """1 where a token is predicted."""

    @property
    def lengths(self) -> Int[np.ndarray, "examples"]:
        """Predicted tokens of each example."""
        return self.is_target.sum(1).astype(int)

    def take(self, indices: Int[np.ndarray, "chosen"]) -> "Rows":
        """Some of the examples."""
        return Rows(self.tokens[indices], self.is_target[indices])


class Measured(NamedTuple):
    """What is known of the training examples of a seed."""

    gains: Float[np.ndarray, "examples"]
    """Minus the hypergradient: above 0, more weight lowers the validation loss."""
    norms: Float[np.ndarray, "examples"]
    """Norm of the gradient of the example's loss at the end of uniform training."""
    start_norms: Float[np.ndarray, "examples"]
    """The same before training."""
    lengths: Int[np.ndarray, "examples"]
    losses: Float[np.ndarray, "examples"]
    """At the end of uniform training, nats per token."""
    start_losses: Float[np.ndarray, "examples"]
    """Before training, of the random initialisation: what `selection.strata: loss` goes by."""
    reducible: Float[np.ndarray, "examples"]
    """The loss at the end of uniform training minus that under a model of validation."""
    grades: Float[np.ndarray, "examples"]
    """Loss under stories-260k: what the grades are made of, and no rule of a user's reads."""
    noise: Float[np.ndarray, "examples"]
    """Random numbers."""


# ---- the ways of choosing


def _top(scores: Callable[[Measured], np.ndarray]) -> Callable[[Measured, float], np.ndarray]:
    return lambda measured, share: _select(scores(measured), share, SelectionSection(top_share=share), None)


def _strata(
    by: Callable[[Measured], np.ndarray],
    num_strata: int = 5,
    scores: Callable[[Measured], np.ndarray] = lambda measured: measured.gains,
) -> Callable[[Measured, float], np.ndarray]:
    def choose(measured: Measured, share: float) -> np.ndarray:
        rule = SelectionSection(top_share=share, strata="length", num_strata=num_strata)
        strata = divide_into_strata(by(measured).astype(float), np.arange(TRAIN), rule.num_strata)
        return _select(scores(measured), share, rule, strata)

    return choose


def _select(scores: np.ndarray, share: float, rule: SelectionSection, strata: np.ndarray | None) -> np.ndarray:
    return select_examples(scores, np.arange(TRAIN), rule, sources=[""] * TRAIN, seed=0, strata=strata)


def _rate_once(measured: Measured) -> np.ndarray:
    """The first step of a linear rater of length and losses at the end: what the gains share along these alone."""
    features = np.stack([measured.lengths, measured.losses, measured.reducible], 1).astype(float)
    features = (features - features.mean(0)) / features.std(0)
    return features @ (features.T @ measured.gains)


RULES: dict[str, Callable[[Measured, float], np.ndarray]] = {
    "exact": _top(lambda m: m.gains),
    "exact / gradient norm at the end": _top(lambda m: m.gains / m.norms),
    "exact / gradient norm at the start": _top(lambda m: m.gains / m.start_norms),
    "exact / loss at the end": _top(lambda m: m.gains / m.losses),
    "exact / tokens": _top(lambda m: m.gains / m.lengths),
    "exact, 5 strata of length": _strata(lambda m: m.lengths),
    "exact, 10 strata of length": _strata(lambda m: m.lengths, 10),
    "exact, 10 strata of loss before training": _strata(lambda m: m.start_losses, 10),
    "exact, 10 strata of loss at the end": _strata(lambda m: m.losses, 10),
    "exact, 10 strata of gradient norm at the end": _strata(lambda m: m.norms, 10),
    "random, 10 strata of length": _strata(lambda m: m.lengths, 10, lambda m: m.noise),
    "a rater's first step": _top(_rate_once),
    "reducible loss": _top(lambda m: m.reducible),
    "largest gradient norm at the end": _top(lambda m: m.norms),
    "longest": _top(lambda m: m.lengths.astype(float)),
    "hardest grade": _top(lambda m: m.grades),
    "easiest grade": _top(lambda m: -m.grades),
}
"""Ways of choosing a share of the examples, by name; the last two know the grades."""


# ---- the task


class Data(NamedTuple):
    """Snippets of all parts, with the loss of the training pool under stories-260k."""

    train: Rows
    grades: Float[np.ndarray, "pool"]
    validation: Rows
    test: Rows


def read_data(shared: Path) -> Data:
    """Snippets of stories of which no two parts share one."""
    model = bj.lm.load(shared / "models" / "stories-260k")
    stories = json.loads((shared / "data/tinystories/tinystories_1000.json").read_text("utf-8"))
    rng = np.random.default_rng(0)
    order = rng.permutation(len(stories))
    parts = {"test": order[:250], "validation": order[250:450], "train": order[450:]}
    rows, texts = {}, {}
    for name, numbers in parts.items():
        snippets = dict.fromkeys(text for number in numbers for text in cut_snippets(stories[number], rng))
        encoded = {text: [1, *model.tokenizer.encode(text, add_special_tokens=False), 2] for text in snippets}
        texts[name] = [text for text in snippets if len(encoded[text]) <= LENGTH + 1][:POOL]
        rows[name] = _pad([encoded[text] for text in texts[name]])
    likelihoods = model.loglik([""] * len(texts["train"]), texts["train"])
    return Data(rows["train"], -likelihoods.nats / likelihoods.num_tokens, rows["validation"], rows["test"])


def cut_snippets(story: str, rng: np.random.Generator, least: int = 3, most: int = 22) -> list[str]:
    """Whole sentences, about as many words as drawn from a log-uniform distribution."""
    snippets: list[str] = []
    words: list[str] = []
    wanted = np.exp(rng.uniform(np.log(least), np.log(most)))
    for sentence in re.split(r"(?<=[.!?])\s+", story.strip()):
        words += sentence.split()
        if len(words) >= wanted:
            snippets += [" ".join(words)] if len(words) <= most else []
            words, wanted = [], np.exp(rng.uniform(np.log(least), np.log(most)))
    return snippets


def _pad(encoded: list[list[int]]) -> Rows:
    rows = Rows(np.zeros((len(encoded), LENGTH + 1), np.int32), np.zeros((len(encoded), LENGTH), np.float32))
    for row, ids in enumerate(encoded):
        rows.tokens[row, : len(ids)] = ids
        rows.is_target[row, : len(ids) - 1] = 1
    return rows


def draw_graded(grades: Float[np.ndarray, "pool"], rng: np.random.Generator) -> Int[np.ndarray, "train"]:
    """A third of the examples from the easiest quarter of the pool, from the middle one, and from the hardest."""
    order, third, size = np.argsort(grades), TRAIN // 3, len(grades)
    easy, middle = order[: size // 4], order[3 * size // 8 : 5 * size // 8]
    hard = order[3 * size // 4 :]
    counts = (third, third, TRAIN - 2 * third)
    drawn = [rng.permutation(part)[:count] for part, count in zip((easy, middle, hard), counts, strict=True)]
    return rng.permutation(np.concatenate(drawn))


def make_student(shared: Path) -> bj.lm.DecoderConfig:
    """A decoder of the family and the vocabulary of stories-260k, of one layer of width 32."""
    config = json.loads((shared / "models/stories-260k/config.json").read_text("utf-8"))
    small = {
        "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 85, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8,
    }  # fmt: skip
    return models.read_config(config | small)


class Learner:
    """A student with one optimizer: the programs are compiled once for each number of examples."""

    def __init__(self, architecture: bj.lm.DecoderConfig, setting: Setting):
        self.architecture = architecture
        token_losses = bj.lm.sft_losses(bj.lm.make_decoder(architecture))

        def losses(params: Params, frozen: tuple[()], batch: Batch) -> jax.Array:
            return token_losses(params, as_batch(batch["data"]))

        self.optimizer = setting.make_optimizer()
        problem = bj.weighted(losses)
        self.step = bj.train_step(problem, self.optimizer)
        self.estimate = bj.unrolled_estimator(problem, self.step)
        self.losses = jax.jit(lambda params, rows: losses(params, (), {"data": rows}))
        self.norms = jax.jit(
            lambda params, rows: jax.lax.map(
                lambda row: tree.norm(
                    jax.grad(lambda at: losses(at, (), {"data": jax.tree.map(lambda leaf: leaf[None], row)})[0])(params)
                ),
                rows,
            )
        )

    def init_params(self, seed: int) -> Params:
        """The start of a seed."""
        return bj.lm.init_params(self.architecture, jax.random.key(seed))

    def train(self, start: Params, rows: Rows, seed: int, steps: int = STEPS) -> Any:
        """(trajectory, weights, stream) of a training at weight 1."""
        stream = bj.shuffled_stream(rows, BATCH, steps, seed)
        weights = jnp.ones(len(rows.tokens))
        return bj.train(self.step, bj.init_train_state(self.optimizer, start), weights, (), stream), weights, stream


def as_batch(rows: Rows) -> Batch:
    """Rows in the form that losses of `lm` read: an example a row."""
    count = rows.tokens.shape[0]
    shape = (count, LENGTH)
    slot = jnp.where(rows.is_target > 0, jnp.arange(count)[:, None], count)
    return {
        "tokens": rows.tokens[:, :-1], "targets": rows.tokens[:, 1:], "slot": slot, "index": jnp.arange(count),
        "positions": jnp.broadcast_to(jnp.arange(LENGTH), shape), "segments": jnp.ones(shape, int),
        "supervised": rows.is_target.sum(1),
    }  # fmt: skip


def measure_examples(
    learner: Learner, start: Params, train: Rows, validation: Rows, grades: np.ndarray, seed: int
) -> tuple[Measured, Params]:
    """The hypergradients at weight 1, what the rules divide by, and the parameters after uniform training."""
    trajectory, weights, stream = learner.train(start, train, seed)
    judges: Stream = bj.full_batch_stream(validation)
    estimate = learner.estimate(trajectory, weights, (), stream, judges)
    end = trajectory.end.params
    of_validation = learner.train(start, validation, seed, STEPS // 2)[0].end.params
    losses = np.asarray(learner.losses(end, train))
    measured = Measured(
        -np.asarray(estimate.grad, float), np.asarray(learner.norms(end, train), float),
        np.asarray(learner.norms(start, train), float), train.lengths, losses, np.asarray(learner.losses(start, train)),
        losses - np.asarray(learner.losses(of_validation, train)), grades, np.random.default_rng(seed).random(TRAIN),
    )  # fmt: skip
    return measured, end


def run_seed(
    data: Data, learner: Learner, setting: Setting, seed: int, fractions: tuple[float, ...], rules: list[str]
) -> dict[str, Any]:
    """What each rule reaches on test at each share: {share: {rule: [loss, loss at equal tokens, tokens, grade]}}."""
    rng = np.random.default_rng(100 + seed)
    drawn = draw_graded(data.grades, rng)
    train, grades = data.train.take(drawn), data.grades[drawn]
    validation = data.validation.take(rng.permutation(len(data.validation.tokens))[: setting.validation])
    test = data.test.take(rng.permutation(len(data.test.tokens))[:TEST])
    start = learner.init_params(seed)
    measured, end = measure_examples(learner, start, train, validation, grades, seed)

    def reach(chosen: np.ndarray, steps: int) -> float:
        params = learner.train(start, train.take(chosen), 500 + seed, steps)[0].end.params
        return float(np.mean(learner.losses(params, test)))

    def judge(chosen: np.ndarray) -> list[float]:
        tokens = float(measured.lengths[chosen].mean())
        fewer = round(STEPS * float(measured.lengths.mean()) / tokens)
        loss = reach(chosen, STEPS)
        at_equal_tokens = reach(chosen, fewer) if fewer < STEPS else loss
        return [loss, at_equal_tokens, tokens, float(grades[chosen].mean())]

    shares: dict[str, dict[str, list[float]]] = {}
    for share in fractions:
        count = max(1, round(share * TRAIN))
        draws = [judge(rng.permutation(TRAIN)[:count]) for _ in range(RANDOM_DRAWS)]
        shares[str(share)] = {"random": np.mean(draws, 0).tolist()}
        shares[str(share)] |= {name: judge(RULES[name](measured, share)) for name in rules}
    return {
        "shares": shares,
        "all": float(np.mean(learner.losses(end, test))),
        "rank_correlation": {
            "length": rank_correlation(measured.gains, measured.lengths.astype(float)),
            "loss before training": rank_correlation(measured.gains, measured.start_losses),
            "loss at the end": rank_correlation(measured.gains, measured.losses),
            "gradient norm at the end": rank_correlation(measured.gains, measured.norms),
        },
    }


def measure(shared: Path, lines: Path, names: list[str], seeds: int) -> None:
    """Run what the file does not hold yet, and add it as it is finished."""
    held = {(line["setting"], line["seed"]) for line in read_lines(lines)}
    data, architecture = read_data(shared), make_student(shared)
    lines.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        learner = Learner(architecture, SETTINGS[name])
        for seed in range(seeds):
            if (name, seed) in held:
                continue
            began = time.process_time()
            found = run_seed(data, learner, SETTINGS[name], seed, FRACTIONS, list(RULES))
            line = {"setting": name, "seed": seed, **found, "cpu_seconds": time.process_time() - began}
            with open(lines, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            exact, random = (found["shares"]["0.1"][rule][0] for rule in ("exact", "random"))
            print(f"{name}, seed {seed}: a tenth, exact {exact:.3f}, random {random:.3f}", flush=True)


def print_tables(lines: Path) -> None:
    """A table for each setting: test loss minus that of a random choice, mean and standard error over the seeds."""
    held = read_lines(lines)
    for name in dict.fromkeys(line["setting"] for line in held):
        runs = [line for line in held if line["setting"] == name]
        shares = list(runs[0]["shares"])
        correlations = {
            what: np.mean([run["rank_correlation"][what] for run in runs]) for what in runs[0]["rank_correlation"]
        }
        told = ", ".join(f"{what} {value:+.2f}" for what, value in correlations.items()).replace("-", "−")
        print(f"\n{name}: {len(runs)} seeds; all examples {_interval([run['all'] for run in runs])}; ", end="")
        print(f"rank correlation of the gains with {told}\n")
        print("| test loss minus random | " + " | ".join(f"{float(share):.0%}" for share in shares), end=" | ")
        print(f"at equal tokens, {float(shares[0]):.0%} | tokens, grade of the {float(shares[0]):.0%} |")
        print("|---" * (len(shares) + 3) + "|")
        for rule in runs[0]["shares"][shares[0]]:
            cells = [_difference(runs, share, rule, 0) for share in shares]
            cells.append("" if rule == "random" else _difference(runs, shares[0], rule, 1))
            tokens, grade = np.mean([run["shares"][shares[0]][rule][2:] for run in runs], 0)
            print(f"| {rule} | {' | '.join(cells)} | {tokens:.1f}, {grade:.2f} |")


def _difference(runs: list[dict[str, Any]], share: str, rule: str, column: int) -> str:
    if rule == "random":
        return f"({_interval([run['shares'][share]['random'][0] for run in runs])})"
    values = [run["shares"][share][rule][column] - run["shares"][share]["random"][0] for run in runs]
    return _interval(values, "+")


def _interval(values: list[float], sign: str = "") -> str:
    half = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.3f}{half}".replace("-", "−")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("lines", type=Path)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--print", action="store_true", help="print the tables of what the file holds, and run nothing")
    options = parser.parse_args()
    if not options.print:
        measure(options.shared, options.lines, options.settings, options.seeds)
    print_tables(options.lines)
