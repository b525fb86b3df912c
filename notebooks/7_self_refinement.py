# %% [markdown]
# # Can a model become better by its own answers?
#
# A model answers questions, is trained on its answers, answers again. Where should anything new come from? This page
# shows, first by a sum that is zero and then by measurement, that such training teaches *nothing* on average; what a
# few validation examples $V$ add to it; and a run of the command `refine`, from the model as it is given to an accepted
# round.
#
# You need: derivatives, and what an expectation is. Everything said here is computed here; where a number matters, an
# `assert` stands next to it.
#
# **What is whose.** Online self-refining generation, judged by validation, is the subject of Xiao & Chen (arXiv
# 2511.21056). That the score $\nabla\log\pi$ has expectation zero, and that weighting it gives a policy gradient
# (Williams 1992), is textbook. The exact hypergradients as weights, and the measurements, are ours.

# %%
# Parameters: change these and run the page again; a failing assert says what the change broke.
LESSONS = (768, 512)  # lessons by the right and by the wrong rule that the model is taught; at most these
DRAWS = 16  # answers to each question of sections 1, 3 and 4
COUNT, BLOCK = 2048, 16  # answers to one question in section 2, at least 512, and how many are read at once
TEMPERATURES = (0.25, 0.5, 1.0, 2.0, 4.0)  # tau of section 4, nats; above 0
ROUNDS, GENERATIONS, OUTER_STEPS = 2, 3, 3  # of `refine` in section 5
SEED = 0

# %%
import contextlib
import json
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # the models are small: compiling is what takes time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import SVG, display
from jax.flatten_util import ravel_pytree

from bilevel_jax.commands.refine.run import refine
from bilevel_jax.core import single_loop
from bilevel_jax.core.problem import weighted as weighted_problem
from bilevel_jax.lm import models
from bilevel_jax.lm.builtin import cipher
from bilevel_jax.lm.data import batches, tokens
from bilevel_jax.lm.data.examples import load_examples
from bilevel_jax.lm.inference.generate import SamplingParams, make_detokenizer, make_sampler
from bilevel_jax.lm.inference.prompts import make_prompts
from bilevel_jax.lm.losses import sft
from bilevel_jax.runs.config.load import RefineConfig, load_config
from bilevel_jax.runs.config.schema import VerifierSection
from bilevel_jax.runs.report.html import read_stylesheet
from bilevel_jax.runs.scoring.verifiers import make_verifier
from bilevel_jax.runs.stats import auc
from bilevel_jax.runs.tasks.builtin import BUILTIN_TASKS, pretrain_builtin_model

plt.style.use("notebooks.mplstyle")
warnings.filterwarnings("ignore", message="IProgress")  # no bar is drawn here
BLUE, ORANGE, GREEN, PINK = (f"C{number}" for number in range(4))

# %% [markdown]
# ## 1. A model that knows two rules
#
# The task is a cipher of twenty letters. To `bhat>` the right answer is `ciba`: every letter moves on by one, and after
# `t` comes `a`. The wrong rule moves them back. A language model of 22 thousand parameters is taught by 1,280 lessons,
# 40 % of them by the wrong rule, and not for long: it knows both rules, and mixes them. It is then asked questions that
# it has not seen, 16 times each; a *checker*, which knows the truth, judges the answers.

# %%
work = tempfile.TemporaryDirectory()
os.chdir(work.name)
made = cipher.write_cipher_data("cipher", clean=845, wrong=691, noise=0, validation=16, dev=64, test=128, copies=0)


def read(name):
    """The rows of a file, each with its right answer: for the checker, never for training."""
    rows = [json.loads(line) for line in (made / name).read_text().splitlines()]
    return [row | {"answer": cipher.rotate_letters(row["prompt"][:-1], 1)} for row in rows]


