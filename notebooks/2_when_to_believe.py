# %% [markdown]
# # When to believe an exact derivative
#
# Notebook 1 has shown that the derivative of the validation loss by every example's weight can be computed exactly.
# Exact means: the slope of the tangent is right. It does not mean that the tangent is good for anything. This page
# shows how an exact derivative fails, and the tests that tell: `bilevel_jax.core.certify`. You need derivatives and a
# little floating-point arithmetic. Everything said is computed here, with an `assert` next to the claims that are
# numbers.
#
# **What is whose.** That long training runs are chaotic and their derivatives useless there is well known. The three
# certificates, their thresholds and the measurements are ours. The thresholds were calibrated on ten settings of small
# language models; they are no theorem.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from bilevel_jax import hypergradient
from bilevel_jax.core import certify, tree
from bilevel_jax.core.hypergradient import full_batch_stream, shuffled_stream
from bilevel_jax.core.problem import weighted
from bilevel_jax.core.training import init_train_state, scan, train, train_step
from bilevel_jax.core.unrolled import unrolled_estimator

plt.style.use("notebooks.mplstyle")
BLUE, ORANGE, GREEN = "C0", "C1", "C2"

# %% [markdown]
# ## 1. Two landscapes
#
# A small network (two hidden layers of 24 units, float32) learns a curved function of 4 inputs from 96 examples, of
# which the last 24 have the wrong sign, by 120 steps of AdamW on batches of 16. 48 validation examples judge it:
# $L_v(w)$ is their mean loss at the end of training with weights $w$. Losses are half squared errors, in nats.
#
# Nothing about the learning rate or Adam's `eps_root` is compiled in (`inject_hyperparams` makes them part of the
# optimiser's state), so that one program trains at every setting below.

# %%
ROWS, TRUSTED, INPUTS, UNITS, STEPS, BATCH = 96, 48, 4, 24, 120, 16
keys = jax.random.split(jax.random.key(0), 6)


def rows(key, count):
    x = jax.random.normal(jax.random.split(key, 3)[0], (count, INPUTS))
    return x, jnp.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2] / 2


x, y = rows(keys[0], ROWS)
training = x, jnp.where(jnp.arange(ROWS) < 72, y, -y)
trusted = rows(keys[1], TRUSTED)
network = {
    "in": 0.7 * jax.random.normal(keys[2], (INPUTS, UNITS)),
    "middle": jax.random.normal(keys[3], (UNITS, UNITS)) / UNITS**0.5,
    "out": jax.random.normal(keys[4], (UNITS,)) / UNITS**0.5,
}
optimizer = optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3, eps_root=1e-12)


def exactly(a, b):
    return a @ b


def losses_with(multiply):
    """Per-example losses of the network, its products made by `multiply`."""

    def losses(params, data):
        x, y = data
        hidden = jnp.tanh(multiply(jnp.tanh(multiply(x, params["in"])), params["middle"]))
        return 0.5 * (multiply(hidden, params["out"]) - y) ** 2

    return losses


def begins(rate, eps_root=1e-12, params=network):
    """The state before training."""
    state = init_train_state(optimizer, params)
    values = {"learning_rate": rate, "eps_root": eps_root}
    values = {name: jnp.asarray(values.get(name, old), old.dtype) for name, old in state.opt_state.hyperparams.items()}
    return state._replace(opt_state=state.opt_state._replace(hyperparams=values))


def tools(losses, training, trusted, optimizer=optimizer):
    """(w, start) -> the exact hypergradient, and (w, start) -> L_v of a new training run, nats."""
    problem = weighted(lambda params, fixed, batch: losses(params, batch["data"]))
    step = train_step(problem, optimizer)
    sweep = unrolled_estimator(problem, step)
    drawn, held_out = shuffled_stream(training, BATCH, STEPS, seed=0), full_batch_stream(trusted)
    kept = [drawn.batch(index) for index in range(STEPS)]  # every run sees the same batches
    stream = drawn._replace(batch=lambda index: kept[index])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *kept)

    def estimate(w, start):
        return sweep(train(step, start, w, None, stream), w, None, stream, held_out)

    @jax.jit
    def ended(w, start, batches, trusted):
        return losses(scan(step, start, w, None, batches).params, trusted).mean()

    return estimate, lambda w, start: float(ended(w, start, stacked, trusted))


estimate, value = tools(losses_with(exactly), training, trusted)
ones = jnp.ones(ROWS)


def curve(value, start, direction, sizes):
    """L_v of training runs along a direction, nats."""
    return np.array([value(ones + float(size) * direction, start) for size in sizes])


