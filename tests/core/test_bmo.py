"""BMO: the merit function against its definition, a known front, rows that should lose their weight, laws of a step."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel_jax.core import single_loop, streams
from bilevel_jax.core.problem import proximal, weighted
from bilevel_jax.core.single_loop import TrainedReference, bmo, geometric_schedule, smooth_merit, weights_from_gaps
from bilevel_jax.core.training import inner_loss_and_grad
from bilevel_jax.core.types import PADDING
from tests.core.problems import ROWS, lora, normal, relative
from tests.core.test_training import equations

ONE, NOTHING, STILL = optax.constant_schedule(1.0), optax.constant_schedule(0.0), optax.sgd(0.0)
HALF, TAU = optax.constant_schedule(0.5), optax.constant_schedule(0.3)
FORMS = {"none": "none", "snapshot": "snapshot", "copy": TrainedReference(optax.sgd(0.05), 2, 0.5)}


def test_bounds_and_weights():
    """min -z <= m <= min -z + tau log N, in nats; weights have mean 1; a shift of all gaps leaves them alone."""
    for seed, tau in ((0, 1.0), (1, 0.1), (2, 1e-3)):
        z = normal(seed, 12)
        m, least = smooth_merit(z, tau), -z.max()
        assert least - 1e-12 <= m <= least + tau * jnp.log(12) + 1e-12
        w = weights_from_gaps(z, tau)
        assert abs(w.mean() - 1) < 1e-12
        assert relative(weights_from_gaps(z + 3, tau), w) < 1e-10
        assert abs(smooth_merit(z + 3, tau) - m + 3) < 1e-12
        padded = jnp.append(z, -jnp.inf)
        assert abs(smooth_merit(padded, tau) - m) < 1e-12 and weights_from_gaps(padded, tau)[-1] == 0
    assert smooth_merit(jnp.zeros(7), 0.2) == 0  # phi = theta: m >= 0
    assert jnp.isfinite(weights_from_gaps(jnp.array([-1e4, 1e4]), 1e-2)).all()


@pytest.mark.parametrize(("share", "above"), [(0.9, 0.5), (0.5, 0.25), (0.3, 0.2)])
def test_the_floor_is_a_quadratic_where_gaps_have_two_values(share, above):
    """A part p of the examples at 0, the others at -d: (p + q r)^2 = share (p + q r^2), tau = -d / log r."""
    gaps = jnp.where(jnp.arange(20) < 20 * above, 0.0, -0.7)
    p, q = above, 1 - above
    a, c = q * (q - share), p * (p - share)
    r = (-p * q + np.sqrt((p * q) ** 2 - a * c)) / a
    found = single_loop.raise_temperature(gaps, 1e-3, share)
    assert relative(found, 0.7 / -np.log(r)) < 1e-9  # 40 halvings of the logarithm
    assert abs(single_loop.effective_share_at(gaps, found) - share) < 1e-9


def test_laws_of_the_floor():
    """Scale, shift, order and padding of the gaps; where tau suffices it stays; the floor holds, and just so."""
    gaps = 3 * normal(50, 40)
    find = jax.jit(lambda gaps, tau: single_loop.raise_temperature(gaps, tau, 0.4))
    found = find(gaps, 0.1)
    assert 0.4 <= single_loop.effective_share_at(gaps, found) < 0.4 + 1e-9 and found > 0.1
    order = np.random.default_rng(0).permutation(40)
    padded = jnp.concatenate([jnp.full(7, -jnp.inf), gaps[order] + 5]).reshape(1, -1)
    assert relative(find(padded, 0.1), found) < 1e-9
    assert relative(find(2 * gaps, 0.1), 2 * found) < 1e-9
    assert find(gaps, 20.0) == 20 and single_loop.raise_temperature(gaps, 0.1, 0.0) == 0.1
    assert find(jnp.zeros(40), 0.1) == 0.1  # equal gaps are spread at any temperature
    w = weights_from_gaps(gaps, found)
    assert abs(w.sum() ** 2 / (w**2).sum() - 16) < 1e-6
    with pytest.raises(
        ValueError, match="min_effective_share is 1.0; give a share of the examples, at least 0 and below"
    ):
        single_loop.raise_temperature(gaps, 0.1, 1.0)


class Convex:
    """Six objectives without a common minimiser, each strongly convex, in three dimensions; with a prior."""

    rows, width, strength = 6, 3, 0.7
    fixed = normal(33, 3)
    data = (normal(30, 6, 3), normal(31, 6, 3))

    def __init__(self):
        prior = proximal(0.2, lambda fixed: fixed)
        self.problem = weighted(lambda p, fixed, b: self.losses(p, b["data"]), prior=prior)
        self.batch = streams.full_batch_stream(self.data).batch(0)

    def losses(self, params, data=None):
        centre, slope = self.data if data is None else data
        return 0.5 * jnp.sum((params[None] - centre) ** 2, -1) + jax.nn.softplus(slope @ params)

    def inner(self, phi, theta, tau):
        """What phi minimises; written out, with a mean in the logarithm."""
        z = (self.losses(phi) - self.losses(theta)) / tau
        prior = 0.1 * (jnp.sum((phi - self.fixed) ** 2) - jnp.sum((theta - self.fixed) ** 2))
        return tau * jnp.log(jnp.mean(jnp.exp(z))) + prior + self.strength / 2 * jnp.sum((phi - theta) ** 2)

    @partial(jax.jit, static_argnums=0)
    def maximiser(self, theta, tau):
        """Newton's method with a halved step, to the last bit."""

        def newton(index, phi):
            slope, curvature = jax.grad(self.inner)(phi, theta, tau), jax.hessian(self.inner)(phi, theta, tau)
            return phi - jnp.where(index < 60, 0.5, 1.0) * jnp.linalg.solve(curvature, slope)

        return jax.lax.fori_loop(0, 80, newton, theta)

    def value(self, theta, tau):
        return -self.inner(self.maximiser(theta, tau), theta, tau)

    def one(self, theta, tau, form, reference=None):
        """(gradient, info) of one step at theta with L_v left out."""
        made = bmo(
            self.problem,
            optax.sgd(1.0),
            self.rows,
            validation_share=NOTHING,
            temperature=optax.constant_schedule(tau),
            reference=form,
        )
        state = made.init(theta)
        state = state if reference is None else single_loop.replace_reference(state, reference)
        after, info = made.step(state, self.fixed, self.batch, self.batch)
        return theta - after.train_state.params, info


