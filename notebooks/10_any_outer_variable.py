# %% [markdown]
# # Anything can be the outer variable
#
# The other pages learn one number for each training example. The same solvers differentiate the validation loss by
# *whatever* training depends on. This page does four things that people look for under other names:
#
# | section | outer variable | known as |
# |---|---|---|
# | 1 | a decay for each parameter, the size of an augmentation, the learning rate | hyperparameter optimization |
# | 2 | the start of training, for many tasks at once | meta-learning, MAML |
# | 3 | the training examples themselves | dataset distillation |
# | 4 | a network that rates training examples | learning to reweight, data rating |
#
# In each of them an *inner* training run ends at parameters $\theta_T(h)$, and
# $$ \min_h\; L_v(\theta_T(h)), \qquad \theta_{t+1} = \theta_t - \text{update}(\nabla_\theta\,
# \text{inner}(\theta_t, h)). $$
# `bj.unroll` gives $dL_v/dh$, exact for the run that happened, and is a pure function: jit, vmap and scan go around it.
# You need: JAX, optax, and what a validation set is. [The guide](../bilevel_jax/core/GUIDE.md) has recipes for flax,
# devices, and the names that other libraries use.
#
# **What is whose.** The four problems are classics: hyperparameters by reversed training (Maclaurin et al. 2015), MAML
# (Finn et al. 2017), dataset distillation (Wang et al. 2018), learned ratings (Ren et al. 2018, Shu et al. 2019). The
# toy problems here are ours, made so that the right answer is known.

# %%
# Parameters: change these and run the page again; a failing assert says what the change broke.
OUTER_STEPS = 80  # of the search in section 1
STEPS = 150  # of training in section 1
USEFUL, USELESS = 2, 6  # inputs of section 1
TRUSTED = 256  # validation examples of section 1
TASKS, SHOTS, INNER_STEPS, META_STEPS = 16, 10, 5, 600  # of section 2: tasks a step, examples, steps of training
DISTILLED = 12  # examples that stand for all in section 3; even
WRONG = 0.4  # share of wrong labels of the careless annotator in section 4, below .5
SEED = 0

# %%
import os
from functools import partial

os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # the models are small: compiling is what takes time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import bilevel_jax as bj

plt.style.use("notebooks.mplstyle")
BLUE, ORANGE, GREEN, PINK = (f"C{number}" for number in range(4))


def network(key, *sizes):
    """Weights and biases of a network with tanh units."""
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"w": jax.random.normal(key, (a, b)) / a**0.5, "b": jnp.zeros(b)}
        for key, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def predict(params, x):
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return (x @ params[-1]["w"] + params[-1]["b"])[:, 0]


# %% [markdown]
# ## 1. Many hyperparameters, searched inside one jit
#
# A regression with 8 inputs, of which 2 matter, and those only by their distance from 0: the answer does not change if
# the two are *rotated*. With 32 training examples a network overfits. Three kinds of hyperparameters can help:
#
# - a decay for **each** of the network's parameters (161 numbers; no grid searches that);
# - an augmentation that rotates the two inputs by a random angle of learned size;
# - the learning rate.
#
# Whatever the loss reads goes into `hyper`. The learning rate belongs to the optimizer: `optax.inject_hyperparams`
# makes it a leaf of the optimizer's state, and its derivative is in `solution.grad_optimizer`. The whole search, 80
# training runs and the steps between them, is one `lax.scan`.

# %%
keys = jax.random.split(jax.random.key(SEED), 8)


def rows(key, count):
    x = jax.random.normal(key, (count, USEFUL + USELESS))
    return x, jnp.sin(2 * jnp.linalg.norm(x[:, :USEFUL], axis=1))


train, valid, test = rows(keys[0], 32), rows(keys[1], TRUSTED), rows(keys[2], 1000)
start = network(keys[3], USEFUL + USELESS, 16, 1)


def mean_loss(params, data):
    return 0.5 * jnp.mean((predict(params, data[0]) - data[1]) ** 2)


def rotate(x, angle):
    a, b = x[:, 0], x[:, 1]
    c, s = jnp.cos(angle), jnp.sin(angle)
    return x.at[:, 0].set(c * a - s * b).at[:, 1].set(s * a + c * b)


def inner(params, hyper, frozen, batch):
    x, y = batch["data"]
    angle = jnp.exp(hyper["log_angle"]) * jax.random.normal(batch["key"], (len(y),))
    decay = optax.tree.sum(jax.tree.map(lambda h, p: jnp.sum(jnp.exp(h) * p**2), hyper["log_decay"], params))
    return mean_loss(params, (rotate(x, angle), y)) + decay


