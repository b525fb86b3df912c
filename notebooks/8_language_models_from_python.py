# %% [markdown]
# # A language model from Python
#
# Two hundred rows of text and a small trusted set; the exact derivative of the trusted set's loss with respect to the
# weight of every row, through 32 steps of AdamW; the implicit one for comparison; what the trained model says; and two
# cheap scores of the same rows. All of it is the one cell of section 1, and nothing is written to disk.
#
# The model and the rows are the package's own, so that this page runs anywhere: a next-letter cipher (`bhat>` wants
# `ciba`) whose training rows follow a right rule, a wrong one, or none, and a model of 22 thousand parameters that has
# learned to copy letters and nothing else. With a model of your own it is `bj.lm.load("FOLDER")`, and rows are a list
# of dicts, a `datasets.Dataset` or the path of a file: plain text, messages, prompt and response, or preference pairs.
#
# You need: notebook 1 for what the derivatives are of, notebook 2 for when to believe one.

# %%
import os
import warnings

os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # the model is small: compiling is what takes time
warnings.filterwarnings("ignore", message="IProgress")  # no bar is drawn here

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import bilevel_jax as bj

plt.style.use("notebooks.mplstyle")

# %% [markdown]
# What may be changed. The assertions below say what a change broke, and none of them is needed.

# %%
ROWS = {"clean": 68, "wrong": 66, "noise": 66, "validation": 16, "test": 64}  # rows of each kind
STEPS, BATCH_SIZE, LEARNING_RATE = 32, 16, 1e-3  # of one fine-tuning
EPS_ROOT = 1e-8  # of AdamW, inside its root; at 1e-12 the derivative holds for tiny changes alone: see section 3 fail
PROXIMAL = 0.3  # strength of the prior that makes the implicit derivative exist
OUTER_STEP = 0.3  # how far the weights move, in standard deviations of the hypergradient
SEED = 0

# %% [markdown]
# ## 1. The whole program

# %%
lm = bj.lm.load("builtin:cipher")  # or the folder of a Hugging Face model
train, validation, test = (
    bj.lm.builtin_rows("cipher", part, sizes=ROWS) for part in ("train", "validation", "test")
)  # [{"prompt": "bhat>", "response": "ciba", "label": "clean"}, ...]; labels are for this page alone

adamw = optax.adamw(LEARNING_RATE, eps_root=EPS_ROOT)
settings = {"steps": STEPS, "batch_size": BATCH_SIZE, "seed": SEED}
unrolled = lm.finetune(train, validation, adamw, **settings)
implicit = lm.finetune(train, validation, adamw, **settings, solver="implicit", proximal=PROXIMAL)

weights = jnp.exp(-OUTER_STEP * unrolled.grad / unrolled.grad.std())  # one step of multiplicative weights
weighted = unrolled.rerun(weights / weights.mean())
answers = weighted.lm.generate([row["prompt"] for row in test], max_new_tokens=6, temperature=0)

ica = lm.score("ica", train, validation, k=2)
sppl = lm.score(
    "sppl", train, max_new_tokens=6, template="{examples}{question}", demonstration_template="{answer}\n", seed=SEED
)  # the usual templates are longer than the 32 letters that this model reads

# %% [markdown]
# ## 2. What came back
#
# `unrolled.grad` has a number for each row, nats of validation loss per unit of weight: below 0 where more weight on
# the row lowers the loss. `unrolled.hypergradients` is the same by the row's id, `unrolled.lm` the model after
# training, `unrolled.value` its validation loss, and `unrolled.status` says whether they can be used. `rerun`
# trains again from the same start with other weights, and compiles nothing.

# %%
labels = np.array([row["label"] for row in train])
print(unrolled, implicit, weighted, sep="\n")
print("what the first is the derivative of:", unrolled.estimand)
print("and the second:", implicit.estimand)
print(f"linear system: residual {implicit.checks.residual:.1e}, least curvature {implicit.checks.curvature:.2g}")
for row, [response] in list(zip(test, answers, strict=True))[:3]:
    print(f"{row['prompt']} wants {row['response']}, and the model says {response.text}")