@pytest.mark.parametrize("tau", [1.0, pytest.param(0.3, marks=pytest.mark.slow), 0.1])
def test_gradient_is_that_of_the_merit_function(tau):
    """Finite differences of m, its inner minimum solved anew at each point: the envelope theorem."""
    toy, theta, h = Convex(), normal(40, 3), 1e-5
    phi = toy.maximiser(theta, tau)
    assert jnp.linalg.norm(jax.grad(toy.inner)(phi, theta, tau)) < 1e-12
    differences = [(toy.value(theta + h * e, tau) - toy.value(theta - h * e, tau)) / (2 * h) for e in jnp.eye(3)]
    grad, info = toy.one(theta, tau, TrainedReference(STILL, 1, toy.strength), phi)
    assert relative(grad, jnp.array(differences)) < 1e-6  # central differences: h^2 / tau^2 and 1e-16 / h
    assert abs(info.merit - toy.value(theta, tau)) < 1e-12
    assert info.merit >= 0
    low = toy.one(theta, tau, TrainedReference(STILL, 1, toy.strength), phi + 0.1 * normal(41, 3))[1]
    assert low.merit < info.merit  # a lower bound away from the maximiser


def test_merit_is_the_least_distance_from_being_trained_with_some_weights():
    """m = min_q D_q + tau KL(q | even), attained at BMO's weights; D_q is what training with weights q still gains."""
    toy, theta, tau = Convex(), normal(40, 3), 0.3
    phi = toy.maximiser(theta, tau)
    own = weights_from_gaps(toy.losses(phi) - toy.losses(theta), tau) / toy.rows

    def distance(q, phi):
        prior = toy.problem.prior(theta, toy.fixed) - toy.problem.prior(phi, toy.fixed)
        return q @ (toy.losses(theta) - toy.losses(phi)) + prior - toy.strength / 2 * jnp.sum((phi - theta) ** 2)

    def upper(q, phi):
        return distance(q, phi) + tau * jnp.sum(q * jnp.log(toy.rows * q))

    assert abs(upper(own, phi) - toy.value(theta, tau)) < 1e-12
    assert jnp.linalg.norm(jax.grad(distance, 1)(own, phi)) < 1e-12  # phi is the maximiser of D_q, too
    for q in jax.random.dirichlet(jax.random.key(3), jnp.ones(toy.rows), (20,)):
        assert upper(q, phi) >= toy.value(theta, tau) - 1e-12  # at any phi a lower bound of D_q + tau KL


