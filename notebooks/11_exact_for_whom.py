# %% [markdown]
# # Exact for whom?
#
# A hypergradient $g_i = dL_v/dw_i$ is exact: weight example $i$ a little more, train again, and the validation loss
# moves by what $g_i$ says. But $L_v$ is the mean loss on a handful of validation examples, and nobody trains a model
# for *those*. What do the same numbers say about the next example, which is in no file yet?
#
# | section | question | tool |
# |---|---|---|
# | 1 | how much of an exact number is the luck of the validation set? | the entries of thousands of other examples |
# | 2 | can one know without those thousands? | two random halves of V: `bj.certify.measure_reliability` |
# | 3 | and after the weights were learned from V? | a dev set, because halves of V then say too much |
# | 4 | what can be done about it? | pooling what examples share: `bj.weightings.pool_contributions` |
# | 5 | what does not help? | four ideas that sound good |
# | 6 | and the next *training* example? | a rater: weights as a function of features, `bj.weightings.rater` |
#
# You need the first notebook, and what a variance is. The task is that of notebook 4: ten classes in 50 dimensions,
# each a Gaussian ball; half of the training labels are wrong. The validation labels are right, but there are few.

# %%
# Parameters: change these and run the page again; a failing assert says what the change broke.
CLASSES, DIMENSIONS, RADIUS = 10, 50, 4.0  # of the data: Gaussian balls of variance 1, so far from the origin
EXAMPLES, OTHERS = 600, 3000  # training examples, half of them with a wrong label; validation examples of section 1
SIZES = (16, 64, 256)  # validation examples
DRAWS = 4  # validation sets of each size in sections 1 and 2
STEPS, RATE = 40, 0.5  # of a training run
OUTER_STEPS, OUTER_RATE = 10, 0.4  # steps of the weights, and the rms of the first step in logits; it falls to 0
DEV = 100  # examples of the dev set
FEW = 64  # validation examples of sections 4 to 6
SEED = 0

# %%
import os

os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # the model is tiny: compiling is what takes time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import bilevel_jax as bj

plt.style.use("notebooks.mplstyle")
BLUE, ORANGE, GREEN, PINK = (f"C{number}" for number in range(4))
random = np.random.default_rng(SEED)
centres = random.normal(size=(CLASSES, DIMENSIONS))
centres *= RADIUS / np.linalg.norm(centres, axis=1, keepdims=True)


def draw(number):
    """Examples with right labels."""
    y = random.integers(0, CLASSES, number)
    return jnp.asarray(centres[y] + random.normal(size=(number, DIMENSIONS)), jnp.float32), jnp.asarray(y)


def draw_with_wrong_labels(number):
    """Half of the examples with another label, and which are right."""
    x, y = draw(number)
    is_good = random.permutation(number) < number // 2
    return (x, jnp.where(is_good, y, (y + random.integers(1, CLASSES, number)) % CLASSES)), is_good


def losses(params, frozen, batch):
    x, y = batch["data"]
    return optax.softmax_cross_entropy_with_integer_labels(x @ params["w"] + params["b"], y)


train, is_good = draw_with_wrong_labels(EXAMPLES)
others, uniform = draw(OTHERS), jnp.ones(EXAMPLES)
start = {"w": jnp.zeros((DIMENSIONS, CLASSES)), "b": jnp.zeros(CLASSES)}
solver = bj.unroll(bj.weighted(losses), optax.sgd(RATE), steps=STEPS)

# %% [markdown]
# ## 1. An exact number about sixteen examples
#
# First the certificates of the other pages, for a validation set of 16: retraining with changed weights moves $L_v$ as
# the hypergradient says.

# %%
sixteen = draw(16)
solution = solver.run(start, uniform, train, sixteen)
differences = bj.certify.check(solver, solution, train, sixteen, num_retrains=0).finite_differences
for size, ratio in zip(differences.steps, differences.ratios, strict=True):
    print(f"every weight changed by {size:<6g} actual / predicted change of L_v {ratio:.4f}")
