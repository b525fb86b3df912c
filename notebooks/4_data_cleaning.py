# %% [markdown]
# # Cleaning labels: all methods on one data set
#
# A thousand examples, half of them with a wrong label. We trust a few hundred other examples, V. Which examples are the
# wrong ones, what does it cost to find out, and when is a method worth more than the simplest idea: keep the examples
# that a model finds easy?
#
# The page drives the same bench as the command `bilevel-jax compare`: every method gets the same number of forward and
# backward passes, then a model is **trained again from cold** with its weights and read on examples that no method has
# seen (test). On the page are the data, the config, and the readings.
#
# The notation is that of the first notebook: example $i$ has loss $\ell_i(\theta)$ and weight $w_i$, and $L_v$ is the
# mean loss on validation examples. Most methods look for weights such that the model trained on $\sum_i w_i \ell_i$ has
# a small $L_v$.

# %%
# Parameters: change these and run the page again; a failing assert says what the change broke.
CLASSES, DIMENSIONS, RADIUS = 10, 50, 4.0  # of the data: Gaussian balls of variance 1, so far from the origin
EXAMPLES, VALIDATION = 1000, 200  # training and validation examples
NOISE_SHARE = 0.5  # of labels that are wrong
BUDGET, SEEDS = 300, 3  # passes of each method and seed; a training takes 10, and its sweep 40
FEW_VALIDATION, MANY_VALIDATION = 30, 1000  # the other sizes of V, below and above VALIDATION
LITTLE_NOISE, MUCH_NOISE = 0.2, 0.8  # the other shares of wrong labels, below and above NOISE_SHARE

# %%
import contextlib
import io
import json
import os
import tempfile
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # the models are tiny: compiling is what takes time

import jax
import matplotlib.pyplot as plt
import numpy as np
import pyarrow.parquet as pq

from bilevel_jax.commands.compare.methods import METHODS
from bilevel_jax.commands.compare.run import compare
from bilevel_jax.runs.config.load import CompareConfig, load_config

plt.style.use("notebooks.mplstyle")
work = tempfile.TemporaryDirectory()
folder = Path(work.name)
jax.config.update("jax_compilation_cache_dir", str(folder / "programs"))  # seeds and runs compile the same programs
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# %% [markdown]
# ## The data
#
# Ten classes in 50 dimensions, each a Gaussian ball of variance 1 around its own centre, which lies 4 from the origin.
# A linear classifier is all but perfect here, if its labels are. The file holds right labels only: `compare` draws the
# training examples anew for each seed and forces the label of half of them to another class, all others equally likely.


# %%
def mixture(path):
    random = np.random.default_rng(0)
    centres = random.normal(size=(CLASSES, DIMENSIONS))
    centres *= RADIUS / np.linalg.norm(centres, axis=1, keepdims=True)
    arrays = {}
    for part, rows in (("train", 4000), ("test", 2000)):
        y = random.integers(0, CLASSES, rows)
        x = centres[y] + random.normal(size=(rows, DIMENSIONS))
        arrays |= {f"x_{part}": x.astype(np.float32), f"y_{part}": y}
    np.savez(path, **arrays)


mixture(folder / "mixture.npz")
(folder / "compare.yaml").write_text(f"""
data: {{train: ['{folder / "mixture.npz"}']}}
arrays: {{train_examples: {EXAMPLES}, validation_examples: {VALIDATION}, test_examples: 1000, label_noise: forced,
  noise_share: {NOISE_SHARE}}}
optimizer: {{name: momentum, learning_rate: 0.2, schedule: constant, warmup_steps: 0}}
train: {{max_steps: 10, global_batch_size: 200}}  # T = 10 steps, 2 epochs
outer: {{weighting: sigmoid, learning_rate: 0.5, schedule: linear, restart: warm,  # a rate that falls to 0
  proximal: 0.01, window: 3, max_iterations: 4, curvature_batches: 5}}
single_loop: {{eval_steps: 25, min_effective_share: 0}}  # one linear model fits all right examples
compare: {{budget: {BUDGET}, seeds: {SEEDS}}}
output: {{progress: false}}
mesh: {{data: 1}}
""")


def run(name, *flags):
    """result.json of one run of the bench, its rows by name, and the weights of every row."""
    with contextlib.redirect_stdout(io.StringIO()):  # its lines, which say how long each part took
        compare(load_config(CompareConfig, folder / "compare.yaml", [*flags, "--out", str(folder / name)]))
    result = json.loads((folder / name / "result.json").read_text())
    return result, {row["name"]: row for row in result["rows"]}, pq.read_table(folder / name / "weights.parquet")