@pytest.mark.parametrize("tau", [0.25, 0.5, 1.0, 2.0, 5.0])
def test_weights_of_drawn_answers_are_powers_of_the_likelihood_ratio(tau):
    """Over answers y ~ pi_phi: w = ratio^(1/tau) / mean, and m = -(1 - tau) D_(1/tau)(pi_theta | pi_phi)."""
    author, student = jax.nn.log_softmax(normal(43, 6)), jax.nn.log_softmax(normal(44, 6))
    gaps, power = student - author, 1 / tau  # l(phi) - l(theta) of l = -log pi

    def merit(student):
        return smooth_merit(student - author, tau, jnp.exp(author))  # the sum over all answers

    moment = jnp.exp(author) @ jnp.exp(gaps) ** power
    ratios = jnp.exp(gaps) ** power
    assert relative(weights_from_gaps(gaps, tau), ratios / ratios.mean()) < 1e-12
    renyi = (student - author) @ jnp.exp(student) if tau == 1 else jnp.log(moment) / (power - 1)
    assert abs(merit(student) + (1 - tau) * renyi) < 1e-12
    slope = jax.grad(lambda logits: merit(jax.nn.log_softmax(logits)))(normal(44, 6))
    assert (jnp.linalg.norm(slope) < 1e-12) == (tau == 1)  # at tau = 1 own answers have no direction


def test_weights_one_step_from_the_sampler_are_hypergradients():
    """theta = phi - eps grad L_v: w = 1 + (eps / tau)(a - mean a) + O(eps^2), a = <grad log pi, -grad L_v>."""
    questions, choice = normal(45, 8, 3), normal(46, 3, 4)
    answers = jnp.arange(8) % 4

    def log_likelihoods(choice):
        return jax.nn.log_softmax(questions @ choice)[jnp.arange(8), answers]

    step = -jax.grad(lambda choice: -jax.nn.log_softmax(normal(47, 5, 3) @ choice)[:, 0].mean())(choice)
    slopes = jax.jvp(log_likelihoods, (choice,), (step,))[1]
    errors = []
    for size in (1e-2, 1e-3):
        gaps = log_likelihoods(choice + size * step) - log_likelihoods(choice)
        linear = size / 0.5 * (slopes - slopes.mean())
        errors.append(relative(weights_from_gaps(gaps, 0.5) - 1, linear))
    assert errors[1] < 0.01 and 8 < errors[0] / errors[1] < 12


@pytest.mark.parametrize("form", ["none", "snapshot"])
def test_gradient_at_a_given_phi(form):
    toy, theta, phi = Convex(), normal(40, 3), normal(42, 3)

    def value(theta):
        prior = toy.problem.prior(theta, toy.fixed)
        if form == "none":
            return smooth_merit(-toy.losses(theta), 0.3) + prior
        return smooth_merit(toy.losses(phi) - toy.losses(theta), 0.3) + prior - toy.problem.prior(phi, toy.fixed)

    grad, info = toy.one(theta, 0.3, form, phi if form == "snapshot" else None)
    assert relative(grad, jax.grad(value)(theta)) < 1e-12
    assert abs(info.merit - value(theta)) < 1e-12