# %%
CALM, WILD = 3e-3, 1e-1
sizes = np.linspace(-0.15, 0.15, 121)
figure, panels = plt.subplots(1, 2, figsize=(9, 3.2))
for axes, rate in zip(panels, (CALM, WILD), strict=True):
    found = estimate(ones, begins(rate))
    direction = jnp.sign(found.grad)
    axes.plot(sizes, curve(value, begins(rate), direction, sizes), color=BLUE, label="trained again")
    axes.plot(
        sizes,
        found.validation_loss + sizes * jnp.vdot(found.grad, direction),
        color=ORANGE,
        ls="--",
        label="exact tangent",
    )
    axes.plot(0, found.validation_loss, "ko")
    axes.set(xlabel="s", title=f"learning rate {rate:g}", ylabel="$L_v(w + s\\,\\mathrm{sign}\\,g)$, nats")
panels[0].legend()
panels[1].set_ylim(0, 1.2)
plt.show()

# %% [markdown]
# Each blue point is a whole training run, with every weight moved up or down by $s$: up where the derivative $g$ says
# that more weight hurts, down where it says that more helps. On the left, the tangent predicts all of them. On the
# right, it is right, as the next section shows, and useless: the function turns before one could take a step.
#
# ## 2. Both tangents are right
#
# To see it, look closer, in double precision. The ratio of the central difference
# $\frac{L_v(w + s\,\mathrm{sign}\,g) - L_v(w - s\,\mathrm{sign}\,g)}{2s}$ to the slope
# $\langle g, \mathrm{sign}\,g\rangle$ must tend to 1 as $s \to 0$. That is what `certify.exact` computes.

# %%
closer = 10.0 ** np.arange(-7, -0.5, 0.5)


def double(values):
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), values)


away = {}
with jax.enable_x64(True):
    estimate_64, value_64 = tools(losses_with(exactly), double(training), double(trusted))
    precise = {
        rate: estimate_64(double(ones), begins(rate, params=double(network))).grad for rate in (CALM, 3e-2, WILD)
    }
    for rate, grad in precise.items():
        start = begins(rate, params=double(network))
        check = certify.check_finite_differences(lambda w, start=start: value_64(w, start), double(ones), grad, closer)
        away[rate] = np.abs(np.array(check.ratios) - 1)

figure, axes = plt.subplots(figsize=(6.4, 3.2))
for (rate, errors), colour in zip(away.items(), (BLUE, GREEN, ORANGE), strict=True):
    axes.loglog(closer, errors, "o-", color=colour, label=f"learning rate {rate:g}")
axes.axhline(0.05, color="grey", lw=1, ls=":", label="5 %")
axes.set(xlabel="step size s", ylabel="|ratio $-$ 1|")
axes.legend()
plt.show()

for rate, errors in away.items():
    print(f"learning rate {rate:g}: |ratio - 1| is {errors.min():.0e} at best, {errors[-2]:.0e} at s = .03")
    assert errors.min() < 1e-3
assert away[CALM][-2] < 0.01 < 0.5 < away[WILD][-2]

# %% [markdown]
# All three reach 1: the derivatives are exact. What differs is **how far the tangent reaches**: at the small rate to
# changes of 10 % and more of every weight, at the large rate to changes far smaller than anyone makes. No look at $g$
# alone tells this; one has to train again.
#
# ## 3. Three certificates and a verdict
#
# - **exact**: the ratio above, at $s = .1, .03, .01, .003$. The largest step is the one that tells regimes apart.
# - **smooth**: the cosine of the derivative at $w$ and the derivative with a random fifth of the examples removed.
#   Where the landscape is noise, it changes altogether. It costs one more estimate.
# - **predictive**: predicted against actual changes of $L_v$ when a random half of the examples is left out, as a rank
#   correlation. It costs a training run per point.
#
# `certify.verdict` makes a sentence of the first two.

# %%
rates = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def certified(start):
    """The certificates of the estimate at equal weights."""
    found = estimate(ones, start)
    again, fewer = (lambda w: value(w, start)), (lambda w: estimate(w, start).grad)
    return certify.Certificates(
        certify.check_finite_differences(again, ones, found.grad, (0.1, 0.03, 0.01, 0.003)),
        certify.metasmoothness(fewer, jax.random.key(1), ones, found.grad),
        certify.predict_removals(
            again, jax.random.key(2), ones, found.grad, float(found.validation_loss), num_retrains=32
        ),
        found.checks,
    )


by_rate = {rate: certified(begins(rate)) for rate in rates}
verdicts = {rate: certify.judge_certificates(one) for rate, one in by_rate.items()}
for rate, verdict in verdicts.items():
    print(f"{rate:<6g} {verdict}\n")

