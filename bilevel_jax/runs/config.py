"""What a run is told: frozen dataclasses, filled from a YAML file and the command line, checked at the border."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import tyro
import yaml

from bilevel_jax.runs.read import read


@dataclass(frozen=True)
class Model:
    """The language model and which of its parameters are trained."""

    path: str = ""  # folder of a Hugging Face checkpoint, or builtin:cipher for the small model made on the spot
    scratch: bool = False  # train from random parameters, drawn anew for each seed, instead of the checkpoint's
    lora_rank: int = 16  # rank of the LoRA factors; 0 trains all parameters
    lora_alpha: float = 16.0  # LoRA scale: the factors' product counts alpha/rank times
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")  # projections that get LoRA factors
    base_dtype: Literal["float32", "bfloat16"] = "float32"  # how a frozen base is stored; it is upcast layer by layer
    train_dtype: Literal["float32", "float64"] = "float32"  # trained parameters, optimiser state and hypergradients
    remat: bool = True  # recompute layers in the backward pass: less memory, about a third more time


@dataclass(frozen=True)
class Data:
    """The rows to be judged, the trusted validation rows, and how text is read from them."""

    train: tuple[str, ...] = ()  # files (jsonl, json, parquet) or a dataset name: the rows that get weights
    validation: tuple[str, ...] = ()  # trusted rows; split by id into V_fit, V_select and V_report
    select: tuple[str, ...] = ()  # own rows for V_select (early stopping); empty: a share of validation
    report: tuple[str, ...] = ()  # own rows for V_report (headline numbers); empty: a share of validation
    split: tuple[float, float, float] = (0.5, 0.25, 0.25)  # shares of validation for V_fit, V_select, V_report
    format: Literal["auto", "chat", "prompt", "alpaca", "text"] = "auto"  # shape of a row; auto looks at its keys
    prompt_field: str = "prompt"  # key of the question in a row
    response_field: str = "response"  # key of the answer; its tokens carry the loss
    text_field: str = "text"  # key of plain text; all its tokens carry the loss
    source_field: str = "source"  # key of where a row comes from: used by weighting per_source and in the report
    label_field: str = ""  # key of a known quality: adds AUC and the oracle's row to the report; never seen in training
    good_label: str = "clean"  # the label of good rows
    empty: Literal["error", "drop"] = "error"  # rows with an empty part: name them and stop, or leave them out
    template: str = ""  # prompt template with {prompt}, or empty: the tokenizer's chat template
    max_length: int = 1024  # tokens of an example
    truncate: Literal["error", "right", "drop"] = "error"  # examples beyond that: stop and name them, cut, leave out
    packing: bool = False  # several examples in one sequence: faster, same numbers
    leaks: Literal["error", "drop"] = "error"  # what to do with training rows that also stand in validation
    seed: int = 0  # of the split and of the data's order


@dataclass(frozen=True)
class Optimizer:
    """How parameters are trained, and what the hypergradient differentiates."""

    name: Literal["sgd", "momentum", "adam", "adamw", "lion"] = "adamw"  # lion's derivative is 0: not for unrolled
    learning_rate: float = 1e-4  # peak; too high a rate makes exact hypergradients useless (certify measures it)
    schedule: Literal["constant", "cosine", "linear"] = "cosine"  # after warmup; cosine and linear end at 0
    warmup: int = 10  # steps over which the rate rises
    weight_decay: float = 0.0  # pull to 0, decoupled (adamw, lion) or added to the gradient (the others)
    momentum: float = 0.9  # of name=momentum
    b1: float = 0.9  # decay of the gradient's mean
    b2: float = 0.999  # decay of the squared gradient's mean
    eps: float = 1e-8  # added outside the square root
    eps_root: float = 1e-12  # added inside the square root; 0 makes the derivative NaN where a gradient is 0
    clip: float = 0.0  # greatest norm of the gradient; 0 does not clip


@dataclass(frozen=True)
class Train:
    """One training run; the outer loop repeats it."""

    steps: int = 300  # optimiser steps of one run
    batch: int = 16  # examples in one step, over all devices
    micro: int = 1  # pieces that a step is cut into: less memory, same numbers
    seed: int = 0  # of the start of the parameters


@dataclass(frozen=True)
class Outer:
    """How the weights are learned."""

    method: Literal["unrolled", "implicit", "window", "alignment"] = "unrolled"  # unrolled: exact for the run itself
    weighting: Literal["softmax", "sigmoid", "per_source", "by_features"] = "softmax"  # what is learned -> weights
    steps: int = 8  # steps of the weights: each trains once and sweeps once
    learning_rate: float = 0.7  # of the weights' logits, along the hypergradient divided by its rms
    max_step: float = 2.0  # greatest change of one logit in one step
    restart: Literal["cold", "warm"] = "cold"  # train from the first parameters again, or from the last
    redraw: bool = True  # new data order at each restart, or the weights over-fit one order
    ess_floor: float = 0.1  # stop when the effective sample size falls below this share of the rows
    patience: int = 3  # stop after so many steps without a better loss on V_select; 0 never stops
    window: int = 20  # method=window: how many last steps are swept
    prior: float = 0.0  # delta in the training loss's prior delta/2 |params - start|^2; method=implicit needs it
    curvature: Literal["gauss_newton", "hessian"] = "gauss_newton"  # implicit: the matrix of the solve
    solver: Literal["cg", "neumann", "dense", "identity"] = "cg"  # implicit: how it is solved
    neumann_rate: float = 0.1  # solver=neumann: step size, below 2 over the largest curvature
    tolerance: float = 1e-4  # implicit: relative residual at which the solve stops
    max_iterations: int = 100  # implicit: products at which it gives up
    curvature_batches: int = 8  # implicit: batches in the matrix; doubled until the solution stays


@dataclass(frozen=True)
class Output:
    """What is written, and where."""

    folder: str = "out"  # the run's folder; never overwritten
    resume: bool = False  # go on with the run in that folder
    progress: bool = True  # show a progress bar
    save_minutes: float = 10.0  # save in the middle of an outer step when the last save is older
    top_share: float = 0.8  # share of rows, by weight, that go into the selected data
    threshold: float = 0.0  # instead: rows of at least this weight (the mean weight is 1); 0 = off
    resample: int = 0  # instead: so many rows drawn in proportion to their weight; 0 = off


Row = Literal[
    "uniform", "learned", "selected", "random", "alignment", "perplexity", "validation", "train+validation", "oracle"
]


@dataclass(frozen=True)
class Compare:
    """The headline numbers: cold retraining with the final weights, read on V_report."""

    enabled: bool = True  # costs one training per row and seed
    seeds: int = 3  # trainings per row
    rows: tuple[Row, ...] = get_args(Row)  # what is compared


@dataclass(frozen=True)
class Certify:
    """Is the hypergradient exact, smooth, predictive? Ends in a verdict."""

    enabled: bool = True  # costs two trainings per step size and one sweep
    step_sizes: tuple[float, ...] = (0.1, 0.03, 0.01, 0.003)  # exact: finite differences along the gradient's sign
    removed: float = 0.2  # smooth: share of rows left out
    retrains: int = 0  # predictive: trainings with changed weights; 0 = not measured, else at least 8


@dataclass(frozen=True)
class Devices:
    """The devices of the run."""

    data: int = 0  # devices over which the examples of a step are spread; 0 = all


@dataclass(frozen=True)
class SelectConfig:
    """Learn one weight per training row from a trusted validation set.

    CONFIG is a YAML file of the sections below; every flag overrides one of its keys. Paths are relative to where you
    stand. Short forms: --fast = --compare.no-enabled --certify.no-enabled; --resume = --output.resume;
    --out FOLDER = --output.folder FOLDER.
    """

    model: Model = Model()
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    outer: Outer = Outer()
    output: Output = Output()
    compare: Compare = Compare()
    certify: Certify = Certify()
    devices: Devices = Devices()


SHORT = {
    "--fast": ("--compare.no-enabled", "--certify.no-enabled"),
    "--resume": ("--output.resume",),
    "--out": ("--output.folder",),
}

# What may differ when a run is resumed: nothing here changes what is computed.
MAY_DIFFER = ("output.folder", "output.resume", "output.progress", "output.save_minutes", "devices.data")

# (key, what must hold, what is said otherwise). All that fail are reported together.
Rule = tuple[str, Callable[[SelectConfig], bool], str]
RULES: tuple[Rule, ...] = (
    ("model.path", lambda c: c.model.path != "", "name a checkpoint's folder, or builtin:cipher"),
    ("model.lora_rank", lambda c: c.model.lora_rank >= 0, "must be 0 (train all parameters) or more"),
    ("model.lora_alpha", lambda c: c.model.lora_alpha > 0, "must be above 0"),
    (
        "model.lora_targets",
        lambda c: c.model.lora_rank == 0 or len(c.model.lora_targets) > 0,
        "name at least one projection, or set model.lora_rank to 0 to train all parameters",
    ),
    (
        "model.base_dtype",
        lambda c: c.model.base_dtype == "float32" or c.model.lora_rank > 0,
        "only a frozen base can be stored in bfloat16: set model.lora_rank above 0",
    ),
    ("data.train", lambda c: len(c.data.train) > 0, "name the rows to be judged: files or a dataset"),
    ("data.validation", lambda c: len(c.data.validation) > 0, "name the trusted rows: files or a dataset"),
    (
        "data.split",
        lambda c: min(c.data.split) >= 0 and c.data.split[0] > 0 and abs(sum(c.data.split) - 1) < 1e-6,
        "three shares (fit, select, report), none negative, fit above 0, that sum to 1",
    ),
    ("data.max_length", lambda c: c.data.max_length >= 2, "must be 2 or more"),
    ("data.seed", lambda c: c.data.seed >= 0, "must be 0 or more"),
    ("optimizer.learning_rate", lambda c: c.optimizer.learning_rate > 0, "must be above 0"),
    (
        "optimizer.warmup",
        lambda c: 0 <= c.optimizer.warmup < max(c.train.steps, 1),
        "must be 0 or more and below train.steps",
    ),
    ("optimizer.weight_decay", lambda c: c.optimizer.weight_decay >= 0, "must be 0 or more"),
    ("optimizer.momentum", lambda c: 0 <= c.optimizer.momentum < 1, "must be in [0, 1)"),
    ("optimizer.b1", lambda c: 0 <= c.optimizer.b1 < 1, "must be in [0, 1)"),
    ("optimizer.b2", lambda c: 0 <= c.optimizer.b2 < 1, "must be in [0, 1)"),
    ("optimizer.eps", lambda c: c.optimizer.eps >= 0, "must be 0 or more"),
    ("optimizer.eps_root", lambda c: c.optimizer.eps_root >= 0, "must be 0 or more"),
    ("optimizer.clip", lambda c: c.optimizer.clip >= 0, "must be 0 (no clipping) or more"),
    (
        "optimizer.name",
        lambda c: c.optimizer.name != "lion" or c.outer.method not in ("unrolled", "window"),
        "lion steps along a sign, whose derivative is 0: choose adamw, or set outer.method to implicit or alignment",
    ),
    ("train.steps", lambda c: c.train.steps >= 1, "must be 1 or more"),
    ("train.batch", lambda c: c.train.batch >= 1, "must be 1 or more"),
    (
        "train.micro",
        lambda c: c.train.micro >= 1 and c.train.batch % c.train.micro == 0,
        "must be 1 or more and divide train.batch",
    ),
    ("train.seed", lambda c: c.train.seed >= 0, "must be 0 or more"),
    ("outer.steps", lambda c: c.outer.steps >= 1, "must be 1 or more"),
    ("outer.learning_rate", lambda c: c.outer.learning_rate > 0, "must be above 0"),
    ("outer.max_step", lambda c: c.outer.max_step > 0, "must be above 0"),
    ("outer.ess_floor", lambda c: 0 <= c.outer.ess_floor < 1, "must be in [0, 1)"),
    ("outer.patience", lambda c: c.outer.patience >= 0, "must be 0 (never stop early) or more"),
    ("outer.window", lambda c: c.outer.window >= 1, "must be 1 or more"),
    (
        "outer.prior",
        lambda c: c.outer.prior >= 0 and (c.outer.prior > 0 or c.outer.method != "implicit"),
        "must be 0 or more; the implicit method needs it above 0 (try 0.1), or set outer.method to unrolled",
    ),
    ("outer.tolerance", lambda c: 0 < c.outer.tolerance < 1, "must be in (0, 1)"),
    ("outer.max_iterations", lambda c: c.outer.max_iterations >= 1, "must be 1 or more"),
    ("outer.curvature_batches", lambda c: c.outer.curvature_batches >= 1, "must be 1 or more"),
    ("output.folder", lambda c: c.output.folder != "", "name the run's folder"),
    ("output.top_share", lambda c: 0 < c.output.top_share <= 1, "must be in (0, 1]"),
    ("output.threshold", lambda c: c.output.threshold >= 0, "must be 0 (off) or more"),
    (
        "output.resample",
        lambda c: c.output.resample >= 0 and not (c.output.resample > 0 and c.output.threshold > 0),
        "must be 0 (off) or more, and output.threshold or output.resample must be 0: they are two ways to select",
    ),
    ("compare.seeds", lambda c: c.compare.seeds >= 1, "must be 1 or more"),
    (
        "certify.step_sizes",
        lambda c: len(c.certify.step_sizes) > 0 and all(0 < size < 1 for size in c.certify.step_sizes),
        "name at least one, each in (0, 1)",
    ),
    ("certify.removed", lambda c: 0 < c.certify.removed < 1, "must be in (0, 1)"),
    (
        "certify.retrains",
        lambda c: c.certify.retrains == 0 or c.certify.retrains >= 8,
        "must be 0 (not measured), or 8 or more: fewer tell nothing about a correlation",
    ),
    ("devices.data", lambda c: c.devices.data >= 0, "must be 0 (all) or more"),
    ("output.save_minutes", lambda c: c.output.save_minutes > 0, "must be above 0"),
    ("outer.neumann_rate", lambda c: c.outer.neumann_rate > 0, "must be above 0"),
)


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> SelectConfig:
    """Read a YAML file (None: the defaults), apply command-line overrides, check every rule.

    Trouble in the file is one ValueError that lists all of it; a wrong flag ends the program as tyro does, with the
    nearest flags named. `--help` among the overrides prints every key, its default and what it means.
    """
    config = SelectConfig() if path is None else read(SelectConfig, find(path))
    flags = [flag for override in overrides for flag in _long(override)]
    prog = f"bilevel-jax select {'CONFIG' if path is None else path}"
    config = tyro.cli(SelectConfig, prog=prog, args=flags, default=config)
    check(config, "the defaults and the command line" if path is None else f"{path} and the command line")
    return config


def check(config: SelectConfig, where: str) -> None:
    """Every rule of RULES, or one ValueError that lists those which do not hold."""
    broken = [f"{key} = {_get(config, key)!r}: {text}" for key, holds, text in RULES if not holds(config)]
    broken += [f"{key} = {value!r}: must be finite" for key, value in _leaves(config) if not _finite(value)]
    if broken:
        raise ValueError("\n  ".join([f"{where}:", *broken]))


def find(path: str | Path) -> Path:
    """The file itself, or the one of that name among the configs that come with the package."""
    package = Path(__file__).resolve().parent.parent
    shipped = [package / "configs", package.parent / "configs"]  # in a wheel; in a clone
    for candidate in (Path(path), *(folder / Path(path).name for folder in shipped)):
        if candidate.is_file():
            return candidate
    known = sorted({file.name for folder in shipped if folder.is_dir() for file in folder.glob("*.yaml")})
    raise FileNotFoundError(f"{path}: no such config. Those that come with the package: {', '.join(known) or 'none'}.")


def resolved(config: SelectConfig) -> str:
    """The whole config as YAML text that `load` reads back to an equal config."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False, width=120, allow_unicode=True)


def config_hash(config: SelectConfig) -> str:
    """SHA-256 of every key that changes what is computed: MAY_DIFFER is left out."""
    text = "\n".join(f"{key}={value!r}" for key, value in _leaves(config) if key not in MAY_DIFFER)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(before: SelectConfig, now: SelectConfig) -> list[str]:
    """One line per key that keeps `now` from resuming a run of `before`; empty when it may."""
    old = dict(_leaves(before))
    return [
        f"{key}: {old[key]!r} in the run, {value!r} now"
        for key, value in _leaves(now)
        if key not in MAY_DIFFER and old[key] != value
    ]


def _long(flag: str) -> tuple[str, ...]:
    name, equals, value = flag.partition("=")
    *others, last = SHORT.get(name, (name,))
    return (*others, f"{last}{equals}{value}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _leaves(config: SelectConfig) -> list[tuple[str, Any]]:
    return [(f"{name}.{key}", value) for name, section in vars(config).items() for key, value in vars(section).items()]


def _get(config: SelectConfig, key: str) -> Any:
    return dict(_leaves(config))[key]


def _finite(value: Any) -> bool:
    items = value if isinstance(value, tuple) else (value,)
    return all(math.isfinite(item) for item in items if isinstance(item, float))
