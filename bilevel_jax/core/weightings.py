"""Maps from outer variables to example weights, and their update steps.

Every weighting starts at weight 1 for each example. A `Weighting` is pulled back once per estimate, outside the
backward pass; `OnlineWeights` are read and moved in every training step, on the examples that are present.
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


def softmax(num_examples: int, table_size: int = 0) -> Weighting:
    """One logit for each example: the weights compete, and their mean is 1 (the paper's default).

        w = N softmax(h)

    Args:
        num_examples: N.
        table_size: more than N where the table has entries of weight 0 at its end, so that devices divide it evenly.

    Returns:
        The weighting; h is float[table_size].

    Example:
        >>> weighting = bj.weightings.softmax(2)
        >>> bool(jnp.allclose(weighting.weights(jnp.log(jnp.array([1.0, 3.0]))), jnp.array([0.5, 1.5])))
        True
    """
    table_size = table_size or num_examples

    def weights(h: WeightTable) -> WeightTable:
        return num_examples * jax.nn.softmax(
            h if table_size == num_examples else jnp.where(jnp.arange(table_size) < num_examples, h, -jnp.inf)
        )

    return Weighting(lambda: jnp.zeros(table_size), weights)


def sigmoid(num_examples: int, table_size: int = 0) -> Weighting:
    """One logit for each example: the weights do not compete, and lie between 0 and 2.

        w = 2 sigmoid(h)

    Args:
        num_examples: N.
        table_size: as in `softmax`.

    Returns:
        The weighting; h is float[table_size].

    Example:
        >>> weighting = bj.weightings.sigmoid(2)
        >>> weighting.weights(weighting.init()).tolist()
        [1.0, 1.0]
    """
    table_size = table_size or num_examples

    def weights(h: WeightTable) -> WeightTable:
        w = 2 * jax.nn.sigmoid(h)
        return w if table_size == num_examples else jnp.where(jnp.arange(table_size) < num_examples, w, 0)

    return Weighting(lambda: jnp.zeros(table_size), weights)


def pad_weighting(weighting: Weighting, num_padding: int) -> Weighting:
    """A weighting whose table has further entries of weight 0 at its end; for those whose outer variable is small.

    Args:
        weighting: such as `per_source`.
        num_padding: entries to add.

    Returns:
        The weighting with the longer table.

    Example:
        >>> weighting = bj.weightings.pad_weighting(bj.weightings.softmax(2), 1)
        >>> weighting.weights(weighting.init()).tolist()
        [1.0, 1.0, 0.0]
    """
    return Weighting(weighting.init, lambda h: jnp.pad(weighting.weights(h), (0, num_padding)))


def per_source(example_source: Int[Array, "examples"], num_sources: int) -> Weighting:
    """One weight for each source of data; the mean over examples is 1 (the setting of ScaleBiO).

        w_i = p_s(i) / mean_j p_s(j)  with p = softmax(h)

    Args:
        example_source: the source of each example, int[examples], 0 .. num_sources - 1.
        num_sources: the number of sources.

    Returns:
        The weighting; h is float[num_sources].

    Example:
        >>> weighting = bj.weightings.per_source(jnp.array([0, 0, 1]), num_sources=2)
        >>> bool(jnp.allclose(weighting.weights(jnp.log(jnp.array([1.0, 4.0]))), jnp.array([0.5, 0.5, 2.0])))
        True
    """
    counts = jnp.bincount(example_source, length=num_sources)

    def weights(h: Float[Array, "sources"]) -> WeightTable:
        p = jax.nn.softmax(h)
        return (p / (jnp.sum(p * counts) / example_source.shape[0]))[example_source]

    return Weighting(lambda: jnp.zeros(num_sources), weights)


def by_features(features: Float[Array, "examples features"]) -> Weighting:
    """One coefficient for each feature: weights that extend to unseen examples.

        w = N softmax(features h)

    Features should be standardised; a constant one has no effect, as softmax ignores a shift.

    Args:
        features: float[examples, features].

    Returns:
        The weighting; h is float[features].

    Example:
        >>> weighting = bj.weightings.by_features(jnp.array([[0.0], [1.0]]))
        >>> bool(jnp.allclose(weighting.weights(jnp.log(jnp.array([3.0]))), jnp.array([0.5, 1.5])))
        True
    """

    def weights(h: Float[Array, "features"]) -> WeightTable:
        return features.shape[0] * jax.nn.softmax(features @ h)

    return Weighting(lambda: jnp.zeros(features.shape[1]), weights)


def weighting_vjp(weighting: Weighting, hyper: Hyper, hypergradients: WeightTable) -> Hyper:
    """d L_v / d hyper from the hypergradients d L_v / d w: one vector-Jacobian product of the weighting.

    Args:
        weighting: the map hyper -> w.
        hyper: where the product is taken.
        hypergradients: d L_v / d w, float[examples], nats per unit of weight.

    Returns:
        The gradient, shaped as `hyper`, nats per unit of hyper.

    Example:
        >>> weighting = bj.weightings.softmax(2)
        >>> bj.weightings.weighting_vjp(weighting, jnp.zeros(2), jnp.array([1.0, -1.0])).tolist()
        [1.0, -1.0]
    """
    return jax.vjp(weighting.weights, hyper)[1](hypergradients)[0]


def normalized_gradient_step(learning_rate: float | Scalar, max_step: float) -> Callable[[Hyper, Hyper], Hyper]:
    """A gradient step of a size that does not depend on the gradient's scale, with a cap.

        hyper <- hyper - clip(learning_rate * gradient / rms(gradient), -max_step, max_step)

    The rms is over the entries that are not 0, so that examples that no batch touched neither move nor change the
    scale. Not Adam: on one logit an example Adam moves examples that are absent, and is blind to the size of what it
    follows.

    Args:
        learning_rate: the rms of the step.
        max_step: the largest change of an entry.

    Returns:
        (hyper, gradient) -> hyper.

    Example:
        >>> step = bj.weightings.normalized_gradient_step(0.5, max_step=10.0)
        >>> step(jnp.zeros(3), jnp.array([4.0, -4.0, 0.0])).tolist()
        [-0.5, 0.5, 0.0]
    """

    def step(hyper: Hyper, grad: Hyper) -> Hyper:
        scale = learning_rate * inverse_rms(grad)
        return jax.tree.map(lambda h, g: h - jnp.clip(scale * g, -max_step, max_step), hyper, grad)

    return step


def inverse_rms(grad: Hyper) -> Scalar:
    """1 / rms over the entries of grad that are not 0; 0 where there is none.

    Args:
        grad: any pytree.

    Returns:
        A scalar.

    Example:
        >>> float(bj.weightings.inverse_rms(jnp.array([2.0, -2.0, 0.0])))
        0.5
    """
    num_nonzero = sum(jnp.sum(leaf != 0) for leaf in jax.tree.leaves(grad))
    rms = optax.tree.norm(grad) / jnp.sqrt(jnp.maximum(num_nonzero, 1))
    return jnp.where(rms > 0, 1 / jnp.where(rms > 0, rms, 1), 0)


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
    """`per_source` for single-loop methods: one weight for each source, stepped on its small table.

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


def effective_sample_size(weights: WeightTable) -> Scalar:
    """How many equally weighted examples the weights amount to.

        ESS = (sum w)^2 / sum w^2

    Args:
        weights: float[examples].

    Returns:
        Between 1 and the number of examples.

    Example:
        >>> float(bj.weightings.effective_sample_size(jnp.array([1.0, 1.0, 0.0])))
        2.0
    """
    return jnp.sum(weights) ** 2 / jnp.sum(weights**2)


def entropy(weights: WeightTable) -> Scalar:
    """Entropy of w / sum w, nats; at most log(examples).

    Args:
        weights: float[examples], at least 0.

    Returns:
        A scalar, nats.

    Example:
        >>> round(float(bj.weightings.entropy(jnp.ones(4))), 4)  # log 4
        1.3863
    """
    p = weights / jnp.sum(weights)
    return jnp.sum(jax.scipy.special.entr(p))