# %%
COLOURS = {"BELIEVE": GREEN, "UNDECIDED": "C5", "DO NOT BELIEVE": ORANGE}
figure, panels = plt.subplots(1, 3, figsize=(10, 3.2))
shown = (
    ("exact: ratio at s = .1", [one.finite_differences.ratios[0] for one in by_rate.values()], (0.95, 1.05)),
    ("smooth: cosine", [one.metasmoothness for one in by_rate.values()], (0.7, 1.0)),
    ("predictive: rank correlation", [one.removal_prediction.rank for one in by_rate.values()], None),
)
for axes, (title, series, band) in zip(panels, shown, strict=True):
    axes.semilogx(rates, series, color="grey", lw=1)
    for level, colour in COLOURS.items():
        chosen = [index for index, rate in enumerate(rates) if verdicts[rate].level == level]
        if chosen:
            axes.plot([rates[i] for i in chosen], [series[i] for i in chosen], "o", ms=8, color=colour, label=level)
    if band:
        axes.axhspan(*band, color=GREEN, alpha=0.12)
    axes.set(xlabel="learning rate", title=title, ylim=(-0.1, 1.2))
panels[2].legend(loc="lower left")
plt.show()

assert verdicts[1e-3].level == verdicts[3e-3].level == "BELIEVE"
assert verdicts[3e-2].level == verdicts[1e-1].level == "DO NOT BELIEVE"
growth = {rate: one.checks.growth for rate, one in by_rate.items()}
print("growth of the adjoint:", {rate: round(value, 1) for rate, value in growth.items()})

# %% [markdown]
# Shaded: where a number speaks for BELIEVE. The third panel is not used by the verdict; it is the outcome that the
# verdict is to predict, and it falls with the other two. With 32 retrains its standard error is about .18 where the
# truth is 0, so its points are rough.
#
# `growth` (how much the adjoint grows on its way back through training) is reported and never judged by: here it
# rises with the rate, but a healthy run of a language model was measured at 101 and a bad one at 1.2.
#
# ## 4. Why along the signs
#
# A finite difference divides the rounding error of $L_v$ by $s$ and compares the result to $\langle g, d\rangle$.
# Along $d = \mathrm{sign}\,g$ that is $\sum_i |g_i|$: nothing cancels. Along random signs its mean square is
# $\sum_i g_i^2$, because the cross terms average out; and by Cauchy and Schwarz $\sum |g_i|$ is larger than
# $(\sum g_i^2)^{1/2}$, by a factor of up to $\sqrt n$. The same rounding error is compared to a smaller number, and at
# times to almost nothing. The curvature, which spoils large steps, is compared to the same two numbers. So a random
# direction accuses a gradient that is right, in single precision at small steps too (left: rounding; right: curvature):

# %%
start = begins(CALM)
grad = estimate(ones, start).grad
true_error = float(np.linalg.norm(grad - np.asarray(precise[CALM])) / np.linalg.norm(precise[CALM]))
directions = [jnp.sign(grad), *jax.random.rademacher(jax.random.key(3), (20, ROWS), jnp.float32)]
steps = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4)


def off(size, direction):
    """|ratio - 1| of the central difference along a direction."""
    down, up = curve(value, start, direction, (-size, size))
    return abs((up - down) / (2 * size) / float(direction @ grad) - 1)


errors = np.array([[off(size, direction) for direction in directions] for size in steps])

figure, axes = plt.subplots(figsize=(6.4, 3.2))
axes.loglog(steps, errors[:, 1:], color="grey", lw=0.8, alpha=0.6)
axes.loglog([], [], color="grey", lw=0.8, label="20 random directions")
axes.loglog(steps, errors[:, 0], "o-", color=BLUE, label="sign(g)")
axes.axhline(true_error, color=ORANGE, ls="--", label="the gradient's own error")
axes.set(xlabel="step size s", ylabel="|ratio $-$ 1|", title="float32, learning rate 0.003")
axes.legend(loc=(0.66, 0.09), fontsize=8)
plt.show()

lengths = float(jnp.abs(grad).sum()), float(np.median([abs(d @ grad) for d in directions[1:]]))
print(f"slope along the signs {lengths[0]:.3f}, along a random direction {lengths[1]:.3f} nats (median of 20)")
print(f"the gradient is right to {true_error:.0e}; at s = .01 the signs say {errors[2, 0]:.0e},")
print(f"the median random direction {np.median(errors[2, 1:]):.0e} and the worst {errors[2, 1:].max():.0e}")
further = np.median(np.median(errors[:, 1:], axis=1) / errors[:, 0])  # one step alone is one draw of the rounding
print(f"over the six steps the median random direction is {further:.0f} times further off than the signs")
assert true_error < 1e-5 and errors[2, 0] < 2e-3 and further > 3