def test_the_copy_finds_the_maximiser():
    toy, theta = Convex(), normal(40, 3)
    made = bmo(
        toy.problem,
        STILL,
        toy.rows,
        validation_share=NOTHING,
        temperature=TAU,
        reference=TrainedReference(optax.sgd(0.05), 20, toy.strength),
        normalizer_memory=0,
    )
    state = made.init(theta)
    for _ in range(100):
        state, info = made.step(state, toy.fixed, toy.batch, toy.batch)
    assert relative(state.reference, toy.maximiser(theta, 0.3)) < 1e-9
    assert abs(info.merit - toy.value(theta, 0.3)) < 1e-9


def test_two_objectives_end_on_the_front_where_validation_is_least():
    """Quadratics around (-1, 0) and (1, 0): the front is the segment between; L_v is least on it at (.4, 0).

    With share 3e-3 the optimum of share L_v + (1 - share) m lies 6e-4 beside the front: m grows as d^2 / (2 (1 + s)).
    Along the front tau pulls to the middle, by tau artanh(.4) / share = 1.4e-3.
    """
    centres, aim, steps, inner = jnp.array([[-1.0, 0.0], [1.0, 0.0]]), jnp.array([[0.4, 0.1]]), 40_000, 20
    problem = weighted(lambda p, fixed, b: 0.5 * jnp.sum((p[None] - b["data"]) ** 2, -1))
    train, held_out = (streams.full_batch_stream(data).batch(0) for data in (centres, aim))
    tau, share = geometric_schedule(1.0, 1e-5, steps // 2), geometric_schedule(0.5, 3e-3, steps // 2)
    rate = geometric_schedule(0.2, 0.2e-5, inner * steps // 2)  # phi's problem has curvature 1 / tau along the front
    copy = TrainedReference(optax.sgd(rate, momentum=0.9, nesterov=True), inner, 1.0)
    made = bmo(problem, optax.sgd(0.1), 2, validation_share=share, temperature=tau, reference=copy, normalizer_memory=0)

    @jax.jit
    def run(state):
        return jax.lax.scan(lambda state, _: made.step(state, (), train, held_out), state, length=steps)

    for start in ([0.5, 2.0], [-3.0, -1.0]):
        state, info = run(made.init(jnp.array(start)))
        along, beside = state.train_state.params
        assert abs(beside) < 1e-3
        assert abs(along - 0.4) < 2e-3
        assert relative(info.weights[-1].ravel(), jnp.array([0.6, 1.4])) < 3e-3  # barycentric coordinates
        assert -1e-9 < info.merit[-1] < 1e-5 * jnp.log(2) + beside**2


def useless(seed: int, gap: float = 2.0):
    """15 rows that validation agrees with, 15 with validation's questions and answers wrong by +-gap; 40 dimensions."""
    rng = np.random.default_rng(seed)
    truth, xv, x = rng.normal(size=40), rng.normal(size=(20, 40)), rng.normal(size=(15, 40))
    wrong = xv[:15] @ truth + gap * rng.choice([-1.0, 1.0], 15)
    problem = weighted(lambda p, fixed, b: 0.5 * (b["data"][0] @ p - b["data"][1]) ** 2)
    training = np.concatenate([x, xv[:15]]), np.concatenate([x @ truth, wrong])
    return problem, streams.full_batch_stream(training), streams.full_batch_stream((xv, xv @ truth))


@pytest.mark.parametrize("seed", range(3))
def test_useless_rows_lose_their_weight(seed):
    """tau 1 -> .3 at share .5: measured L_v 6.0e-6 to 8.5e-6, greatest useless weight 3.0e-3 to 3.6e-3."""
    problem, train, held_out = useless(seed)
    made = bmo(
        problem,
        optax.sgd(0.02, momentum=0.9),
        30,
        validation_share=HALF,
        temperature=geometric_schedule(1, 0.3, 5000),
        normalizer_memory=0,
    )

    @jax.jit
    def run(state):
        batches = train.batch(0), held_out.batch(0)
        return jax.lax.scan(lambda state, _: made.step(state, (), *batches), state, length=15_000)[0]

    state = run(made.init(jnp.zeros(40)))
    w = single_loop.compute_weights(problem, state.train_state.params, (), (), train, 30, 0.3)
    value = problem.outer(state.train_state.params, (), jax.tree.map(lambda leaf: leaf[0], held_out.batch(0)))
    assert value < 2e-5
    assert w[15:].max() < 5e-3 and abs(w.mean() - 1) < 1e-12
    assert relative(made.weights(state), w) < 1e-6


def started(form, toy=None, **options):
    """The LoRA toy after three steps of a form, on copies of the batches."""
    toy = toy or lora()
    options = {"validation_share": HALF, "temperature": TAU, **options}
    made = bmo(toy.problem, optax.adam(1e-2), ROWS, reference=FORMS[form], **options)
    state = made.init(toy.params)
    for step in range(3):
        state, _ = made.step(state, toy.fixed, toy.train.batch(step), toy.validation.batch(step))
    return toy, made, state


def stepped(toy, made, state, batch, held_out=None):
    """One step of a copy of the state: the one that is given stays."""
    held_out = toy.validation.batch(0) if held_out is None else held_out
    return made.step(jax.tree.map(jnp.array, state), toy.fixed, batch, held_out)


def split(batch, micro):
    """The same rows in another number of micro-batches."""
    rows = jnp.full((micro,), batch["num_examples"][0])
    return {k: v.reshape(micro, -1, *v.shape[2:]) for k, v in batch.items() if k != "num_examples"} | {
        "num_examples": rows
    }


def same(one, other, order=slice(None)):
    """States and infos agree; examples are compared in the order given."""
    slots = ("weights", "gaps")
    for field in slots:
        a, b = (getattr(info, field).ravel() for info in (one[1], other[1]))
        np.testing.assert_allclose(a[order], b, rtol=1e-10)
    blank = [(state, info._replace(weights=0, gaps=0)) for state, info in (one, other)]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), *blank)


