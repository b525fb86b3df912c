"""Output files of a selection, its weights, examples and model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jaxtyping import Int

from bilevel_jax.core import single_loop
from bilevel_jax.core.types import Params
from bilevel_jax.lm import models
from bilevel_jax.lm.data.examples import Example, example_kind, example_to_row, is_preference_pair
from bilevel_jax.lm.hub.downloads import resolve_commit
from bilevel_jax.lm.models.source_files import find_hub_name
from bilevel_jax.runs.config.local_paths import short_file_names
from bilevel_jax.runs.config.schema import OuterSection
from bilevel_jax.runs.engine.outer_loop import LearnedWeights
from bilevel_jax.runs.infra import distributed, seals
from bilevel_jax.runs.scoring.difficulty import Difficulty
from bilevel_jax.runs.tasks.text import TextTask


def weights_table(
    task: TextTask,
    learned: LearnedWeights,
    selected_indices: Int[np.ndarray, "selected"],
    difficulty: Difficulty,
    *,
    estimand: str,
    param_dtype: str,
    product_precision: str,
    config_hash: str,
) -> pa.Table:
    """One row per training example, joined by `id` and never by position; signs and units in the schema's metadata."""
    selected_mask = np.zeros(task.num_examples, bool)
    selected_mask[selected_indices] = True
    file_names = short_file_names(example.file for example in task.examples)
    columns = {
        "id": [example.id for example in task.examples],
        "row": np.arange(task.num_examples),
        "source": [example.source for example in task.examples],
        "label": [example.label for example in task.examples],
        "weight": learned.weights,
        "hypergradient": learned.hypergradient,
        "first_hypergradient": learned.first_hypergradient,
        "alignment": learned.alignment,
        "loss": learned.losses,
        "start_loss": difficulty.losses,
        "tokens": difficulty.lengths,
        "selected": selected_mask,
        "file": [file_names[example.file] for example in task.examples],
        "line": [example.line for example in task.examples],
    }
    meanings = {
        "weight": "factor of the row's loss; the mean of a competing weighting is 1",
        "hypergradient": f"d L_v / d weight at these weights, {task.outer_objective.unit} on validation per unit of "
        "weight; below 0: more weight lowers L_v",
        "first_hypergradient": "the same at weight 1 for every example",
        "alignment": "-<grad loss_i, grad L_v> / rows at the end of uniform training; same sign as hypergradient",
        "loss": f"the row's loss at the end of uniform training, {task.objective.loss_unit}",
        "start_loss": f"the row's loss before training, {task.objective.loss_unit}",
        "tokens": "tokens of the row, as training sees them",
        "estimand": estimand,
        "precision": f"{param_dtype}, matrix products at the highest precision"
        + ("" if product_precision == "highest" else f", in the steps back at {product_precision}"),
        "device": jax.devices()[0].device_kind,
        "config_hash": config_hash,
        "outer_step": str(learned.best_step),
    }
    if np.isnan(learned.hypergradient).all():  # a single-loop method has no hypergradients
        columns = {
            name: column for name, column in columns.items() if name not in ("hypergradient", "first_hypergradient")
        }
    table = pa.table(columns)
    return table.replace_schema_metadata({key: value.encode() for key, value in meanings.items()})


def describe_estimand(outer: OuterSection, steps: int) -> str:
    """The quantity that the method differentiates, for training runs of so many steps."""
    return {
        "unrolled": f"L_v(theta_T(w)), the training run itself (T = {steps} steps): exact",
        "window": f"L_v(theta_T(w)) through the last {outer.window} of {steps} steps: an approximation of unrolled",
        "implicit": f"L_v(theta*(w)), the minimiser of the weighted loss + {outer.proximal:g}/2 |theta - start|^2, by "
        f"{'Gauss-Newton' if outer.curvature == 'gauss_newton' else 'the exact Hessian'}: exact at convergence"
        + (" for the proximal Bregman problem" if outer.curvature == "gauss_newton" else ""),
        "alignment": "<grad loss_i, grad L_v> at the end of training: one step's effect, not a hypergradient",
        "penalty": single_loop.OPTIMISTIC_ESTIMAND,
        "bmo": single_loop.BMO_ESTIMAND,
        "mixing": single_loop.MIXING_ESTIMAND,
    }[outer.method]


def format_selected_jsonl(
    examples: list[Example], weights: np.ndarray, selected_indices: Int[np.ndarray, "selected"]
) -> str:
    """The selected examples as jsonl, with id and weight."""
    return format_jsonl(examples, selected_indices, lambda row: {"weight": float(weights[row])})


def format_jsonl(
    examples: list[Example], indices: Int[np.ndarray, "written"], describe: Callable[[int], dict[str, Any]]
) -> str:
    """Some examples as jsonl, with id and what `describe` says of each, in the one layout that holds all of them."""
    kinds = {example_kind(examples[row]) for row in indices}
    chat_layout = "preference_chat" if is_preference_pair(examples[0]) else "chat"
    layout = chat_layout if kinds == {"chat", "prompt"} else "auto"  # a file has one layout
    lines = []
    for row in indices:
        content = {**example_to_row(examples[row], layout), "id": examples[row].id, **describe(int(row))}
        lines.append(json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n")
    # Half of a surrogate pair has no UTF-8; its escape is the same character to a reader of JSON.
    return "".join(lines).encode("utf-8", "backslashreplace").decode("utf-8")


def train_weights_table(task: TextTask, weights: np.ndarray, *, source: str, config_hash: str) -> pa.Table:
    """What `train` used: one row per training example, joined by `id`."""
    file_names = short_file_names(example.file for example in task.examples)
    columns = {
        "id": [example.id for example in task.examples],
        "row": np.arange(task.num_examples),
        "source": [example.source for example in task.examples],
        "label": [example.label for example in task.examples],
        "weight": weights,
        "file": [file_names[example.file] for example in task.examples],
        "line": [example.line for example in task.examples],
    }
    meanings = {"weight": "factor of the row's loss", "from": source, "config_hash": config_hash}
    return pa.table(columns).replace_schema_metadata({key: value.encode() for key, value in meanings.items()})


def write_model(folder: Path, task: TextTask, params: Params, *, base_path: str, parts: str = "both") -> None:
    """The trained model as a Hugging Face folder; adapters folded into the base ("full"), beside it, or "both".

    What is there already is left: the folders appear whole, one after the other, and a run that was killed between the
    two goes on with the second. The adapter names its base only where that has a name on the hub. Their files are noted
    in the run; a folder of which a kill came before that is written again.
    """
    params = jax.tree.map(distributed.fetch_to_host, params)
    base = jax.tree.map(distributed.fetch_to_host, task.base_params) if parts != "adapter" else task.base_params
    adapter = folder.with_name(f"{folder.name}-adapter")

    def write() -> None:
        if task.base_params is not None and parts != "full" and not seals.is_noted_folder(adapter):
            shutil.rmtree(adapter, ignore_errors=True)
            base_name = find_hub_name(base_path)
            models.save_peft(
                adapter,
                task.architecture,
                params,
                base=base_name.repo if base_name else None,
                base_revision=resolve_commit(base_name) if base_name else None,
            )
            seals.note_folder(adapter)
        if seals.is_noted_folder(folder) or (task.base_params is not None and parts == "adapter"):
            return
        merged_params = params
        if task.base_params is not None:
            merged_params = models.merge_adapters(
                jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), base), params
            )
        shutil.rmtree(folder, ignore_errors=True)
        models.save_model(folder, task.architecture, merged_params, source_files=task.source_files)
        seals.note_folder(folder)

    distributed.run_on_first_process(write)
