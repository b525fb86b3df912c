# %% [markdown]
# # A selection on a language model
#
# From examples of text to a verdict, one weight per example, a report, and files for a trainer: what the command
# `bilevel-jax select` does, with every step in view.
#
# With the folder of a real model, this page trains one of 260 thousand parameters, which knows children's stories, on
# passages of such stories, half of them garbled; trusted passages judge. Without one it takes the task that the package
# makes itself: a next-letter cipher with examples of a right rule, of a wrong one, and of none. It says below which of
# the two you see; what is said about numbers is computed from them. The folders are found next to the repository, or
# named: `BILEVEL_MODEL` (a Hugging Face folder) and `BILEVEL_STORIES` (a JSON list of texts).

# %%
# Parameters: change these and run the page again; a failing assert says what the change broke.
CLEAN, GARBLED, TRUSTED = 64, 64, 96  # rows of stories: training examples of two kinds, and as many for test as trusted
STEPS, OUTER_STEPS = 16, 2  # of training, and of the weights, on the stories
CIPHER_STEPS, CIPHER_OUTER_STEPS = 96, 4  # the same on the cipher
STORIES_RATE = 5e-4  # learning rate on the stories
TOP_SHARE = 0.5  # of the examples that `selected` and the export keep
RETRAIN_SEEDS = 2
SEED = 0  # of the passages' order

# %%
import contextlib
import json
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path

os.environ["TERM"] = "dumb"  # text without colours
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # the model is small: compiling is what takes time

warnings.filterwarnings("ignore", message="IProgress")  # no bar is drawn here

import numpy as np
import pyarrow.parquet as pq
from IPython.display import SVG, display

from bilevel_jax.commands.export.run import export, flags_for_run
from bilevel_jax.commands.inspect.run import inspect
from bilevel_jax.commands.select.run import select
from bilevel_jax.lm.data import tokens
from bilevel_jax.runs.config.load import ExportConfig, InspectConfig, SelectConfig, load_config
from bilevel_jax.runs.report.html import read_stylesheet

SHARED = Path("../../shared").resolve()
MODEL = Path(os.environ.get("BILEVEL_MODEL", SHARED / "models/stories-260k")).resolve()
STORIES = Path(os.environ.get("BILEVEL_STORIES", SHARED / "data/tinystories/tinystories_1000.json")).resolve()
REAL = MODEL.is_dir() and STORIES.is_file()
work = tempfile.TemporaryDirectory()
os.chdir(work.name)
if REAL:
    print("Real: a pretrained model of children's stories, and stories of the kind that it was trained on.")
else:
    print("No folder of a model was found: this is the task that the package makes itself, a cipher.")

# %% [markdown]
# ## Data in
#
# Examples are jsonl: plain text, or prompts with responses, or chats. The **training examples** get the weights. The
# **validation examples** say what is wanted; they are split by id into validation, which steers the weights, and dev,
# which chooses the step to stop at. A third set, test, is read for the report alone.
#
# Of the stories one passage each is taken, so that no story is in two sets. The garbled examples went through one fixed
# permutation of the vocabulary: they have a grammar of their own and can be learned, which costs the model dear. The
# labels `clean` and `garbled` are **never seen in training**: they are there to check the result.