assert abs(differences.ratios[-1] - 1) < 0.01, "the hypergradient is not the derivative"

# %% [markdown]
# Exact. Now draw three thousand *other* validation examples of the same kind, take their hypergradient through the very
# same training run, and lay the two beside each other, entry by entry. (Entries are weight times hypergradient: what a
# step of the weights follows. Their mean is taken away, because with a softmax over examples only differences count.)


# %%
@jax.jit
def entries_of(weights, valid):
    """(centred w * g, L_v)."""
    solution = solver.run(start, weights, train, valid, throw=False)
    entries = weights * solution.grad
    return entries - entries.mean(), solution.value


def correlation(a, b):
    return float(jnp.vdot(a, b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b)))


validation_sets = {size: [draw(size) for _ in range(DRAWS)] for size in SIZES}
of_others, loss_of_others = entries_of(uniform, others)
truth = {
    size: [correlation(entries_of(uniform, valid)[0], of_others) for valid in valids]
    for size, valids in validation_sets.items()
}
fig, axes = plt.subplots(1, len(SIZES), figsize=(9, 3), sharey=True)
for ax, size in zip(axes, SIZES, strict=True):
    of_few, _ = entries_of(uniform, validation_sets[size][0])
    for mask, color, label in ((is_good, BLUE, "right label"), (~is_good, ORANGE, "wrong label")):
        ax.scatter(EXAMPLES * of_few[mask], EXAMPLES * of_others[mask], s=5, color=color, label=label)
    ax.set(title=f"{size} validation examples", xlabel="entry by them")
axes[0].set_ylabel(f"entry by {OTHERS:,} others")
axes[0].legend()
fig.suptitle("The same training run, judged by different examples (entries times N, nats)")
plt.show()
for size in SIZES:
    print(f"|V| = {size:<4} correlation with the others: " + "  ".join(f"{value:.2f}" for value in truth[size]))
assert np.mean(truth[SIZES[0]]) < np.mean(truth[SIZES[-1]]), "more validation examples should speak better for others"

# %% [markdown]
# Each cloud is made of exact derivatives. With 16 validation examples most of what they show is the luck of the draw:
# the hypergradient is a *mean over V* of derivatives, one for each validation example, and a mean of 16 has a standard
# error. Nothing in the certificates of a single V can show it, since they ask about that V.
#
# ## 2. Known without the three thousand
#
# Write $g = \frac1n\sum_{j} g^{(j)}$ for the mean over validation examples. Split V at random into halves A and B, and
# let $d = (g_A - g_B)/2$. Whatever the true entries are, they cancel in $d$; what is left has the size of the noise:
#
# $$ \mathbb E\,|d|^2 \;=\; \mathbb E\,|g - \mathbb E g|^2, \qquad
# \text{noise} = \frac{|d|^2}{|g|^2}, \qquad \text{reliability} = \sqrt{\max(0, 1 - \text{noise})}. $$
#
# The last is the correlation with $\mathbb E g$, the entries of an endless validation set: if $g = s + e$ with $e$
# independent of $s$, then $\cos(g, s) \approx |s|/|g| = \sqrt{1 - |e|^2/|g|^2}$. It costs one more adjoint in the
# backward pass that is made anyway. One draw of halves is noisy, so we take two and average the noise.


# %%
def halves(valid, seed):
    signs = bj.certify.validation_halves(len(valid[1]), seed)
    return [tuple(leaf[half] for leaf in valid) for half in (np.flatnonzero(signs > 0), np.flatnonzero(signs < 0))]


def measure_by_halves(weights, valid, num_draws=2):
    """The reliability of the entries at these weights, by halves of the validation set that they were made with."""
    entries, _ = entries_of(weights, valid)
    draws = []
    for seed in range(num_draws):
        first, second = (entries_of(weights, half)[0] for half in halves(valid, seed))
        draws.append(bj.certify.measure_reliability(uniform, entries, (first - second) / 2, len(valid[1])))
    return bj.certify.average_reliability(draws)


