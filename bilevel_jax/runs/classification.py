"""A classification task from arrays (hyper-cleaning): data with wrong labels, a small network, streams of batches.

It has what `task.Task` has wherever training, estimates, the outer loop and the comparison touch it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from bilevel_jax.core.problem import proximal, weighted
from bilevel_jax.core.transition import transition
from bilevel_jax.core.types import PADDING, Batch, Fixed, Loss, Params, Problem, Stream, Transition
from bilevel_jax.lm import batches
from bilevel_jax.lm.data import Example
from bilevel_jax.runs import mesh as placing
from bilevel_jax.runs.config import SelectConfig
from bilevel_jax.runs.objective import Objective
from bilevel_jax.runs.optimizers import optimizer
from bilevel_jax.runs.sections import ArraysSection

NAMES = ("x_train", "y_train", "x_test", "y_test")


class Labelled(NamedTuple):
    """Rows of features, in the type that they were stored in (images stay one byte a pixel), and their classes."""

    x: np.ndarray
    y: Int[np.ndarray, "rows"]

    @property
    def rows(self) -> int:
        """How many there are."""
        return len(self.y)


class Source(NamedTuple):
    """What the file holds: rows to train and trust, and rows that V_report is drawn from."""

    train: Labelled
    test: Labelled
    classes: int
    name: str


class Network(NamedTuple):
    """What is compiled: shared by the tasks of all seeds, so that it is compiled once."""

    problem: Problem
    objective: Objective
    optimizer: optax.GradientTransformation
    step: Transition
    fresh: Callable[[int], Params]


class ArrayTask(NamedTuple):
    """The ingredients of a run on arrays, with the names that `task.Task` gives them."""

    examples: list[Example]
    trusted: dict[str, Int[np.ndarray, "rows"]]
    """The classes of V_fit, V_select and V_report."""
    notes: list[str]
    corpus: Labelled
    """The N rows with weights, with their noisy labels, then those of V_fit."""
    held_out: dict[str, Stream]
    base: None
    fresh: Callable[[int], Params]
    problem: Problem
    objective: Objective
    optimizer: optax.GradientTransformation
    step: Transition
    steps: int
    batch: int
    micro: int
    mesh: Mesh
    prior: bool

    @property
    def rows(self) -> int:
        """N, the size of the weight table."""
        return len(self.examples)

    def fixed(self, start: Params) -> Fixed:
        """The start of training where the prior is centred there."""
        return {"base": None, "start": start if self.prior else None}

    def stream(self, seed: int, chosen: Int[np.ndarray, "chosen"] | None = None, *, packed: bool = True) -> Stream:
        """A training run's batches: epochs over the chosen rows of the corpus (default: the N rows with weights)."""
        del packed
        chosen = self.trainable() if chosen is None else chosen
        order = batches.subset(chosen, self.corpus.rows, self.batch, seed)
        return placing.placed(
            self.mesh, Stream(lambda step: batch_of(self.corpus, order(step), self.micro), self.steps)
        )

    def summed(self, seed: int) -> Stream:
        """All N rows once, in a random order, as a stream that sums to their mean: what implicit estimators read."""
        order = batches.subset(self.trainable(), self.corpus.rows, self.batch, seed)
        steps = batches.steps_per_epoch(self.rows, self.batch)
        stream = Stream(lambda step: batch_of(self.corpus, order(step), self.micro, self.rows), steps)
        return placing.placed(self.mesh, stream)

    def trainable(self) -> Int[np.ndarray, "rows"]:
        """The rows with weights."""
        return np.arange(self.rows)

    def fit_rows(self) -> Int[np.ndarray, "fit"]:
        """The corpus rows of V_fit."""
        return np.arange(self.rows, self.corpus.rows)

    def features(self) -> Float[np.ndarray, "rows features"]:
        """For outer.weighting = by_features, which reads text."""
        raise ValueError("outer.weighting = by_features reads text; for arrays choose softmax, sigmoid or per_source.")


