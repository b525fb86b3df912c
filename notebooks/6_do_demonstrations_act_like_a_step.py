# %% [markdown]
# # Do demonstrations act like a step?
#
# *In-Context Approximation* (ICA, arXiv 2510.14459) scores a training example by reading alone. With validation
# examples $C$ put before it as demonstrations, by how much does the example's answer become more likely?
#
# $$ s_i = \log p(y_i \mid C, x_i) - \log p(y_i \mid x_i) \quad\text{(nats)} $$
#
# No gradient is computed. The reason given for it is a chain of two links: reading $C$ acts like a *training step* on
# $C$; and by how much a small step on the validation examples lowers the example's loss is
# $\eta\,\langle\nabla\ell_i, \nabla L_v \rangle$, which is also by how much a small step on the example lowers $L_v$.
# So examples with a large $s_i$ should be those that help. The authors did not test the first link. This page does:
# first where everything has a closed form, then on language models, against the exact derivative of a training run.
#
# **What is whose.** The score is that paper's, the alignment $\langle\nabla\ell_i,\nabla L_v\rangle$ is TracIn's
# (Pruthi et al. 2020), the reducible loss is that of Mindermann et al. (2022). The identity and the expansion of
# section 1 and 2 are textbook probability; putting them together, and the measurements, are ours.

# %%
# Parameters: change these and run the page again; a failing assert says what the change broke.
A, B = 2.0, 2.0  # the prior of section 1, Beta(A, B), worth A + B flips; A = B in what section 2 says of even rows
SHARP = 20.0  # a = b of two panels of section 2: a coin that is known as from 2 SHARP flips
CLEAN, GARBLED, TRUSTED = 60, 36, 40  # rows of stories in section 3
STEPS, BATCH = 16, 12  # of the training run
SHOWN, STORIES_RATE = 3, 5e-4  # demonstrations and learning rate on the stories
CIPHER_SHOWN, CIPHER_RATE = 2, 2e-3  # the same on the cipher, whose model's context holds two demonstrations
SEED = 0

# %%
import json
import os
import re
import tempfile
import warnings
from functools import partial
from math import log
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # the models are small: compiling is what takes time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from scipy.special import betaln

from bilevel_jax.core.problem import weighted
from bilevel_jax.core.training import init_train_state, train, train_step
from bilevel_jax.core.unrolled import unrolled_estimator
from bilevel_jax.lm import models
from bilevel_jax.lm.builtin import cipher
from bilevel_jax.lm.data import batches, tokens
from bilevel_jax.lm.data.examples import Example, Turn, load_examples
from bilevel_jax.lm.inference.loglik import LogLik, LogLikRequest, make_loglik_scorer
from bilevel_jax.lm.losses import sft
from bilevel_jax.runs.config.schema import OptimizerSection
from bilevel_jax.runs.stats import (
    auc,
    bootstrap_rank_correlations,
    percentile_interval,
    rank_correlation,
    resample_counts,
)
from bilevel_jax.runs.tasks.builtin import BUILTIN_TASKS, pretrain_builtin_model
from bilevel_jax.runs.tasks.optimizers import build_optimizer
from bilevel_jax.scores.demonstrations import demonstration_selector
from bilevel_jax.scores.incontext import DemonstrationFormat, ica_score, make_demonstration_format
from bilevel_jax.scores.requests import make_tokenized_examples

plt.style.use("notebooks.mplstyle")
warnings.filterwarnings("ignore", message="IProgress")  # no bar is drawn here
BLUE, ORANGE, GREEN, PINK = (f"C{number}" for number in range(4))

# %% [markdown]
# ## 1. Where learning in context is exact
#
# Examples are flips of one coin whose bias $\theta$ nobody knows; the prior is $\theta \sim \mathrm{Beta}(a, b)$. The
# model is Bayesian: it predicts each flip from all flips that it has read, with probability
# $(a + \text{ones})/(a + b + \text{flips})$ for a one (Laplace's rule). This model learns in context perfectly, and it
# does not matter *where* a flip was seen, in a demonstration or in training. So, by Bayes' rule,
#
# $$ s_i = \log\frac{p(y_i, C)}{p(y_i)\,p(C)} = \log p(C \mid y_i) - \log p(C) : $$
#
# the score **is** the gain of the validation examples' log-likelihood when the model learns example $i$; it is their
# *pointwise mutual information*, symmetric in the two. Both sides are computed here in two ways that share no code: the
# left one by the package's score, which makes prompts and asks a model that reads flip by flip; the right one by
# updating the prior with the example, in closed form.

