"""Hypergradients of single tokens, for the examples at both ends of the exact hypergradients."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jaxtyping import Float

from bilevel_jax.core.types import Stream, TrainState
from bilevel_jax.lm.data.vocabulary import spell_tokens
from bilevel_jax.runs.budget.work import differentiates_tokens
from bilevel_jax.runs.config.schema import AuditSection, OuterSection
from bilevel_jax.runs.engine.trainer import HVP_WORK, REPLAY_WORK
from bilevel_jax.runs.engine.trajectory_store import device_memory_bytes, plan_checkpoints
from bilevel_jax.runs.infra import run_dir
from bilevel_jax.runs.infra.session import Session
from bilevel_jax.runs.scoring.token_hypergradients import compute_token_hypergradients
from bilevel_jax.runs.tasks.protocol import Task
from bilevel_jax.runs.tasks.text import TextTask

MAX_TOKENS = 400
"""Tokens shown of one example."""

TokenValues = list[Float[np.ndarray, "tokens"]]


def compute_tokens(
    task: Task, audit: AuditSection, outer: OuterSection, start: TrainState, stream: Stream, session: Session
) -> TokenValues | None:
    """d L_v / d factor of each token of each example at uniform weights, nan without a loss; stored when it is done.

    None where nothing is shown of it, and for tasks without tokens of their own: arrays and preference pairs.
    """
    if not isinstance(task, TextTask) or not differentiates_tokens(task, audit):
        return None
    path = session.folder / "parts" / "tokens.npy"
    ends = task.corpus.offsets[: task.num_examples + 1]

    def compute() -> None:
        steps_done = 0

        def on_step() -> None:
            nonlocal steps_done
            session.advance(1 if steps_done < task.num_steps else REPLAY_WORK + HVP_WORK)
            session.check_signals()
            steps_done += 1

        # held in device memory, whatever keeps the states of the first training; where a device does not tell how much
        # that is, what those states may take is all that is known
        is_known = outer.offload == "device" or not device_memory_bytes()
        budget = replace(outer, offload="device", memory_gib=outer.memory_gib if is_known else 0.0)
        plan = plan_checkpoints(budget, task.num_steps, start, task.base_params)
        found = compute_token_hypergradients(
            task,
            jnp.ones(task.num_examples),
            start.params,
            stream,
            task.held_out_streams["validation"],
            plan=plan._replace(linearize=False),
            on_step=on_step,
        )
        run_dir.write_arrays(path, np.concatenate(found.values))

    session.set_phase("hypergradients of tokens")
    session.run_once("tokens", compute, path.exists())
    return np.split(run_dir.read_arrays(path), ends[1:-1])


def build_tokens_table(task: TextTask, values: TokenValues) -> pa.Table:
    """One row per example that training reads: its id, its tokens as text, their hypergradients."""
    rows = task.trainable_indices()
    ids = {row: task.corpus.ids[slice(*task.corpus.offsets[row : row + 2])].tolist() for row in rows}
    return pa.table(
        {
            "id": [task.examples[row].id for row in rows],
            "token_ids": list(ids.values()),
            "tokens": [[text for text, _ in spell_tokens(ids[row], task.tokenizer)] for row in rows],
            "hypergradients": pa.array(
                [[None if np.isnan(value) else value for value in values[row].tolist()] for row in rows],
                pa.list_(pa.float64()),
            ),
        }
    )


def describe_extremes(
    task: TextTask, values: TokenValues, exact: Float[np.ndarray, "examples"], count: int
) -> list[dict[str, Any]]:
    """What result.json holds: the examples that help and that harm most, with each token's text and hypergradient.

    `exact` are scores, larger is better. At most half of the examples stand at either end.
    """
    rows = task.trainable_indices()
    order = rows[np.argsort(-exact[rows], kind="stable")]
    ends = {"help": order[: min(count, (len(order) + 1) // 2)], "harm": order[::-1][: min(count, len(order) // 2)]}
    shown = []
    for end, places in ends.items():
        for row in places:
            ids = task.corpus.ids[slice(*task.corpus.offsets[row : row + 2])].tolist()
            texts = [text for text, _ in spell_tokens(ids, task.tokenizer)]
            numbers = [None if np.isnan(value) else value for value in values[row].tolist()]
            shown.append(
                {
                    "end": end,
                    "id": task.examples[row].id,
                    "place": task.examples[row].where,
                    "hypergradient": float(-exact[row]),
                    "left_out": max(0, len(texts) - MAX_TOKENS),
                    "tokens": list(zip(texts, numbers, strict=True))[:MAX_TOKENS],
                }
            )
    return shown
