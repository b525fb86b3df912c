"""Shared types of problems, training steps, trajectories and estimates."""

from collections.abc import Callable, MutableMapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

PyTree = Any
Params = PyTree
"""What the inner problem trains."""
HyperSlice = PyTree
"""The part of the outer variable that one batch touches; leaves lead with [micro, ...], as a batch's do."""
Hyper = PyTree
"""What the estimators differentiate with respect to; by default the weight table, float[examples]."""
Frozen = PyTree
"""Constant over a run (a frozen base model). Never stacked, scanned or differentiated."""
ModelState = PyTree
"""What a model carries from step to step beside its parameters: averages of batch normalisation, or of parameters."""
Batch = PyTree
"""A dict of arrays that lead with [micro, ...]. Always there: `index` int32[micro, examples], the place of each
example in the weight table (`PADDING` where there is none), and `num_examples` float[micro], the number of real
examples in the whole global step (in a stream that is summed, as the validation stream is: in the whole stream). Where
examples do not all count the same before they are weighted, `multiplicity` float[micro, examples], mean 1: a factor of
each. In a validation stream whose sum is the difference of two halves, `halves` float[micro, examples]: the factors of
`certify.validation_halves`."""
Linearization = Callable[[list[Array], Params], tuple[Params, HyperSlice]]
"""(the step's inputs, v) -> (H v, the hypergradients along v): a step's second derivatives, as arrays that compiled
functions take and return."""
Scalar = Float[Array, ""]
Fetch = Callable[[Array], np.ndarray]
"""Brings all of an array from the devices to the host."""

PADDING = 2**31 - 1
"""The index of an empty example slot: beyond any table, so reading it gives weight 0 and adding to it does nothing."""


class Stream(NamedTuple):
    """Batches as a pure function of the step: one step, one batch, for ever. Resuming needs no iterator state."""

    batch: Callable[[int], Batch]
    steps: int


class CompositeLoss(NamedTuple):
    """Per-example losses as `link(outputs)`, the link convex in the outputs, so that Gauss-Newton is defined."""

    outputs: Callable[[Params, Frozen, Batch], PyTree]
    link: Callable[[PyTree, Frozen, Batch], Float[Array, "examples"]]


class Problem(NamedTuple):
    """min over hyper of L_v(params*(hyper)), where params* comes from training on inner + prior.

    The functions see one micro-batch: a batch and a slice without their leading axis, except `gather` and
    `scatter_add`, which see the whole global step.
    """

    inner: Callable[[Params, HyperSlice, Frozen, Batch], Any]
    """One micro-batch's share of the training loss: sum(weights * losses) / N."""
    prior: Callable[[Params, Frozen], Scalar]
    """r(params), added once per step."""
    outer: Callable[[Params, Frozen, Batch], Scalar]
    """One micro-batch's share of L_v; summed over all of the validation stream."""
    gather: Callable[[Hyper, Batch], HyperSlice]
    """The slice of hyper that a global step touches."""
    scatter_add: Callable[[Hyper, Batch, HyperSlice], Hyper]
    """The transpose of `gather`, in which repeated examples add up."""
    per_example: bool = True
    """Whether the outer variable holds a number for each training example; else every batch touches all of it."""
    has_state: bool = False
    """Whether the model carries a state: `inner` and `outer` then find it in the batch as `model_state`, and `inner`
    returns (loss, new state)."""


class TrainState(NamedTuple):
    """The state of training: all that the next step needs."""

    params: Params
    opt_state: PyTree
    step: Int[Array, ""]
    model_state: ModelState = ()


class StepMetrics(NamedTuple):
    """What one training step reports: the loss it started from (nats), its gradient and the gradient's norm."""

    loss: Scalar
    grad: Params
    grad_norm: Scalar


class Adjoint(NamedTuple):
    """d L_v / d (state of training): of the parameters, and of the inexact leaves of the optimizer's and the model's
    state, in leaf order."""

    params: Params
    opt_state: list[Array]
    model_state: tuple[Array, ...] = ()