# pooling is the subject of notebook 11, mixtures of sources (proxy_fit) that of configs/compare_mixtures.yaml
methods = [name for name in METHODS if name not in ("pooled", "auto", "proxy_fit")]
result, rows, weights = run("all", "--compare.methods", *methods)
print(*result["notes"], sep="\n")
print(f"Budget of each method and seed: {result['budget']} passes. One training: {result['steps']} passes.")

# %% [markdown]
# ## The table
#
# *AUC*: how often a right example has a larger weight than a wrong one (.5 is chance). *F1*: examples of weight above 1
# called right. *L_v*: loss on test of the model trained again, with the weights alone, and with validation added to the
# examples. ± is the half-width of the 95 % interval of the mean over three seeds, by Student's t.
#
# The upper rows of the table learn nothing. `oracle` trains on the right examples, `validation` on the 200 validation
# examples alone, `low_loss` on the half of the examples with the least loss after one training on all of them; mind
# that it is *given* this share.

# %%
UPPER = ("uniform", "oracle", "validation", "train+validation", "top_alignment", "low_loss")
COLUMNS = {"auc": "AUC", "f1": "F1", "test": "L_v", "with_v test": "L_v, with V", "own test": "own model's L_v"}


def said(row, key):
    mean, half = row["mean"].get(key), row["interval"].get(key)
    return "–" if mean is None else f"{mean:.3f} ± {half:.3f}" if mean < 1 else f"{mean:.2f} ± {half:.2f}"


print(f"{'':<18}" + "".join(f"{head:>17}" for head in COLUMNS.values()) + f"{'passes':>8}")
for name in (*UPPER, *methods):
    row = rows[name]
    print(f"{name:<18}" + "".join(f"{said(row, key):>17}" for key in COLUMNS) + f"{row['mean']['passes']:>8.0f}")

# %% [markdown]
# What the lower rows compute differs, and `compare` says so:

# %%
for name in methods:
    print(f"{name:<15}{METHODS[name].estimand}.  Exact: {METHODS[name].exactness}.")


# %% [markdown]
# Three readings, each checked below.
#
# **The simple baseline is hard to beat here.** Sorting by the loss of one plain training costs 30 passes of the 300,
# and no method that learns weights calls the examples right with a clearly higher F1. The reason is in the data: the
# right examples of a class agree with each other, the wrong ones contradict everybody, and ten steps of a linear model
# do not learn them by heart. No validation example is needed for that; but the share of wrong labels is, and it was
# given.
#
# **Exactness is not what these examples are short of.** `unrolled` is the only method here whose gradient is that of
# the training that happened. Yet `window`, and even `alignment`, which is the derivative of nothing, do better for the
# same passes: their steps are cheaper, so the weights get further, and on a short training of a convex problem all of
# them point much the same way. Where training is long or not convex, the first two notebooks show how far the cheap
# directions drift from the exact one.
#
# **A ranking is not yet a set of weights.** Without its second model the penalty method (`penalty_alone`) does what
# `low_loss` does: every weight only falls, those of easy examples more slowly. Let it go four times as far, and its AUC
# is as high as before, but a few examples hold all the weight (the effective sample size $(\sum w)^2 / \sum w^2$ says
# how many), and a model trained with them is worse than one that ignores the question. Look at ESS before you train.


# %%
def values(rows, name, key):
    """One number for each seed."""
    outer, _, inner = key.rpartition(" ")
    return np.array([cell[outer][inner] if outer else cell[key] for cell in rows[name]["runs"]])


def mean(rows, name, key):
    return values(rows, name, key).mean()


learners = [name for name in methods if name != "mixing"]  # mixing learns no weights
best = max(learners, key=lambda name: mean(rows, name, "f1"))
print(f"F1: low_loss {mean(rows, 'low_loss', 'f1'):.3f}; of those that learn, {best} {mean(rows, best, 'f1'):.3f}")
assert mean(rows, best, "f1") < mean(rows, "low_loss", "f1") + 0.02, (
    "a method that learns weights calls the rows right more often than low_loss, by .02 or more: say so in the text"
)

for name in ("window", "alignment"):
    gap = values(rows, "unrolled", "with_v test") - values(rows, name, "with_v test")
    print(f"L_v of unrolled less that of {name}, by seed: {', '.join(f'{one:+.3f}' for one in gap)}")
    assert (gap > 0).all(), f"{name} no longer beats unrolled for the same passes in every seed"

