"""Classification task on arrays with label noise (hyper-cleaning)."""

import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from bilevel_jax.core.problem import proximal, weighted
from bilevel_jax.core.training import train_step
from bilevel_jax.core.types import PADDING, Batch, CompositeLoss, Frozen, Params, Problem, Stream, TrainStep
from bilevel_jax.lm.data import batches
from bilevel_jax.lm.data.examples import Example
from bilevel_jax.runs.config.schema import (
    ArraysSection,
    DataSection,
    MeshSection,
    ModelSection,
    OptimizerSection,
    TrainSection,
)
from bilevel_jax.runs.infra import identity
from bilevel_jax.runs.infra.placement import align_layout, cache_stream, make_mesh, place_stream, replicate
from bilevel_jax.runs.tasks.objective import Objective
from bilevel_jax.runs.tasks.optimizers import build_optimizer
from bilevel_jax.runs.tasks.targets import OuterObjective, training_target
from bilevel_jax.storage import copies, urls

NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")


class LabelledArrays(NamedTuple):
    """Rows of features, in the type that they were stored in (images stay one byte a pixel), and their classes."""

    x: np.ndarray
    y: Int[np.ndarray, "examples"]

    @property
    def num_examples(self) -> int:
        """How many there are."""
        return len(self.y)


class ArrayDataset(NamedTuple):
    """The content of the file: examples to train and validate on, and examples that test is drawn from."""

    train: LabelledArrays
    test: LabelledArrays
    num_classes: int
    name: str


class ArrayModel(NamedTuple):
    """What is compiled: shared by the tasks of all seeds, so that it is compiled once."""

    problem: Problem
    objective: Objective
    optimizer: optax.GradientTransformation
    train_step: TrainStep
    init_params: Callable[[int], Params]
    num_steps: int
    has_proximal: bool


class ArrayTask(NamedTuple):
    """A classification task on arrays; see `Task` for its members."""

    examples: list[Example]
    held_out_examples: dict[str, Int[np.ndarray, "examples"]]
    """The classes of validation, dev and test."""
    notes: list[str]
    corpus: LabelledArrays
    """The N training examples with their noisy labels, then those of validation."""
    held_out_streams: dict[str, Stream]
    base_params: None
    init_params: Callable[[int], Params]
    problem: Problem
    objective: Objective
    optimizer: optax.GradientTransformation
    train_step: TrainStep
    num_steps: int
    batch_size: int
    num_micro_batches: int
    mesh: Mesh
    has_proximal: bool

    @property
    def num_examples(self) -> int:
        """N, the size of the weight table."""
        return len(self.examples)

    @property
    def outer_objective(self) -> OuterObjective:
        """The training loss: on arrays the validation examples judge by no other."""
        return training_target(self.objective)

    @property
    def reported(self) -> None:
        """None: on arrays there are no other losses."""

    @property
    def target_sizes(self) -> dict[str, list[int]]:
        """The number of examples of each part, as of one target."""
        return {part: [len(examples)] for part, examples in self.held_out_examples.items()}

    def frozen(self, start: Params) -> Frozen:
        """The start of training where the prior is centred there."""
        return {"base": None, "start": start if self.has_proximal else None}

    def training_stream(
        self, seed: int, indices: Int[np.ndarray, "chosen"] | None = None, *, packed: bool = True
    ) -> Stream:
        """A training run's batches: epochs over the chosen examples of the corpus (default: the N with weights)."""
        del packed
        indices = self.trainable_indices() if indices is None else indices
        order = batches.shuffled_subset_order(indices, self.corpus.num_examples, self.batch_size, seed)
        return place_stream(
            self.mesh,
            Stream(lambda step: make_array_batch(self.corpus, order(step), self.num_micro_batches), self.num_steps),
        )

    def validation_stream(self, seed: int) -> Stream:
        """Batches of validation examples in epochs of their own."""
        return self.training_stream(seed, self.validation_indices())

    def full_pass_stream(self, seed: int, indices: Int[np.ndarray, "chosen"] | None = None) -> Stream:
        """Some examples of the corpus (default: the N with weights) once, in random order, as a stream that sums to
        their mean loss."""
        indices = self.trainable_indices() if indices is None else indices
        order = batches.shuffled_subset_order(indices, self.corpus.num_examples, self.batch_size, seed)
        steps, total = batches.steps_per_epoch(len(indices), self.batch_size), len(indices)
        stream = Stream(lambda step: make_array_batch(self.corpus, order(step), self.num_micro_batches, total), steps)
        return place_stream(self.mesh, stream)

    def trainable_indices(self) -> Int[np.ndarray, "examples"]:
        """The indices of the training examples."""
        return np.arange(self.num_examples)

    def validation_indices(self) -> Int[np.ndarray, "validation"]:
        """The corpus indices of the validation examples."""
        return np.arange(self.num_examples, self.corpus.num_examples)


