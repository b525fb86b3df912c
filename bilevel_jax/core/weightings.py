"""From an outer variable to the weight table: softmax, sigmoid, per_source, by_features; and the step on it.

Every weighting starts at weight 1 for each row. A `Weighting` is pulled back once per estimate, outside the sweep; a
`Selector` is read and moved in every training step, on the rows that are present.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from bilevel_jax.core.types import PADDING, Hyper, Scalar, Weighting

WeightTable = Float[Array, "examples"]
ExampleIndex = Int[Array, "micro examples"]
BatchValues = Float[Array, "micro examples"]


class OnlineWeights(NamedTuple):
    """Weights that single-loop methods read and move in every step, in O(batch) work whatever the number of rows.

    The state is a pytree of arrays, an argument of the compiled step like any other. `index` gives the row of each
    slot of a batch, `PADDING` where there is none; a row may repeat.
    """

    init: Callable[[], Any]
    batch_weights: Callable[[Any, ExampleIndex], BatchValues]
    """(state, index) -> weights, mean 1 at the start; 0 for padding."""
    batch_grad: Callable[[Any, ExampleIndex, BatchValues], Hyper]
    """(state, index, entries) -> d/dh of the batch; `entries` are nats per example and unit of weight."""
    update: Callable[[Any, ExampleIndex, Hyper], Any]
    """(state, index, change of h) -> state; shaped as `slope` gives it."""
    weights: Callable[[Any], WeightTable]
    """state -> the whole table; for the end of a run, it costs O(rows)."""
    renormalize: Callable[[Any], Any]
    """state -> the same state without the rounding that running sums gathered; once an epoch, it costs O(rows)."""


def softmax(num_examples: int, table_size: int = 0) -> Weighting:
    """w = rows * softmax(h), one logit for each row: the weights compete, their mean is 1 (the paper's default).

    `size` > rows: the table has entries of weight 0 at its end, so that devices divide it evenly.
    """
    table_size = table_size or num_examples

    def weights(h: WeightTable) -> WeightTable:
        return num_examples * jax.nn.softmax(
            h if table_size == num_examples else jnp.where(jnp.arange(table_size) < num_examples, h, -jnp.inf)
        )

    return Weighting(lambda: jnp.zeros(table_size), weights)


def sigmoid(num_examples: int, table_size: int = 0) -> Weighting:
    """w = 2 sigmoid(h), one logit for each row: the weights do not compete; between 0 and 2. `size` as in `softmax`."""
    table_size = table_size or num_examples

    def weights(h: WeightTable) -> WeightTable:
        w = 2 * jax.nn.sigmoid(h)
        return w if table_size == num_examples else jnp.where(jnp.arange(table_size) < num_examples, w, 0)

    return Weighting(lambda: jnp.zeros(table_size), weights)


def pad_weighting(weighting: Weighting, num_padding: int) -> Weighting:
    """A weighting whose table gets `more` entries of weight 0 at its end; for those whose outer variable is small."""
    return Weighting(weighting.init, lambda h: jnp.pad(weighting.weights(h), (0, num_padding)))


def per_source(example_source: Int[Array, "examples"], num_sources: int) -> Weighting:
    """One weight for each source of data, w_i = p_s(i) / mean_j p_s(j) with p = softmax(h): their mean over rows is 1.

    `source` gives the source of each row, 0 .. sources-1 (the setting of ScaleBiO).
    """
    counts = jnp.bincount(example_source, length=num_sources)

    def weights(h: Float[Array, "sources"]) -> WeightTable:
        p = jax.nn.softmax(h)
        return (p / (jnp.sum(p * counts) / example_source.shape[0]))[example_source]

    return Weighting(lambda: jnp.zeros(num_sources), weights)


def by_features(features: Float[Array, "examples features"]) -> Weighting:
    """w = rows * softmax(features h), one coefficient for each feature: weights that extend to unseen rows.

    Features should be standardised; a constant one has no effect, as softmax ignores a shift.
    """

    def weights(h: Float[Array, "features"]) -> WeightTable:
        return features.shape[0] * jax.nn.softmax(features @ h)

    return Weighting(lambda: jnp.zeros(features.shape[1]), weights)


def weighting_vjp(weighting: Weighting, hyper: Hyper, hypergradients: WeightTable) -> Hyper:
    """d L_v / d hyper from the entries d L_v / d w: one vector-Jacobian product of the weighting."""
    return jax.vjp(weighting.weights, hyper)[1](hypergradients)[0]


def normalized_gradient_step(learning_rate: float | Scalar, max_step: float) -> Callable[[Hyper, Hyper], Hyper]:
    """(hyper, gradient) -> hyper - clip(rate * gradient / rms(gradient), -cap, cap).

    The rms is over the entries that are not 0, so that rows that no batch touched neither move nor change the scale.
    Not Adam: on one logit a row Adam moves rows that are absent, and is blind to the size of what it follows.
    """

    def step(hyper: Hyper, grad: Hyper) -> Hyper:
        scale = learning_rate * inverse_rms(grad)
        return jax.tree.map(lambda h, g: h - jnp.clip(scale * g, -max_step, max_step), hyper, grad)

    return step


def inverse_rms(grad: Hyper) -> Scalar:
    """1 / rms over the entries of grad that are not 0; 0 where there is none."""
    num_nonzero = sum(jnp.sum(leaf != 0) for leaf in jax.tree.leaves(grad))
    rms = optax.tree.norm(grad) / jnp.sqrt(jnp.maximum(num_nonzero, 1))
    return jnp.where(rms > 0, 1 / jnp.where(rms > 0, rms, 1), 0)


class SoftmaxState(NamedTuple):
    """The state of `softmax_selector`: w_i = rows * exp(logits_i - peak) / total."""

    logits: WeightTable
    logit_bound: Scalar
    """At least as large as every logit, so that nothing overflows."""
    exp_sum: Scalar
    """sum_i exp(logits_i - peak), kept by adding what the touched rows change."""
    rounding_error: Scalar
    """What rounding took from `total` (Kahan): at 1e7 rows one step changes less than float32 resolves."""


def online_softmax(num_examples: int) -> OnlineWeights:
    """w = rows * softmax(h), the slope on present rows: d/dh_i = w_i (e_i - mean of e), the mean weighted by w.

    The mean is over the batch, so that rows that are absent do not move and the present ones compete with each other;
    the normaliser of *all* rows is a running sum. It gathers rounding: about 1e-7 of its largest value in float32;
    `refresh` removes it.
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

    def init() -> SoftmaxState:
        return renormalize(SoftmaxState(jnp.zeros(num_examples), jnp.zeros(()), jnp.zeros(()), jnp.zeros(())))

    return OnlineWeights(
        init, batch_weights, batch_grad, update, lambda state: num_examples * jax.nn.softmax(state.logits), renormalize
    )


def online_sigmoid(num_examples: int) -> OnlineWeights:
    """w = 2 sigmoid(h), the slope on present rows: d/dh_i = w_i (1 - w_i / 2) e_i; rows do not compete."""

    def batch_weights(logits: WeightTable, index: ExampleIndex) -> BatchValues:
        return 2 * jax.nn.sigmoid(logits.at[index].get(mode="fill", fill_value=-jnp.inf))

    def batch_grad(logits: WeightTable, index: ExampleIndex, hypergradients: BatchValues) -> BatchValues:
        w = batch_weights(logits, index)
        return w * (1 - w / 2) * hypergradients

    def update(logits: WeightTable, index: ExampleIndex, change: BatchValues) -> WeightTable:
        return logits.at[index].add(change, mode="drop")

    return OnlineWeights(
        lambda: jnp.zeros(num_examples),
        batch_weights,
        batch_grad,
        update,
        lambda logits: 2 * jax.nn.sigmoid(logits),
        lambda logits: logits,
    )


class SourceState(NamedTuple):
    """The state of `per_source_selector`."""

    logits: Float[Array, "sources"]
    example_source: Int[Array, "examples"]
    source_counts: Int[Array, "sources"]


def online_per_source(example_source: Int[Array, "examples"], num_sources: int) -> OnlineWeights:
    """`per_source`, one weight for each source: w_s = p_s / mean_j p_s(j), p = softmax(h), stepped on its small table.

        d/dh = (d w / d h)^T [sum of e over the present rows of s, over the number of present rows]_s

    A source that is absent from a batch does move: the sources share one softmax, and its weight changes when the
    others' do.
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

    def init() -> SourceState:
        return SourceState(
            jnp.zeros(num_sources), jnp.array(example_source), jnp.bincount(example_source, length=num_sources)
        )

    def weights(state: SourceState) -> WeightTable:
        return source_weights(state.logits, state.source_counts)[state.example_source]

    return OnlineWeights(init, batch_weights, batch_grad, update, weights, lambda state: state)


def online_uniform(num_examples: int) -> OnlineWeights:
    """w = 1 for ever: no outer variable, so that a baseline can be driven as the methods that learn weights."""

    def ones(state: None, index: ExampleIndex) -> BatchValues:
        return jnp.where(index != PADDING, 1.0, 0.0)

    return OnlineWeights(
        lambda: None,
        ones,
        lambda state, index, hypergradients: jnp.zeros_like(hypergradients),
        lambda state, index, change: state,
        lambda state: jnp.ones(num_examples),
        lambda state: state,
    )


def effective_sample_size(weights: WeightTable) -> Scalar:
    """ESS = (sum w)^2 / sum w^2: how many equally weighted rows the weights amount to."""
    return jnp.sum(weights) ** 2 / jnp.sum(weights**2)


def entropy(weights: WeightTable) -> Scalar:
    """Entropy of w / sum w, nats; at most log(rows)."""
    p = weights / jnp.sum(weights)
    return jnp.sum(jax.scipy.special.entr(p))
