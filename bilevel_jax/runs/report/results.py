"""Results of a finished run, read from its folder."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from bilevel_jax.lm.data.examples import Example
from bilevel_jax.runs.infra import run_dir
from bilevel_jax.runs.tasks.splits import PART_NAMES


class RunResults(NamedTuple):
    """A run's folder, read."""

    name: str
    result: dict[str, Any]
    config_text: str
    environment: dict[str, Any]
    columns: dict[str, Any]
    """Columns of weights.parquet: numbers as arrays, text as lists."""
    column_meanings: dict[str, str]
    """What the columns mean, and facts about the run, from the parquet file's metadata."""
    examples: dict[str, Example]
    """By id; examples without one are shown without their text."""

    @property
    def config(self) -> dict[str, Any]:
        """config.yaml as a dict of sections."""
        return yaml.safe_load(self.config_text)

    @property
    def hypergradient(self) -> np.ndarray | None:
        """The per-example hypergradients at the weights; None where the method has none."""
        return self.columns.get("hypergradient")

    @property
    def unit(self) -> str:
        """The unit of a loss: nats per token, per example or per pair."""
        return self.result["unit"]

    @property
    def accuracy_unit(self) -> str:
        """What an accuracy is a share of."""
        right = self.result["right"]
        return "share of pairs" if right.startswith("pair") else "share of target tokens" if right else ""

    @property
    def has_labels(self) -> bool:
        """Whether any training example has a label."""
        return any(label is not None for label in self.columns["label"])


def read_results(folder: Path, examples: Sequence[Example]) -> RunResults:
    """result.json, config.yaml, environment.json and weights.parquet of a run."""
    table = run_dir.read_parquet(folder / "weights.parquet")
    text = ("id", "source", "label", "file")
    return RunResults(
        name=folder.resolve().name,
        result=run_dir.read_json(folder / "result.json"),
        config_text=run_dir.read_text(folder / run_dir.CONFIG_FILE),
        environment=run_dir.read_json(folder / "environment.json"),
        columns={
            name: table[name].to_pylist() if name in text else table[name].to_numpy() for name in table.column_names
        },
        column_meanings={key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()},
        examples={example.id: example for example in examples},
    )


def most_independent_part(run: RunResults) -> str:
    """The most independent part of the validation examples that was read."""
    return next((part for part in reversed(PART_NAMES) if run.result["rows"].get(part)), "validation")


def float_or_nan(value: float | None) -> float:
    """The number; nan for None, which is how JSON holds it."""
    return math.nan if value is None else float(value)


def write_report(folder: Path, render_page: Callable[[str, dict[str, Any], str, dict[str, Any]], str]) -> Path:
    """Write `folder`/report.html, `render_page` of (the run's name, its result, its config, its environment)."""
    path = folder / "report.html"
    result, environment = (run_dir.read_json(folder / name) for name in ("result.json", "environment.json"))
    config_text = run_dir.read_text(folder / run_dir.CONFIG_FILE)
    run_dir.write_atomic(path, render_page(folder.resolve().name, result, config_text, environment))
    return path