def read_npz_dataset(path: str) -> ArrayDataset:
    """An .npz file with x_train, y_train, x_test, y_test: features [rows, ...] and classes 0, 1, ....

    Raises ValueError with the remedy where something else is in it.
    """
    if urls.is_url(path):
        with copies.shown_errors():
            return read_npz_dataset(str(copies.local_path(path)))
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file. data.train names an .npz file with {', '.join(NPZ_KEYS)}.")
    arrays = _load_npz(path)
    labelled_parts = []
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if (
            y.ndim != 1
            or x.ndim < 2
            or len(x) != len(y)
            or not len(y)
            or not np.issubdtype(y.dtype, np.integer)
            or y.min(initial=0) < 0
        ):
            raise ValueError(
                f"{path}: y_{part} is {y.dtype}{list(y.shape)} beside x_{part} {x.dtype}{list(x.shape)}; wanted one "
                "class (a whole number from 0) for each row."
            )
        if x.dtype != np.uint8 and not np.issubdtype(x.dtype, np.floating):
            raise ValueError(f"{path}: x_{part} is {x.dtype}; wanted uint8 (divided by 255 in training) or floats.")
        if not np.isfinite(x).all():
            row = int(np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(1))[0])
            raise ValueError(f"{path}: row {row} of x_{part} is not finite. Remove the row, or fill it.")
        if y.max() >= len(arrays["y_train"]) + len(arrays["y_test"]):
            raise ValueError(
                f"{path}: y_{part} has the class {y.max()}, more than there are rows. Number the classes from 0."
            )
        labelled_parts.append(LabelledArrays(x.reshape(len(x), -1), y.astype(np.int32)))
    train, test = labelled_parts
    if train.x.shape[1] != test.x.shape[1]:
        raise ValueError(f"{path}: {train.x.shape[1]} features in x_train and {test.x.shape[1]} in x_test.")
    return ArrayDataset(train, test, int(max(train.y.max(), test.y.max())) + 1, Path(path).name)