# %%
BOS = 2


def coins(flips):
    """Rows of text that are nothing but flips."""
    examples = [Example(f"{i}#0", i, (Turn("text", f),), "", None, "coins", i) for i, f in enumerate(flips)]
    sequences = [np.array([BOS, *map(int, f)], np.int32) for f in flips]
    return make_tokenized_examples(
        examples,
        tokens.corpus_from_sequences([tokens.TokenizedSequence(ids, np.arange(len(ids)) > 0) for ids in sequences]),
    )


def reader(requests):
    """The model: Laplace's rule, flip by flip."""
    answers = []
    for prefix, response in requests:
        ones, zeros, nats = A + prefix.count(1), B + prefix.count(0), 0.0
        for flip in response:
            nats += log((ones if flip else zeros) / (ones + zeros))
            ones, zeros = ones + flip, zeros + 1 - flip
        answers.append(LogLik(nats, len(response)))
    return answers


def evidence(ones, flips, a=A, b=B):
    """log p of given flips under the prior Beta(a, b)."""
    return betaln(a + ones, b + flips - ones) - betaln(a, b)


random = np.random.default_rng(SEED)
trusted = ["11011", "101", "1111"]
drawn = ["".join(random.choice(["0", "1"], random.integers(1, 9))) for _ in range(80)]
rows = [row for row in drawn if row not in trusted][:60]  # the score shows no row its own copy
score = ica_score(
    DemonstrationFormat((BOS,), (), (), ((), ()), (), ()),
    demonstration_selector("fixed", max_similarity=2),
    k=3,
    max_length=99,
    per_token_mean=False,
)
plan = score(coins(rows), coins(trusted))
by_reading = plan.combine(reader(plan.requests))

ones, flips = (np.array(values) for values in zip(*[(row.count("1"), len(row)) for row in rows], strict=True))
shown, many = sum(row.count("1") for row in trusted), sum(map(len, trusted))
by_learning = evidence(shown, many, A + ones, B + flips - ones) - evidence(shown, many)
print(f"{len(rows)} rows, demonstrations with {shown} ones in {many} flips")
print(f"greatest difference of the two: {np.abs(by_reading - by_learning).max():.0e} nats")
assert np.abs(by_reading - by_learning).max() < 1e-12, (
    "reading and learning differ: the score is not the pointwise mutual information"
)

# %% [markdown]
# So for an exact learner the *idea* of ICA is no approximation. What it is to a **gradient step** is another question.
#
# ## 2. The size of the step
#
# Take the coin's predicted bias $\theta$ as the parameter, at the prior mean $m = a/c$ with $c = a + b$, and let $f_i(
# \theta)$ and $g(\theta)$ be the log-likelihoods of the example and of the demonstrations. For $K$ ones in $N$ flips,
# $g'(m) = (K - Nm)/(m(1-m))$. The prior's variance is $\sigma^2 = m(1-m)/(c+1)$. Two facts:
#
# 1. After one flip the posterior mean is $m + (K - m)/(c + 1) = m + \sigma^2 g'(m)$: **exactly one gradient step with
#    the rate $\eta = \sigma^2$**. After $N$ flips it is $m + (K - Nm)/(c + N)$: the same direction, but a shorter step
#    than $\sigma^2 g'(m)$, by the factor $(c+1)/(c+N)$.
# 2. The score is $s_i = \log E[e^{f_i + g}] - \log E[e^{f_i}] - \log E[e^{g}]$ over the prior. Expand in cumulants:
#    $s_i = \mathrm{Cov}(f_i, g) + \ldots$, where all later terms are mixed cumulants of third and higher order. With
#    $f_i$ and $g$ nearly linear where the prior lives,
#
# $$ s_i \approx \sigma^2 f_i'(m)\, g'(m) = \eta\,\langle \nabla \ell_i, \nabla L\rangle . $$
#
# That is the claim, with its rate: the variance of what the model does not know. It is good where the prior is sharp
# against what is read, $N + n_i \ll c$. At the other end, $N \to \infty$, the posterior is a point $\theta^*$ and
# $s_i \to \log p(y_i \mid \theta^*) - \log p(y_i)$: the example's loss before minus its loss after training on the
# holdout *to the end*, which is the **reducible loss**. Between the two lies every number of demonstrations.