problem = bj.problem(inner, lambda params, frozen, batch: mean_loss(params, batch["data"]))


def run(hyper, log_rate, key):
    """One training run with the derivatives of L_v by all hyperparameters."""
    optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=jnp.exp(log_rate), eps_root=1e-8)
    solution = bj.unroll(problem, optimizer, steps=STEPS).run(start, hyper, train, valid, key=key)
    by_log_rate = solution.grad_optimizer["learning_rate"] * jnp.exp(log_rate)
    return solution, (solution.grad, by_log_rate)


@partial(jax.jit, static_argnames="searched")
def search(hyper, log_rate, searched=("log_angle", "log_decay", "rate")):
    outer_optimizer = optax.adam(0.15)

    def outer_step(carry, key):
        (hyper, log_rate), state = carry
        solution, (grad, rate_grad) = run(hyper, log_rate, key)
        grad = {name: optax.tree.scale(float(name in searched), part) for name, part in grad.items()}
        updates, state = outer_optimizer.update((grad, rate_grad * ("rate" in searched)), state)
        record = solution.value, mean_loss(solution.params, test), log_rate, hyper["log_angle"], solution.status
        return (optax.apply_updates((hyper, log_rate), updates), state), record

    first = hyper, log_rate
    carry = first, outer_optimizer.init(first)
    (found, _), record = jax.lax.scan(outer_step, carry, jax.random.split(keys[4], OUTER_STEPS))
    return found, record


first_hyper = {"log_angle": jnp.array(-1.0), "log_decay": jax.tree.map(lambda p: jnp.full_like(p, -7.0), start)}
first_log_rate = jnp.log(0.03)
(found, found_log_rate), record = search(first_hyper, first_log_rate)
value, test_loss, log_rates, log_angles, status = map(np.asarray, record)
assert (status == bj.Status.OK).all(), "a run diverged or lost its derivative: lower the first learning rate"
print(f"validation {value[0]:.3f} -> {value[-1]:.3f} nats, test {test_loss[0]:.3f} -> {test_loss[-1]:.3f} nats")
print(f"learning rate {np.exp(log_rates[0]):.3f} -> {np.exp(log_rates[-1]):.3f}")
print(f"angle {np.exp(log_angles[0]):.2f} -> {np.exp(log_angles[-1]):.2f} radians")

# %%
strengths = np.asarray(jnp.exp(found["log_decay"][0]["w"].mean(1)))  # the geometric mean over units
figure, axes = plt.subplots(1, 3, figsize=(10, 3))
axes[0].plot(value, color=BLUE, label="validation")
axes[0].plot(test_loss, color=ORANGE, label="test")
axes[0].set(title="Loss after training, nats", xlabel="outer step", ylim=(0, None))
axes[0].legend()
axes[1].bar(range(USEFUL), strengths[:USEFUL], color=GREEN, label="matters")
axes[1].bar(range(USEFUL, USEFUL + USELESS), strengths[USEFUL:], color=PINK, label="does not")
axes[1].set(title="Learned decay of an input's weights", xlabel="input", yscale="log")
axes[1].set_ylim(strengths.min() / 2, 5 * strengths.max())
axes[1].legend(loc="upper left")
axes[2].plot(np.exp(log_angles), color=BLUE, label="angle, radians")
axes[2].plot(100 * np.exp(log_rates), color=ORANGE, label="100 x learning rate")
axes[2].set(title="Augmentation and learning rate", xlabel="outer step", ylim=(0, None))
axes[2].legend()
plt.show()

assert test_loss[-1] < 0.5 * test_loss[0], "the search no longer halves the test loss: more outer steps, or more data?"
useless_decay, useful_decay = (np.exp(np.log(part).mean()) for part in (strengths[USEFUL:], strengths[:USEFUL]))
assert useless_decay > 2 * useful_decay, "the decays do not tell useless inputs from useful ones"
assert np.exp(log_angles[-1]) > np.exp(log_angles[0]), (
    "the search no longer finds that the answer is rotation-invariant"
)

# %% [markdown]
# Inputs that are useless have the stronger decays, on the whole; nobody told which they are. The angle grows until the
# training set is rotated at random, because the answer does not change. The test loss falls with the validation loss:
# 256 validation examples are enough for 163 hyperparameters; with 64 the search fits *them*: try it. Is the derivative
# right? A difference of two trainings says so:

