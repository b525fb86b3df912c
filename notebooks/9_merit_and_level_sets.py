# %% [markdown]
# # One function for all examples, and losses that never reach zero
#
# Notebook 3 used two things that it did not explain. Multi-objective training (BMO) goes downhill on a *merit function*
# that says how far a model is from being a good compromise between the examples; and all theorems there are about
# examples that some model fits *perfectly*, which no model does under the logistic loss or cross-entropy. This page
# states and proves what holds, in a few lines each, and computes it:
#
# - section 1: the merit function and its bounds; section 2: what it has to do with weights of examples; section 3: its
#   gradient, and what an unfinished inner problem costs;
# - section 4: *perfect* read as *within $\varepsilon$*; section 5: the strict gain of bilevel selection over direct
#   mixing for the logistic loss, with its size.
#
# You need: gradients, convex functions, and the inequality between a mean and a maximum. Section 4 and 5 go on where
# notebook 3 ends.
#
# **What is whose.** The problems and the notions of useful and useless examples are from Xiao & Chen (arXiv
# 2511.21056), as we know them from public summaries. Merit functions of this kind are known in multi-objective
# optimisation, the formula in section 2 rests on Gibbs' variational principle, and the lemma of section 5 on the
# perceptron's margin argument. The statements and proofs as they stand here are ours.

# %%
# Parameters: change these and run the page again; a failing assert says what the change broke.
TEMPERATURES = (0.3, 0.1, 0.03)  # tau of section 1, nats; all above 0
STRENGTH = 0.5  # s, of (s/2) |phi - theta|^2; above 0
CROSSING = 0.25  # where section 1 crosses the front: the first example's multiplier there, between 0 and 1
USEFUL, USELESS, TRUSTED = 15, 15, 20  # examples of section 5, and validation examples; USELESS <= TRUSTED
WIDTH = 60  # parameters of section 5; at least TRUSTED + USEFUL, so that the questions are independent
SHARES = (0.5, 0.9, 0.99)  # rho of mixing, between 0 and 1
STEPS = 4000  # of training in section 5
SEED = 0

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from bilevel_jax.core import single_loop
from bilevel_jax.core.problem import weighted
from bilevel_jax.core.streams import full_batch_stream
from bilevel_jax.core.weightings import online_softmax

jax.config.update("jax_enable_x64", True)
plt.style.use("notebooks.mplstyle")
BLUE, ORANGE, GREEN, PINK = (f"C{number}" for number in range(4))

# %% [markdown]
# ## 1. The merit function and its bounds
#
# Every example is an objective $\ell_i(\theta)$, $i = 1 \dots N$. A model is *weakly Pareto-optimal* if no other model
# has a lower loss on **all** examples at once; these models are the *front*. How far is a model from it? Look for a
# better one near by, and report the gain on the example that gains least:
#
# $$ u(\theta) = \max_\varphi \Big\{ \min_i\, [\ell_i(\theta) - \ell_i(\varphi)] - \tfrac s2 \|\varphi-\theta\|^2
# \Big\}, \qquad m(\theta) = \max_\varphi \Big\{ -\tau \log \tfrac1N \sum_i e^{z_i/\tau} - \tfrac s2
# \|\varphi-\theta\|^2 \Big\} $$
#
# with the *gaps* $z_i = \ell_i(\varphi) - \ell_i(\theta)$. The second has a soft minimum in the place of the first's
# minimum, so that it can be differentiated; $\tau$ is the *temperature*, in nats.
#
# **Statement.** (a) $u \ge 0$ everywhere, $u = 0$ on the front, and for convex losses only there.
# (b) $u \le m \le u + \tau\log N$. (c) $m \ge 0$, and for convex losses $m(\theta) = 0$ only where
# $\frac1N\sum_i\nabla\ell_i(\theta) = 0$.
#
# **Proof.** (a) $\varphi = \theta$ gives 0, so $u \ge 0$. On the front every $\varphi$ has an example that does not
# gain, so the minimum is at most 0, and $u = 0$. Off the front some $\varphi$ gains at least $g > 0$ on every example;
# by convexity the model $\theta + t(\varphi-\theta)$ gains at least $tg$, and pays only $\frac s2t^2\|\varphi-
# \theta\|^2$: more than 0 remains for small $t$.
# (b) A mean of positive numbers lies between the largest, divided by $N$, and the largest:
# $\frac1N e^{\max z/\tau} \le \frac1N\sum_i e^{z_i/\tau} \le e^{\max z/\tau}$. Take $-\tau\log$, and note that
# $-\max_i z_i = \min_i [\ell_i(\theta)-\ell_i(\varphi)]$; the maximum over $\varphi$ keeps the order.
# (c) $\varphi=\theta$ gives 0 again. If that is the maximum, the derivative by $\varphi$ vanishes there, and at
# $z = 0$ all examples count the same: it is $-\frac1N\sum_i\nabla\ell_i(\theta)$. $\square$
#
# Two quadratic examples with minimisers $a$ and $b$ and unequal curvatures, as in section 7 of notebook 3. Their front
# is a curve, $\theta(\lambda)$ with $\lambda\nabla\ell_1 + (1-\lambda)\nabla\ell_2 = 0$. We walk across it.