# %%
def scores(ones, flips, shown, many, a=A, b=B):
    """s_i in closed form."""
    return evidence(ones + shown, flips + many, a, b) - evidence(ones, flips, a, b) - evidence(shown, many, a, b)


def linear(ones, flips, shown, many, a=A, b=B):
    """eta f'(m) g'(m) with eta the variance of the prior."""
    m, c = a / (a + b), a + b
    return (ones - flips * m) * (shown - many * m) / (m * (1 - m) * (c + 1))


flip = np.array([0, 1])
m = A / (A + B)
step = m + m * (1 - m) / (A + B + 1) * (flip - m) / (m * (1 - m))
np.testing.assert_allclose((A + flip) / (A + B + 1), step, rtol=1e-14)  # fact 1
np.testing.assert_allclose(scores(ones, flips, shown, many), by_reading, atol=1e-12)

sizes = np.geomspace(4, 4e4, 13)  # prior counts a + b
miss = [abs(scores(6, 8, 4, 5, c / 2, c / 2) / linear(6, 8, 4, 5, c / 2, c / 2) - 1) for c in sizes]
slope = np.polyfit(np.log(sizes[-6:]), np.log(miss[-6:]), 1)[0]
numbers = 5 * 4 ** np.arange(7)  # flips shown, always 4 of 5 ones
one_row = [scores(4, 6, 0.8 * number, number, SHARP, SHARP) for number in numbers]
to_the_end = ones * log(0.8) + (flips - ones) * log(0.2) - evidence(ones, flips, SHARP, SHARP)
end_of_one = 4 * log(0.8) + 2 * log(0.2) - evidence(4, 6, SHARP, SHARP)
of_all = [scores(ones, flips, 0.8 * number, number, SHARP, SHARP) for number in numbers]
one_step = linear(ones, flips, 4, 5, SHARP, SHARP)  # its order does not depend on how many flips are shown
ranks = {
    "a small step": [rank_correlation(one, one_step) for one in of_all],
    "training to the end": [rank_correlation(one, to_the_end) for one in of_all],
}

figure, panels = plt.subplots(1, 3, figsize=(10, 3.3))
panels[0].loglog(sizes, miss, "o-")
panels[0].loglog(sizes, miss[-1] * sizes[-1] / sizes, color="grey", lw=1, ls=":")
panels[0].set(
    xlabel="sharpness of the prior, $a + b$", ylabel="$|s_i$ / linear $- 1|$", title="a sharp prior: one step"
)
panels[1].semilogx(numbers, one_row, "o-", label="score")
panels[1].semilogx(
    numbers[:3], linear(4, 6, 0.8 * numbers, numbers, SHARP, SHARP)[:3], color=ORANGE, label="$\\eta$ ⟨grad, grad⟩"
)
panels[1].axhline(end_of_one, color=GREEN, lw=1, ls="--", label="reducible loss")
panels[1].set(xlabel="flips shown", ylabel="nats", title="many demonstrations: one row")
panels[1].legend()
for (name, values), colour in zip(ranks.items(), (ORANGE, GREEN), strict=True):
    panels[2].semilogx(numbers, values, "o-", color=colour, label=name)
panels[2].set(xlabel="flips shown", ylabel="rank correlation", title="the order of 60 rows")
panels[2].legend()
plt.show()

# %%
print(f"error of the linear form ~ (a + b)^{slope:.2f}")
print(f"one row, {numbers[-1]} flips: score {one_row[-1]:.3f}, reducible loss {end_of_one:.3f} nats")
for name, values in ranks.items():
    print(f"rank correlation with {name}: {values[0]:.3f} at {numbers[0]} flips, {values[-1]:.3f} at {numbers[-1]}")