# %% [markdown]
# ## 5. Adam's `eps_root`
#
# Adam divides by $\sqrt{v + \texttt{eps\_root}} + \texttt{eps}$, with $v$ a mean of squared gradients. The square root
# has no derivative at 0, so where a gradient is *exactly* 0 (an embedding before its first use, LoRA's other factor
# at the start, two examples that cancel) the derivative of the run is NaN for `eps_root` = 0, the usual default:

# %%
tug = jnp.array([1.0, -1.0])  # two rows that pull the one parameter apart with equal force


def pulled(params, data):
    return 0.5 * (params - data) ** 2


def one_step(w, eps_root):
    adam = optax.adam(0.1, eps_root=eps_root)
    grad = jax.grad(lambda params: (w * pulled(params, tug)).mean())(jnp.zeros(()))
    return optax.apply_updates(jnp.zeros(()), adam.update(grad, adam.init(jnp.zeros(())))[0])


naive = jax.grad(lambda w: pulled(one_step(w, 0.0), 1.0))(jnp.ones(2))
print("plain jax.grad:", naive)
assert jnp.isnan(naive).all()
try:
    hypergradient(pulled, jnp.zeros(()), tug, jnp.ones(1), optimizer=optax.adam(0.1), steps=1)
except ValueError as refusal:
    print("hypergradient:", refusal)

# %% [markdown]
# A tiny `eps_root` makes the derivative finite; it does not make the landscape better. Adam's first step is
# $-\eta\, g/(\sqrt{g^2 + \texttt{eps\_root}} + \texttt{eps})$: nearly the *sign* of $g$, with a slope of
# $1/\sqrt{\texttt{eps\_root}}$ at 0. Where two examples cancel, the validation loss as a function of one weight is a
# step, and its exact derivative is the slope of the step's edge:

# %%
one_weight = jnp.linspace(0.8, 1.2, 401)
figure, axes = plt.subplots(figsize=(6.4, 3.2))
edges = {}
for eps_root, colour in zip((1e-12, 1e-4, 1e-2), (ORANGE, GREEN, BLUE), strict=True):
    ends = jax.vmap(lambda w, eps_root=eps_root: pulled(one_step(jnp.array([w, 1.0]), eps_root), 1.0))(one_weight)
    axes.plot(one_weight, ends, color=colour, label=f"eps_root = {eps_root:g}")
    slope = hypergradient(
        pulled, jnp.zeros(()), tug, jnp.ones(1), optimizer=optax.adam(0.1, eps_root=eps_root), steps=1
    ).grad
    ratio = certify.check_finite_differences(
        lambda w, eps_root=eps_root: float(pulled(one_step(w, eps_root), 1.0)), jnp.ones(2), slope, (0.1, 1e-6)
    ).ratios[0]
    edges[eps_root] = ratio
    print(f"eps_root {eps_root:<6g} entry of row 1: {float(slope[0]):11.4g} nats, ratio at s = .1: {ratio:.1g}")
axes.set(xlabel="weight of row 1 (row 2 has weight 1)", ylabel="$L_v$ after one Adam step, nats")
axes.legend()
plt.show()
assert edges[1e-12] < 2e-5 and edges[1e-2] > 0.7

# %% [markdown]
# With `eps_root` = 1e-12 the hypergradient is exact, enormous, and wrong by a factor of $10^5$ as a forecast: the
# certificate says so. A larger `eps_root` rounds all edges off. On the network, at a rate that was not to be believed:

# %%
softer = {eps_root: certified(begins(3e-2, eps_root)) for eps_root in (1e-12, 1e-4, 1e-2)}
for eps_root, one in softer.items():
    print(
        f"eps_root {eps_root:<6g} ratio {one.finite_differences.ratios[0]:.3f}, smooth {one.metasmoothness:.2f}, "
        f"rank {one.removal_prediction.rank:.2f}: {certify.judge_certificates(one).level}"
    )
assert softer[1e-2].metasmoothness > softer[1e-4].metasmoothness > softer[1e-12].metasmoothness
assert certify.judge_certificates(softer[1e-2]).level == "BELIEVE" != certify.judge_certificates(softer[1e-12]).level