# %%
CENTRES, CURVATURES = jnp.array([[0.0, 0.0], [2.0, 1.0]]), jnp.array([[1.0, 4.0], [4.0, 1.0]])


def pair(theta):
    """The losses of the two examples, nats."""
    return 0.5 * jnp.sum(CURVATURES * (theta - CENTRES) ** 2, axis=-1)


def front(multiplier):
    """theta(lambda): the minimiser of lambda l_1 + (1 - lambda) l_2."""
    share = jnp.array([multiplier, 1 - multiplier])[:, None] * CURVATURES
    return (share * CENTRES).sum(0) / share.sum(0)


def newton(value, start, steps=60):
    """The minimiser of a strictly convex function: Newton steps, each shortened where that lowers the value more."""
    lengths = 0.5 ** jnp.arange(24.0)

    def body(x, _):
        move = jnp.linalg.solve(jax.hessian(value)(x), jax.grad(value)(x))
        tried = x - jnp.append(lengths, 0.0)[:, None] * move
        return tried[jnp.nanargmin(jax.vmap(value)(tried))], None

    x = jax.lax.scan(body, start, length=steps)[0]
    for _ in range(3):  # values are blind to the last digits; whole steps are not
        x = x - jnp.linalg.solve(jax.hessian(value)(x), jax.grad(value)(x))
    return x


def maximiser(losses, theta, tau):
    """phi* of m(theta): what is minimised over phi is convex where the losses are."""

    def value(phi):
        return -single_loop.smooth_merit(losses(phi) - losses(theta), tau) + STRENGTH / 2 * jnp.sum((phi - theta) ** 2)

    return newton(value, theta)


def merit(losses, theta, tau, phi=None):
    """m(theta), nats; with a phi of one's own: what is under the maximum."""
    phi = maximiser(losses, theta, tau) if phi is None else phi
    return single_loop.smooth_merit(losses(phi) - losses(theta), tau) - STRENGTH / 2 * jnp.sum((phi - theta) ** 2)