print("demonstrations with as many ones as zeros, of 10 flips: linear form", linear(1, 2, 5, 10), "for every row;")
print(f"score of the row 10: {scores(1, 2, 5, 10):+.3f}, of the row 11: {scores(2, 2, 5, 10):+.3f} nats")
assert abs(slope + 1) < 0.05 and abs(one_row[-1] - end_of_one) < 0.01, (
    "the error of the linear form does not fall as 1/(a + b), or many flips do not end at the reducible loss"
)
assert ranks["training to the end"][-1] > 0.99 and scores(1, 2, 5, 10) > 0 > scores(2, 2, 5, 10), (
    "many flips do not order rows as finished training does, or even demonstrations do not prefer even rows: is A = B?"
)

# %% [markdown]
# *Left:* as the prior sharpens, the score tends to the linear form, with an error of order $1/(a + b)$. *Middle:* the
# linear form grows with every demonstration; the score does not, because what is known cannot be learned again. It ends
# at the reducible loss, dashed. *Right:* the order of the examples is at first nearer to that of the small step, and
# ends as that of the finished training. Only examples of different lengths change places: the order suffers less than
# the size.
#
# The last printed lines show where the claim fails altogether, in order as well as in size: demonstrations that confirm
# the model's mean have no gradient ($\nabla L = 0$), so the linear form says nothing, and yet the exact learner becomes
# surer, and prefers examples that are as even as the demonstrations. That is the second-order part.
#
# So for a learner that really learns in context: **the idea holds exactly, the linear form where little is read against
# much that is known.** A language model is not this learner. Whether its reading is like a step must be measured.
#
# ## 3. A language model
#
# With the folder of a real model next to the repository, or named in `BILEVEL_MODEL` (with `BILEVEL_STORIES`, a JSON
# list of texts), examples are pairs of sentences of children's stories: the first is the prompt, the second the answer.
# Of the 96 answers 36 went through one fixed permutation of the vocabulary. The scores never see which. Without the
# folder it is the cipher that the package makes itself, so that this page runs anywhere; what it prints is then about
# that.

# %%
SHARED = Path("../../shared").resolve()
MODEL = Path(os.environ.get("BILEVEL_MODEL", SHARED / "models/stories-260k"))
STORIES = Path(os.environ.get("BILEVEL_STORIES", SHARED / "data/tinystories/tinystories_1000.json"))
REAL = MODEL.is_dir() and STORIES.is_file()
work = tempfile.TemporaryDirectory()
folder = Path(work.name)


def passages(texts):
    """Two sentences from the middle of each story."""
    for text in texts:
        sentences = re.findall(r"[A-Z][^.!?\n]*[.!?]", text)
        pairs = zip(sentences[2:], sentences[3:], strict=False)
        if some := [pair for pair in pairs if 30 <= len(" ".join(pair)) <= 58]:
            yield some[0]


def garbler(tokenizer, random):
    """Text -> text, by one permutation of all whole tokens."""
    special = set(tokenizer.all_special_ids)
    plain = sorted(i for text, i in tokenizer.get_vocab().items() if i not in special and not text.startswith("<0x"))
    permuted = dict(zip(plain, random.permutation(plain).tolist(), strict=True))

    def garbled(text):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokenizer.decode([permuted.get(i, i) for i in ids]).strip()

    return garbled


def story_rows(model):
    """Clean and garbled answers, and validation examples, as files."""
    random = np.random.default_rng(SEED)
    pairs = list(dict.fromkeys(passages(json.loads(STORIES.read_text(encoding="utf-8")))))[: CLEAN + GARBLED + TRUSTED]
    assert len(pairs) == CLEAN + GARBLED + TRUSTED, f"the file has only {len(pairs)} passages: ask for fewer rows"
    garbled = garbler(tokens.load_tokenizer(str(model)), random)
    some = [{"prompt": a, "response": b, "label": "clean"} for a, b in pairs[:CLEAN]]
    some += [{"prompt": a, "response": garbled(b), "label": "garbled"} for a, b in pairs[CLEAN : CLEAN + GARBLED]]
    parts = {"train": some, "validation": [{"prompt": a, "response": b} for a, b in pairs[CLEAN + GARBLED :]]}
    for name, part in parts.items():
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def cipher_rows():
    """The package's own task: answers of a right rule, of a wrong one, and of none; a model that can only copy."""
    made = cipher.write_cipher_data(folder / "cipher", clean=48, wrong=24, noise=24, validation=40)
    pretrain_builtin_model(made, BUILTIN_TASKS["cipher"], progress=False)
    return made