# %% [markdown]
# That is why "raise eps_root" stands among the verdict's remedies. It is not free: it is another optimiser, closer to
# plain gradient descent, and the model is trained with it too.
#
# ## 6. Precision
#
# An H100 multiplies float32 as TF32 unless told otherwise: factors keep 10 bits after the leading one instead of 23; a
# TPU takes bfloat16, 7 bits. A CPU has neither, so **they are emulated here**: both factors of every product of the
# network are rounded to so many bits, and by the chain rule what flows back through a product is rounded as well. Sums
# stay float32, as in the hardware.

# %%


def rounded(bits):
    def short(a):
        return jax.lax.reduce_precision(a, exponent_bits=8, mantissa_bits=bits)

    return lambda a, b: short(a) @ short(b)


few = {name: tools(losses_with(rounded(bits)), training, trusted) for name, bits in (("TF32", 10), ("bfloat16", 7))}
fine = np.linspace(-0.004, 0.004, 81)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
entries = {}
for (name, (estimated, retrained)), colour in zip(
    ({"float32": (estimate, value)} | few).items(), (BLUE, GREEN, ORANGE), strict=True
):
    entries[name] = {rate: estimated(ones, begins(rate)).grad for rate in (CALM, 3e-2)}
    seen = curve(retrained, start, jnp.sign(grad), fine)
    left.plot(fine, 1e3 * (seen - seen[40]), ".-", ms=3, lw=0.8, color=colour, label=name)
    check = certify.check_finite_differences(
        lambda w, retrained=retrained: retrained(w, start), ones, entries[name][CALM]
    )
    right.semilogx(check.steps, check.ratios, "o-", color=colour, label=name)
left.set(xlabel="s", ylabel="change of $L_v$, thousandths of a nat", title="the landscape, close by")
left.locator_params(axis="x", nbins=5)
left.legend()
right.set(xlabel="step size s", ylabel="ratio", title="certificate: exact")
plt.show()

# %%
against = {}
for name in few:
    for rate, own in entries[name].items():
        exact = entries["float32"][rate]
        against[name, rate] = float(tree.norm(own - exact) / tree.norm(exact))
        print(f"{name:8s} at rate {rate:<5g}: entries {against[name, rate]:.1%} away from float32's")
assert against["TF32", CALM] < 0.005 < against["bfloat16", 3e-2]

# %% [markdown]
# On the left, rounding makes the landscape a rough road: each point is a training run whose products were rounded
# differently. The derivative does not see the potholes; a central difference does, once $s$ is small enough to fit into
# one. So in bfloat16 only the large steps of the certificate mean anything, and the hypergradients are off by what the
# rough road costs, more at a larger rate.
#
# Products are not all. If parameters and optimiser are *stored* in bfloat16, a step smaller than half of the last of
# their 8 bits is lost, and even the constants of Adam do not survive:

# %%
print("0.999 in bfloat16:", float(jnp.bfloat16(0.999)))
assert float(jnp.bfloat16(0.999)) == 1.0  # nu = 0.999 nu + 0.001 g^2 forgets nothing any more


def brief(values):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), values)


adamw = optax.adamw(1e-3, eps_root=1e-12)
estimate_16, _ = tools(losses_with(exactly), brief(training), brief(trusted), adamw)
stored = estimate_16(ones, init_train_state(adamw, brief(network))).grad
exact = estimate(ones, begins(1e-3)).grad
loss_of_storage = float(tree.norm(stored - exact) / tree.norm(exact))
print(f"all stored in bfloat16, rate 0.001: entries {loss_of_storage:.0%} away from float32's")
assert loss_of_storage > 0.1

# %% [markdown]
# This is why the package traces every step that it differentiates at the highest precision of products, whatever the
# default of the device, and trains in float32 (a frozen base model may be stored shorter). It can be read from the
# traced program:

# %%
problem = weighted(lambda params, fixed, batch: losses_with(exactly)(params, batch["data"]))
step, batch = train_step(problem, optimizer), full_batch_stream(training).batch(0)
program = str(jax.make_jaxpr(step.forward)(begins(CALM), step.gather(ones, batch), None, batch))
products, highest = program.count("dot_general["), program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")
print(f"{highest} of {products} products of a training step are at the highest precision")
assert highest == products > 0

# %% [markdown]
# ## What to take away
#
# - Exact is a property of the number, useful is a property of the landscape. Train again before you believe.
# - Lower the learning rate (or raise `eps_root`) until the verdict is BELIEVE; then the tangent reaches as far as the
#   changes that you want to make.
# - Check along the signs of the gradient, at the size of those changes, in float32 at the least.
# - `bilevel-jax select` computes the certificates for you and puts the verdict on top of its report.
