"""Hypergradients of the factors of single tokens: which token of an example helps, and which harms."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bilevel_jax.core.training import init_train_state, train, train_step
from bilevel_jax.core.types import (
    PADDING,
    Batch,
    CheckpointPlan,
    Checks,
    Frozen,
    Hyper,
    HyperSlice,
    Params,
    Problem,
    Stream,
)
from bilevel_jax.core.unrolled import backward_pass
from bilevel_jax.runs.infra.distributed import fetch_to_host
from bilevel_jax.runs.infra.placement import replicate, replicate_unplaced
from bilevel_jax.runs.tasks.text import TextTask


class TokenHypergradients(NamedTuple):
    """d L_v / d factor of each token's loss, at factor 1; below 0 where more of the token lowers L_v."""

    tokens: list[Int[np.ndarray, "tokens"]]
    """The token ids of each training example as training sees it; none of an example that was dropped as too long."""
    values: list[Float[np.ndarray, "tokens"]]
    """For each of them, nats per unit of the factor; nan for a token without a loss, as those of a prompt."""
    examples: Float[np.ndarray, "examples"]
    """d L_v / d weight of each example, of the same pass: weight times it is the sum over the example's tokens."""
    validation_loss: float
    checks: Checks


def token_weighted(problem: Problem, first_tokens: Int[np.ndarray, "examples"]) -> Problem:
    """The problem with a factor for the loss of each token beside the weight of each example.

        inner = sum_i w_i loss_i(v) / N,   loss_i(v) = the loss of example i with its token losses n_t times v_t

    The counts of tokens that divide losses stay as they are (see `sft_losses`), so loss_i is linear in v, and at v = 1
    the derivatives by the factors of an example's tokens sum to w_i times that by w_i. A corpus with token weights of
    its own keeps them: factors multiply them.

    Args:
        problem: of `weighted`, with losses that read `token_weights`, as `sft_losses` and those made from it.
        first_tokens: the place of each example's first token in the factors; those of a corpus are
            `corpus.offsets[:-1]`.

    Returns:
        The problem whose outer variable is (weights float[examples], factors float[places]).
    """
    starts = jnp.asarray(first_tokens)

    def find_tokens(batch: Batch) -> Array:
        """The place in the factors of the target at each place of the batch; beyond them where there is none."""
        slots = batch["slot"].reshape(*batch["slot"].shape[:1], -1)
        examples = jax.vmap(lambda index, slot: index.at[slot].get(mode="fill", fill_value=PADDING))(
            batch["index"], slots
        ).reshape(batch["slot"].shape)
        places = starts.at[examples].get(mode="fill", fill_value=0) + batch["positions"] + 1
        return jnp.where(examples == PADDING, PADDING, places)

    def inner(params: Params, hyper: HyperSlice, frozen: Frozen, batch: Batch) -> Any:
        weights, factors = hyper
        return problem.inner(
            params, weights, frozen, {**batch, "token_weights": factors * batch.get("token_weights", 1.0)}
        )

    def gather(hyper: Hyper, batch: Batch) -> HyperSlice:
        weights, factors = hyper
        return problem.gather(weights, batch), factors.at[find_tokens(batch)].get(mode="fill", fill_value=1)

    def scatter_add(hyper: Hyper, batch: Batch, slices: HyperSlice) -> Hyper:
        weights, factors = hyper
        return (
            problem.scatter_add(weights, batch, slices[0]),
            factors.at[find_tokens(batch)].add(slices[1], mode="drop"),
        )

    return problem._replace(inner=inner, gather=gather, scatter_add=scatter_add)


def compute_token_hypergradients(
    task: TextTask,
    weights: Float[Array, "examples"],
    start: Params,
    stream: Stream,
    validation: Stream,
    *,
    plan: CheckpointPlan,
    window: int | None = None,
    on_step: Callable[[], Any] = lambda: None,
) -> TokenHypergradients:
    """Train once more, with a factor 1 for every token, and go back through the run, as `unrolled_estimator` does.

    Costs a training and its backward pass, whatever the number of tokens. Exact and wrong where the hypergradients of
    examples are.

    Args:
        task: fine-tuning on single responses.
        weights: of the examples, on the mesh.
        start: the parameters before training.
        stream: the batches of training.
        validation: the stream of L_v.
        plan: which states of the training are stored.
        window: steps of the backward pass, the last ones; None: all.
        on_step: called after each step, there and back.

    Returns:
        The derivatives by token and by example.

    Raises:
        ValueError: for preference pairs, and for a streamed corpus, whose tokens are not there.
    """
    corpus = task.corpus
    if not len(corpus.ids):
        raise ValueError("data are streamed, so there is no table of their tokens. Set data.streaming to false.")
    if corpus.sequences_per_example != 1:
        raise ValueError("preference pairs have no loss of a single token: their losses compare whole responses.")
    problem = token_weighted(task.problem, corpus.offsets[:-1])
    step = train_step(problem, task.optimizer)
    state = replicate_unplaced(task.mesh, init_train_state(task.optimizer, start))
    factors = replicate(task.mesh, np.ones(len(corpus.ids), jax.tree.leaves(start)[0].dtype))
    hyper, frozen = (weights, factors), task.frozen(start)
    first = 0 if window is None else max(0, task.num_steps - window)
    trajectory = train(
        step, state, hyper, frozen, stream, plan=plan, first_backward_step=first, on_step=lambda *_: on_step()
    )
    passes = backward_pass(problem, step, window=window, on_step=lambda _: on_step())
    backward = passes.init(trajectory, hyper, frozen, validation)
    while not passes.is_done(trajectory, backward):
        backward = passes.advance(trajectory, hyper, frozen, stream, backward)
    estimate = passes.finish(trajectory, backward)
    by_example, by_token = (np.asarray(fetch_to_host(leaf), float) for leaf in estimate.grad)
    values = np.where(corpus.target_mask, by_token, np.nan)
    ends = corpus.offsets[1 : task.num_examples]
    ids, shown = (np.split(flat[: corpus.offsets[task.num_examples]], ends) for flat in (corpus.ids, values))
    return TokenHypergradients(
        ids, shown, by_example[: task.num_examples], float(estimate.validation_loss), estimate.checks
    )