if REAL:
    model, made, k, rate = MODEL, story_rows(MODEL), SHOWN, STORIES_RATE
    print("Real: a pretrained model of children's stories, of 260 thousand parameters, and rows of stories.")
else:
    made = cipher_rows()
    model, k, rate = made / "model", CIPHER_SHOWN, CIPHER_RATE
    print("No folder of a model was found: this is the cipher that the package makes itself, and its model.")

# %% [markdown]
# Measured for every training example, all as "larger is better":
#
# - **ICA** with the nearest validation examples as demonstrations (`knn`, as published), and with the same for all
#   (`fixed`);
# - **alignment** $\langle\nabla\ell_i, \nabla L_v\rangle$ over all validation examples $V$, and over the very examples
#   that ICA showed to example $i$, which is what the claim is about;
# - what **real steps** on $V$ do to the example's loss: 1 to 32 steps of gradient descent;
# - the **exact hypergradient** $-dL_v/dw_i$ of a training run of 16 steps of AdamW on all parameters: the sweep of
#   notebook 1;
# - **perplexity**: minus the example's loss.
#
# ICA and alignment are taken twice: at the start, and at the end of the training run (`trained`).

# %%
LEARNED = (1, 2, 4, 8, 16, 32)


def one_batch(corpus, length, micro=1):
    """All rows in `micro` micro-batches."""
    count = corpus.num_examples // micro
    return batches.make_evaluation_stream(corpus, batches.BatchShape(micro, count, count, length))


def measure(model, made, k, rate):
    """Everything that this page compares: name -> one number for each training example, larger = better."""
    architecture, params = models.load_model(model)
    decoder, tokenizer = models.make_decoder(architecture), tokens.load_tokenizer(str(model))
    examples, held = (load_examples([str(made / f"{name}.jsonl")]) for name in ("train", "validation"))
    corpus, judge = (
        tokens.tokenize(part, tokenizer, max_length=architecture.max_length)[0] for part in (examples, held)
    )
    length = max(batches.padded_max_length(corpus), batches.padded_max_length(judge))
    all_rows, trusted_rows = one_batch(corpus, length), one_batch(judge, length)
    per_example = sft.sft_losses(decoder)
    values = jax.jit(lambda params, batch: per_example(params, jax.tree.map(lambda leaf: leaf[0], batch)))
    before = values(params, all_rows.batch(0))

    sides = make_tokenized_examples(examples, corpus), make_tokenized_examples(held, judge)

    # the exact entries of a training run
    problem = weighted(lambda params, fixed, batch: per_example(params, batch))
    adamw = build_optimizer(OptimizerSection(learning_rate=rate, warmup_steps=2, eps_root=1e-8), STEPS)
    layout = batches.BatchShape(1, BATCH, BATCH, length)
    stream = batches.make_train_stream(corpus, batches.shuffled_order(corpus.num_examples, BATCH, 0), STEPS, layout)
    weights, step = jnp.ones(corpus.num_examples), train_step(problem, adamw)
    run = train(step, init_train_state(adamw, params), weights, None, stream)
    estimate = unrolled_estimator(problem, step)(run, weights, None, stream, trusted_rows)
    assert estimate.checks.replayed, "a replayed segment did not end where training did"
    found = {"exact entry": -np.array(estimate.grad), "perplexity": -np.array(before)}

    def slope(params, micro):
        return ravel_pytree(jax.grad(lambda params: per_example(params, micro)[0])(params))[0]

    @jax.jit
    def products(params, batch, trusted):
        table = jax.lax.map(partial(slope, params), trusted)
        return jax.lax.map(lambda micro: table @ slope(params, micro), batch), jnp.sum(table.mean(0) ** 2)

    answer, form = (
        make_loglik_scorer(decoder, bucket_lengths=(96, 320), share_prefixes=False),
        make_demonstration_format(tokenizer),
    )
    one_by_one = (
        one_batch(corpus, length, corpus.num_examples).batch(0),
        one_batch(judge, length, judge.num_examples).batch(0),
    )
    steepness = {}
    for when, reached in (("", params), (", trained", run.end.params)):
        # inner products of the gradients of training and validation examples; their mean over V is alignment
        gram, steepness[when] = products(reached, *one_by_one)
        found["alignment" + when] = np.array(gram.mean(1))
        # by reading
        for name in ("knn", "fixed"):
            asked = ica_score(form, demonstration_selector(name), max_length=architecture.max_length, k=k)(*sides)
            found[f"ICA {name}{when}"] = asked.combine(answer.score(reached, asked.requests))
            shown = demonstration_selector(name)(*sides, k)
            found[f"alignment with shown {name}{when}"] = np.take_along_axis(np.array(gram), shown, 1).mean(1)
            assert (asked.num_holdout == k).all(), (
                "not every prompt holds all its demonstrations: fewer, or shorter rows"
            )
        last = [judge.get_sequence(i).ids.tolist() for i in range(judge.num_examples)]
        ends = answer.score(reached, [LogLikRequest(tuple(ids[:-1]), tuple(ids[-1:])) for ids in last])
        print(
            f"validation examples{when}: {float(values(reached, trusted_rows.batch(0)).mean()):.2f} nats per token; "
            f"the token that ends an answer {-np.mean([one.nats for one in ends]):.2f} nats"
        )

    # by steps on the validation examples, each of which lowers L_v by .02 nats to first order
    descent = optax.sgd(0.02 / steepness[""])

    def keep(state, info):
        if int(state.step) in LEARNED:
            change = before - values(state.params, all_rows.batch(0))
            found[f"{int(state.step)} × step on V"] = np.array(change)

    again = batches.Stream(lambda step: trusted_rows.batch(0), max(LEARNED))
    train(
        train_step(problem, descent),
        init_train_state(descent, params),
        jnp.ones(judge.num_examples),
        None,
        again,
        on_step=keep,
    )
    return found, np.array([example.label == "clean" for example in examples])


