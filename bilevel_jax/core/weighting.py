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

Table = Float[Array, "rows"]
Index = Int[Array, "micro examples"]
Slots = Float[Array, "micro examples"]


class Selector(NamedTuple):
    """Weights that single-loop methods read and move in every step, in O(batch) work whatever the number of rows.

    The state is a pytree of arrays, an argument of the compiled step like any other. `index` gives the row of each
    slot of a batch, `PADDING` where there is none; a row may repeat.
    """

    init: Callable[[], Any]
    take: Callable[[Any, Index], Slots]
    """(state, index) -> weights, mean 1 at the start; 0 for padding."""
    slope: Callable[[Any, Index, Slots], Hyper]
    """(state, index, entries) -> d/dh of the batch; `entries` are nats per example and unit of weight."""
    move: Callable[[Any, Index, Hyper], Any]
    """(state, index, change of h) -> state; shaped as `slope` gives it."""
    weights: Callable[[Any], Table]
    """state -> the whole table; for the end of a run, it costs O(rows)."""
    refresh: Callable[[Any], Any]
    """state -> the same state without the rounding that running sums gathered; once an epoch, it costs O(rows)."""


def softmax(rows: int, size: int = 0) -> Weighting:
    """w = rows * softmax(h), one logit for each row: the weights compete, their mean is 1 (the paper's default).

    `size` > rows: the table has entries of weight 0 at its end, so that devices divide it evenly.
    """
    size = size or rows

    def weights(h: Table) -> Table:
        return rows * jax.nn.softmax(h if size == rows else jnp.where(jnp.arange(size) < rows, h, -jnp.inf))

    return Weighting(lambda: jnp.zeros(size), weights)


def sigmoid(rows: int, size: int = 0) -> Weighting:
    """w = 2 sigmoid(h), one logit for each row: the weights do not compete; between 0 and 2. `size` as in `softmax`."""
    size = size or rows

    def weights(h: Table) -> Table:
        w = 2 * jax.nn.sigmoid(h)
        return w if size == rows else jnp.where(jnp.arange(size) < rows, w, 0)

    return Weighting(lambda: jnp.zeros(size), weights)


def padded(weighting: Weighting, more: int) -> Weighting:
    """A weighting whose table gets `more` entries of weight 0 at its end; for those whose outer variable is small."""
    return Weighting(weighting.init, lambda h: jnp.pad(weighting.weights(h), (0, more)))


def per_source(source: Int[Array, "rows"], sources: int) -> Weighting:
    """One weight for each source of data, w_i = p_s(i) / mean_j p_s(j) with p = softmax(h): their mean over rows is 1.

    `source` gives the source of each row, 0 .. sources-1 (the setting of ScaleBiO).
    """
    counts = jnp.bincount(source, length=sources)

    def weights(h: Float[Array, "sources"]) -> Table:
        p = jax.nn.softmax(h)
        return (p / (jnp.sum(p * counts) / source.shape[0]))[source]

    return Weighting(lambda: jnp.zeros(sources), weights)


def by_features(features: Float[Array, "rows features"]) -> Weighting:
    """w = rows * softmax(features h), one coefficient for each feature: weights that extend to unseen rows.

    Features should be standardised; a constant one has no effect, as softmax ignores a shift.
    """

    def weights(h: Float[Array, "features"]) -> Table:
        return features.shape[0] * jax.nn.softmax(features @ h)

    return Weighting(lambda: jnp.zeros(features.shape[1]), weights)


def pull_back(weighting: Weighting, hyper: Hyper, entries: Table) -> Hyper:
    """d L_v / d hyper from the entries d L_v / d w: one vector-Jacobian product of the weighting."""
    return jax.vjp(weighting.weights, hyper)[1](entries)[0]


def normalised_descent(rate: float | Scalar, cap: float) -> Callable[[Hyper, Hyper], Hyper]:
    """(hyper, gradient) -> hyper - clip(rate * gradient / rms(gradient), -cap, cap).

    The rms is over the entries that are not 0, so that rows that no batch touched neither move nor change the scale.
    Not Adam: on one logit a row Adam moves rows that are absent, and is blind to the size of what it follows.
    """

    def step(hyper: Hyper, grad: Hyper) -> Hyper:
        scale = rate * inverse_rms(grad)
        return jax.tree.map(lambda h, g: h - jnp.clip(scale * g, -cap, cap), hyper, grad)

    return step


def inverse_rms(grad: Hyper) -> Scalar:
    """1 / rms over the entries of grad that are not 0; 0 where there is none."""
    present = sum(jnp.sum(leaf != 0) for leaf in jax.tree.leaves(grad))
    rms = optax.tree.norm(grad) / jnp.sqrt(jnp.maximum(present, 1))
    return jnp.where(rms > 0, 1 / jnp.where(rms > 0, rms, 1), 0)


class Logits(NamedTuple):
    """The state of `softmax_selector`: w_i = rows * exp(logits_i - peak) / total."""

    logits: Table
    peak: Scalar
    """At least as large as every logit, so that nothing overflows."""
    total: Scalar
    """sum_i exp(logits_i - peak), kept by adding what the touched rows change."""
    lost: Scalar
    """What rounding took from `total` (Kahan): at 1e7 rows one step changes less than float32 resolves."""