@pytest.mark.parametrize("form", FORMS)
def test_splits_and_orders_of_a_batch_are_equal(form):
    toy, made, state = started(form)
    batch = toy.train.batch(4)  # the last of its epoch: three rows and padding
    assert (batch["index"] == PADDING).any()
    whole = stepped(toy, made, state, batch)
    for micro in (1, 5):
        held_out = split(toy.validation.batch(0), 4)
        same(whole, stepped(toy, made, state, split(batch, micro), held_out))
    order = np.random.default_rng(0).permutation(10)
    shuffled = {
        k: v if k == "num_examples" else v.reshape(10, *v.shape[2:])[order].reshape(v.shape) for k, v in batch.items()
    }
    same(whole, stepped(toy, made, state, shuffled), order)


@pytest.mark.parametrize("form", ["none", "snapshot"])
def test_weights_do_not_depend_on_the_batch(form):
    """Nor L_v on the `rows` of a validation batch that is a part of a stream."""
    toy, made, state = started(form)
    one, other = toy.train.batch(3), toy.train.batch(2)
    mixed = jax.tree.map(lambda a, b: a.at[1].set(b[1]), one, other)
    (_, first), (_, second) = (stepped(toy, made, state, batch) for batch in (one, mixed))
    assert (first.weights[0] == second.weights[0]).all()
    assert (first.weights[1] != second.weights[1]).any()
    partial_stream = toy.validation.batch(0) | {"num_examples": jnp.full((1,), 77.0)}
    assert stepped(toy, made, state, one, partial_stream)[1].validation_loss == first.validation_loss