assert unrolled.status == implicit.status == bj.Status.OK, "finetune raises otherwise, unless throw=False"
assert len(unrolled.hypergradients) == len(train) == 200, "rows of ROWS do not sum to 200, or two rows have one id"
assert implicit.checks.curvature > 0, "Gauss-Newton with a prior is positive definite: PROXIMAL is too small"

# %% [markdown]
# ## 3. Is it right?
#
# The derivative of 200 weights against two trainings: every weight changes by the share $s$ of itself, up where its
# hypergradient is positive and down where it is negative, and the change of the validation loss is divided by what the
# hypergradients say that it is. `certify=True` does that, and takes the derivative again without a half of the rows
# (and, where the rest does not keep its entries, without a fifth).

# %%
certified = unrolled.rerun(certify=True)
print(certified.certificates)
differences = certified.certificates.finite_differences

assert np.array_equal(certified.grad, unrolled.grad), "the same weights and seed gave other numbers"
assert abs(differences.ratios[-1] - 1) < 0.05, (
    "the loss is no line at this scale: raise EPS_ROOT, or lower LEARNING_RATE"
)

# %% [markdown]
# ## 4. What tells the rows apart
#
# The scores never see the labels. ICA asks how much likelier the row's answer is after validation rows as
# demonstrations; SPPL how likely it is after answers of the model's own, so it prefers what the model says already,
# and this model copies. Neither knows what the training will do; the hypergradient is the derivative of just that.

# %%
scores = {
    "unrolled": -unrolled.grad,
    "implicit": -implicit.grad,
    "ICA": ica.values,
    "SPPL": sppl.values,
    "perplexity": lm.score("perplexity", train).values,
}


def auc(values):
    """The share of pairs of a clean and another row that the score orders so."""
    clean, other = values[labels == "clean"], values[labels != "clean"]
    return np.mean(clean[:, None] > other[None, :])


figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
for kind in ("clean", "wrong", "noise"):
    which = labels == kind
    left.plot(implicit.grad[which], unrolled.grad[which], "o", alpha=0.6, label=kind)
left.axhline(0, color="grey", lw=1)
left.axvline(0, color="grey", lw=1)
left.set(xlabel="implicit, nats per unit of weight", ylabel="unrolled", title="below 0: more weight lowers the loss")
left.legend()
right.barh(list(scores), [auc(values) for values in scores.values()])
right.axvline(0.5, color="grey", lw=1)
right.invert_yaxis()
right.set(xlim=(0, 1), xlabel="AUC of clean rows", title="who finds the right rule")
plt.show()

for name, values in scores.items():
    print(f"{name:12s} AUC {auc(values):.2f}")
uniform, learned = (
    -result.lm.loglik([row["prompt"] for row in test], [row["response"] for row in test]).nats.mean() / 5
    for result in (unrolled, weighted)
)
print(f"test loss, nats per token: {uniform:.3f} with equal weights, {learned:.3f} after one step of the weights")

assert auc(scores["unrolled"]) > 0.6, "the validation rows do not tell the rules apart: more of them, or more STEPS"
assert weighted.value < unrolled.value, "the step of the weights is too long for a line: lower OUTER_STEP"

# %% [markdown]
# ## 5. Adapters, pairs, and other data
#
# `lora=RANK` trains low-rank factors over the frozen model; the prior of `"implicit"` is then centred at the fresh
# factors, which is another thing than the frozen base. `objective="dpo"` or `"simpo"` reads preference pairs. Where the
# rows have other names, a `DataSection` says so.

# %%
adapted = lm.finetune(train, validation, adamw, **settings, lora=2, solver="implicit", proximal=PROXIMAL)
agreement = bj.certify.spearman(jnp.array(adapted.grad), jnp.array(implicit.grad))
print(adapted, adapted.lm, f"rank correlation with all parameters trained: {agreement:.2f}", sep="\n")

named = bj.lm.DataSection(prompt_field="question", response_field="answer")
asked = lm.read([{"question": row["prompt"], "answer": row["response"]} for row in train], named)
assert [example.id for example in asked] == list(unrolled.hypergradients), "the same text has another id"

# %% [markdown]
# Next: `bilevel-jax select` repeats the step of section 1 until a dev set says stop, certifies, compares with simpler
# selections and writes a report (notebook 5); `bj.scores` has the formula of each score.