def _load_npz(path: str) -> dict[str, np.ndarray]:
    """The arrays of NPZ_KEYS; a ValueError where one is missing, or the file is none of numpy's or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if missing := [name for name in NPZ_KEYS if name not in file]:
                raise ValueError(
                    f"{path}: no {', '.join(missing)}; it holds {', '.join(file) or 'nothing'}. Name the arrays so."
                )
            return {name: np.asarray(file[name]) for name in NPZ_KEYS}
    except (zipfile.BadZipFile, zlib.error, EOFError, TypeError, AttributeError, ValueError) as error:
        if str(error).startswith(path):
            raise
        text = str(error).splitlines()[0][:120].rstrip(".")
        raise ValueError(
            f"{path}: not a whole .npz file of numbers ({text}). Write it anew with numpy.savez."
        ) from None


def label_array_data(data: DataSection) -> DataSection:
    """The section data of a task on arrays, where every example has a label: clean or wrong."""
    return replace(data, label_field="label", good_label="clean")


def build_array_model(
    dataset: ArrayDataset,
    arrays: ArraysSection,
    *,
    model: ModelSection,
    optimizer: OptimizerSection | optax.GradientTransformation,
    max_steps: int,
    proximal_strength: float = 0.0,
) -> ArrayModel:
    """Linear softmax regression or, with arrays.hidden_sizes, a multilayer perceptron; and its training."""
    shape = (dataset.train.x.shape[1], *arrays.hidden_sizes, dataset.num_classes)
    dtype = jnp.dtype(model.param_dtype)
    logits = partial(network_logits, activation=arrays.activation)

    def losses(params: Params, frozen: Frozen, batch: Batch) -> Float[Array, "examples"]:
        return cross_entropy(logits(params, frozen, batch), frozen, batch)

    def accuracy(params: Params, frozen: Frozen, batch: Batch) -> Float[Array, "examples"]:
        is_correct = logits(params, frozen, batch).argmax(-1) == batch["y"]
        return is_correct.astype(jnp.float32)

    objective = Objective(losses, accuracy, CompositeLoss(logits, cross_entropy), "nats per example", "accuracy")
    prior = proximal(proximal_strength, lambda frozen: frozen["start"]) if proximal_strength else None
    problem = weighted(losses, prior=prior)
    optax_optimizer = build_optimizer(optimizer, max_steps) if isinstance(optimizer, OptimizerSection) else optimizer
    return ArrayModel(
        problem=problem,
        objective=objective,
        optimizer=optax_optimizer,
        train_step=train_step(problem, optax_optimizer),
        init_params=lambda seed: init_network(shape, seed, dtype),
        num_steps=max_steps,
        has_proximal=proximal_strength > 0,
    )


def prepare_array_task(
    dataset: ArrayDataset,
    model: ArrayModel,
    arrays: ArraysSection,
    folder: Path,
    *,
    train: TrainSection,
    mesh: MeshSection,
    data_seed: int,
) -> ArrayTask:
    """Draw the examples of every part and the wrong labels from `data_seed`; test is drawn from the file's test part.

    What was drawn is recorded in `folder`. Raises ValueError where the file has too few rows, and where the run in
    `folder` was started with others.
    """
    drawn = draw_array_parts(dataset, arrays, data_seed)
    parts = {"training and validation": drawn.corpus, **drawn.held_out}
    identity.check_tokens(
        folder,
        {
            f"{part}, seed {data_seed}": {
                "rows": labelled.num_examples,
                "features": identity.hash_arrays(labelled.x),
                "labels": identity.hash_arrays(labelled.y),
            }
            for part, labelled in parts.items()
        },
    )
    devices = make_mesh(mesh.data, mesh.fsdp)
    micro_batches = train.gradient_accumulation_steps
    micro_batch_size = train.global_batch_size // micro_batches
    align_layout(devices, batches.BatchShape(micro_batches, micro_batch_size, micro_batch_size, 1))
    return ArrayTask(
        examples=drawn.examples,
        held_out_examples={part: labelled.y for part, labelled in drawn.held_out.items()},
        notes=[drawn.note],
        corpus=drawn.corpus,
        held_out_streams={
            part: cache_stream(devices, array_evaluation_stream(labelled, train.global_batch_size, micro_batches))
            for part, labelled in drawn.held_out.items()
        },
        base_params=None,
        init_params=lambda seed: replicate(devices, model.init_params(seed)),
        problem=model.problem,
        objective=model.objective,
        optimizer=model.optimizer,
        train_step=model.train_step,
        num_steps=model.num_steps,
        batch_size=train.global_batch_size,
        num_micro_batches=micro_batches,
        mesh=devices,
        has_proximal=model.has_proximal,
    )


class DrawnParts(NamedTuple):
    """The examples of one repetition."""

    examples: list[Example]
    """The training examples, as `Example`s with label clean or wrong."""
    corpus: LabelledArrays
    """The training examples with their noisy labels, then those of validation."""
    held_out: dict[str, LabelledArrays]
    """validation, dev and test, where they have examples."""
    note: str
    """Sizes and noise, in words."""


def draw_array_parts(dataset: ArrayDataset, arrays: ArraysSection, seed: int) -> DrawnParts:
    """Draw disjoint training, validation, dev and test examples, and change labels of the training examples."""
    counts = {"train": arrays.train_examples, "validation": arrays.validation_examples, "dev": arrays.dev_examples}
    if sum(counts.values()) > dataset.train.num_examples:
        raise ValueError(
            f"arrays.train_examples + validation_examples + dev_examples = {sum(counts.values()):,} rows, but "
            f"{dataset.name} has {dataset.train.num_examples:,} in x_train. Lower one of them."
        )
    if arrays.test_examples > dataset.test.num_examples:
        raise ValueError(
            f"arrays.test_examples = {arrays.test_examples:,}, but {dataset.name} has "
            f"{dataset.test.num_examples:,} test rows."
        )
    random = np.random.default_rng((seed, 1))
    indices = random.permutation(dataset.train.num_examples)[: sum(counts.values())]
    indices_by_part = dict(zip(counts, np.split(indices, np.cumsum(list(counts.values()))[:-1]), strict=True))
    test_indices = random.permutation(dataset.test.num_examples)[: arrays.test_examples or None]
    parts = {part: take_examples(dataset.train, rows) for part, rows in indices_by_part.items()}
    parts["test"] = take_examples(dataset.test, test_indices)
    noisy_labels = add_label_noise(
        parts["train"].y, arrays.label_noise, arrays.noise_share, dataset.num_classes, random
    )
    clean_mask = noisy_labels == parts["train"].y
    corpus = LabelledArrays(
        np.concatenate([parts["train"].x, parts["validation"].x]), np.concatenate([noisy_labels, parts["validation"].y])
    )
    examples = [
        Example(
            id=f"{index}",
            row=row,
            turns=(),
            source=f"label {noisy_labels[row]}",
            label="clean" if clean_mask[row] else "wrong",
            file=dataset.name,
            line=index + 1,
        )
        for row, index in enumerate(indices_by_part["train"].tolist())
    ]
    held_out = {part: parts[part] for part in ("validation", "dev", "test") if parts[part].num_examples}
    return DrawnParts(examples, corpus, held_out, _describe_parts(dataset.name, arrays, clean_mask, held_out))


def _describe_parts(
    name: str, arrays: ArraysSection, clean_mask: Bool[np.ndarray, "examples"], held_out: dict[str, LabelledArrays]
) -> str:
    noise = {
        "forced": "always to a wrong class",
        "redrawn": "uniformly over all classes",
        "shifted": "to the next class",
        "none": "never",
    }
    share = 0.0 if arrays.label_noise == "none" else arrays.noise_share
    sizes = ", ".join(f"{part}: {labelled.num_examples:,} rows" for part, labelled in held_out.items())
    return (
        f"training: {arrays.train_examples:,} rows of {name}, {share:.0%} of their labels changed, "
        f"{noise[arrays.label_noise]}: {1 - clean_mask.mean():.1%} are wrong. {sizes}."
    )


def take_examples(labelled: LabelledArrays, indices: Int[np.ndarray, "places"]) -> LabelledArrays:
    """The examples at these indices."""
    return LabelledArrays(labelled.x[indices], labelled.y[indices])


def add_label_noise(
    labels: Int[np.ndarray, "examples"],
    kind: Literal["none", "forced", "redrawn", "shifted"],
    share: float,
    num_classes: int,
    random: np.random.Generator,
) -> Int[np.ndarray, "examples"]:
    """The labels with exactly `share` of them changed: `forced`, each to another class, all others equally likely;
    `redrawn`, uniformly over all classes, so that one in `num_classes` of them stays right; `shifted`, to the next
    class, a wrong rule that can be learned as well as the right one."""
    noisy_labels = labels.copy()
    if kind == "none":
        return noisy_labels
    changed = random.permutation(len(labels))[: round(share * len(labels))]
    if kind == "forced":
        noisy_labels[changed] = (labels[changed] + random.integers(1, num_classes, len(changed))) % num_classes
    elif kind == "shifted":
        noisy_labels[changed] = (labels[changed] + 1) % num_classes
    else:
        noisy_labels[changed] = random.integers(0, num_classes, len(changed))
    return noisy_labels


# ---- batches


def make_array_batch(
    labelled: LabelledArrays, indices: Int[np.ndarray, "batch"], num_micro_batches: int, total_examples: int = 0
) -> Batch:
    """The chosen examples as a batch; `total_examples` is their number in a stream that is summed."""
    is_real = indices < labelled.num_examples
    examples = take_examples(labelled, np.where(is_real, indices, 0))
    micro_batch_size = len(indices) // num_micro_batches
    return {
        "x": examples.x.reshape(num_micro_batches, micro_batch_size, -1),
        "y": examples.y.reshape(num_micro_batches, micro_batch_size),
        "index": np.where(is_real, indices, PADDING).astype(np.int32).reshape(num_micro_batches, micro_batch_size),
        "num_examples": np.full(num_micro_batches, total_examples or int(is_real.sum()), np.float32),
    }


def array_evaluation_stream(labelled: LabelledArrays, batch_size: int, num_micro_batches: int) -> Stream:
    """Every example once, in order, as a stream whose sum is their mean."""
    total = labelled.num_examples
    order = batches.sequential_order(np.arange(total), total, batch_size)
    return Stream(
        lambda step: make_array_batch(labelled, order(step), num_micro_batches, total),
        batches.steps_per_epoch(total, batch_size),
    )


# ---- the network: pure functions of (params, fixed, micro-batch)


def init_network(layer_sizes: tuple[int, ...], seed: int, dtype: Any) -> Params:
    """Layers {kernel, bias}: normal with variance 2 / width in (He et al. 2015), 1 / width in of the last; biases 0."""
    keys = jax.random.split(jax.random.key(seed), len(layer_sizes) - 1)
    gains = [2.0] * (len(layer_sizes) - 2) + [1.0]
    return [
        {
            "kernel": (gain / fan_in) ** 0.5 * jax.random.normal(key, (fan_in, fan_out), dtype),
            "bias": jnp.zeros(fan_out, dtype),
        }
        for key, gain, fan_in, fan_out in zip(keys, gains, layer_sizes, layer_sizes[1:], strict=False)
    ]


ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu, "tanh": jnp.tanh}


def network_logits(
    params: Params, frozen: Frozen, batch: Batch, activation: str = "relu"
) -> Float[Array, "examples classes"]:
    """The logits."""
    del frozen
    *hidden, last = params
    x = batch["x"].astype(last["kernel"].dtype)
    if batch["x"].dtype == jnp.uint8:
        x = x / 255
    for layer in hidden:
        x = ACTIVATIONS[activation](x @ layer["kernel"] + layer["bias"][None])
    return x @ last["kernel"] + last["bias"][None]


def cross_entropy(logits: Float[Array, "examples classes"], frozen: Frozen, batch: Batch) -> Float[Array, "examples"]:
    """-log softmax(logits)[y], nats: convex in the logits."""
    del frozen
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