def softmax_selector(rows: int) -> Selector:
    """w = rows * softmax(h), the slope on present rows: d/dh_i = w_i (e_i - mean of e), the mean weighted by w.

    The mean is over the batch, so that rows that are absent do not move and the present ones compete with each other;
    the normaliser of *all* rows is a running sum. It gathers rounding: about 1e-7 of its largest value in float32;
    `refresh` removes it.
    """

    def logits_of(state: Logits, index: Int[Array, "..."]) -> Float[Array, "..."]:
        return state.logits.at[index].get(mode="fill", fill_value=-jnp.inf)

    def take(state: Logits, index: Index) -> Slots:
        return rows * jnp.exp(logits_of(state, index) - state.peak) / state.total

    def slope(state: Logits, index: Index, entries: Slots) -> Slots:
        w = take(state, index)
        mass = w.sum()
        return w * (entries - jnp.sum(w * entries) / jnp.where(mass > 0, mass, 1))

    def move(state: Logits, index: Index, change: Slots) -> Logits:
        touched = jnp.unique(index, size=index.size, fill_value=PADDING)  # a row that repeats changes the sum once
        after = state._replace(logits=state.logits.at[index].add(change, mode="drop"))
        old, new = logits_of(state, touched), logits_of(after, touched)
        peak = jnp.maximum(state.peak, new.max())
        scale = jnp.exp(state.peak - peak)
        before = state.total * scale
        added = jnp.sum(jnp.exp(new - peak) - jnp.exp(old - peak)) - state.lost * scale
        total = before + added
        return after._replace(peak=peak, total=total, lost=(total - before) - added)

    def refresh(state: Logits) -> Logits:
        peak = state.logits.max()
        return Logits(state.logits, peak, jnp.exp(state.logits - peak).sum(), jnp.zeros_like(peak))

    def init() -> Logits:
        return refresh(Logits(jnp.zeros(rows), jnp.zeros(()), jnp.zeros(()), jnp.zeros(())))

    return Selector(init, take, slope, move, lambda state: rows * jax.nn.softmax(state.logits), refresh)


def sigmoid_selector(rows: int) -> Selector:
    """w = 2 sigmoid(h), the slope on present rows: d/dh_i = w_i (1 - w_i / 2) e_i; rows do not compete."""

    def take(logits: Table, index: Index) -> Slots:
        return 2 * jax.nn.sigmoid(logits.at[index].get(mode="fill", fill_value=-jnp.inf))

    def slope(logits: Table, index: Index, entries: Slots) -> Slots:
        w = take(logits, index)
        return w * (1 - w / 2) * entries

    def move(logits: Table, index: Index, change: Slots) -> Table:
        return logits.at[index].add(change, mode="drop")

    return Selector(
        lambda: jnp.zeros(rows), take, slope, move, lambda logits: 2 * jax.nn.sigmoid(logits), lambda logits: logits
    )


class Sources(NamedTuple):
    """The state of `per_source_selector`."""

    logits: Float[Array, "sources"]
    source: Int[Array, "rows"]
    counts: Int[Array, "sources"]


def per_source_selector(source: Int[Array, "rows"], sources: int) -> Selector:
    """`per_source`, one weight for each source: w_s = p_s / mean_j p_s(j), p = softmax(h), stepped on its small table.

        d/dh = (d w / d h)^T [sum of e over the present rows of s, over the number of present rows]_s

    A source that is absent from a batch does move: the sources share one softmax, and its weight changes when the
    others' do.
    """

    def table(logits: Float[Array, "sources"], counts: Int[Array, "sources"]) -> Float[Array, "sources"]:
        p = jax.nn.softmax(logits)
        return p * counts.sum() / jnp.sum(p * counts)

    def source_of(state: Sources, index: Index) -> Index:
        return state.source.at[index].get(mode="fill", fill_value=sources)

    def take(state: Sources, index: Index) -> Slots:
        return table(state.logits, state.counts).at[source_of(state, index)].get(mode="fill", fill_value=0)

    def slope(state: Sources, index: Index, entries: Slots) -> Float[Array, "sources"]:
        present = jnp.maximum(jnp.sum(index != PADDING), 1)
        sums = jnp.zeros(sources, entries.dtype).at[source_of(state, index)].add(entries / present, mode="drop")
        return jax.vjp(lambda logits: table(logits, state.counts), state.logits)[1](sums)[0]

    def move(state: Sources, index: Index, change: Float[Array, "sources"]) -> Sources:
        return state._replace(logits=state.logits + change)

    def init() -> Sources:
        return Sources(jnp.zeros(sources), jnp.array(source), jnp.bincount(source, length=sources))

    def weights(state: Sources) -> Table:
        return table(state.logits, state.counts)[state.source]

    return Selector(init, take, slope, move, weights, lambda state: state)


def equal_selector(rows: int) -> Selector:
    """w = 1 for ever: no outer variable, so that a baseline can be driven as the methods that learn weights."""

    def ones(state: None, index: Index) -> Slots:
        return jnp.where(index != PADDING, 1.0, 0.0)

    return Selector(
        lambda: None,
        ones,
        lambda state, index, entries: jnp.zeros_like(entries),
        lambda state, index, change: state,
        lambda state: jnp.ones(rows),
        lambda state: state,
    )


def effective_size(weights: Table) -> Scalar:
    """ESS = (sum w)^2 / sum w^2: how many equally weighted rows the weights amount to."""
    return jnp.sum(weights) ** 2 / jnp.sum(weights**2)


def entropy(weights: Table) -> Scalar:
    """Entropy of w / sum w, nats; at most log(rows)."""
    p = weights / jnp.sum(weights)
    return jnp.sum(jax.scipy.special.entr(p))