class TrainStep(NamedTuple):
    """One optimizer step, forward and backward, and the compiled access to the outer variable."""

    forward: Callable[[TrainState, HyperSlice, Frozen, Batch], tuple[TrainState, StepMetrics]]
    backward: Callable[[TrainState, Params, HyperSlice, Frozen, Batch, Adjoint], tuple[Adjoint, HyperSlice]]
    """(state before the step, its gradient, slice, frozen, batch, adjoint after) -> (adjoint before, slice's)."""
    gather: Callable[[Hyper, Batch], HyperSlice]
    scatter_add: Callable[[Hyper, Batch, HyperSlice], Hyper]
    """Writes into the table that it is given (donated): adding a batch touches the batch's examples and copies
    nothing."""
    linearize: Callable[[TrainState, HyperSlice, Frozen, Batch], tuple[TrainState, StepMetrics, Linearization]]
    """`forward`, and what `backward` would compute of it again."""
    vjp_step: Callable[
        [TrainState, Params, Linearization, HyperSlice, Frozen, Batch, Adjoint], tuple[Adjoint, HyperSlice]
    ]
    """`backward` with it."""


class CheckpointPlan(NamedTuple):
    """What of a training run is stored for its backward pass; see `checkpointing`."""

    snapshots: int
    """Snapshots, states that are kept at the same time."""
    stored_steps: int
    """Steps whose state and gradient are stored at the same time: the backward pass goes back through so many at
    once."""
    linearize: bool = False
    """Whether the stored steps keep their linearisations, too: a quarter less work to go back through them."""


class StoredStep(NamedTuple):
    """A step of training as the backward pass reads it."""

    state: TrainState
    """Before the step."""
    grad: Params
    linearization: Linearization | None = None


class Trajectory(NamedTuple):
    """A finished training run, as the estimators read it."""

    start: TrainState
    end: TrainState
    steps: int
    plan: CheckpointPlan
    snapshots: MutableMapping[int, TrainState]
    """The states before some steps but the first, in memory or elsewhere. The backward pass adds others where
    it has to replay twice, and removes those that it is done with; any that are there serve the next."""
    stored_steps: dict[int, StoredStep]
    """The last steps. The backward pass clears it where it needs the memory for earlier ones."""


class BackwardState(NamedTuple):
    """The state of a backward pass; written to disk, it is what resuming needs."""

    step: int
    """All steps from this one on are done."""
    train_state: TrainState
    """The state before that step: what a replay of the steps before it must reach."""
    adjoint: Adjoint
    grad: Hyper
    validation_loss: Scalar
    """L_v at the end of training, nats."""
    norm_at_end: Scalar
    """The norm of the adjoint at the end of training."""
    max_norm: Scalar
    """The largest norm of the adjoint so far."""
    replay_matches: Bool[Array, ""]


class Checks(NamedTuple):
    """Numerical trouble as fields, never as exceptions inside jit; nan where a field does not apply."""

    residual: float | Scalar = float("nan")
    """|A x - b| / |b| of the linear solve."""
    curvature: float | Scalar = float("nan")
    """The least p.Ap / p.p that the solve met; at or below 0 the system was not positive definite."""
    gap: float | Scalar = float("nan")
    """<v, grad of inner + prior>, nats of L_v: what finishing the inner training would still change, to first order."""
    growth: float | Scalar = float("nan")
    """The largest norm of the adjoint over its norm at the end of training."""
    replayed: bool | Array = True
    """Every replayed piece ended, bit for bit, where training did."""
    steps: int | Array = 0
    """Training steps gone back through, or products of the linear solve."""
    sample: float | Scalar = float("nan")
    """Cosine of the solutions on half and on all of the curvature batches that were used."""
    batches: int | Array = 0
    """Curvature batches that were used."""
    resolution: float | Scalar = float("nan")
    """Norm of the hypergradient over the rounding error of its sum over steps; at or below 1 it is noise."""
    product_error: float | Scalar = float("nan")
    """|h - h*| / |h*|, where the matrix products of the steps back to h* have the highest precision; of entries less
    their mean where that is larger, and inf where one is not finite."""