flags = ("--compare.methods", "penalty_alone", "--compare.baselines", "uniform", "--compare.seeds", "1")
far = run("far", *flags, "--outer.learning-rate", "2")[1]
for words, some in (("as in the table", rows), ("four times as far", far)):
    one = {key: values(some, "penalty_alone", key)[0] for key in ("auc", "ess", "test")}
    print(f"penalty_alone {words}: AUC {one['auc']:.3f}, ESS {one['ess']:.0f} rows, L_v {one['test']:.2f}")
assert values(far, "penalty_alone", "auc")[0] > 0.95 and values(far, "penalty_alone", "ess")[0] < 20, (
    "penalty_alone, gone too far, does not rank well with few effective rows: the text's warning has no case"
)
assert values(far, "penalty_alone", "test")[0] > values(far, "uniform", "test")[0], (
    "the model of few effective rows is not worse than uniform weights"
)

# %% [markdown]
# ## Quality against cost
#
# Left: how well the weights rank the examples, by the passes that were spent. An outer step of `unrolled` costs a
# training and its sweep (each step of it replays a training step and multiplies by a Hessian): $10 + 4 \cdot 10 = 50$
# passes. One of `alignment` costs 20, one of `implicit` a training and a solve, 80, so that it makes three in all: it
# is unfinished rather than wrong. The methods of one loop (penalty, BMO) move weights and parameters together. Right:
# what counts in the end, the model trained again with the weights and V. A dot is one seed.
#
# The rate of the weights falls to 0 over the budget, so that they settle. Where a curve falls again all the same, as
# that of `penalty` does, later steps fit the 200 examples of V rather than what they stand for; a dev of their own,
# which chooses the step to stop at, is the remedy, and `select` takes one from the validation examples.

# %%
COLOURS = dict(zip(methods, ["C0", "C1", "C2", "C3", "C4", "C5", "C6", "0.5"], strict=True))
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), width_ratios=[1.25, 1])
for name in learners:
    trails = [[(one["passes"], one["auc"]) for one in cell["trail"]] for cell in rows[name]["runs"]]
    passes, auc = np.mean([trail[: min(map(len, trails))] for trail in trails], 0).T
    left.plot(passes, auc, "o-", markersize=3, color=COLOURS[name], label=name)
left.axhline(rows["low_loss"]["mean"]["auc"], color="0.4", linestyle=":", label="low_loss")
left.set(xlabel="forward and backward passes spent", ylabel="AUC of the weights", ylim=(0.45, 1.02))
left.legend(fontsize=8, ncols=2, loc="lower right")

last = {"oracle": "test", "low_loss": "test", "validation": "test", "uniform": "test"}
shown = {**dict.fromkeys(learners, "with_v test"), "mixing": "own test", **last}
shown = dict(sorted(shown.items(), key=lambda item: -rows[item[0]]["mean"][item[1]]))
for place, (name, key) in enumerate(shown.items()):
    colour = COLOURS.get(name, "0.4")
    right.plot(values(rows, name, key), [place] * result["seeds"], "o", markersize=3, color=colour, alpha=0.6)
    right.plot(rows[name]["mean"][key], place, "|", markersize=14, markeredgewidth=2, color=colour)
right.set_yticks(range(len(shown)), shown)
right.set(xlabel="$L_v$ on test, nats per row", xlim=(0, None), title="retrained (mixing: its own model)")
plt.show()
assert all(
    mean(rows, "bmo", key) < mean(rows, name, key) for name in learners[:-1] for key in ("test", "with_v test")
), "bmo is not the best of the methods that learn weights"

# %% [markdown]
# ## The weights themselves
#
# Weights of right and wrong examples, all seeds together, and last the losses that `low_loss` sorts by. Sigmoid weights
# start at 1 and stay between 0 and 2; those of BMO and of `penalty_alone` compete for one sum and have no such bound
# (what lies above 3 is in the last bar): BMO presses wrong examples to 0 and spreads the right ones.

# %%
clean = np.array(weights["label"].to_pylist()) == "clean"
figure, axes = plt.subplots(2, 4, figsize=(9.5, 4.2), sharey=True)
for axis, name in zip(axes.flat, [*learners, "loss"], strict=True):
    values_of = weights["loss" if name == "loss" else f"weight {name}"].to_numpy()
    end = 6 if name == "loss" else 3 if name in ("bmo", "penalty_alone") else 2
    bins = np.linspace(0, end, 31)
    for good, colour, words in ((True, "C0", "right"), (False, "C1", "wrong")):
        axis.hist(np.clip(values_of[clean == good], 0, end), bins, color=colour, alpha=0.6, label=words)
    axis.set(title="loss, nats" if name == "loss" else name, ylim=(0, 600))