# %%
def write(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def passages(texts):
    """Two sentences from the middle of each story, of 40 to 90 characters."""
    for text in texts:
        sentences = re.findall(r"[A-Z][^.!?\n]*[.!?]", text)
        pairs = [f"{a} {b}" for a, b in zip(sentences[2:], sentences[3:], strict=False)]
        if some := [pair for pair in pairs if 40 <= len(pair) <= 90]:
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


if REAL:
    random = np.random.default_rng(SEED)
    texts = list(dict.fromkeys(passages(json.loads(STORIES.read_text(encoding="utf-8")))))
    garbled = garbler(tokens.load_tokenizer(str(MODEL)), random)
    train = [{"text": text, "label": "clean"} for text in texts[:CLEAN]]
    train += [{"text": garbled(text), "label": "garbled"} for text in texts[CLEAN : CLEAN + GARBLED]]
    write("train.jsonl", [train[i] for i in random.permutation(len(train))])
    rest = [{"text": text} for text in texts[CLEAN + GARBLED :]]
    write("trusted.jsonl", rest[:TRUSTED])
    write("test.jsonl", rest[TRUSTED : 2 * TRUSTED])
    base = "select.yaml"
    flags = {
        "model.name_or_path": MODEL, "lora.r": 0, "model.remat": "none",
        "data.train": "train.jsonl", "data.validation": "trusted.jsonl", "data.test": "test.jsonl",
        "data.split": ("0.667", "0.333", "0"), "data.label-field": "label", "data.max-length": 96,
        "optimizer.learning-rate": STORIES_RATE, "optimizer.warmup_steps": 2, "optimizer.eps-root": 1e-8,
        "train.max_steps": STEPS, "train.global_batch_size": 8, "outer.steps": OUTER_STEPS,
        "selection.top-share": TOP_SHARE,
    }  # fmt: skip
else:
    base = "quickstart.yaml"
    flags = {
        "model.remat": "none", "train.max_steps": CIPHER_STEPS, "outer.steps": CIPHER_OUTER_STEPS,
    }  # fmt: skip
flags |= {
    "retrain.seeds": RETRAIN_SEEDS, "certify.step-sizes": "0.1",
    "retrain.variants": ("uniform", "learned", "selected", "top_alignment", "low_loss", "validation", "oracle"),
}  # fmt: skip


def words(flags):
    """The flags as on a command line."""
    for key, value in flags.items():
        yield f"--{key}"
        yield from map(str, value if isinstance(value, tuple) else (value,))


# %% [markdown]
# ## What training would see
#
# The command `inspect` trains nothing. It reads the same config and prints lengths, copies, leaks, and the first
# examples token by token; what stands between ⟦ and ⟧ is a target, and one token `<s>` begins the example.

# %%
about = {key: value for key, value in flags.items() if key.startswith(("model.", "data."))}
seen = load_config(InspectConfig, base, [*words(about | {"show.examples": 1, "show.width": 100})])
print(inspect(seen).summary)

# %% [markdown]
# ## The run
#
# From weight 1 for every example, each outer step trains a model from the same start, sweeps back through that training
# for $\mathrm{d} L_v / \mathrm{d} w_i$ (exact: of the run that happened), and moves the weights against it; the next
# step trains anew, in a new order of the examples. Then the certificates, then the comparison: models trained again
# from cold. Each line is what the run says while it works; on a terminal a progress bar with the time that is left
# stands below.

# %%
with contextlib.redirect_stderr(sys.stdout):
    result = select(load_config(SelectConfig, base, [*words(flags), "--out", "run", "--output.no-progress"]))

# %% [markdown]
# ## The verdict
#
# The gradient is exact for the run that happened. Whether it says anything about the *next* run is another question,
# and two measurements answer it. **Exact**: change every weight by 10 % in the direction of the gradient's sign, train
# again, and compare the change of $L_v$ with the predicted one; a ratio of 1 means that the derivative still holds at
# that distance. **Smooth**: leave a half of the examples out and compute the gradient again (where the cosine is below
# .8, with a fifth left out, too, which speaks for small changes alone); a cosine near 1 means that the hypergradients
# of the rest do not hang on who else was in the data. Where the learning rate is too high the second breaks down first:
# the derivative is right, and predicts nothing.
#
# The verdict is at uniform weights, where the steps began. At the learned weights the slope is nearly 0, as it should
# be at the end of a descent, so that a ratio of two small numbers tells less there.

# %%
print(f"{result['verdict']['level']}: {result['verdict']['reason']}")
print("The number is the derivative of", result["estimand"] + ".")
for place, one in result["certificates"].items():
    ratio = one["exact"]["ratios"][0]
    replayed = one["checks"]["replayed"]
    smooth = one["smooth"]["cosines"][-1]
    print(f"at {place:<16}  ratio {ratio:.3f}, smooth {smooth:.3f}, replayed bit for bit: {replayed}")

start = result["certificates"]["uniform weights"]
believed = 0.95 <= start["exact"]["ratios"][0] <= 1.05 and start["smooth"]["cosines"][-1] >= 0.8
assert believed == (result["verdict"]["level"] == "BELIEVE"), (
    "the verdict is not what ratio and cosine say by the rule of this page"
)  # the rule, in numbers
assert start["checks"]["replayed"], (
    "a replayed segment did not end where training did"
)  # every replayed segment ended where training did

# %% [markdown]
# ## The report
#
# The run left `report.html`, one file with everything in it. Its pictures are vector graphics without a script; here
# are three of them. First the outer loop: validation, which steers, may fall below test, which nothing was chosen by;
# where the two part, V is being over-fitted. Then the comparison: models trained again from cold, filled dots read on
# test, hollow ones on validation; the dashed line is uniform weights. Then the weights, by label.

# %%
report = Path("run/report.html").read_text(encoding="utf-8")
COLOURS = read_stylesheet().split("@media")[0]  # the report's, for light pages


def picture(begins):
    """The report's figure whose description begins so."""
    found = next(one for one in re.findall(r"<svg.*?</svg>", report, re.DOTALL) if f'aria-label="{begins}' in one)
    style = COLOURS + "svg { font: 11px var(--font); stroke-linejoin: round; }"
    head = '<svg xmlns="http://www.w3.org/2000/svg" width="640" '
    display(SVG(found.replace("<svg ", head, 1).replace(">", f"><style>{style}</style>", 1)))


unit = result["unit"]
for begins in (f"loss, {unit} by outer step", f"loss, {unit}:", "weight"):
    picture(begins)

# %% [markdown]
# ## Who went up, and who down
#
# `weights.parquet` has one line for each training example, joined by an id that comes from the example's content.
# `hypergradient` is $\mathrm{d} L_v / \mathrm{d} w_i$ at the learned weights, `first_hypergradient` the same at
# weight 1; below 0: more weight on this example lowers $L_v$.

# %%
table = pq.read_table("run/weights.parquet").to_pandas()


def shown(row):
    """The text of a row, cut, as it stands in its file."""
    found = json.loads(Path(row.file).read_text(encoding="utf-8").splitlines()[row.line - 1])
    whole = found.get("text") or f"{found['prompt']} → {found['response']}"
    return whole if len(whole) <= 76 else whole[:75] + "…"


ordered = table.sort_values("weight", ascending=False)
for words_of, some in (("largest", ordered.head(6)), ("least", ordered.tail(6))):
    print(f"The {words_of} weights (weight, first_hypergradient in {unit} per unit of weight, label, text):")
    for row in some.itertuples():
        print(f"  {row.weight:.3f}  {row.first_hypergradient:+.1e}  {row.label:<8} {shown(row)}")

good = table["label"] == "clean"
names = {
    "weights": "the learned weights",
    "first_hypergradient": "one exact gradient",
    "alignment": "alignment",
    "low_loss": "least loss",
}
print(
    "\nAUC against the hidden labels:", ", ".join(f"{names[key]} {value:.3f}" for key, value in result["auc"].items())
)
assert table["weight"][good].mean() > 1 > table["weight"][~good].mean(), (
    "clean rows do not weigh more than 1 on average, or others not less"
)
assert result["auc"]["weights"] > 0.85, (
    "the weights do not find the clean rows: more OUTER_STEPS, or is the verdict not BELIEVE?"
)

# %% [markdown]
# ## Does it help? Trained again from cold
#
# Labels are not the aim, a better model is. Each line below is a model trained from the same start, with an order of
# the examples that the weights have not seen, and read on test. Read the `oracle` first: it trains on the clean
# examples alone, and only if it beats uniform weights do the labels mean anything for this model.
#
# Then look at the choices that learn nothing: the examples of least loss, and V alone (`validation`). **Where one
# of them is as good, take it; it is cheaper.** The stories are such a case: garbled text has a high loss for a model
# that knows stories, so every score finds it, and V alone, which holds nothing but what is wanted, is no worse. The
# cipher is the other case: its wrong examples follow a rule that can be learned, so a low loss does not mean right, its
# 16 validation examples are too few to train on, and the learned weights win by far.

# %%
lines = {row["name"]: row for row in result["compare"]}
for name, row in sorted(lines.items(), key=lambda item: item[1]["mean"]["test"]):
    runs = ", ".join(f"{one['test']:.3f}" for one in row["runs"])
    size = f"{row['rows']} rows, {row['epochs']:.1f} epochs"
    print(f"{name:<18} {row['mean']['test']:.3f} {unit}   (seeds {runs})   {size}")

loss = {name: row["mean"]["test"] for name, row in lines.items()}
headroom = loss["uniform"] - loss["oracle"]
won = {name: (loss["uniform"] - value) / headroom for name, value in loss.items()}
print(f"\nThe oracle is {headroom:.3f} {unit} better than uniform weights. Of that way go")
for name, share in sorted(won.items(), key=lambda item: -item[1]):
    print(f"  {name:<18} {share:.0%}")
assert headroom > 0.05 and won["learned"] > 0.5, (
    "the oracle is not better than uniform weights, or the learned weights go less than half of its way"
)
simple = min(("low_loss", "top_alignment", "validation"), key=loss.get)
print(f"\nThe best choice that learns nothing is {simple}: {loss[simple]:.3f} {unit}.")
if REAL and "BILEVEL_MODEL" not in os.environ:
    assert loss["validation"] == loss[simple] < loss["selected"], (
        "on the stories V alone is not the best of the choices that learn nothing, or not better than the selected rows"
    )
elif not REAL:
    assert loss["learned"] < loss[simple], (
        "on the cipher a choice that learns nothing is as good as the learned weights"
    )

# %% [markdown]
# ## How to go on
#
# `export` writes the examples that the weights choose as another trainer reads them, with a card that says how they
# were chosen. From a shell:
#
# ```sh
# bilevel-jax export run --export.format axolotl --selection.top-share 0.5 --out rows-to-keep
# ```

# %%
config = load_config(
    ExportConfig,
    "run/config.yaml",
    [
        *flags_for_run(Path("run")),
        "--selection.top-share",
        str(TOP_SHARE),
        "--export.format",
        "axolotl",
        "--out",
        "rows-to-keep",
    ],
)
print(
    export(
        config, Path("run"), f"bilevel-jax export run --export.format axolotl --selection.top-share {TOP_SHARE}"
    ).summary
)
for file in sorted(Path("rows-to-keep").iterdir()):
    print(f"  {file.name}")
kept = [json.loads(line) for line in Path("rows-to-keep/train.jsonl").read_text(encoding="utf-8").splitlines()]
label = dict(zip(table["id"], table["label"], strict=True))
share = np.mean([label[row["id"]] == "clean" for row in kept])
print(f"{share:.0%} of the kept rows are clean; of all rows {good.mean():.0%}.")
assert share > good.mean(), "the exported rows are not cleaner than all rows"

# %% [markdown]
# Or train here with the soft weights, one for each example, joined by id; the model that comes out loads in
# `transformers`:
#
# ```sh
# bilevel-jax train configs/train.yaml --model.name-or-path FOLDER --data.train train.jsonl \
#     --weights.file run/weights.parquet --data.validation trusted.jsonl --out tuned
# ```
#
# Before you trust weights of your own examples: is the verdict BELIEVE? If not, lower the learning rate until it is.
# Does the comparison beat `validation`? If not, the validation examples alone would do. And is the learned
# example's test near its validation? If not, V is too small, and more validation examples help more than more outer
# steps.

# %%
for one in (lines[name] for name in ("learned", "validation") if name in lines):
    print(f"{one['name']:<16} validation {one['mean']['validation']:.3f}, test {one['mean']['test']:.3f} {unit}")
work.cleanup()