# %%
step = 0.02
key = jax.random.key(1)
trained = jax.jit(lambda log_rate: run(found, log_rate, key)[0].value)
by_difference = (trained(found_log_rate + step) - trained(found_log_rate - step)) / (2 * step)
by_solver = jax.jit(lambda: run(found, found_log_rate, key)[1][1])()
print(f"dL_v / d log(learning rate): solver {by_solver:.5f}, difference {by_difference:.5f}")
assert abs(by_solver - by_difference) < 0.05 * abs(by_difference) + 1e-4, "far apart: is training chaotic here?"

# %% [markdown]
# ## 2. A start from which five steps are enough
#
# A task is a sine of random amplitude and phase, with ten examples. Five steps of training from a random start learn
# little of it. MAML learns the *start*: `solution.grad_start` is the derivative of a task's validation loss after its
# five steps by where they began, and `jax.vmap` runs the tasks of a step together. The comparison is a start that was
# trained, as long, on the same tasks put into one pot, without looking through the five steps.

# %%
short = bj.unroll(
    bj.weighted(lambda params, frozen, batch: 0.5 * (predict(params, batch["data"][0]) - batch["data"][1]) ** 2),
    optax.sgd(0.05),
    steps=INNER_STEPS,
    memory="all",
)


def task(key):
    """(ten training examples, ten others) of one sine."""
    keys = jax.random.split(key, 3)
    amplitude, phase = jax.random.uniform(keys[0], (2,), minval=jnp.array([0.5, 0.0]), maxval=jnp.array([2.0, jnp.pi]))
    x = jax.random.uniform(keys[1], (2 * SHOTS, 1), minval=-4.0, maxval=4.0)
    y = amplitude * jnp.sin(x[:, 0] + phase)
    return (x[:SHOTS], y[:SHOTS]), (x[SHOTS:], y[SHOTS:])


def adapt(params, key):
    return short.run(params, jnp.ones(SHOTS), *task(key))


def meta_grad(params, key):
    solutions = jax.vmap(partial(adapt, params))(jax.random.split(key, TASKS))
    return solutions.value.mean(), jax.tree.map(lambda leaf: leaf.mean(0), solutions.grad_start)


def pot_grad(params, key):
    (x, y), _ = jax.vmap(task)(jax.random.split(key, TASKS))
    return jax.value_and_grad(mean_loss)(params, (x.reshape(-1, 1), y.reshape(-1)))


@partial(jax.jit, static_argnums=0)
def learn(grad_of_start, params):
    outer_optimizer = optax.adam(3e-3)

    def outer_step(carry, key):
        params, state = carry
        value, grad = grad_of_start(params, key)
        updates, state = outer_optimizer.update(grad, state)
        return (optax.apply_updates(params, updates), state), value

    carry = params, outer_optimizer.init(params)
    (params, _), values = jax.lax.scan(outer_step, carry, jax.random.split(jax.random.key(SEED + 1), META_STEPS))
    return params, values


random_start = network(keys[5], 1, 32, 32, 1)
learned_start, meta_values = learn(meta_grad, random_start)
pot_start, _ = learn(pot_grad, random_start)
starts = {"random": random_start, "all tasks in one pot": pot_start, "learned through the steps": learned_start}
new_tasks = jax.random.split(jax.random.key(1000), 200)
after = {name: jax.vmap(partial(adapt, params))(new_tasks) for name, params in starts.items()}
for name, solutions in after.items():
    print(f"{name:>26}: {solutions.value.mean():.3f} nats on 200 new tasks, after {INNER_STEPS} steps")

figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), width_ratios=(2, 3))
axes[0].plot(meta_values, color=BLUE, linewidth=0.8)
axes[0].set(title="Loss of a step's tasks after training, nats", xlabel="outer step", ylim=(0, None))
shown = 3
(x, y), (x_other, y_other) = task(new_tasks[shown])
line = jnp.linspace(-4, 4, 200)[:, None]
axes[1].plot(x[:, 0], y, "o", color="black", label="ten examples")
for (name, params), color in zip(starts.items(), (PINK, ORANGE, BLUE), strict=True):
    axes[1].plot(line[:, 0], predict(params, line), ":", color=color, linewidth=1)
    axes[1].plot(line[:, 0], predict(adapt(params, new_tasks[shown]).params, line), color=color, label=name)
axes[1].set(title="A new task: start (dotted), after five steps", xlabel="x", xlim=(-4, 7.5))
axes[1].legend(loc="upper right")
plt.show()

losses_after = {name: float(solutions.value.mean()) for name, solutions in after.items()}
assert losses_after["learned through the steps"] < 0.5 * losses_after["all tasks in one pot"], (
    "the learned start is no better than plain pretraining: more META_STEPS or TASKS?"
)