found, clean = measure(model, made, k, rate)

# %%
SCORES = ["ICA knn", "ICA fixed", "alignment"]
SCORES += [f"{name}, trained" for name in SCORES] + ["perplexity", "exact entry"]
print(f"{len(clean)} rows, of which {clean.sum()} are clean")
print("                     mean: clean    others   AUC of clean")
for name in SCORES:
    one = found[name]
    print(f"{name:18s} {one[clean].mean():+13.3f} {one[~clean].mean():+9.3f} {auc(one, clean):10.3f}")

# %%
figure, panels = plt.subplots(1, 3, figsize=(10, 3.4))
for axes, (across, up) in zip(
    panels,
    (
        ("alignment, trained", "ICA knn, trained"),
        ("exact entry", "ICA knn, trained"),
        ("exact entry", "alignment, trained"),
    ),
    strict=True,
):
    for kind, colour, mark, label in ((clean, BLUE, "o", "clean"), (~clean, ORANGE, "s", "not clean")):
        axes.plot(found[across][kind], found[up][kind], mark, color=colour, alpha=0.7, label=label)
    axes.axhline(0, color="grey", lw=1)
    axes.axvline(0, color="grey", lw=1)
    axes.set(xlabel=across, ylabel=up, title=f"rank correlation {rank_correlation(found[across], found[up]):.2f}")
panels[0].legend()
plt.show()

# %%
PAIRS = [
    ("ICA knn", "alignment with shown knn"),
    ("ICA knn", "32 × step on V"),
    ("ICA knn", "exact entry"),
    ("ICA fixed", "alignment with shown fixed"),
    ("ICA fixed", "exact entry"),
    ("ICA knn, trained", "alignment with shown knn, trained"),
    ("ICA knn, trained", "exact entry"),
    ("ICA fixed, trained", "alignment with shown fixed, trained"),
    ("ICA fixed, trained", "exact entry"),
    ("alignment", "1 × step on V"),
    ("alignment", "exact entry"),
    ("alignment, trained", "exact entry"),
    ("perplexity", "exact entry"),
]