foretold = {size: [measure_by_halves(uniform, valid) for valid in valids] for size, valids in validation_sets.items()}
fig, ax = plt.subplots(figsize=(4, 3.6))
for size, color in zip(SIZES, (BLUE, ORANGE, GREEN), strict=True):
    ax.plot([reliability.value for reliability in foretold[size]], truth[size], "o", color=color, label=f"|V| = {size}")
ax.plot([0, 1], [0, 1], color="0.6", lw=1)
ax.set(xlabel="reliability, from V alone", ylabel="correlation with 3,000 others", xlim=(0, 1), ylim=(0, 1))
ax.legend()
plt.show()
for size in SIZES:
    print(
        f"|V| = {size:<4} foretold {np.mean([one.value for one in foretold[size]]):.2f}, measured "
        f"{np.mean(truth[size]):.2f};  {foretold[size][0]}"
    )
    assert abs(np.mean([one.value for one in foretold[size]]) - np.mean(truth[size])) < 0.12, "not foretold"

# %% [markdown]
# ## 3. A validation set can be used up
#
# Now learn the weights: logits $h$, $w = N\,\mathrm{softmax}(h)$, normalised steps, every training from the same start.
# At each step four numbers:
#
# - the loss on V, and on the three thousand others;
# - the reliability by halves of V, as above;
# - the reliability **by a dev set** of 100, which took no part in learning: with A and B its halves,
#   $$ \frac{\langle c_V,\; \tfrac12(c_A + c_B)\rangle}{|c_V|\,\sqrt{\langle c_A, c_B\rangle}}, $$
#   where $c$ are centred entries. The noise of A is independent of that of B and of V, so numerator and the square
#   under the root have the expectation that an endless dev set would give;
# - the truth: the correlation with the others.


# %%
def measure_by_dev(weights, valid, dev, num_draws=4):
    """The reliability of the entries at these weights, by halves of other examples; nan where they show none."""
    entries, _ = entries_of(weights, valid)
    shared, energy = 0.0, 0.0
    for seed in range(num_draws):
        first, second = (entries_of(weights, half)[0] for half in halves(dev, seed))
        shared += float(jnp.vdot(entries, first + second)) / 2 / num_draws
        energy += float(jnp.vdot(first, second)) / num_draws
    return shared / (float(jnp.linalg.norm(entries)) * energy**0.5) if energy > 0 else float("nan")


def step_size(step):
    return OUTER_RATE * (1 - step / OUTER_STEPS)


def move(logits, direction, step, scale=None):
    """A step of the logits with the rms that its place in the loop gives it; the scale is the direction's own rms."""
    scale = jnp.sqrt(jnp.mean(direction**2)) if scale is None else scale
    return logits - step_size(step) * direction / scale


def learn_and_watch(valid, dev):
    logits, rows = jnp.zeros(EXAMPLES), []
    for step in range(OUTER_STEPS):
        weights = EXAMPLES * jax.nn.softmax(logits)
        entries, loss = entries_of(weights, valid)
        entries_by_others, loss_by_others = entries_of(weights, others)
        by_halves = measure_by_halves(weights, valid, num_draws=1).value
        rows.append(
            (
                loss,
                loss_by_others,
                by_halves,
                measure_by_dev(weights, valid, dev),
                correlation(entries, entries_by_others),
            )
        )
        logits = move(logits, entries, step)
    return np.array(rows, float)