axes[0, 0].set_ylabel("rows")
axes[1, 0].set_ylabel("rows")
axes[0, 3].legend()
plt.show()

# %% [markdown]
# ## How large must V be?
#
# Now V grows from 30 examples (three of a class) to 1,000. Two seeds; dots are seeds.

# %%
SOME = ("unrolled", "window", "bmo")
FEW = (
    "--compare.methods",
    *SOME,
    "--compare.seeds",
    "2",
    "--compare.baselines",
    "uniform",
    "validation",
    "oracle",
    "low_loss",
)
by_size = {VALIDATION: rows}
for size in (FEW_VALIDATION, MANY_VALIDATION):
    by_size[size] = run(f"fit-{size}", *FEW, "--arrays.validation-examples", str(size))[1]
by_size = dict(sorted(by_size.items()))


def curve(axis, table, name, key, words, colour, style="-"):
    """Means as a line, seeds as dots."""
    places = list(table)
    each = [values(table[place], name, key) for place in places]
    axis.plot(places, [one.mean() for one in each], style, color=colour, label=words)
    axis.plot(np.repeat(places, [len(one) for one in each]), np.concatenate(each), "o", markersize=3, color=colour)


figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9.5, 3.4))
for name in SOME:
    curve(left, by_size, name, "auc", name, COLOURS[name])
    curve(right, by_size, name, "with_v test", name, COLOURS[name])
curve(left, by_size, "low_loss", "auc", "low_loss", "0.4", ":")
curve(middle, by_size, "unrolled", "validation", "on validation", "C1")
curve(middle, by_size, "unrolled", "test", "on test", "C0")
curve(right, by_size, "low_loss", "test", "low_loss", "0.4", ":")
curve(right, by_size, "validation", "test", "V alone", "0.4", "--")
left.set(xscale="log", xlabel="rows of V", ylabel="AUC", title="do weights find wrong rows?")
middle.set(
    xscale="log", xlabel="rows of V", ylabel="$L_v$, nats per row", title="unrolled: fitted and new rows", ylim=0
)
right.set(xscale="log", xlabel="rows of V", title="$L_v$ on test, retrained with V", ylim=(0, 1.3))
for axis in (left, middle, right):
    axis.legend(fontsize=8)
plt.show()

# %% [markdown]
# With 30 validation examples, `unrolled` brings the loss on those 30 down and leaves that on new examples high: the
# derivative is exact, of the wrong thing. The gap between validation and test shows it without any label, and closes as
# V grows. At 30 examples `low_loss`, which reads no V at all, gives the better model by far. At 1,000 V finds the wrong
# examples well, **but then V alone is a training set as good as any**. BMO needs V least here: V only keeps its model
# from going astray.

# %%
for size, table in by_size.items():
    gap = mean(table, "unrolled", "test") - mean(table, "unrolled", "validation")
    print(
        f"|V| = {size:>4}: unrolled AUC {mean(table, 'unrolled', 'auc'):.3f}, its test less validation {gap:+.3f};  "
        f"L_v: unrolled with V {mean(table, 'unrolled', 'with_v test'):.3f}, bmo with V "
        f"{mean(table, 'bmo', 'with_v test'):.3f}, low_loss {mean(table, 'low_loss', 'test'):.3f}, "
        f"V alone {mean(table, 'validation', 'test'):.3f}"
    )
gaps = [mean(table, "unrolled", "test") - mean(table, "unrolled", "validation") for table in by_size.values()]
ranks = [mean(table, "unrolled", "auc") for table in by_size.values()]
assert gaps == sorted(gaps, reverse=True) and ranks == sorted(ranks), (
    "with more validation examples, unrolled's gap between test and validation does not fall, or its AUC does not rise"
)
small, large = by_size[FEW_VALIDATION], by_size[MANY_VALIDATION]
assert (values(small, "unrolled", "with_v test") > values(small, "low_loss", "test") + 0.05).all(), (
    "with few validation examples low_loss is not clearly better than unrolled"
)
assert (values(small, "validation", "test") > values(small, "unrolled", "with_v test")).all(), (
    "a few validation examples alone are as good as weights with them"
)
assert all(mean(large, "validation", "test") < mean(large, name, "with_v test") + 0.02 for name in SOME), (
    "many validation examples alone are not as good as weights with them"
)
assert mean(large, "validation", "test") < mean(large, "low_loss", "test"), (
    "many validation examples alone are not better than low_loss"
)