@pytest.mark.parametrize("form", ["none", "snapshot"])
def test_a_step_with_a_floor_has_the_temperature_of_the_gaps_that_were_seen(form):
    """In the first step those of its batch; order, split and padding of a batch change nothing."""
    toy, made, state = started(form, min_effective_share=0.8, temperature=optax.constant_schedule(1e-3))
    first = started(form, min_effective_share=0.8, temperature=optax.constant_schedule(1e-3))[1]
    _, info = first.step(first.init(toy.params), toy.fixed, toy.train.batch(0), toy.validation.batch(0))
    if form == "none":
        assert relative(info.temperature, single_loop.raise_temperature(info.gaps, 1e-3, 0.8)) < 1e-12
        assert abs(info.weights.sum() ** 2 / (info.weights**2).sum() - 8) < 1e-6  # of the 10 of the batch
    else:  # theta is phi
        assert info.temperature == 1e-3 and relative(info.weights, jnp.ones((2, 5))) < 1e-12
    batch = toy.train.batch(4)  # the last of its epoch: three rows and padding
    whole = stepped(toy, made, state, batch)
    assert relative(whole[1].temperature, single_loop.raise_temperature(state.last_gaps, 1e-3, 0.8)) < 1e-12
    assert whole[1].temperature > 1e-3
    same(whole, stepped(toy, made, state, split(batch, 5)))
    seen = state.last_gaps > -jnp.inf
    w = made.weights(state)[seen]
    assert abs(w.sum() ** 2 / (w**2).sum() / seen.sum() - 0.8) < 1e-6
    table = single_loop.compute_weights(
        toy.problem, toy.params, (), toy.fixed, toy.train._replace(steps=5), ROWS, 1e-3, 0.8
    )
    assert abs(table.sum() ** 2 / (table**2).sum() / ROWS - 0.8) < 1e-6


def test_of_many_examples_the_floor_goes_by_those_that_were_seen_last(monkeypatch):
    """25 of the 30 examples of three steps; order, split and padding of a batch change nothing."""
    monkeypatch.setattr(single_loop, "MAX_FLOOR_EXAMPLES", 25)
    options = {"min_effective_share": 0.8, "temperature": optax.constant_schedule(1e-3)}
    toy, made, state = started("none", **options)
    seen = []
    again = made.init(toy.params)
    for step in range(3):
        again, info = made.step(again, toy.fixed, toy.train.batch(step), toy.validation.batch(step))
        seen += info.gaps.ravel().tolist()
    batch = toy.train.batch(4)  # the last of its epoch: three rows and padding
    whole = stepped(toy, made, state, batch)
    expected = single_loop.raise_temperature(jnp.array(seen[-25:]), 1e-3, 0.8)
    assert relative(whole[1].temperature, expected) < 1e-12 and expected > 1e-3
    assert relative(whole[1].temperature, single_loop.raise_temperature(state.last_gaps, 1e-3, 0.8)) > 1e-6
    assert jnp.sum(whole[0].recent_gaps > -jnp.inf) < 25  # what is padded was not seen


def test_a_level_that_lags_far_behind_bounds_the_weights():
    toy, made, state = started("none")
    _, info = stepped(toy, made, state._replace(log_normalizer=state.log_normalizer - 1e4), toy.train.batch(3))
    assert (info.weights == 40).all()  # 30 rows before this batch, and its 10
    assert jnp.isfinite(info.grad_norm)


@pytest.mark.parametrize("form", FORMS)
def test_an_epoch_at_fixed_theta_measures_the_normaliser_of_all_rows(form):
    """Batches of unequal size; phi is fixed too."""
    toy = lora()
    phi = FORMS[form] if form != "copy" else TrainedReference(STILL, 1, 0.5)
    made = bmo(toy.problem, STILL, ROWS, validation_share=HALF, temperature=TAU, reference=phi)
    state = made.init(toy.params)
    if form != "none":
        state = single_loop.replace_reference(state, jax.tree.map(lambda leaf: leaf + 0.1, toy.params))
    seen = made.weights(state)
    assert (seen == 1).all()
    other = jax.tree.map(jnp.array, state.reference)
    for step in range(5):
        state, _ = made.step(state, toy.fixed, toy.train.batch(step), toy.validation.batch(0))
    assert state.num_measured == ROWS
    exact = single_loop.compute_weights(
        toy.problem, toy.params, other, toy.fixed, toy.train._replace(steps=5), ROWS, 0.3
    )
    assert relative(made.weights(state), exact) < 1e-12
    assert abs(exact.mean() - 1) < 1e-12
    assert abs(jnp.mean(jnp.exp((state.last_gaps - state.log_normalizer) / 0.3)) - 1) < 1e-12
    half = single_loop.compute_weights(
        toy.problem, toy.params, other, toy.fixed, toy.train._replace(steps=2), ROWS, 0.3
    )
    assert (half == 0).sum() == ROWS - 20 and abs(half.sum() - 20) < 1e-9  # rows that the stream lacks