class Estimate(NamedTuple):
    """A hypergradient with its diagnostics."""

    grad: Hyper
    """d L_v / d hyper, nats per unit of weight; below 0 where more weight lowers L_v."""
    validation_loss: Scalar
    """L_v, nats."""
    direction: Params
    """implicit: the solution v; unrolled: d L_v / d (parameters at the earliest step reached)."""
    checks: Checks
    params: Params = ()
    """The parameters that L_v was read at."""
    half_difference: Hyper = ()
    """d of two halves A and B of the validation set, (g_A - g_B) / 2, shaped as `grad`: E |d|^2 is the sampling
    variance of `grad`. () where it was not measured."""
    independent: tuple[Hyper, Hyper] | tuple[()] = ()
    """(hypergradient, difference of halves) of a second validation set, at the same weights. () where not measured."""


Estimator = Callable[[Trajectory, Hyper, Frozen, Stream, Stream], Estimate]
"""(trajectory, hyper, frozen, train stream, validation stream) -> Estimate."""
Matvec = Callable[[Params], Params]


class SolveResult(NamedTuple):
    """The result of a linear solve A x = b."""

    x: Params
    residual: float | Scalar
    min_curvature: float | Scalar
    steps: int | Scalar


class LinearSolver(NamedTuple):
    """A solver of A x = b; both functions take (product v -> A v, right-hand side, first guess or None)."""

    solve: Callable[[Matvec, Params, Params | None], SolveResult]
    """With a Python loop, for products that read a stream; the result's numbers are Python's."""
    solve_traced: Callable[[Matvec, Params, Params | None], SolveResult]
    """The same as a pure function, for products that can be traced."""

    def __call__(self, matvec: Matvec, b: Params, guess: Params | None = None) -> SolveResult:
        """`solve`."""
        return self.solve(matvec, b, guess)


class Weighting(NamedTuple):
    """A map from an outer variable to the weight table; pulled back once per estimate, outside the backward pass."""

    init: Callable[[], Hyper]
    weights: Callable[[Hyper], Float[Array, "examples"]]
    step: Callable[[Hyper, Hyper, float | Scalar, float], Hyper]
    """(variable, gradient, learning rate, largest change of a logit) -> the variable after a step against it, in which
    the logits move by the learning rate (root mean square)."""
    fit_logits: Callable[[Float[Array, "examples"]], Hyper]
    """Logits of the examples -> the variable whose logits are nearest (least squares)."""


class SingleLoop(NamedTuple):
    """A single-loop method: the parameters and the weights move together, so that one driver trains with any of them.

    A state is plain arrays, has `train_state: TrainState` (the parameters, their optimizer's state, the steps done),
    and saving it is all that resuming needs. Metrics have at least `train_loss`, the weighted loss with the prior,
    `validation_loss`, L_v of the validation batch (both nats, before the step), `validation_share`, the part of L_v in
    the gradient, and `grad_norm`, the gradient's norm.
    """

    init: Callable[..., Any]
    """(params, outer variable; default: weights 1) -> the state before the first step, in buffers of its own."""
    step: Callable[[Any, Frozen, Batch, Any], tuple[Any, Any]]
    """(state, frozen, training batch, validation batch) -> (state, metrics); compiled; the state given is donated. A
    tuple of validation batches are those of the terms of L_v, whose losses and gradients add up."""
    weights: Callable[[Any], Float[Array, "examples"]]
    """state -> the whole table, mean about 1; it costs O(examples)."""
    estimand: str
    """What the trained model and the weights solve, in words."""
    hyper: Callable[[Any], Hyper]
    """state -> the outer variable, as `init` takes it; () of a method that learns none."""
    axis_name: str | None = None
    """Of devices that each hold a share of the examples."""
