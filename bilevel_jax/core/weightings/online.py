"""Weights that single-loop methods read and move in every training step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bilevel_jax.core.types import PADDING, Hyper, Scalar
from bilevel_jax.core.weightings.tables import WeightTable

ExampleIndex = Int[Array, "micro examples"]


BatchValues = Float[Array, "micro examples"]


class OnlineWeights(NamedTuple):
    """Weights that single-loop methods read and move in every step, in O(batch) work whatever the number of examples.

    The state is a pytree of arrays, an argument of the compiled step like any other. An index gives the entry of the
    weight table for each slot of a batch, `PADDING` where there is none; an example may repeat.
    """

    init: Callable[..., Any]
    """(logits h; default 0) -> state."""
    batch_weights: Callable[[Any, ExampleIndex], BatchValues]
    """(state, index) -> weights, mean 1 at the start; 0 for padding."""
    batch_grad: Callable[[Any, ExampleIndex, BatchValues], Hyper]
    """(state, index, hypergradients) -> d/dh of the batch; `hypergradients` are nats per example and unit of weight."""
    update: Callable[[Any, ExampleIndex, Hyper], Any]
    """(state, index, change of h) -> state; shaped as `batch_grad` gives it."""
    weights: Callable[[Any], WeightTable]
    """state -> the whole table; for the end of a run, it costs O(examples)."""
    renormalize: Callable[[Any], Any]
    """state -> the same state without the rounding that running sums gathered; once an epoch, it costs O(examples)."""
    logits: Callable[[Any], Hyper]
    """state -> h, what `init` takes."""
    is_separate: bool = False
    """Whether the weight of an example depends on its own logit alone, so that each device can hold a share of them."""


class SoftmaxState(NamedTuple):
    """The state of `online_softmax`: w_i = N exp(logits_i - logit_bound) / exp_sum."""

    logits: WeightTable
    logit_bound: Scalar
    """At least as large as every logit, so that nothing overflows."""
    exp_sum: Scalar
    """sum_i exp(logits_i - logit_bound), kept by adding what the touched examples change."""
    rounding_error: Scalar
    """What rounding took from `exp_sum` (Kahan): at 1e7 examples one step changes less than float32 resolves."""


def online_softmax(num_examples: int) -> OnlineWeights:
    """`softmax` for single-loop methods: the gradient on the examples that are present.

        w = N softmax(h);   d/dh_i = w_i (e_i - mean of e), the mean weighted by w

    The mean is over the batch, so that examples that are absent do not move and the present ones compete with each
    other; the normaliser of *all* examples is a running sum. It gathers rounding: about 1e-7 of its largest value in
    float32; `renormalize` removes it.

    Args:
        num_examples: N.

    Returns:
        The online weights, with a state of type `SoftmaxState`.

    Example:
        >>> online = bj.weightings.online_softmax(3)
        >>> index = jnp.array([[0, 1]])
        >>> online.batch_grad(online.init(), index, jnp.array([[1.0, 3.0]])).tolist()
        [[-1.0, 1.0]]
    """

    def logits_of(state: SoftmaxState, index: Int[Array, "..."]) -> Float[Array, "..."]:
        return state.logits.at[index].get(mode="fill", fill_value=-jnp.inf)

    def batch_weights(state: SoftmaxState, index: ExampleIndex) -> BatchValues:
        return num_examples * jnp.exp(logits_of(state, index) - state.logit_bound) / state.exp_sum

    def batch_grad(state: SoftmaxState, index: ExampleIndex, hypergradients: BatchValues) -> BatchValues:
        w = batch_weights(state, index)
        weight_sum = w.sum()
        return w * (hypergradients - jnp.sum(w * hypergradients) / jnp.where(weight_sum > 0, weight_sum, 1))

    def update(state: SoftmaxState, index: ExampleIndex, change: BatchValues) -> SoftmaxState:
        touched = jnp.unique(index, size=index.size, fill_value=PADDING)  # a row that repeats changes the sum once
        new_state = state._replace(logits=state.logits.at[index].add(change, mode="drop"))
        old, new = logits_of(state, touched), logits_of(new_state, touched)
        logit_bound = jnp.maximum(state.logit_bound, new.max())
        scale = jnp.exp(state.logit_bound - logit_bound)
        rescaled_sum = state.exp_sum * scale
        added = jnp.sum(jnp.exp(new - logit_bound) - jnp.exp(old - logit_bound)) - state.rounding_error * scale
        exp_sum = rescaled_sum + added
        return new_state._replace(
            logit_bound=logit_bound, exp_sum=exp_sum, rounding_error=(exp_sum - rescaled_sum) - added
        )

    def renormalize(state: SoftmaxState) -> SoftmaxState:
        logit_bound = state.logits.max()
        return SoftmaxState(
            state.logits, logit_bound, jnp.exp(state.logits - logit_bound).sum(), jnp.zeros_like(logit_bound)
        )

    def init(logits: WeightTable | None = None) -> SoftmaxState:
        logits = jnp.zeros(num_examples) if logits is None else jnp.array(logits)
        return renormalize(SoftmaxState(logits, jnp.zeros(()), jnp.zeros(()), jnp.zeros(())))

    return OnlineWeights(
        init,
        batch_weights,
        batch_grad,
        update,
        lambda state: num_examples * jax.nn.softmax(state.logits),
        renormalize,
        lambda state: state.logits,
    )


def online_sigmoid(num_examples: int) -> OnlineWeights:
    """`sigmoid` for single-loop methods: the examples do not compete.

        w = 2 sigmoid(h);   d/dh_i = w_i (1 - w_i / 2) e_i

    Args:
        num_examples: N.

    Returns:
        The online weights; the state is the table of logits, float[examples].

    Example:
        >>> online = bj.weightings.online_sigmoid(3)
        >>> online.batch_grad(online.init(), jnp.array([[2]]), jnp.array([[4.0]])).tolist()
        [[2.0]]
    """

    def batch_weights(logits: WeightTable, index: ExampleIndex) -> BatchValues:
        return 2 * jax.nn.sigmoid(logits.at[index].get(mode="fill", fill_value=-jnp.inf))

    def batch_grad(logits: WeightTable, index: ExampleIndex, hypergradients: BatchValues) -> BatchValues:
        w = batch_weights(logits, index)
        return w * (1 - w / 2) * hypergradients

    def update(logits: WeightTable, index: ExampleIndex, change: BatchValues) -> WeightTable:
        return logits.at[index].add(change, mode="drop")

    return OnlineWeights(
        lambda logits=None: jnp.zeros(num_examples) if logits is None else jnp.array(logits),
        batch_weights,
        batch_grad,
        update,
        lambda logits: 2 * jax.nn.sigmoid(logits),
        lambda logits: logits,
        lambda logits: logits,
        is_separate=True,
    )


class SourceState(NamedTuple):
    """The state of `online_per_source`."""

    logits: Float[Array, "sources"]
    example_source: Int[Array, "examples"]
    source_counts: Int[Array, "sources"]


def online_per_source(example_source: Int[Array, "examples"], num_sources: int) -> OnlineWeights:
    """A `rater` of one-hot sources for single-loop methods: one weight for each, stepped on its small table.

        w_s = p_s / mean_j p_s(j), p = softmax(h);
        d/dh = (d w / d h)^T [sum of e over the present examples of s, over the number of present examples]_s

    A source that is absent from a batch does move: the sources share one softmax, and its weight changes when the
    others' do.

    Args:
        example_source: the source of each example, int[examples], 0 .. num_sources - 1.
        num_sources: the number of sources.

    Returns:
        The online weights, with a state of type `SourceState`.

    Example:
        >>> online = bj.weightings.online_per_source(jnp.array([0, 1]), num_sources=2)
        >>> online.batch_grad(online.init(), jnp.array([[0, 1]]), jnp.array([[2.0, -2.0]])).tolist()
        [1.0, -1.0]
    """

    def source_weights(logits: Float[Array, "sources"], counts: Int[Array, "sources"]) -> Float[Array, "sources"]:
        p = jax.nn.softmax(logits)
        return p * counts.sum() / jnp.sum(p * counts)

    def source_of(state: SourceState, index: ExampleIndex) -> ExampleIndex:
        return state.example_source.at[index].get(mode="fill", fill_value=num_sources)

    def batch_weights(state: SourceState, index: ExampleIndex) -> BatchValues:
        return (
            source_weights(state.logits, state.source_counts).at[source_of(state, index)].get(mode="fill", fill_value=0)
        )

    def batch_grad(state: SourceState, index: ExampleIndex, hypergradients: BatchValues) -> Float[Array, "sources"]:
        num_present = jnp.maximum(jnp.sum(index != PADDING), 1)
        sums = (
            jnp.zeros(num_sources, hypergradients.dtype)
            .at[source_of(state, index)]
            .add(hypergradients / num_present, mode="drop")
        )
        return jax.vjp(lambda logits: source_weights(logits, state.source_counts), state.logits)[1](sums)[0]

    def update(state: SourceState, index: ExampleIndex, change: Float[Array, "sources"]) -> SourceState:
        return state._replace(logits=state.logits + change)

    def init(logits: Float[Array, "sources"] | None = None) -> SourceState:
        return SourceState(
            jnp.zeros(num_sources) if logits is None else jnp.array(logits),
            jnp.array(example_source),
            jnp.bincount(example_source, length=num_sources),
        )

    def weights(state: SourceState) -> WeightTable:
        return source_weights(state.logits, state.source_counts)[state.example_source]

    return OnlineWeights(
        init, batch_weights, batch_grad, update, weights, lambda state: state, lambda state: state.logits
    )


def online_uniform(num_examples: int) -> OnlineWeights:
    """Weight 1 for every example, always: a baseline is driven as the methods that learn weights.

    Args:
        num_examples: N.

    Returns:
        The online weights, without state.

    Example:
        >>> online = bj.weightings.online_uniform(2)
        >>> online.weights(online.init()).tolist()
        [1.0, 1.0]
    """

    def ones(state: None, index: ExampleIndex) -> BatchValues:
        return jnp.where(index != PADDING, 1.0, 0.0)

    return OnlineWeights(
        lambda logits=None: None,
        ones,
        lambda state, index, hypergradients: jnp.zeros_like(hypergradients),
        lambda state, index, change: state,
        lambda state: jnp.ones(num_examples),
        lambda state: state,
        lambda state: (),
        is_separate=True,
    )