# %% [markdown]
# ## How many labels may be wrong?
#
# Back to 200 validation examples; the share of wrong labels goes from a fifth to four fifths. `low_loss` is given it
# each time.

# %%
by_share = {NOISE_SHARE: rows}
for share in (LITTLE_NOISE, MUCH_NOISE):
    flags = ("--arrays.noise-share", str(share), "--compare.top-share", str(round(1 - share, 1)))
    by_share[share] = run(f"share-{share}", *FEW, *flags)[1]
by_share = dict(sorted(by_share.items()))

figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4))
for name in SOME:
    curve(left, by_share, name, "auc", name, COLOURS[name])
    curve(right, by_share, name, "with_v test", name, COLOURS[name])
curve(left, by_share, "low_loss", "auc", "low_loss", "0.4", ":")
curve(right, by_share, "low_loss", "test", "low_loss", "0.4", ":")
curve(right, by_share, "validation", "test", "V alone", "0.4", "--")
curve(right, by_share, "uniform", "test", "uniform", "0.7", "-.")
left.set(xlabel="share of wrong labels", ylabel="AUC", title="do weights find wrong rows?")
right.set(xlabel="share of wrong labels", title="$L_v$ on test, retrained with V", ylim=(0, 2))
for axis in (left, right):
    axis.legend(fontsize=8)
plt.show()

# %% [markdown]
# With a fifth of the labels wrong there is little to win: sorting by loss is all but perfect, and every choice is about
# as good as the oracle. With four fifths wrong the model learns the majority, which lies, and **least loss now fails**:
# it keeps too many wrong examples. The methods that look at V still rank well, and their models are better by far. But
# again V alone does as well as the best of them. Learned weights earn their cost between the ends: where V is too small
# to train on, and the data are too wrong to be judged by their own majority.

# %%
for share, table in by_share.items():
    ranks = ", ".join(f"{name} {mean(table, name, 'auc'):.3f}" for name in (*SOME, "low_loss"))
    losses = ", ".join(f"{name} {mean(table, name, 'with_v test'):.3f}" for name in SOME)
    rest = ", ".join(f"{name} {mean(table, name, 'test'):.3f}" for name in ("low_loss", "validation", "oracle"))
    print(f"{share:.0%} wrong. AUC: {ranks}. L_v: {losses}; {rest}.")
few, many = by_share[LITTLE_NOISE], by_share[MUCH_NOISE]
assert (
    mean(few, "low_loss", "auc") > 0.99 and abs(mean(few, "low_loss", "test") - mean(few, "oracle", "test")) < 0.03
), "with few wrong labels low_loss does not find them all, or is not near the oracle"
assert (values(many, "low_loss", "auc") < values(many, "unrolled", "auc")).all(), (
    "with most labels wrong low_loss ranks as well as unrolled"
)
assert (values(many, "low_loss", "test") > values(many, "unrolled", "with_v test") + 0.2).all(), (
    "with most labels wrong low_loss is not clearly worse than unrolled with V"
)
assert all(mean(many, "validation", "test") < mean(many, name, "with_v test") + 0.02 for name in SOME), (
    "with most labels wrong V alone is not as good as weights with V"
)

# %% [markdown]
# ## What to pick when
#
# | you have | start with | because, on this page |
# |---|---|---|
# | half or more right labels, an idea of their share | `low_loss` | no higher F1, at a tenth of the cost, without V |
# | mostly wrong labels, or harm that is not a high loss | a method that reads V | least loss keeps the majority |
# | a large V | V alone, first | at 1,000 examples nothing was better |
# | a small V | no steps too many, a dev | the gap between validation and test is widest there |
# | V may be trained on, one model fits all good examples | `bmo` | best ranking and model here, for one run |
# | V must stay clean of training | `unrolled` or `window` | V acts through the weights alone |
#
# Mind what this page is: balls of equal size, a linear model, labels forced at random. BMO's rule, that good examples
# are those which one good model fits at once, is true of such data by construction; on text the table of
# configs/README.md has it behind the others. Wrong labels that follow a rule of their own are learned like right ones,
# and then losses say nothing. So run `compare` on your own examples: `bilevel-jax compare configs/compare_mnist.yaml
# --data.train YOURS.npz`, and read the examples `low_loss` and `validation` first.

# %%
work.cleanup()