def read(path: str) -> Source:
    """An .npz file with x_train, y_train, x_test, y_test: features [rows, ...] and classes 0, 1, ....

    Raises ValueError with the remedy where something else is in it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file. data.train names an .npz file with {', '.join(NAMES)}.")
    with np.load(path, allow_pickle=False) as file:
        if missing := [name for name in NAMES if name not in file]:
            raise ValueError(f"{path}: no {', '.join(missing)}; it holds {', '.join(file) or 'nothing'}.")
        given = {name: file[name] for name in NAMES}
    parts = []
    for part in ("train", "test"):
        x, y = given[f"x_{part}"], given[f"y_{part}"]
        if y.ndim != 1 or len(x) != len(y) or not np.issubdtype(y.dtype, np.integer) or y.min(initial=0) < 0:
            raise ValueError(
                f"{path}: y_{part} is {y.dtype}{list(y.shape)} beside x_{part} {x.dtype}{list(x.shape)}; wanted one "
                "class (a whole number from 0) for each row."
            )
        if x.dtype != np.uint8 and not np.issubdtype(x.dtype, np.floating):
            raise ValueError(f"{path}: x_{part} is {x.dtype}; wanted uint8 (divided by 255 in training) or floats.")
        parts.append(Labelled(x.reshape(len(x), -1), y.astype(np.int32)))
    train, test = parts
    if train.x.shape[1] != test.x.shape[1]:
        raise ValueError(f"{path}: {train.x.shape[1]} features in x_train and {test.x.shape[1]} in x_test.")
    return Source(train, test, int(max(train.y.max(), test.y.max())) + 1, Path(path).name)


def network(config: SelectConfig, arrays: ArraysSection, source: Source) -> Network:
    """The model of the config: linear softmax regression, or with hidden layers an MLP with ReLU."""
    shape = (source.train.x.shape[1], *arrays.hidden_sizes, source.classes)
    dtype = jnp.dtype(config.model.param_dtype)
    loss = Loss(outputs, link)
    right = Objective(losses, accuracy, loss, "nats per row", "accuracy")
    prior = config.outer.proximal
    problem = weighted(losses, prior=proximal(prior, lambda fixed: fixed["start"]) if prior else None)
    optimiser = optimizer(config.optimizer, config.train.max_steps)
    return Network(problem, right, optimiser, transition(problem, optimiser), lambda seed: init(shape, seed, dtype))


def prepare(config: SelectConfig, arrays: ArraysSection, source: Source, net: Network) -> ArrayTask:
    """Draw the rows, their wrong labels and V from config.data.seed, all anew for each seed; V_report is of test rows.

    Raises ValueError where the file has too few rows.
    """
    counts = {"train": arrays.train_examples, "fit": arrays.validation_examples, "select": arrays.dev_examples}
    if sum(counts.values()) > source.train.rows:
        raise ValueError(
            f"arrays.train_examples + fit + select = {sum(counts.values()):,} rows, but {source.name} has {source.train.rows:,} "
            "in x_train. Lower one of them."
        )
    if arrays.test_examples > source.test.rows:
        raise ValueError(
            f"arrays.test_examples = {arrays.test_examples:,}, but {source.name} has {source.test.rows:,} test rows."
        )
    random = np.random.default_rng((config.data.seed, 1))
    drawn = random.permutation(source.train.rows)[: sum(counts.values())]
    places = dict(zip(counts, np.split(drawn, np.cumsum(list(counts.values()))[:-1]), strict=True))
    reported = random.permutation(source.test.rows)[: arrays.test_examples or None]
    parts = {part: at(source.train, rows) for part, rows in places.items()} | {"report": at(source.test, reported)}
    noisy = noise(parts["train"].y, arrays.label_noise, arrays.noise_share, source.classes, random)
    clean = noisy == parts["train"].y
    corpus = Labelled(np.concatenate([parts["train"].x, parts["fit"].x]), np.concatenate([noisy, parts["fit"].y]))
    examples = [
        Example(f"{place}", row, (), f"label {noisy[row]}", "clean" if clean[row] else "wrong", source.name, place + 1)
        for row, place in enumerate(places["train"].tolist())
    ]
    trusted = {part: parts[part] for part in ("fit", "select", "report") if parts[part].rows}
    mesh = placing.make_mesh(config.mesh.data, config.mesh.fsdp)
    each = config.train.global_batch_size // config.train.gradient_accumulation_steps
    placing.fit_layout(mesh, batches.Layout(config.train.gradient_accumulation_steps, each, each, 1))
    told = {"forced": "always to a wrong class", "redrawn": "uniformly over all classes", "none": "never"}[
        arrays.label_noise
    ]
    share = 0.0 if arrays.label_noise == "none" else arrays.noise_share
    return ArrayTask(
        examples=examples,
        trusted={part: some.y for part, some in trusted.items()},
        notes=[
            f"training: {arrays.train_examples:,} rows of {source.name}, {share:.0%} of their labels changed, {told}: "
            f"{1 - clean.mean():.1%} are wrong. "
            + ", ".join(f"V_{part}: {some.rows:,} rows" for part, some in trusted.items())
            + "."
        ],
        corpus=corpus,
        held_out={part: placing.kept(mesh, once(some, config.train)) for part, some in trusted.items()},
        base=None,
        fresh=lambda seed: placing.everywhere(mesh, net.fresh(seed)),
        problem=net.problem,
        objective=net.objective,
        optimizer=net.optimizer,
        step=net.step,
        steps=config.train.max_steps,
        batch=config.train.global_batch_size,
        micro=config.train.gradient_accumulation_steps,
        mesh=mesh,
        prior=config.outer.proximal > 0,
    )


def at(rows: Labelled, places: Int[np.ndarray, "places"]) -> Labelled:
    """The rows at these places."""
    return Labelled(rows.x[places], rows.y[places])


def noise(
    y: Int[np.ndarray, "rows"],
    kind: Literal["none", "forced", "redrawn"],
    share: float,
    classes: int,
    random: np.random.Generator,
) -> Int[np.ndarray, "rows"]:
    """The labels with exactly `share` of the rows changed: `forced`, each to another class, all others equally likely;
    `redrawn`, uniformly over all classes, so that one in `classes` of them stays right."""
    out = y.copy()
    if kind == "none":
        return out
    chosen = random.permutation(len(y))[: round(share * len(y))]
    if kind == "forced":
        out[chosen] = (y[chosen] + random.integers(1, classes, len(chosen))) % classes
    else:
        out[chosen] = random.integers(0, classes, len(chosen))
    return out


# ---- batches


def batch_of(rows: Labelled, chosen: Int[np.ndarray, "batch"], micro: int, total: int = 0) -> Batch:
    """The chosen rows as a batch; `total` is the number of rows of a stream that is summed rather than stepped on."""
    real = chosen < rows.rows
    some = at(rows, np.where(real, chosen, 0))
    each = len(chosen) // micro
    return {
        "x": some.x.reshape(micro, each, -1),
        "y": some.y.reshape(micro, each),
        "index": np.where(real, chosen, PADDING).astype(np.int32).reshape(micro, each),
        "rows": np.full(micro, total or int(real.sum()), np.float32),
    }


def once(rows: Labelled, train: Any) -> Stream:
    """Every row once, in order, as a stream whose sum is their mean."""
    order = batches.in_order(np.arange(rows.rows), rows.rows, train.global_batch_size)
    steps = batches.steps_per_epoch(rows.rows, train.global_batch_size)
    return Stream(lambda step: batch_of(rows, order(step), train.gradient_accumulation_steps, rows.rows), steps)


# ---- the network: pure functions of (params, fixed, micro-batch)


def init(shape: tuple[int, ...], seed: int, dtype: Any) -> Params:
    """Layers {kernel, bias}: normal with variance 2 / width in (He et al. 2015), 1 / width in of the last; biases 0."""
    keys = jax.random.split(jax.random.key(seed), len(shape) - 1)
    gains = [2.0] * (len(shape) - 2) + [1.0]
    return [
        {
            "kernel": (gain / before) ** 0.5 * jax.random.normal(key, (before, after), dtype),
            "bias": jnp.zeros(after, dtype),
        }
        for key, gain, before, after in zip(keys, gains, shape, shape[1:], strict=False)
    ]


def outputs(params: Params, fixed: Fixed, batch: Batch) -> Float[Array, "examples classes"]:
    """The logits."""
    del fixed
    *hidden, last = params
    x = batch["x"].astype(last["kernel"].dtype)
    if batch["x"].dtype == jnp.uint8:
        x = x / 255
    for layer in hidden:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None])
    return x @ last["kernel"] + last["bias"][None]


def link(logits: Float[Array, "examples classes"], fixed: Fixed, batch: Batch) -> Float[Array, "examples"]:
    """-log softmax(logits)[y], nats: convex in the logits."""
    del fixed
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def losses(params: Params, fixed: Fixed, batch: Batch) -> Float[Array, "examples"]:
    """The cross-entropy of each row, nats."""
    return link(outputs(params, fixed, batch), fixed, batch)


def accuracy(params: Params, fixed: Fixed, batch: Batch) -> Float[Array, "examples"]:
    """Whether the class of the largest logit is the label."""
    right = outputs(params, fixed, batch).argmax(-1) == batch["y"]
    return right.astype(jnp.float32)