watched = {size: learn_and_watch(validation_sets[size][0], draw(DEV)) for size in SIZES}
fig, axes = plt.subplots(2, len(SIZES), figsize=(10, 5.4), sharex=True, sharey="row")
for (above, below), size in zip(axes.T, SIZES, strict=True):
    rows = watched[size]
    above.plot(rows[:, 0], color=BLUE, label="V")
    above.plot(rows[:, 1], color=ORANGE, label="3,000 others")
    above.set(title=f"{size} validation examples")
    below.axhline(0, color="0.7", lw=1)
    below.plot(rows[:, 4], color="0.2", lw=2.5, label="truth")
    below.plot(rows[:, 2], "--", color=PINK, label="by halves of V")
    below.plot(rows[:, 3], "o-", color=GREEN, ms=4, label="by a dev set")
    below.set(xlabel="step of the weights", ylim=(-1, 1.05))
axes[0, 0].set_ylabel("loss, nats")
axes[1, 0].set_ylabel("reliability")
axes[0, 0].legend()
axes[1, 0].legend(loc="lower left")
plt.show()
for size in SIZES:
    late = watched[size][OUTER_STEPS // 2 :]
    print(
        f"|V| = {size:<4} last half of the steps: L_v {late[:, 0].mean():.3f}, others {late[:, 1].mean():.3f}; "
        f"reliability by halves {late[:, 2].mean():.2f}, by dev {np.nanmean(late[:, 3]):.2f}, "
        f"truth {late[:, 4].mean():.2f}"
    )
few_late = watched[SIZES[0]][OUTER_STEPS // 2 :]
assert few_late[:, 2].mean() > few_late[:, 4].mean() + 0.3, "halves of a used-up V should say too much"

# %% [markdown]
# Three lessons. Learning uses V up: its loss falls to almost nothing, and the gradients that are left are about V's own
# quirks. Halves of V notice that at first, when they fall to 0; but once V is fitted its two halves, which were both
# learned from, agree with each other again, and with 16 examples they say .5 and more where the truth is below 0. A dev
# set stays with the truth, for the same price. (So `select` measures by dev at learned weights, stops there, and
# without dev says that its number is an upper bound.) And the loss on others can *rise* while every single number
# remains an exact derivative.
#
# ## 4. Pooling: what examples share
#
# Six hundred numbers are learned from a few dozen validation examples. But wrong labels have something in common: their
# loss is high, and it is high under a model of V alone. Split the contributions $c$ of a step into a part that is a
# *function of features* and a rest, and let each count as far as the halves of V agree on it:
#
# $$ c = f(\text{features}) + \text{rest}, \qquad \text{direction} = \rho_f\, f + \rho_r\, \text{rest}, \qquad
# \rho = 1 - \frac{|(A - B)/2|^2}{|(A + B)/2|^2}. $$
#
# For noise that is independent of the signal, $\rho$ is the factor of least squared error (empirical Bayes). The
# features are two curves over ranks: of the loss after one plain training, and of the loss under a model of V. The
# features that judge half A come from a model of half B, or A would recognise its own examples in them.


# %%
def loss_under_model_of(valid):
    """Of each training example, nats: after a training on validation examples alone."""
    params = solver.run(start, jnp.ones(len(valid[1])), valid, valid).params
    return losses(params, (), {"data": train})


plain_loss = losses(solver.run(start, uniform, train, sixteen).params, (), {"data": train})


def make_features(valid):
    """Curves over the ranks of two losses, for half A, half B and all of the validation set."""
    curves = [
        np.concatenate([bj.weightings.rank_curves(plain_loss), bj.weightings.rank_curves(loss_under_model_of(part))], 1)
        for part in (*reversed(halves(valid, 0)), valid)
    ]
    return bj.weightings.PoolingFeatures(jnp.stack(curves[:2]), jnp.asarray(curves[2]))


def pool(parts):
    return bj.weightings.pool_contributions(parts, bj.weightings.measure_part_reliability(parts, parts))


def learn(valid, direction_of):
    """(loss on others, correlation of the direction with the entries of others) at each step of the weights.

    direction_of(parts, memory) -> (direction, memory). The step has the rms of the place in the loop over that of the
    *unshrunk* contributions, so that a direction that trusts little moves little.
    """
    features, halves_of_valid = make_features(valid), halves(valid, 0)
    logits, memory, rows = jnp.zeros(EXAMPLES), None, []
    for step in range(OUTER_STEPS + 1):
        weights = EXAMPLES * jax.nn.softmax(logits)
        by_half = jnp.stack([entries_of(weights, half)[0] for half in halves_of_valid])
        entries_by_others, loss_by_others = entries_of(weights, others)
        parts = bj.weightings.split_contributions(features, by_half)
        direction, memory = direction_of(parts, memory)
        rows.append((loss_by_others, correlation(direction, entries_by_others)))
        logits = move(logits, direction, step, jnp.sqrt(jnp.mean(by_half.mean(0) ** 2)))
    return np.array(rows, float)


def each_for_itself(parts, memory):
    return (parts.shared + parts.own).mean(0), memory


def pooled(parts, memory):
    return pool(parts), memory


tried = [draw(FEW) for _ in range(DRAWS)]
runs = {
    "each example for itself": np.array([learn(valid, each_for_itself) for valid in tried]),
    "pooled": np.array([learn(valid, pooled) for valid in tried]),
}
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
for (name, rows), color in zip(runs.items(), (BLUE, GREEN), strict=True):
    left.plot(rows[:, :, 0].mean(0), "o-", ms=4, color=color, label=name)
    right.plot(rows[:, :, 1].mean(0), "o-", ms=4, color=color, label=name)
oracle = float(entries_of(2.0 * jnp.asarray(is_good), others)[1])
left.axhline(oracle, color="0.5", lw=1, ls="--")
left.text(0, oracle, " the right examples alone", va="bottom", color="0.4")
left.set(xlabel="step of the weights", ylabel=f"loss on {OTHERS:,} others, nats", ylim=(0, None))
right.set(xlabel="step of the weights", ylabel="correlation of the step with theirs")
left.legend()
fig.suptitle(f"{FEW} validation examples; mean of {DRAWS} validation sets")
plt.show()


def final_losses(rows):
    """The loss on others with the last weights, for each validation set."""
    return rows[:, -1, 0]


for name, rows in runs.items():
    print(
        f"{name:<26} loss on others {final_losses(rows).mean():.3f}  (each validation set: "
        + "  ".join(f"{value:.3f}" for value in final_losses(rows))
        + ")"
    )
print(f"{'the right examples alone':<26} loss on others {oracle:.3f}")
assert (final_losses(runs["pooled"]) < final_losses(runs["each example for itself"])).all(), "pooling should help here"

# %% [markdown]
# The same backward passes, the same validation examples; only what is *believed* of them differs. The step of the right
# panel keeps its correlation with what the others would say, because a curve over 600 ranks is fitted by 600 entries at
# once, and their noise averages out.
#
# ## 5. What does not help
#
# Ideas that sound as good, tried in the same loop with the same halves:
#
# - **shrink each entry by its own noise**, by $1 - d_i^2 / c_i^2$;
# - **sign agreement**: move only where both halves agree on the sign;
# - **momentum**: average the directions of the steps;
# - **early stopping**, at the best of the steps (chosen, unfairly, by the others themselves).


# %%
def shrunk(parts, memory):
    by_half = parts.shared + parts.own
    mean, noise = by_half.mean(0), ((by_half[0] - by_half[1]) / 2) ** 2
    return mean * jnp.maximum(0, 1 - noise / mean**2), memory


def sign_agreement(parts, memory):
    by_half = parts.shared + parts.own
    return jnp.where(by_half[0] * by_half[1] > 0, by_half.mean(0), 0), memory


def momentum(parts, memory):
    mean = (parts.shared + parts.own).mean(0)
    average = mean if memory is None else 0.7 * memory + 0.3 * mean
    return average, average


for name, direction_of in (
    ("shrunk by its own noise", shrunk),
    ("sign agreement", sign_agreement),
    ("momentum", momentum),
):
    runs[name] = np.array([learn(valid, direction_of) for valid in tried])
baseline = final_losses(runs["each example for itself"])
stopped = runs["each example for itself"][:, :, 0].min(1)
print(f"{'each example for itself':<26} {baseline.mean():.3f}")
print(f"{'  stopped at the best step':<26} {stopped.mean():.3f}")
for name in list(runs)[2:]:
    print(f"{name:<26} {final_losses(runs[name]).mean():.3f}")
print(f"{'pooled':<26} {final_losses(runs['pooled']).mean():.3f}")
for name in list(runs)[2:]:
    assert final_losses(runs["pooled"]).mean() < final_losses(runs[name]).mean(), f"{name} did better than pooling"
assert final_losses(runs["pooled"]).mean() < stopped.mean(), "early stopping did better than pooling"

# %% [markdown]
# Shrinking and sign agreement help a little, momentum does harm, and none comes near pooling, not even early stopping
# with knowledge of the answer. All of them look at one example at a time: an entry in the one half and in the other are
# two numbers, which cannot tell whether they agree by truth or by luck. What helps is to ask the same of many examples.
#
# ## 6. The next training example
#
# A weight for each example dies with the data set. But the curve of section 4 is a *function*, and can be read at
# examples that were not there when it was learned. `bj.weightings.rater` makes it the outer variable: $w = N\,
# \mathrm{softmax}(\beta \cdot \phi)$, with a step that is normalised in logits, so that one learning rate suits any
# number and any scale of features. Here $\phi$ is the loss after a plain training, the loss under a model of V, and
# their difference.


# %%
def rate_features(examples, models):
    plain, of_valid = (np.asarray(losses(params, (), {"data": examples})) for params in models)
    return np.stack([np.log1p(plain), np.log1p(of_valid), np.log1p(plain) - np.log1p(of_valid)], 1)


def learn_rater(valid):
    """The rater's coefficients, the two models that make its features, and the loss on others that it reaches."""
    models = [
        solver.run(start, uniform, train, valid).params,
        solver.run(start, jnp.ones(len(valid[1])), valid, valid).params,
    ]
    weighting = bj.weightings.rater(rate_features(train, models))
    variable = weighting.init()
    for step in range(OUTER_STEPS):
        grad = solver.run(start, weighting.weights(variable), train, valid).grad
        by_variable = bj.weightings.weighting_vjp(weighting, variable, grad)
        variable = weighting.step(variable, by_variable, step_size(step), 2.0)
    return variable.coefficients, models, float(entries_of(weighting.weights(variable), others)[1])


def area_under_curve(scores, is_positive):
    ranks = np.argsort(np.argsort(scores))
    positives = is_positive.sum()
    below = ranks[is_positive].sum() - positives * (positives - 1) / 2
    return below / (positives * (len(scores) - positives))


unseen, unseen_is_good = draw_with_wrong_labels(OTHERS)
for valid in tried:
    coefficients, models, loss = learn_rater(valid)
    seen_area, unseen_area = (
        area_under_curve(rate_features(examples, models) @ np.asarray(coefficients), mask)
        for examples, mask in ((train, is_good), (unseen, unseen_is_good))
    )
    print(
        f"loss on others {loss:.3f}; right above wrong labels (AUC): {seen_area:.3f} of the {EXAMPLES} examples it was "
        f"learned on, {unseen_area:.3f} of {OTHERS:,} it has never seen"
    )
    assert unseen_area > 0.9, "the rater does not extend to unseen examples"

# %% [markdown]
# No gradient was computed for the unseen examples: two forward passes each. Here the rater, which has no freedom at all
# beside its three features, is even better than pooling, which keeps a part for each example. The command `score`
# does this with the rater that a `select` run saved, for as many examples as there are.
#
# **What to take along.** An exact hypergradient is a statement about one validation set. Before weights are learned,
# its halves say how far that reaches; afterwards only examples that took no part can. With few validation examples,
# learn what examples share rather than a number for each.