# %% [markdown]
# ## 3. Twelve examples that stand for all
#
# Two interleaved half-moons, 300 examples. The outer variable is a training set of 12 examples that is *invented*:
# their places are learned, so that a network trained on them alone is good on the 300. A set that works from one start
# only would have learned that start, so each outer step averages over four random starts with `vmap`, and the
# judgement uses starts never seen.


# %%
def moons(key, count):
    keys = jax.random.split(key, 2)
    angle = jnp.pi * jax.random.uniform(keys[0], (count,))
    upper = jnp.arange(count) % 2
    x = jnp.stack([jnp.cos(angle) + upper - 0.5, jnp.where(upper, 0.4, -0.1) + jnp.sin(angle) * (1 - 2 * upper)], 1)
    return x + 0.12 * jax.random.normal(keys[1], (count, 2)), upper.astype(float)


def cross_entropy(params, data):
    return optax.sigmoid_binary_cross_entropy(predict(params, data[0]), data[1])


everything, test = moons(keys[6], 300), moons(jax.random.key(2000), 2000)
labels = jnp.arange(DISTILLED) % 2.0
distill = bj.unroll(
    bj.problem(
        lambda params, places, frozen, batch: cross_entropy(params, (places, labels)).mean(),
        lambda params, frozen, batch: cross_entropy(params, batch["data"]).mean(),
    ),
    optax.adam(0.05, eps_root=1e-8),
    steps=60,
)


def train_on(places, key):
    """From a random start; the 300 examples are validation alone."""
    return distill.run(network(key, 2, 16, 1), places, everything, everything)


@jax.jit
def invent(places):
    outer_optimizer = optax.adam(0.05)

    def outer_step(carry, key):
        places, state = carry
        solutions = jax.vmap(partial(train_on, places))(jax.random.split(key, 4))
        updates, state = outer_optimizer.update(solutions.grad.mean(0), state)
        return (optax.apply_updates(places, updates), state), solutions.value.mean()

    keys = jax.random.split(jax.random.key(SEED + 2), 120)
    (places, _), values = jax.lax.scan(outer_step, (places, outer_optimizer.init(places)), keys)
    return places, values


@jax.jit
def accuracy(places):
    """On the test set, from 20 new starts."""
    solutions = jax.vmap(partial(train_on, places))(jax.random.split(jax.random.key(3000), 20))
    return jax.vmap(lambda params: ((predict(params, test[0]) > 0) == (test[1] > 0.5)).mean())(solutions.params).mean()


first_places = everything[0][:DISTILLED]
places, values = invent(first_places)
by_real = jax.lax.map(lambda first: accuracy(jax.lax.dynamic_slice_in_dim(everything[0], first, DISTILLED)),
                      DISTILLED * jnp.arange(10))  # fmt: skip
by_invented = accuracy(places)
print(f"accuracy on new examples from new starts: {DISTILLED} invented examples {by_invented:.3f}")
print(f"{DISTILLED} real ones {by_real.mean():.3f} (ten draws, {by_real.min():.3f} to {by_real.max():.3f})")

figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), width_ratios=(2, 3))
axes[0].plot(values, color=BLUE)
axes[0].set(title="Loss on the 300 examples, nats", xlabel="outer step", ylim=(0, None))
grid = jnp.stack(jnp.meshgrid(jnp.linspace(-2, 2, 80), jnp.linspace(-1.6, 2.8, 60)), -1)
shade = jax.nn.sigmoid(predict(train_on(places, jax.random.key(4)).params, grid.reshape(-1, 2))).reshape(60, 80)
axes[1].contourf(grid[..., 0], grid[..., 1], shade, levels=[0, 0.5, 1], colors=[BLUE, ORANGE], alpha=0.12)
for label, color in ((0, BLUE), (1, ORANGE)):
    axes[1].plot(*everything[0][everything[1] == label].T, ".", color=color, markersize=3)
    axes[1].plot(*places[labels == label].T, "D", color=color, markeredgecolor="black", markersize=7)
axes[1].set(title="Invented examples (diamonds), and a model of them")
axes[1].grid(False)
plt.show()

assert by_invented > by_real.mean() + 0.02, "invented examples are no better than as many real ones"

# %% [markdown]
# ## 4. A network that rates examples it has never seen
#
# Weights, one for each example, say nothing about tomorrow's examples. A *rating network* does: its parameters are the
# outer variable, its output is the weight. Here two annotators label the half-moons; the careless one (feature
# $a = 1$) is wrong in 40 % of the cases, the careful one in 2 %. The network sees the example, its label and the
# annotator, and a validation set of 100 trusted examples judges what a model learns from 200 rated ones.