def write(name, rows):
    (made / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


lines = read("train.jsonl")
clean, wrong = ([line for line in lines if line["label"] == label] for label in ("clean", "wrong"))
random = np.random.default_rng(SEED)
write("lessons.jsonl", random.permutation(clean[: LESSONS[0]] + wrong[: LESSONS[1]]).tolist())
write("train.jsonl", random.permutation(clean[768:] + wrong[512:]).tolist())  # 256 rows, 70 % of them wrong
for name in ("validation.jsonl", "dev.jsonl", "test.jsonl"):
    write(name, read(name))
pretrain_builtin_model(
    made, BUILTIN_TASKS["cipher"]._replace(pretraining_file="lessons", num_steps=500), progress=False
)

architecture, old = models.load_model(made / "model")
decoder, tokenizer = models.make_decoder(architecture, remat="none"), tokens.load_tokenizer(made / "model")
trusted, report = (load_examples([str(made / f"{name}.jsonl")]) for name in ("validation", "test"))
judge = make_verifier(VerifierSection("exact", answer_field="answer"))
sample = make_sampler(
    decoder,
    SamplingParams(temperature=1.0, max_new_tokens=6),
    make_detokenizer(tokenizer),
    end_tokens=[tokenizer.eos_token_id],
).sample
drawn = sample(old, make_prompts(report, tokenizer), range(DRAWS))
right = np.array([[judge(row, one.text) for one in some] for row, some in zip(report, drawn, strict=True)])
print(f"{right.mean():.0%} of the answers are right; of 4 answers to a question, one or more in", end=" ")
print(f"{right[:, :4].max(1).mean():.0%} of the questions")
for row, some in zip(report[:4], drawn, strict=False):
    print(f"   {row.turns[0].content}  {'  '.join(one.text for one in some[:8])}   (right: {row.turns[1].content})")

assert right[:, :4].max(1).mean() > right.mean() + 0.1, (
    "of four answers none is better than one: nothing to choose from"
)

# %% [markdown]
# ## 2. The sum that is zero
#
# Let $\pi_{\text{old}}$ be the model that wrote the answers and $\pi_\theta$ the model in training. Each answer $y$ is
# trained on by its *importance ratio* $\rho = \pi_\theta(y\mid x) / \pi_{\text{old}}(y\mid x)$, which makes up for the
# difference between the two. The step that is expected is
#
# $$ \mathbb E_{y\sim\pi_{\text{old}}}\big[\rho\,\nabla\log\pi_\theta(y\mid x)\big]
#  = \sum_y \pi_{\text{old}}\,\frac{\pi_\theta}{\pi_{\text{old}}}\,\frac{\nabla\pi_\theta}{\pi_\theta}
#  = \nabla \sum_y \pi_\theta(y\mid x) = \nabla\, 1 = 0 . $$
#
# On average, a model learns nothing from its own answers. First for a single token, where the sum can be written out;
# for that, a second model $\theta$ is made by a few steps away from the old one.


# %%
def corpus_of(asked, written):
    """Questions with the model's answers, as training reads them."""
    rows = [
        tokens.TokenizedSequence(
            np.array([*q.tokens, *one.tokens]), np.arange(len(q.tokens) + len(one.tokens)) >= len(q.tokens)
        )
        for q, one in zip(asked, written, strict=True)
    ]
    return tokens.corpus_from_sequences(rows)


def blocks(corpus, size):
    """All rows as arrays [blocks, size, ...]: each block is one batch."""
    stream = batches.make_evaluation_stream(corpus, batches.BatchShape(1, size, size, 16))
    found = [stream.batch(step) for step in range(stream.steps)]
    return {
        key: jnp.stack([batch[key][0] for batch in found])
        for key in ("tokens", "targets", "positions", "segments", "slot", "supervised")
    }


log_p = sft.sequence_log_likelihoods(decoder)  # (params, batch) -> log p(y|x) of each row, nats
flat_old, unravel = ravel_pytree(old)
rows_v, _ = tokens.tokenize(trusted, tokenizer, max_length=32)
batch_v = jax.tree.map(lambda x: x[0], blocks(rows_v, len(trusted)))


@jax.jit
def loss_v(flat, batch):
    """L_v, nats per row."""
    return -log_p(unravel(flat), batch).mean()


new = flat_old
for _ in range(3):
    slope = jax.grad(loss_v)(new, batch_v)
    new = new - 0.03 * slope / jnp.linalg.norm(slope)

question = make_prompts(report[:1], tokenizer)
ids = jnp.array([question[0].tokens])


@jax.jit
def first(flat):
    """log pi(token | question) of the first token of an answer, for the whole vocabulary."""
    params, at = unravel(flat), jnp.arange(ids.shape[1])[None]
    hidden = decoder.hidden(params, ids, at, jnp.ones_like(ids))[0, -1]
    return jax.nn.log_softmax(hidden @ decoder.head(params))


scores = jax.jacobian(first)(new)  # a row for each token: the gradient of its log-probability
ratio = jnp.exp(first(new) - first(flat_old))
whole_sum = (jnp.exp(first(flat_old)) * ratio) @ scores
parts = jnp.linalg.norm(jnp.exp(first(new))[:, None] * scores, axis=1).sum()
print(f"ratios of the tokens: {ratio.min():.2f} to {ratio.max():.2f}")
print(f"length of the sum {jnp.linalg.norm(whole_sum):.1e}, of its parts {parts:.1e}")
assert jnp.linalg.norm(whole_sum) < 1e-5 * parts, (
    "the sum over all tokens is not zero, to what single precision can tell"
)

# %% [markdown]
# For whole answers there are too many to write the sum out, so it is estimated from answers that the package's sampler
# draws. Of $n$ of them the mean has a *length* that is not zero, but falls like $1/\sqrt n$, as an error does and a
# signal does not. Next to it the same mean without the ratio, $\mathbb E_{\text{old}}[\nabla\log\pi_\theta] =
# -\nabla\,\mathrm{KL}(\pi_{\text{old}}\,\|\,\pi_\theta)$: it goes to a length of its own, and points back to the old
# model.

# %%
written = sample(old, question, range(COUNT))[0]
batch = blocks(corpus_of(question * COUNT, written), BLOCK)
sampled = jnp.array([sum(one.log_probs) for one in written]).reshape(-1, BLOCK)  # nats, from the sampler


@jax.jit
def both(flat, batch, sampled):
    """Of each block: the mean of rho grad log pi, that of grad log pi, the ratios."""

    def one(inputs):
        batch, sampled = inputs
        logs, pull = jax.vjp(lambda flat: log_p(unravel(flat), batch), flat)
        ratio = jnp.exp(logs - sampled)
        return pull(ratio / BLOCK)[0], pull(jnp.full(BLOCK, 1 / BLOCK))[0], ratio

    return jax.lax.map(one, (batch, sampled))


again = jax.lax.map(lambda batch: log_p(old, batch), batch)
assert jnp.abs(again - sampled).max() < 1e-3, "the sampler's log-probabilities are not those that training finds"
weighted, plain, ratios = both(new, batch, sampled)
ratios = np.asarray(ratios).ravel()
print(
    f"{COUNT:,} answers, {len({one.text for one in written})} different ones; mean ratio {ratios.mean():.3f}, "
    f"largest {ratios.max():.1f}, effective number {ratios.sum() ** 2 / (ratios**2).sum():,.0f}"
)
slope = jnp.linalg.norm(jax.grad(loss_v)(flat_old, batch_v))
print(f"length of the old model's gradient of L_v, for comparison: {slope:.1f}")


def lengths(gradients, n):
    """|mean of n answers|, of every disjoint set of n."""
    return np.linalg.norm(np.asarray(gradients).reshape(COUNT // n, n // BLOCK, -1).mean(1), axis=1)


sizes = [BLOCK * 2**k for k in range(7)]
rms = {n: np.sqrt((lengths(weighted, n) ** 2).mean()) for n in sizes}
figure, axes = plt.subplots()
for gradients, name, colour in ((weighted, "with the ratio", BLUE), (plain, "without", ORANGE)):
    middle = [np.sqrt((lengths(gradients, n) ** 2).mean()) for n in sizes]
    low, high = np.array([np.quantile(lengths(gradients, n), (0.1, 0.9)) for n in sizes]).T
    axes.fill_between(sizes, low, high, color=colour, alpha=0.2, lw=0)
    axes.plot(sizes, middle, "o-", color=colour, label=name)
axes.plot(sizes, rms[BLOCK] * np.sqrt(BLOCK / np.array(sizes)), "k--", lw=1, label=r"$\propto 1/\sqrt{n}$")
axes.set(
    xscale="log",
    yscale="log",
    xlabel="answers n",
    ylabel="length of the mean, nats",
    title="The mean of n own answers; bands: 10 % to 90 % of the sets of n",
)
axes.legend()
plt.show()

fall = rms[BLOCK] / rms[256]
print(f"from n = 16 to 256 the length falls by {fall:.1f}; 1/sqrt(n) says {np.sqrt(256 / 16):.1f}")
assert 0.75 < fall / np.sqrt(256 / 16) < 1.33, "the mean does not fall as 1/sqrt(n): too few sets of 256, or a signal?"

# %% [markdown]
# So training on one's own answers is a walk without a direction: each finite set pushes somewhere, and the pushes add
# up to noise.
#
# ## 3. What validation adds
#
# Give each answer a weight $w(y)$, a number that $\theta$ does not move. At $\theta = \theta_{\text{old}}$ the expected
# step is
#
# $$ \mathbb E\big[w(y)\,\nabla\log\pi_\theta(y\mid x)\big] = \nabla_\theta\, \mathbb E_{y\sim\pi_\theta}[w(y)] , $$
#
# the policy gradient: training goes *up the mean weight*. A weight that is the same for all answers drops out, as
# section 2 says. All that is learned is what the weights tell apart, and here it is validation examples that tell it.
#
# The smallest example: two answers, right and wrong, $\pi_\theta(\text{right}\mid x) = \sigma(\theta\cdot\phi_x)$. One
# validation question has features $\phi_v$, another question $x$ is answered by the model, and $c = \phi_x\cdot\phi_v$
# is what they have in common. The hypergradient of an answer, by how much training on it lowers $L_v$, is
# $a(y) = \langle\nabla\log\pi(y\mid x), -\nabla L_v\rangle$, which is $(1-p_x)(1-p_v)\,c$ for the right answer and
# $-p_x(1-p_v)\,c$ for the wrong one. Its mean is 0. With it as the weight, a small step $\varepsilon$ changes $L_v$ by
#
# $$ -\varepsilon\,\mathbb E[a^2] = -\varepsilon\; p_x(1-p_x)\,(1-p_v)^2\, c^2 . $$
#
# Never up, whatever the sign of $c$; and not at all where the two questions have nothing in common, or where the model
# is sure of its answer to $x$.


# %%
def expected_step(theta, x, v, weigh):
    """The exact expectation, over both answers, of weight times gradient of log pi; and the slope of L_v along it."""

    def log_pi(theta, right):
        return jax.nn.log_sigmoid(jnp.where(right, 1.0, -1.0) * theta @ x)

    slope_v = jax.grad(lambda theta: -jax.nn.log_sigmoid(theta @ v))(theta)
    step = 0.0
    for right in (True, False):
        score = jax.grad(log_pi)(theta, right)
        step += jnp.exp(log_pi(theta, right)) * weigh(-score @ slope_v) * score
    return step, slope_v @ step


theta, angles = jnp.array([0.3, -0.4]), np.linspace(0, np.pi, 37)
v = jnp.array([1.0, 0.0])
change = {"weight 1": [], "weighed by V": []}
for angle in angles:
    x = jnp.array([np.cos(angle), np.sin(angle)])
    for name, weigh in (("weight 1", lambda a: 1.0), ("weighed by V", lambda a: a)):
        change[name].append(float(expected_step(theta, x, v, weigh)[1]))
    p_x, p_v = jax.nn.sigmoid(theta @ x), jax.nn.sigmoid(theta @ v)
    formula = -p_x * (1 - p_x) * (1 - p_v) ** 2 * np.cos(angle) ** 2
    assert abs(change["weighed by V"][-1] - formula) < 1e-6, "the expected change of L_v is not -E[a^2]"
assert np.abs(change["weight 1"]).max() < 1e-7, "answers of equal weight have a direction in expectation"
figure, axes = plt.subplots()
for (name, values), colour in zip(change.items(), (ORANGE, BLUE), strict=True):
    axes.plot(np.degrees(angles), values, color=colour, label=name)
axes.set(
    xlabel="angle between the two questions' features, degrees",
    ylabel=r"slope of $L_v$, nats",
    title="What a step on own answers does to the trusted question, in expectation",
)
axes.legend()
plt.show()

# %% [markdown]
# The same on the language model. The 128 questions that it answered above share nothing with the 16 validation examples
# but the rule. The hypergradient $a = \langle\nabla\log\pi(y\mid x), -\nabla L_v\rangle$ of each of the 2,048 answers
# is one directional derivative: no gradient per answer is formed. The checker is asked only afterwards, for the
# colours.

# %%
by_draw = [
    one for some in zip(*drawn, strict=True) for one in some
]  # the first answer to each question, the second ...
batch = blocks(corpus_of(make_prompts(report, tokenizer) * DRAWS, by_draw), len(report))  # a block for each draw
direction = -jax.grad(loss_v)(flat_old, batch_v)


@jax.jit
def entries(flat, direction, batch):
    """a of each answer, nats of L_v per unit of step size."""
    return jax.lax.map(lambda one: jax.jvp(lambda flat: log_p(unravel(flat), one), (flat,), (direction,))[1], batch)


a = np.asarray(entries(flat_old, direction, batch))
good = right.T > 0
error = a.std() / np.sqrt(a.size)
told = auc(a.ravel(), good.ravel())
print(f"mean of a {a.mean():+.2f} ± {error:.2f} (standard error); rms {np.sqrt((a**2).mean()):.1f}")
print(f"right answers {a[good].mean():+.2f}, others {a[~good].mean():+.2f}; AUC of a against the checker {told:.3f}")
truth = [row.turns[1].content for row in report] * DRAWS
letters = np.array([sum(map(str.__eq__, one.text, right)) for one, right in zip(by_draw, truth, strict=True)]).reshape(
    a.shape
)
means = [a[letters == count].mean() for count in range(5)]
print("mean of a by the number of right letters, 0 to 4:", "  ".join(f"{mean:+.1f}" for mean in means))
bins = np.linspace(*np.quantile(a, (0.002, 0.998)), 60)
figure, axes = plt.subplots()
axes.hist([a[good], a[~good]], bins, stacked=True, color=[GREEN, ORANGE], label=["right", "not right"])
axes.axvline(0, color="k", lw=1)
axes.set(
    xlabel="entry a, nats",
    ylabel="answers",
    title="What V says of the model's own answers, without having seen their questions",
)
axes.legend()
plt.show()

assert abs(a.mean()) < 4 * error, "the mean of a is not zero: is this the model that wrote the answers?"
assert means == sorted(means), "more right letters do not mean a larger a; were too few answers drawn?"
chance = 3 / np.sqrt(12 * min(good.sum(), (~good).sum()))
assert told > 0.5 + chance, "V does not tell right answers from wrong ones"

# %% [markdown]
# One step on the answers to half of these questions, then, of one length for all: unweighted, weighted by the
# hypergradients, and weighted by the truth (right answers against the mean). What it does is read on the right answers
# to the other half, which gave no weights and no answers. 16 sets of answers, one for each draw, give the bars. The
# hypergradients may do better than the truth, because they see more than it says: an answer with three right letters of
# four is not right.

# %%
half = len(report) // 2
weights = {"unweighted": np.ones_like(a), "weighed by V": a, "by the truth": good - good.mean()}
rows_r, _ = tokens.tokenize(report[half:], tokenizer, max_length=32)
batch_r = jax.tree.map(lambda x: x[0], blocks(rows_r, half))


@jax.jit
def moves(flat, batch, weights):
    """By how much a step along sum w grad log pi changes the loss of other questions, for each draw and weighting."""

    def one(inputs):
        batch, weights = inputs
        _, pull = jax.vjp(lambda flat: log_p(unravel(flat), batch), flat)
        steps = jax.vmap(lambda w: pull(w)[0])(weights)
        steps = 0.02 * steps / jnp.linalg.norm(steps, axis=1, keepdims=True)
        return jax.vmap(lambda step: loss_v(flat + step, batch_r))(steps) - loss_v(flat, batch_r)

    return jax.lax.map(one, (batch, weights))


given = np.stack(list(weights.values()), 1) * (np.arange(len(report)) < half)  # [draws, weightings, questions]
moved = dict(zip(weights, np.asarray(moves(flat_old, batch, jnp.asarray(given, jnp.float32))).T, strict=True))
figure, axes = plt.subplots(figsize=(8, 2.2))
for place, (name, values) in enumerate(moved.items()):
    axes.errorbar(
        np.mean(values), place, xerr=np.std(values, ddof=1), fmt="o", color=(ORANGE, BLUE, GREEN)[place], capsize=4
    )
    print(
        f"{name:<14} {np.mean(values):+.3f} ± {np.std(values, ddof=1) / np.sqrt(DRAWS):.3f} nats per row; "
        f"{np.mean(values < 0):.0%} of the sets lower it"
    )
axes.axvline(0, color="k", lw=1)
axes.set(
    yticks=range(3),
    yticklabels=list(moved),
    ylim=(2.6, -0.6),
    xlabel="change of the loss on other questions by one step, nats per row (bar: standard deviation)",
)
plt.show()

weighed = moved["weighed by V"]
assert np.mean(weighed) < -3 * np.std(weighed, ddof=1) / np.sqrt(DRAWS), "a step weighed by V does not help elsewhere"

# %% [markdown]
# ## 4. The weight of an answer, as a ratio
#
# A weight by a hypergradient costs a derivative. Multi-objective training (BMO, notebooks 3 and 9) gets its weights
# from losses alone. Let $\pi_\varphi$ be the model that wrote the answers $y_1 \dots y_N$, and $\ell_i =
# -\log\pi(y_i\mid x_i)$. The gap is then $z_i = \ell_i(\varphi) - \ell_i(\theta) = \log\frac{\pi_\theta}{\pi_\varphi}
# (y_i\mid x_i)$, and the merit function with $\varphi$ held is
# $m_\varphi(\theta) = -\tau\log\frac1N\sum_ie^{z_i/\tau}$ with a temperature $\tau$.
#
# **Statement.** (a) Its gradient is $\frac1N\sum_iw_i\nabla\ell_i(\theta)$ with
#
# $$ w_i \ \propto\ \Big(\frac{\pi_\theta(y_i\mid x_i)}{\pi_\varphi(y_i\mid x_i)}\Big)^{1/\tau} \quad\text{of mean }1 ,
# $$
#
# and $q = w/N$ is the answer to $\max_q \sum_iq_iz_i - \tau\,\mathrm{KL}(q\,\|\,\tfrac1N)$: more weight on what the
# model in training likes better than its author did, at a price for uneven weights.
#
# (b) Over answers $y\sim\pi_\varphi$, as $N\to\infty$, $m_\varphi(\theta) \to -(1-\tau)\,D_{1/\tau}(\pi_\theta\|
# \pi_\varphi)$, where $D_\alpha(P\|Q) = \frac1{\alpha-1}\log\mathbb E_Q[(P/Q)^\alpha]$ is Rényi's divergence.
#
# (c) After one small step on validation, $\theta = \varphi - \varepsilon\nabla L_v(\varphi)$,
#
# $$ w_i = 1 + \frac\varepsilon\tau\,(a_i - \bar a) + O(\varepsilon^2), \qquad a_i = \langle\nabla\log\pi(y_i\mid x_i),
# -\nabla L_v\rangle : $$
#
# the weights are the hypergradients of section 3 in other units, $\bar a$ being their mean.
#
# *Proof.* (a) Differentiate: $\nabla m_\varphi = -\sum_i\mathrm{softmax}_i(z/\tau)\nabla z_i$, and $\nabla z_i =
# -\nabla\ell_i(\theta)$. The second half is Gibbs' principle (notebook 9, section 2). (b) The mean tends to
# $\mathbb E_\varphi[(\pi_\theta/\pi_\varphi)^\alpha]$ with $\alpha = 1/\tau$, and $\tau\log\mathbb E =
# \tau(\alpha-1)D_\alpha = (1-\tau)D_\alpha$. (c) $z_i = \varepsilon a_i + O(\varepsilon^2)$ by Taylor; expand the
# softmax. $\square$
#
# In `refine` the losses are means over tokens, so that a temperature of $\tau$ per token is one of $\tau\,|y_i|$ on
# the log-ratio of the whole answer; on summed losses $\tau = 1$ gives the normalised ratios of `refine.ratio:
# sequence`. Without a model to compare with (`single_loop.reference: none`) the same formula weighs by the likelihood
# itself, $w_i \propto \pi_\theta(y_i\mid x_i)^{1/\tau}$.
#
# So the ratio, too, knows of right and wrong only what $V$ told $\theta$. Right after new answers were drawn,
# $\theta = \varphi$, and all weights are 1. By (b), what answers alone pull at is the distance to their author: nothing
# at $\tau = 1$, where the weights are section 2's importance ratios; back to the author for $\tau > 1$ (with
# $\tau\to\infty$ the weights are even, and it is section 2's orange curve); *away* from it for $\tau < 1$, along
# whatever direction $V$ gave. First (a) and (b) where sums can be written out, with a policy of six answers.

# %%
logits = jax.random.normal(jax.random.key(SEED), (2, 6))  # of the author and of the model in training
author, student = jax.nn.log_softmax(logits[0]), jax.nn.log_softmax(logits[1])


def renyi(log_p, log_q, order):
    """D_order(P || Q) of two policies, nats; at order 1 it is KL(P || Q)."""
    if order == 1:
        return jnp.exp(log_p) @ (log_p - log_q)
    return jax.nn.logsumexp(order * log_p + (1 - order) * log_q) / (order - 1)


def merit_of(log_p, draws, tau):
    """m_phi(theta) over drawn answers, nats, by the package."""
    return single_loop.smooth_merit((log_p - author)[draws], tau)


answers = jax.random.categorical(jax.random.key(SEED + 1), logits[0], shape=(200_000,))
sampled_merit = {tau: float(merit_of(student, answers, tau)) for tau in TEMPERATURES}
for tau, value in sampled_merit.items():
    exact = float(-(1 - tau) * renyi(student, author, 1 / tau))
    slope_m = jax.grad(lambda logits, tau=tau: merit_of(jax.nn.log_softmax(logits), answers, tau))(logits[1])
    slope_d = jax.grad(lambda logits, tau=tau: -(1 - tau) * renyi(jax.nn.log_softmax(logits), author, 1 / tau))(
        logits[1]
    )
    print(
        f"tau {tau:<5g} m over 200,000 answers {value:+.4f}, -(1 - tau) D {exact:+.4f} nats; "
        f"distance of the gradients {jnp.linalg.norm(slope_m - slope_d):.0e}"
    )
    assert abs(value - exact) < 0.05 * max(1, abs(exact)), f"the merit at tau = {tau} is not Renyi's divergence"
    assert jnp.linalg.norm(slope_m - slope_d) < 0.05, f"nor is its gradient at tau = {tau}"

# %% [markdown]
# Now (a) and (c) on the language model and its 2,048 answers: the weights by the package, which reads losses, against
# the ratios with the log-probabilities that the *sampler* stored; and against the hypergradients, for steps of several
# sizes.

# %%
TAU = 0.5
own = corpus_of(make_prompts(report, tokenizer) * DRAWS, by_draw)
stream = batches.make_evaluation_stream(own, batches.BatchShape(1, len(report), len(report), 16))
answering = weighted_problem(lambda params, frozen, batch: -log_p(params, batch))
stored = np.array([sum(one.log_probs) for one in by_draw])
centred = a.ravel() - a.mean()


def ratio_weights(epsilon):
    """The weights after a step of this size on L_v: (by the package, log-likelihoods of the answers)."""
    moved_on = unravel(flat_old + epsilon * direction)
    weights = single_loop.compute_weights(answering, moved_on, old, (), stream, len(by_draw), TAU)
    logs = jax.lax.map(lambda one: log_p(moved_on, one), batch)
    return np.asarray(weights), np.asarray(logs).ravel()


sizes_of_z = (0.01, 0.03, 0.1, 0.3, 1.0)  # root mean square of the gap, nats, to first order
epsilons = [size / np.sqrt((centred**2).mean()) for size in sizes_of_z]
found = [ratio_weights(epsilon) for epsilon in epsilons]
by_ratio = np.exp((found[2][1] - stored) / TAU)
by_ratio = by_ratio / by_ratio.mean()
first_order = [epsilon / TAU * centred for epsilon in epsilons]
errors = [
    np.linalg.norm(weights - 1 - linear) / np.linalg.norm(linear)
    for (weights, _), linear in zip(found, first_order, strict=True)
]
order_of_error = np.polyfit(np.log(sizes_of_z[1:4]), np.log(errors[1:4]), 1)[0]
of_ratio = auc(found[2][0], good.ravel())
print(f"weights by the package and ratios by the sampler differ by at most {np.abs(found[2][0] - by_ratio).max():.0e}")
print(f"AUC against the checker: hypergradients {told:.3f}, ratios after one step {of_ratio:.3f}")

figure, (left, middle, last) = plt.subplots(1, 3, figsize=(10.5, 3.4))
order = np.array(TEMPERATURES)
left.plot(order, list(sampled_merit.values()), "o", color=BLUE, label="m, 200,000 answers")
fine = np.geomspace(order.min(), order.max(), 60)
theory = [float(-(1 - tau) * renyi(student, author, 1 / tau)) for tau in fine]
left.plot(fine, theory, color="black", lw=1, label="$-(1-\\tau)\\,D_{1/\\tau}$")
left.axhline(0, color="grey", lw=1)
left.set(xscale="log", xlabel="temperature $\\tau$", ylabel="nats", title="six answers: the merit")
left.set_xticks(order, [f"{tau:g}" for tau in order])
left.minorticks_off()
left.legend(fontsize=8)
middle.plot(first_order[2], found[2][0] - 1, ".", ms=3, color=BLUE)
ends = np.array([first_order[2].min(), first_order[2].max()])
middle.plot(ends, ends, color="black", lw=1)
middle.set(xlabel="$(\\varepsilon/\\tau)(a_i-\\bar a)$", ylabel="$w_i - 1$", title="own answers, gaps of .1 nat")
last.loglog(sizes_of_z, errors, "o-", color=BLUE)
last.loglog(sizes_of_z, errors[2] * np.array(sizes_of_z) / sizes_of_z[2], color="grey", lw=1, ls=":", label="slope 1")
last.set(xlabel="gap, root mean square, nats", ylabel="error of the first order", title="smaller steps")
last.legend()
plt.show()

assert np.abs(found[2][0] - by_ratio).max() < 0.02, "the package's weights are not ratios of likelihoods"
assert abs(order_of_error - 1) < 0.3, "the ratios do not tend to the hypergradients as the step on V falls"
assert abs(of_ratio - told) < 0.02, "the ratios order the answers otherwise than the hypergradients: too long a step?"

# %% [markdown]
# *Left: the merit over drawn answers is Rényi's divergence from their author, of either sign. Middle: after one small
# step on $V$, an answer's ratio weight against its hypergradient; each of the 2,048 dots is an answer. Right: what the
# first order misses falls with the step.* So the ratio is the cheap form of the hypergradient: two forward passes, near
# the author. Farther away it remembers the whole way that $\theta$ has gone, not $V$'s present opinion.
#
# ## 5. A run of `refine`
#
# The command does this in rounds. The model answers questions of a training set, here of 256 examples of which 70 %
# follow the wrong rule; the answers take the place of these examples; every example and answer gets a weight by its
# *exact* hypergradient, of the training run that really happened (notebook 1), judged by the 16 validation examples; a
# candidate is trained with the weights; and it replaces the model only if the lower bound of its gain on dev, 64
# examples that trained nothing, is above 0 by paired bootstrap. Next to it stands the control, a candidate of plain
# self-training: same examples, no weights.

# %%
Path("refine.yaml").write_text(
    f"""
model: {{name_or_path: {made.name}/model, remat: none}}
lora: {{r: 0}}
data:
  train: [{made.name}/train.jsonl]
  validation: [{made.name}/validation.jsonl]
  dev: [{made.name}/dev.jsonl]
  test: [{made.name}/test.jsonl]
  split: [1, 0, 0]
  label_field: label
refine: {{rounds: {ROUNDS}, questions: all, methods: [unrolled, uniform]}}
generate: {{num_generations: {GENERATIONS}, max_new_tokens: 6}}
verifier: {{name: exact, answer_field: answer}}
optimizer: {{learning_rate: 1.0e-3, warmup_steps: 5, b2: 0.99, eps_root: 1.0e-6}}
train: {{max_steps: 24, global_batch_size: 32}}
outer: {{steps: {OUTER_STEPS}, weighting: sigmoid, learning_rate: 1.5}}
output: {{dir: refined, progress: false}}
mesh: {{data: 1}}
""",
    encoding="utf-8",
)
with contextlib.redirect_stderr(sys.stdout):
    result = refine(load_config(RefineConfig, "refine.yaml", []))

# %% [markdown]
# Not one example that somebody else wrote was trained on, and most of the model's answers were wrong. What moved it are
# 16 validation examples, through the weights. The control has the same answers without weights. The mean of its first
# step is zero, but the step itself is not; the optimiser follows the noise, and the loss rises. The test on dev keeps
# such a candidate out: a round that does not help changes nothing, and the model stays what it was.

# %%
print(result["sentence"])
REPORT = Path("refined/report.html").read_text(encoding="utf-8")
found = re.search(r"<svg.*?</svg>", REPORT, re.DOTALL)[0]
style = read_stylesheet().split("@media")[0] + "svg { font: 11px var(--font); stroke-linejoin: round; }"
head = '<svg xmlns="http://www.w3.org/2000/svg" width="640" '
display(SVG(found.replace("<svg ", head, 1).replace(">", f"><style>{style}</style>", 1)))

first, held = result["records"][0], result["test"]
losses_of = {one["name"]: one["dev"] for one in first["candidates"]}
assert first["accepted"] and first["best"] == "unrolled", "the first round's weighted candidate is not accepted"
assert losses_of["unrolled"] < first["present"] < losses_of["uniform"], "plain self-training does not harm the model"
assert held["gain"]["low"] > 0 and held["right"]["gain"]["low"] > 0, "no gain is left on rows that decided nothing"

# %% [markdown]
# ## What this page does not say
#
# This model is tiny, its task is made for the purpose, and one seed was run. That the hypergradients tell right answers
# from wrong ones rests on two things that hold here: the validation examples have the rule in common with the questions
# (section 3: $c \ne 0$), and right answers are among those that the model gives. Where a model is never right, there is
# nothing to weigh. And $V$ is used up: with every round the weights fit its 16 examples more closely, which is why the
# rounds are judged on examples that no weight has seen. These also say, at the end of each line of section 5, how far
# the round's last hypergradients speak for other examples than $V$: 1 entirely, 0 not at all. `configs/refine_*.yaml`
# hold the methods of the paper and their controls on a harder task, sums with forgotten carries.