def test_schedules_and_rules():
    tau = geometric_schedule(1.0, 0.1, 10)
    np.testing.assert_allclose([tau(0), tau(5), tau(10), tau(99)], [1, 0.1**0.5, 0.1, 0.1], rtol=1e-6)
    made = partial(bmo, lora().problem, STILL, ROWS, validation_share=HALF)
    with pytest.raises(ValueError, match="reference='snap'; use 'none', 'snapshot' or TrainedReference"):
        made(temperature=TAU, reference="snap")
    with pytest.raises(
        ValueError, match="1 inner steps and strength 0.0 of the reference; give at least 1, and above 0"
    ):
        made(temperature=TAU, reference=TrainedReference(STILL, 1, 0.0))
    with pytest.raises(ValueError, match="min_effective_share is -0.1; give a share of the examples"):
        made(temperature=TAU, min_effective_share=-0.1)
    with pytest.raises(
        ValueError, match="temperature starts at 0.0, normalizer_memory 512.0; give a positive temperature"
    ):
        made(temperature=NOTHING)


@pytest.mark.parametrize("form", FORMS)
def test_compiles_once_and_works_on_the_batch_alone(form):
    plain, traces = lora().problem, []

    def counted(*inputs):
        traces.append(1)
        return plain.inner(*inputs)

    toy, made, state = started(form, lora()._replace(problem=plain._replace(inner=counted)))
    before = len(traces)
    stepped(toy, made, state, toy.train.batch(3))
    assert len(traces) == before
    types = [[leaf.aval for leaf in jax.tree.leaves(at)] for at in (made.init(toy.params), state)]
    assert types[0] == types[1]  # nor does the second step compile again

    def traced(rows, floor):
        many = bmo(
            toy.problem,
            optax.adam(1e-2),
            rows,
            validation_share=HALF,
            temperature=TAU,
            reference=FORMS[form],
            min_effective_share=floor,
        )
        shape = jax.eval_shape(many.init, toy.params)
        return jax.make_jaxpr(many.step)(shape, toy.fixed, toy.train.batch(0), toy.validation.batch(0))

    rows = 10_000_019
    touching = {
        equation.primitive.name
        for floor in (0.0, 0.2)
        for equation in equations(traced(rows, floor).jaxpr)
        if any(rows in getattr(v.aval, "shape", ()) for v in [*equation.invars, *equation.outvars])
    }
    assert touching <= {"jit", "pjit", "scatter"}  # the table is written in place, in the rows of the batch


def test_the_separable_form_multiplies_no_more_than_plain_training():
    toy = lora()
    batch, weights = toy.train.batch(0), jnp.ones((2, 5))
    products = [
        sum(equation.primitive.name == "dot_general" for equation in equations(jax.make_jaxpr(f)(toy.params).jaxpr))
        for f in (
            lambda p: inner_loss_and_grad(toy.problem, p, weights, toy.fixed, batch),
            lambda p: single_loop.weighted_loss_and_grad(
                toy.problem, p, toy.fixed, batch, single_loop.WeightNormalizer(0.0, 1.0, 9.0), weights, 1
            ),
        )
    ]
    assert products[0] == products[1] > 0


def test_losses_come_from_the_problem():
    toy = lora()
    micro = jax.tree.map(lambda leaf: leaf[0], toy.train.batch(0))
    direct = (jnp.tanh(micro["x"] @ toy.fixed["base"]) @ toy.fixed["head"] - micro["y"]) ** 2  # LoRA's b is 0
    assert relative(single_loop.micro_batch_losses(toy.problem, toy.params, toy.fixed, micro), direct) < 1e-12