# %%
def annotated(key, count):
    """((places, labels, annotator), whether each label is right)"""
    keys = jax.random.split(key, 3)
    x, y = moons(keys[0], count)
    careless = jax.random.bernoulli(keys[1], 0.5, (count,))
    is_wrong = jax.random.uniform(keys[2], (count,)) < jnp.where(careless, WRONG, 0.02)
    return (x, jnp.where(is_wrong, 1 - y, y), careless.astype(float)), ~is_wrong


def rate(rater, data):
    x, y, careless = data
    return 2 * jax.nn.sigmoid(predict(rater, jnp.c_[x, 2 * y - 1, 2 * careless - 1]))


def rated_loss(params, rater, frozen, batch):
    data = batch["data"]
    return jnp.mean(rate(rater, data) * cross_entropy(params, data[:2]))


solver = bj.unroll(
    bj.problem(rated_loss, lambda params, frozen, batch: cross_entropy(params, batch["data"]).mean()),
    optax.adam(0.05, eps_root=1e-8),
    steps=100,
)
(noisy, is_right), trusted = annotated(jax.random.key(11), 200), moons(jax.random.key(12), 100)
model_start, neutral = network(jax.random.key(13), 2, 16, 1), network(jax.random.key(14), 4, 8, 1)
neutral[-1] = jax.tree.map(jnp.zeros_like, neutral[-1])  # every rating is 1


@jax.jit
def learn_rater(rater):
    outer_optimizer = optax.adam(0.05)

    def outer_step(carry, _):
        rater, state = carry
        solution = solver.run(model_start, rater, noisy, trusted)
        updates, state = outer_optimizer.update(solution.grad, state)
        return (optax.apply_updates(rater, updates), state), solution.value

    (rater, _), values = jax.lax.scan(outer_step, (rater, outer_optimizer.init(rater)), length=60)
    return rater, values


rater, values = learn_rater(neutral)
unseen, unseen_is_right = annotated(jax.random.key(21), 200)  # tomorrow's examples
ratings = rate(rater, unseen)


def loss_when_trained_on_unseen(rater):
    """Test loss of a model that is trained on the unseen examples, with their ratings."""
    return cross_entropy(solver.run(model_start, rater, unseen, trusted).params, test).mean()


def share_of_pairs(right, wrong):
    """The chance that a right label is rated above a wrong one (AUC)."""
    return (right[:, None] > wrong[None]).mean() + 0.5 * (right[:, None] == wrong[None]).mean()


auc = share_of_pairs(ratings[unseen_is_right], ratings[~unseen_is_right])
uniform, rated = loss_when_trained_on_unseen(neutral), loss_when_trained_on_unseen(rater)
print(f"AUC of the ratings of unseen examples {auc:.3f}")
print(f"test loss of a model trained on the unseen examples: as they are {uniform:.3f}, rated {rated:.3f} nats")

figure, axes = plt.subplots(1, 2, figsize=(9, 3))
axes[0].plot(values, color=BLUE)
axes[0].set(title="Validation loss, nats", xlabel="outer step", ylim=(0, None))
is_careless = unseen[2] == 1
groups = {
    "careful, right": ~is_careless & unseen_is_right,
    "careful, wrong": ~is_careless & ~unseen_is_right,
    "careless, right": is_careless & unseen_is_right,
    "careless, wrong": is_careless & ~unseen_is_right,
}
axes[1].hist([np.asarray(ratings[group]) for group in groups.values()], bins=12, stacked=True, label=list(groups),
             color=[GREEN, BLUE, ORANGE, PINK])  # fmt: skip
axes[1].set(title="Ratings of 200 unseen examples", xlabel="rating (1 at the start)")
axes[1].legend()
plt.show()

assert auc > 0.8, "the rating network does not tell right from wrong labels of unseen examples"
assert rated < 0.9 * uniform, "ratings of unseen examples do not help a model that is trained on them"

# %% [markdown]
# The network has found out by itself whom to trust. It mistrusts *all* labels of the careless annotator, the right ones
# too: 100 validation examples say that these labels harm on the whole, and too little about each of them.
#
# ## What to take from here
#
# - `bj.problem(inner, outer)` for anything the loss reads; `bj.weighted(losses)` for one weight an example;
#   `solution.grad_start` and `solution.grad_optimizer` come with every run of `bj.unroll`.
# - Build the solver once. jit, vmap and scan go around `run`; inside of them a failure is no exception but
#   `solution.status`, which section 1 reads.
# - A search can fit the validation set. Keep a test set that it never reads; [notebook 2](2_when_to_believe.ipynb) says
#   when an exact derivative is no guide, and `bj.certify.check` tells.