def least_gain(theta):
    """u(theta) of the two examples, by brute force: the best of 201 x 201 models around theta, near and far."""
    ticks = jnp.linspace(-1, 1, 201)
    square = jnp.stack(jnp.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
    around = theta + jnp.concatenate([size * square for size in (2.5, 0.5, 0.1, 0.02)])
    gains = jnp.min(pair(theta) - jax.vmap(pair)(around), axis=1)
    return jnp.max(gains - STRENGTH / 2 * jnp.sum((around - theta) ** 2, axis=1))


step = 1e-4
tangent = (front(CROSSING + step) - front(CROSSING - step)) / (2 * step)
normal = jnp.array([-tangent[1], tangent[0]]) / jnp.linalg.norm(tangent)
offsets = jnp.linspace(-0.6, 0.6, 41)  # the middle one is on the front
walk = front(CROSSING) + offsets[:, None] * normal
u = jax.lax.map(jax.jit(least_gain), walk)
m = {tau: jax.jit(jax.vmap(lambda theta, tau=tau: merit(pair, theta, tau)))(walk) for tau in TEMPERATURES}

figure, axes = plt.subplots(figsize=(7.2, 3.6))
for (tau, values), colour in zip(m.items(), (ORANGE, GREEN, BLUE), strict=False):
    axes.fill_between(offsets, u, u + tau * np.log(2), color=colour, alpha=0.15, lw=0)
    axes.plot(offsets, values, color=colour, label=f"$m$, $\\tau$ = {tau:g}")
axes.plot(offsets, u, color="black", label="$u$")
axes.axvline(0, color="grey", lw=1, ls=":")
axes.text(0.01, 0.45, "front", color="grey", transform=axes.get_xaxis_transform())
axes.set(xlabel="distance from the front, to either side", ylabel="merit, nats", ylim=(-0.02, None))
axes.set_title("Band of each colour: from $u$ to $u + \\tau\\,\\log\\,2$")
axes.legend(loc="upper center")
plt.show()

GRID = 2e-3  # what a search on a grid can miss of a maximum, nats
for tau, values in m.items():
    print(
        f"tau {tau:<5g} m on the front {values[20]:.4f} nats, at most tau log 2 = {tau * np.log(2):.4f};  "
        f"largest m - u = {jnp.max(values - u):.4f}"
    )
    assert (values >= u - 1e-9).all(), f"m < u at tau = {tau}: section 1 (b) is broken; is STRENGTH above 0?"
    assert (values <= u + tau * np.log(2) + GRID).all(), f"m > u + tau log N at tau = {tau}: section 1 (b) is broken"
    assert (values >= -1e-12).all(), f"m < 0 at tau = {tau}: the inner maximum was not found"
assert abs(u[20]) < 1e-12, "u is not 0 on the front: is CROSSING between 0 and 1?"
assert u[jnp.abs(offsets) > 0.05].min() > 1e-4, "u is 0 off the front: these losses are convex, so it must not be"

# %% [markdown]
# *$u$ (black) is 0 on the front and positive on both sides. Each $m$ lies between $u$ and $u + \tau\log 2$, the band of
# its colour. On the front $m$ is not 0, unless one crosses it where the two gradients cancel with equal weights
# ($\lambda = \frac12$). Section 2 says what it is there.*
#
# The same for random convex problems of five examples and three parameters, each a softplus plus a quadratic, far from
# the front and near to it. $u$ is now bounded from both sides by a fine temperature.

# %%
COUNT, DIMENSIONS, PROBLEMS = 5, 3, 40


def random_losses(key):
    """Five convex losses of three parameters, none of them quadratic."""
    keys = jax.random.split(key, 3)
    tilt, centre = (jax.random.normal(one, (COUNT, DIMENSIONS)) for one in keys[:2])
    size = jax.random.uniform(keys[2], (COUNT,), minval=0.2, maxval=2.0)

    def losses(theta):
        return jax.nn.softplus(3 * jnp.sum(tilt * (theta - centre), axis=1)) + size * jnp.sum(
            (theta - centre) ** 2, axis=1
        )

    return losses


def tried(key, tau):
    """Of one random problem: (m, its parts by sections 1 to 3)."""
    problem_key, theta_key, weights_key = jax.random.split(key, 3)
    losses, theta = random_losses(problem_key), 1.5 * jax.random.normal(theta_key, (DIMENSIONS,))
    phi = maximiser(losses, theta, tau)
    gaps = losses(phi) - losses(theta)
    weights = single_loop.weights_from_gaps(gaps, tau)

    def distance(q):
        """D_q(theta) of section 2, nats: by an inner problem of its own."""

        def value(phi):
            return q @ (losses(phi) - losses(theta)) + STRENGTH / 2 * jnp.sum((phi - theta) ** 2)

        return -value(newton(value, theta))

    def upper(q):
        return distance(q) + tau * jnp.sum(q * jnp.log(COUNT * q))

    others = jax.random.dirichlet(weights_key, jnp.ones(COUNT), (8,))
    slopes = jax.jacobian(losses)(theta)
    by_formula = weights @ slopes / COUNT + STRENGTH * (phi - theta)
    size = 1e-5
    by_differences = jnp.stack(
        [
            (merit(losses, theta + size * d, tau) - merit(losses, theta - size * d, tau)) / (2 * size)
            for d in jnp.eye(DIMENSIONS)
        ]
    )
    return {
        "m": merit(losses, theta, tau, phi),
        "at the weights": upper(weights / COUNT),
        "at others": jax.vmap(upper)(others),
        "slope": by_formula,
        "slope by differences": by_differences,
        "slope by losses": weights @ (slopes - jax.jacobian(losses)(phi)) / COUNT,
    }


keys = jax.random.split(jax.random.key(SEED), PROBLEMS)
by_tau = {tau: jax.jit(jax.vmap(lambda key, tau=tau: tried(key, tau)))(keys) for tau in (1.0, 0.2, 0.002)}
fine, bound = by_tau[0.002]["m"], 0.002 * np.log(COUNT)  # u lies between m - bound and m of the finest temperature
for tau, some in by_tau.items():
    excess = some["m"] - fine
    print(f"tau {tau:<6g} m - u between {excess.min():+.4f} and {excess.max():.4f}; tau log 5 = {tau * np.log(5):.4f}")
    assert (excess > -bound - 1e-9).all(), f"m < u in a random problem at tau = {tau}: section 1 (b) is broken"
    assert (excess < tau * np.log(COUNT) + 1e-9).all(), f"m > u + tau log N at tau = {tau}: section 1 (b) is broken"

# %% [markdown]
# ## 2. The merit is a question about weights
#
# BMO has no table of weights. Yet weights are in it. For weights $q_i \ge 0$ of sum 1 let
#
# $$ D_q(\theta) = \max_\varphi \Big\{ \sum_i q_i\,[\ell_i(\theta) - \ell_i(\varphi)] - \tfrac s2\|\varphi-\theta\|^2
# \Big\} \ \ge 0 : $$
#
# what training on the *weighted* loss $\sum_i q_i\ell_i$ could still gain, near $\theta$. It is 0 where $\theta$ has
# been trained with these weights to the end.
#
# **Statement.** For convex losses
#
# $$ m(\theta) = \min_q \Big\{ D_q(\theta) + \tau\,\mathrm{KL}(q \,\|\, \tfrac1N) \Big\}, \qquad
# u(\theta) = \min_q D_q(\theta), $$
#
# and the minimiser of the first is $q_i = w_i/N = \mathrm{softmax}_i(z_i/\tau)$ at the best $\varphi$: **BMO's weights
# are those with which $\theta$ comes nearest to being the trained model, made as even as the temperature asks.**
#
# **Proof.** Gibbs' principle: $\tau\log\frac1N\sum_i e^{z_i/\tau} \ge \sum_i q_iz_i - \tau\,\mathrm{KL}(q\|\frac1N)$
# for every $q$, with equality for $q = \mathrm{softmax}(z/\tau)$ (the difference is
# $\tau\,\mathrm{KL}(q\,\|\,\mathrm{softmax}(z/\tau))$). With the minus sign, and the maximum over $\varphi$ on both
# sides, $m \le D_q + \tau\,\mathrm{KL}$ for every $q$. For equality take $q = \mathrm{softmax}(z/\tau)$ at the
# maximiser $\varphi^*$ of $m$. There $\sum_i q_i\nabla\ell_i(\varphi^*) + s(\varphi^*-\theta) = 0$. This is the
# condition for the maximum in $D_q$, too, and the losses are convex, so $\varphi^*$ attains both. For $u$ let
# $\tau\to0$, with section 1 (b). $\square$
#
# Two things follow. First, $u(\theta) = 0$ exactly if $\theta$ is the trained model of *some* weights $\lambda$, its
# multipliers. Second, on the front $0 \le m \le \tau\,\mathrm{KL}(\lambda\|\frac1N)$, which is sharper than
# $\tau\log N$; and $m/\tau \to \mathrm{KL}(\lambda\|\frac1N)$ as $\tau\to0$ if $\lambda$ is unique. (The minimiser
# $q_\tau$ has $D_{q_\tau} \le \tau\,\mathrm{KL}(\lambda\|\frac1N) \to 0$, so it tends to multipliers of $\theta$, that
# is, to $\lambda$; and $m/\tau \ge \mathrm{KL}(q_\tau\|\frac1N)$.) This is the slope along the front on which a fixed
# temperature slides to the model of *even* weights: it has a force of order $\tau$. Notebook 3 lets $\tau$ fall for
# this reason.

# %%
for tau, some in by_tau.items():
    scale = np.maximum(np.abs(some["m"]), tau)
    attained = np.abs(some["at the weights"] - some["m"]) / scale
    below = (some["at others"] - some["m"][:, None]).min()
    print(f"tau {tau:<6g} at BMO's weights: off by {attained.max():.0e}; at random weights: at least {below:+.3f} nats")
    assert attained.max() < 1e-8, f"D_q + tau KL differs from m at BMO's weights, tau = {tau}: section 2 is broken"
    assert below > -1e-9, f"some weights have D_q + tau KL below m, tau = {tau}: section 2 is broken"

multipliers = jnp.linspace(0.02, 0.98, 49)
entropy = multipliers * jnp.log(2 * multipliers) + (1 - multipliers) * jnp.log(2 * (1 - multipliers))
on_front = jax.vmap(front)(multipliers)
FALLING = (1.0, 0.1, 0.01, 0.001)
along = {tau: jax.jit(jax.vmap(lambda theta, tau=tau: merit(pair, theta, tau)))(on_front) / tau for tau in FALLING}
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
for shade, (tau, values) in zip((0.35, 0.55, 0.8, 1.0), along.items(), strict=True):
    left.plot(multipliers, values, color=BLUE, alpha=shade, label=f"$m/\\tau$, $\\tau$ = {tau:g}")
left.plot(multipliers, entropy, "k:", label="KL($\\lambda$ ∥ even weights)")
left.axhline(np.log(2), color="grey", lw=1)
left.text(0.5, np.log(2) - 0.03, "log N", color="grey", ha="center", va="top")
left.set(
    xlabel="multiplier $\\lambda$ of the first example", ylabel="nats / $\\tau$", title="the merit along the front"
)
left.legend(fontsize=8, loc=(0.3, 0.38))
worst = [float(jnp.abs(values - entropy).max()) for values in along.values()]
right.loglog(FALLING, worst, "o-", color=BLUE)
right.loglog(FALLING, worst[-1] * np.array(FALLING) / FALLING[-1], color="grey", lw=1, ls=":", label="slope 1")
right.set(xlabel="temperature $\\tau$, nats", ylabel="largest $|m/\\tau - KL|$", title="how fast it gets there")
right.legend()
plt.show()
for tau, values in along.items():
    assert (values <= entropy + 1e-9).all(), f"m > tau KL on the front at tau = {tau}: section 2 is broken"
assert worst[-1] < 0.02 and worst == sorted(worst, reverse=True), "m / tau does not tend to KL along the front"
assert jnp.abs(along[FALLING[0]][24]) < 1e-9, "m is not 0 where the multipliers are even: section 1 (c) is broken"

# %% [markdown]
# *Left: along the front $m/\tau$ (blue, darker for a lower temperature) grows to the dotted line, the information
# that the multipliers carry against even weights. All curves touch 0 in the middle, where the weights are even: there
# the mean loss has its minimum. Right: the distance to the dotted line falls in proportion to $\tau$ in the end.*
#
# ## 3. The gradient, and an unfinished inner problem
#
# **Statement.** Where $\varphi^*$ is unique (it is for convex losses and $s > 0$),
#
# $$ \nabla m(\theta) = \tfrac1N\sum_i w_i\,\nabla\ell_i(\theta) + s\,(\varphi^*-\theta)
# = \tfrac1N\sum_i w_i\,[\nabla\ell_i(\theta)-\nabla\ell_i(\varphi^*)],
# \qquad w_i = N\,\mathrm{softmax}_i(z_i/\tau) . $$
#
# With any other $\varphi$ the value under the maximum is a *lower* bound of $m$, short of it by
# $O(\|\varphi-\varphi^*\|^2)$.
#
# **Proof.** By the envelope theorem (Danskin), the gradient of a maximum is the partial derivative at the maximiser:
# differentiate by $\theta$ with $\varphi^*$ held. The second form puts in the condition of section 2,
# $s(\varphi^*-\theta) = -\frac1N\sum_iw_i\nabla\ell_i(\varphi^*)$. The last sentence is the definition of a maximum,
# and that its derivative is 0 there. $\square$
#
# So a step of BMO costs a weighted gradient and no second derivative, and a model $\varphi$ that is nearly right is
# good enough: its error counts squared in the value.

# %%
for tau, some in by_tau.items():
    length = jnp.linalg.norm(some["slope"], axis=1)
    first = (jnp.linalg.norm(some["slope"] - some["slope by differences"], axis=1) / length).max()
    second = (jnp.linalg.norm(some["slope"] - some["slope by losses"], axis=1) / length).max()
    print(f"tau {tau:<6g} gradient of m: {first:.0e} from finite differences, {second:.0e} between its two forms")
    assert first < 1e-4, f"the gradient of m is not that of finite differences at tau = {tau}: section 3 is broken"
    assert second < 1e-6, f"the two forms of the gradient differ at tau = {tau}: was the inner maximum found?"

point, tau = jnp.array([1.6, -0.4]), 0.1
best = maximiser(pair, point, tau)
ways = jax.random.normal(jax.random.key(1), (64, 2))
away = jnp.geomspace(1e-3, 0.3, 12)
short = jnp.stack(
    [merit(pair, point, tau) - jax.vmap(lambda way: merit(pair, point, tau, best + way))(size * ways) for size in away]
)
fall = np.polyfit(np.log(away[:8]), np.log(short.mean(1)[:8]), 1)[0]
print(f"the value falls short of m by |phi - phi*|^{fall:.2f}")
assert (short > -1e-12).all(), "a phi has a larger value than the maximiser: the inner maximum was not found"
assert abs(fall - 2) < 0.05, "the loss of value by an unfinished phi is not quadratic"

# %% [markdown]
# **The form without a second model.** If one model attains the least loss 0 on *every* example (separable data) and
# $s = 0$, that model is the best $\varphi$ for every $\theta$: it makes every $z_i$ as small as can be,
# $z_i = -\ell_i(\theta)$. Then $u = \min_i\ell_i(\theta)$ and $m = -\tau\log\frac1N\sum_ie^{-\ell_i(\theta)/\tau}$,
# a soft minimum of the losses, with weights $w_i \propto e^{-\ell_i/\tau}$. On all other data examples with noise in
# their answers lose their weight, because they cannot be fitted. (Notebook 7 has the third form, where $\varphi$ is
# the model that wrote the answers: then $w_i \propto (\pi_\theta/\pi_\varphi)^{1/\tau}$.)
#
# ## 4. Perfect means within $\varepsilon$
#
# Let the losses be $\ell_i \ge 0$ with infimum 0, attained or not. Under the logistic loss
# $\ell_i(\theta) = \log(1 + e^{-y_i x_i^\top\theta})$, with labels $y_i = \pm1$, it never is. So all definitions of
# notebook 3 get a level:
#
# - a model is *$\varepsilon$-perfect* for example $i$ if $\ell_i(\theta) \le \varepsilon$, and *$\eta$-optimal* if
#   $L_v(\theta) \le \inf L_v + \eta$;
# - an example is *$(\varepsilon,\eta)$-useful* if some model is both; otherwise *useless*;
# - examples are *separable* if for every $\varepsilon > 0$ one model is $\varepsilon$-perfect for all of them (for the
#   logistic loss: if a hyperplane separates them);
# - a model is *$\varepsilon$-weakly Pareto-optimal* if no other is better by more than $\varepsilon$ on all examples.
#
# **T1 for level sets.** On separable examples, for every $\varepsilon > 0$ and $\varepsilon' > 0$,
# $\bigcup_i\{\ell_i\le\varepsilon\} \subset \mathrm{WP}_\varepsilon \subset \bigcup_i\{\ell_i \le
# \varepsilon + \varepsilon'\}$: up to a hair, the $\varepsilon$-front is the models that are $\varepsilon$-perfect for
# one example.
#
# *Proof.* If $\ell_i(\theta) \le \varepsilon$, no model is better on $i$ by more than $\varepsilon$, as losses are not
# negative. If $\theta \in \mathrm{WP}_\varepsilon$, the model that is $\varepsilon'$-perfect for all is not better by
# more than $\varepsilon$ on some $i$: $\ell_i(\theta) \le \varepsilon + \varepsilon'$. $\square$
#
# **T2 for level sets.** Let $\frac1N\sum_i w_i\ell_i(\theta) \le \varepsilon$ with weights of mean 1, and
# $L_v(\theta) \le \eta$. If a set of examples has $\ell_j > b$ wherever $L_v \le \eta$ (they are useless at the level
# $b$), their share of all weight is below $\varepsilon/b$.
#
# *Proof.* $\varepsilon \ge \frac1N\sum_j w_j\ell_j > b\cdot\frac1N\sum_jw_j$, the sums over that set. $\square$
#
# **When is an example useless?** Take one that asks a validation question and gives the other label, among $|V|$
# validation examples that some model separates. $L_v \le \eta$ forces the validation example's own loss below
# $|V|\eta$; and two losses of one question with opposite labels satisfy $e^{-\ell_v} + e^{-\ell_j} = 1$, as
# probabilities of the two labels. Hence
#
# $$ \ell_j \ge b(\eta) = -\log\big(1 - e^{-|V|\eta}\big), \qquad\text{and the example is useless exactly if}\quad
# e^{-\varepsilon} + e^{-|V|\eta} > 1 $$
#
# (*exactly* if the other validation questions can be answered at the same time, for instance if all are linearly
# independent). So an example that contradicts a validation example is useless at fine levels and useful at coarse ones:
# at $\varepsilon = |V|\eta \ge \log 2$, where a coin will do for both.

# %%
margins = jnp.linspace(-30, 30, 6001)  # models, by what they answer to the question
loss_v, loss_j = jnp.logaddexp(0, -margins), jnp.logaddexp(0, margins)
levels = jnp.linspace(0.02, 2.0, 100)
least = jax.vmap(lambda eta: jnp.min(jnp.where(loss_v <= eta, loss_j, jnp.inf)))(levels)  # by search, for |V| eta
useful = least[:, None] <= levels  # [|V| eta, epsilon]
figure, axes = plt.subplots(figsize=(5.6, 3.8))
axes.contourf(levels, levels, useful.T.astype(float), levels=[-0.5, 0.5, 1.5], colors=["#f6d9c9", "#d3e6f2"])
axes.plot(levels, -jnp.log1p(-jnp.exp(-levels)), color="black", lw=1.5, label="$e^{-\\varepsilon}+e^{-|V|\\eta}=1$")
axes.plot(np.log(2), np.log(2), "ko")
axes.annotate("log 2", (np.log(2), np.log(2)), (6, 6), textcoords="offset points")
axes.text(0.2, 0.25, "useless", color=ORANGE)
axes.text(1.3, 1.3, "useful", color=BLUE)
axes.set(
    xlabel="level of validation, $|V|\\,\\eta$, nats", ylabel="level of the example, $\\varepsilon$, nats", ylim=(0, 2)
)
axes.set_title("An example that contradicts a validation example")
axes.legend(loc="upper right")
plt.show()
edge = jnp.exp(-levels)[:, None] + jnp.exp(-levels) - 1
clear = jnp.abs(edge) > 0.01  # the search has steps of .01 in the margin
assert (useful == (edge < 0))[clear].all(), "the search over models and the formula of section 4 disagree"

# %% [markdown]
# ## 5. The strict gain over mixing, for the logistic loss
#
# In notebook 3, direct mixing of validation and training loss loses because its minimiser would have to be perfect for
# every example. Here no minimiser exists: where all the rest can be separated, models run away to infinity. The gain is
# strict all the same, and its size can be said.
#
# **Lemma.** Let a hyperplane separate the training examples with margin $\gamma$: $y_ix_i^\top a \ge \gamma > 0$ for
# some $\|a\| = 1$. Then $\|\nabla\bar\ell\,\| \ge \gamma\,\frac1N\sum_i(1-e^{-\ell_i})$ everywhere, where $\bar\ell =
# \frac1N\sum_i\ell_i$. And with $R = \max\|x_v\|$ over validation questions, $\|\nabla L_v\| \le R\,L_v$.
#
# *Proof.* $\nabla\ell_i = -(1-e^{-\ell_i})\,y_ix_i$, since $1-e^{-\ell}$ is the probability of the wrong label.
# The first follows by the product with $-a$, the second by the triangle inequality and $1-e^{-\ell}\le\ell$. $\square$
#
# **Statement.** Let the training examples be separable with margin $\gamma$, and a share $c$ of them useless at level
# $b$: $\ell_j > b$ wherever $L_v\le\eta$. Then at every minimiser of $\rho L_v + (1-\rho)\bar\ell$, and in the limit of
# every minimising sequence,
#
# $$ L_v \ \ge\ \min\Big\{\eta,\ \frac{1-\rho}{\rho}\,\frac\gamma R\,c\,\big(1-e^{-b}\big)\Big\} \ >\ 0 . $$
#
# If some model separates the validation examples together with one training example, bilevel selection reaches
# $L_v < \varepsilon$ for every $\varepsilon > 0$: all weight to that example.
#
# *Proof.* The gradient of a smooth convex function tends to 0 along a minimising sequence, so in the limit
# $\rho\|\nabla L_v\| = (1-\rho)\|\nabla\bar\ell\,\|$. If $L_v \le \eta$, the share $c$ of the examples has
# $1-e^{-\ell_j} > 1-e^{-b}$. Put the lemma in on both sides. $\square$
#
# **The exact size in one case.** Let $n_0$ training examples contradict validation examples, one each, and let all
# *different* questions be linearly independent. Then every minimising sequence of mixing has
#
# $$ L_v \to \frac{n_0}{|V|}\,\log\Big(1 + \frac{(1-\rho)\,|V|}{\rho\,N}\Big) . $$
#
# *Proof.* The objective is a sum over questions, and independence lets every question's margin $t = y_vx_v^\top\theta$
# be chosen on its own. Questions without contradiction tend to loss 0. A contradicted one has
# $\frac{\rho}{|V|}\log(1+e^{-t}) + \frac{1-\rho}{N}\log(1+e^{t})$, which is least at
# $e^{-t} = \frac{(1-\rho)|V|}{\rho N}$. A sum can tend to its infimum only if every term does. $\square$
#
# No share $\rho < 1$ makes it vanish; near $\rho = 1$ both the bound and the exact size are proportional to $1-\rho$.


# %%
def contradicted(seed):
    """(training, validation): own questions with right labels; validation questions with the other label."""
    random = np.random.default_rng(seed)
    truth = random.normal(size=WIDTH)
    judge, own = (random.normal(size=(count, WIDTH)) / WIDTH**0.5 for count in (TRUSTED, USEFUL))
    labels = np.concatenate([np.sign(own @ truth), -np.sign(judge[:USELESS] @ truth)])
    return (np.concatenate([own, judge[:USELESS]]), labels), (judge, np.sign(judge @ truth))


def logistic(params, data):
    x, y = data
    return jnp.logaddexp(0, -y * (x @ params))


training, trusted = contradicted(SEED)
ROWS = USEFUL + USELESS
questions = np.concatenate([trusted[0], training[0][:USEFUL]])
assert np.linalg.matrix_rank(questions) == len(questions), (
    "the questions are not independent: WIDTH must be at least TRUSTED + USEFUL, and USELESS at most TRUSTED"
)
normal = np.linalg.pinv(training[0]) @ training[1]  # separates with equal margins
gamma, radius = 1 / np.linalg.norm(normal), np.linalg.norm(trusted[0], axis=1).max()
assert (training[1] * (training[0] @ normal) > 0.999).all(), "no hyperplane separates the training examples"


def limit(rho):
    """L_v that mixing tends to, nats."""
    return USELESS / TRUSTED * np.log1p((1 - rho) * TRUSTED / (rho * ROWS))


def lower_bound(rho):
    """The statement's bound at its best eta, nats: 1 - exp(-b) = exp(-|V| eta)."""
    eta = np.geomspace(1e-9, 1, 4000)
    return np.minimum(eta, (1 - rho) / rho * gamma / radius * USELESS / ROWS * np.exp(-TRUSTED * eta)).max()


problem = weighted(lambda params, frozen, batch: logistic(params, batch["data"]))
fast = optax.sgd(20.0, momentum=0.9, nesterov=True)
falling = single_loop.geometric_schedule(1.0, 0.05, STEPS)
methods = {
    f"mixing, rho = {rho:g}": single_loop.mixing(problem, fast, validation_share=rho, num_examples=ROWS)
    for rho in SHARES
}
methods["BDS (penalty)"] = single_loop.penalty(
    problem,
    fast,
    online_softmax(ROWS),
    validation_share=optax.constant_schedule(0.5),
    weights_learning_rate=lambda step: jnp.where(step < STEPS // 10, 0.0, 0.3),
)
methods["BMO"] = single_loop.bmo(
    problem,
    fast,
    ROWS,
    validation_share=optax.constant_schedule(0.5),
    temperature=falling,
    normalizer_memory=0,
)


def drive(method):
    """At every step: L_v, the weighted training loss, and the useless examples' share of the weight."""
    batch, judge = full_batch_stream(training).batch(0), full_batch_stream(trusted).batch(0)

    @jax.jit
    def run(state, batch, judge):
        def body(state, _):
            params, weights = state.train_state.params, method.weights(state)
            seen = logistic(params, trusted).mean(), (weights * logistic(params, training)).mean()
            return method.step(state, None, batch, judge)[0], (*seen, weights[USEFUL:].sum() / weights.sum())

        return jax.lax.scan(body, state, length=STEPS)[1]

    return jax.tree.map(np.array, run(method.init(jnp.zeros(WIDTH)), batch, judge))


runs = {name: drive(method) for name, method in methods.items()}
print("after training                L_v, nats     in the limit   at least   useless share of weight")
for name, (values, _, useless) in runs.items():
    rho = float(name.split()[-1]) if "mixing" in name else None
    theory = f"{'0':>13}{'':>11}" if rho is None else f"{limit(rho):13.5f}{lower_bound(rho):11.5f}"
    print(f"{name:26}{values[-1]:13.5f}{theory}{useless[-1]:18.1e}")

# %%
colours = {name: ORANGE for name in runs} | {"BDS (penalty)": BLUE, "BMO": GREEN}
count = np.arange(1, STEPS + 1)
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8))
for name, (values, weighted_loss, useless) in runs.items():
    left.loglog(count, values, color=colours[name], label=None if "mixing" in name else name)
    if "mixing" in name:
        rho = float(name.split()[-1])
        left.axhline(limit(rho), color="black", lw=1, ls=":")
        left.text(STEPS, limit(rho) * 1.25, f"mixing, $\\rho$ = {rho:g}", color=ORANGE, ha="right", fontsize=9)
    else:
        right.loglog(count, useless, color=colours[name], label=f"{name}: their share")
        bound = weighted_loss / -np.log1p(-np.exp(-TRUSTED * values))
        right.loglog(count, bound, color=colours[name], lw=1, ls="--", label="its bound $\\varepsilon/b(\\eta)$")