def correlations(some):
    """The rank correlation of each pair over some of the rows, with its 95 % bootstrap interval."""
    one, other = (np.stack([found[pair[side]][some] for pair in PAIRS]) for side in (0, 1))
    draws = bootstrap_rank_correlations(one, other, resample_counts(int(some.sum()), (0,)))
    return [percentile_interval(draws[:, pair]) for pair in range(len(PAIRS))]


figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.8), width_ratios=(1, 1.1))
read = {"all rows": correlations(np.ones(len(clean), bool)), "clean rows only": correlations(clean)}
for (name, found_here), colour, shift in zip(read.items(), (BLUE, ORANGE), (-0.15, 0.15), strict=True):
    places = np.arange(len(PAIRS)) + shift
    left.hlines(places, [one.low for one in found_here], [one.high for one in found_here], color=colour)
    left.plot([one.value for one in found_here], places, "o", color=colour, label=name)
left.axvline(0, color="grey", lw=1)
left.set_yticks(range(len(PAIRS)), [f"{one}  ~  {other}" for one, other in PAIRS])
left.invert_yaxis()
left.set(xlim=(-1, 1), xlabel="rank correlation, 95 % interval", title="who orders the rows alike")
figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=2)
for name, colour in (("ICA knn", BLUE), ("ICA fixed", PINK), ("alignment", ORANGE), ("exact entry", GREEN)):
    values = [rank_correlation(found[name][clean], found[f"{number} × step on V"][clean]) for number in LEARNED]
    right.semilogx(LEARNED, values, "o-", color=colour, label=name)
right.axhline(0, color="grey", lw=1)
right.set(xlabel="gradient steps on the validation examples", ylim=(-1, 1.02), title="against real steps, clean rows")
right.legend()
plt.show()

# %%
for (one, other), every, of_clean in zip(PAIRS, *read.values(), strict=True):
    print(
        f"{one:18s} ~ {other:36s} {every.value:+.2f} [{every.low:+.2f}, {every.high:+.2f}]"
        f"   clean {of_clean.value:+.2f} [{of_clean.low:+.2f}, {of_clean.high:+.2f}]"
    )
assert read["all rows"][PAIRS.index(("alignment", "1 × step on V"))].value > 0.95, (
    "alignment and one real step on V disagree, which Taylor's theorem forbids for a small step"
)  # the second link is calculus

# %% [markdown]
# ## What came out
#
# These are observations of one model and one set of examples; the intervals are over examples, not over models. For the
# stories model, whose outputs are kept here:
#
# - **The second link holds.** Alignment and what a real step on $V$ does agree, as they must: it is Taylor's theorem.
#   Even 32 steps leave the order almost as it was.
# - **The first link does not.** ICA's rank correlation with the alignment to the very examples that were shown is at
#   most about .3, and after training not distinguishable from 0. Showing three examples is *not* like a step on them,
#   for this model.
# - **Demonstrations hardly help it at all.** The mean ICA of clean examples is about 0 or below: after three
#   demonstrations their answers are no likelier. A model of 260 thousand parameters, trained on single stories, has not
#   learned to learn from earlier exchanges. ICA then measures how much a longer, stranger prompt disturbs.
# - **Against the exact hypergradients** ICA's correlation is small and of either sign. Among clean examples alone none
#   of its four versions is above 0, and the two after training are below it. Its AUC lies between .48 and .77, where
#   perplexity, which costs one forward pass, has .99.
# - **Alignment itself depends on when.** At the start it points the wrong way, AUC .27. There the token that ends an
#   answer costs 26 nats: the gradient of $L_v$ asks for the *form*, and garbled examples end as clean ones do. That is
#   the likely reason; it was not isolated. At the end of the 16 steps the AUC is 1.00 and the correlation with the
#   exact hypergradients .79. Those follow the whole run, and need no choice of a moment.
#
# So the reason that is given for ICA is right for an exact learner, in the regime of section 2, and is not what ICA
# computes on a small model. It may be on a large one that learns in context: this page does not know. Before trusting
# the score on yours, look whether its mean on clean examples is clearly above 0, and run `bilevel-jax audit`, which
# grades every score by exact hypergradients on your model and data.