left.set(xlabel="step", ylabel="$L_v$, nats", title="Mixing stops at its limit (dotted)", ylim=(1e-5, 2))
left.legend(loc="lower left")
right.set(xlabel="step", ylabel="share of all weight", title="The useless examples", ylim=(1e-12, 30))
right.legend(fontsize=8, loc="lower left")
plt.show()

for name, (values, weighted_loss, useless) in runs.items():
    if "mixing" in name:
        rho = float(name.split()[-1])
        assert abs(values[-1] / limit(rho) - 1) < 0.03, f"{name} is not at its limit: more STEPS?"
        assert lower_bound(rho) <= limit(rho), f"{name}: the bound of section 5 is above the exact size"
        assert runs["BDS (penalty)"][0][-1] < values[-1] and runs["BMO"][0][-1] < values[-1], (
            f"bilevel selection is not below {name}: it falls as 1/step, so a share near 1 needs more STEPS"
        )
    else:
        bound = weighted_loss / -np.log1p(-np.exp(-TRUSTED * values))
        assert (useless <= bound * (1 + 1e-9)).all(), f"{name}: T2 for level sets is broken"
        assert useless[-1] < 1e-3, f"{name} has not taken the useless examples' weight away: more STEPS?"

# %% [markdown]
# *Left: $L_v$ while training goes on. Mixing (orange) stops at its limit, dotted, for every share; BDS and BMO fall on,
# in proportion to 1/step, as the logistic loss does on separable data. Right: the useless examples' share of all weight
# (solid) and the bound of T2 for level sets (dashed), with $\varepsilon$ and $\eta$ read at each step. BDS, whose
# weights wait for the first tenth of the steps, comes close to the bound; BMO's useless weights vanish much faster.*
#
# ## What to take home
#
# - $u$ is 0 on the front and positive elsewhere; the smooth $m$ costs at most $\tau\log N$ nats, on the front
#   $\tau\,\mathrm{KL}(\lambda\|\frac1N)$. At a fixed temperature it prefers even weights: let it fall.
# - The merit function *is* a search for weights: those with which the present model comes nearest to being trained to
#   its end, at a price for uneven ones.
# - Under losses that never reach 0, say the level. An example that contradicts a validation example is useless at fine
#   levels and useful at coarse ones; at fine levels its share of weight is at most $\varepsilon/b$.
# - The strict gain over mixing needs no perfect models. For the logistic loss its size is known, and no mixing share
#   $\rho<1$ takes it away.
# - All methods of section 5 train on the validation examples. Compare with training on those alone, on examples that
#   nobody trained on (notebook 3).
