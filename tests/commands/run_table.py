"""Small runs of every command and option set, without the clock; what two folders of one run have in common."""

import contextlib
import importlib
import json
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from bilevel_jax import commands
from bilevel_jax.commands.train.loop import TrainingLoop, TrainingTiming
from bilevel_jax.lm.builtin import cipher
from bilevel_jax.runs.budget import usage
from bilevel_jax.runs.config import load
from bilevel_jax.runs.infra import identity
from bilevel_jax.runs.infra.session import Session
from tests.runs import blobs
from tests.runs.tiny_rater import write_rater

RANK = """
model: {{name_or_path: {made}/model}}
lora: {{r: 0}}
data: {{train: [{made}/strategies.jsonl], validation: [{made}/validation.jsonl]}}
rank:
  block_size: 6
  num_blocks: 2
  template: "{{question}} {{examples}} "
  example_template: "{{answer}} "
generate: {{max_new_tokens: 4, temperature: 1.0, top_p: 1.0, top_k: 0}}
output: {{progress: false}}
mesh: {{data: 1}}
"""
AUDIT = """
data: {{train: ['{made}/blobs.npz']}}
arrays: {{train_examples: 60, validation_examples: 24, test_examples: 30, noise_share: 0.2}}
optimizer: {{name: sgd, learning_rate: 0.1, schedule: constant, warmup_steps: 0}}
train: {{max_steps: 6, global_batch_size: 20}}
outer: {{proximal: 0.01, max_iterations: 3, curvature_batches: 3}}
audit: {{queries: 4, vmap_size: 4, removed: [0.5], subsets: 8, scores: [loss, alignment, random], extremes: [0.1]}}
certify: {{step_sizes: [0.1], removed: [0.5], draws: 2}}
output: {{progress: false}}
mesh: {{data: 1}}
"""
TUNE_TASK = """
data: {{train: ['{made}/blobs.npz']}}
arrays:
  {{hidden_sizes: [4], activation: tanh, train_examples: 40, validation_examples: 16, dev_examples: 16,
   test_examples: 20}}
optimizer: {{name: sgd, learning_rate: 30.0, schedule: constant, warmup_steps: 0}}
train: {{max_steps: 4, global_batch_size: 20}}
outer: {{steps: 1}}
"""
TUNE = (
    TUNE_TASK
    + """tune:
  {{learning_rates: [0.01, 0.0001], warmup_shares: [0.5], clip_norms: [], batch_sizes: [2], activations: [],
   max_loss_increase: 9}}
certify: {{step_sizes: [0.1], removed: [0.5], draws: 2}}
output: {{progress: false}}
mesh: {{data: 1}}
"""
)
PAIRS = "--data.train {made}/pairs.jsonl --data.validation {made}/pairs_report.jsonl --data.dev"
SELECT_PAIRS = (
    "--data.train {made}/pairs.jsonl --data.validation {made}/pairs_validation.jsonl --data.test "
    "{made}/pairs_report.jsonl --optimizer.eps-root 1e-6"
)
SCORE = """
score: {{rater: {made}/rater, model: {made}/model}}
data: {{train: [{made}/train.jsonl]}}
output: {{progress: false}}
"""
EVALUATE = """
evaluate: {{model: {made}/model, baseline: {made}/model}}
data: {{test: [{made}/test.jsonl]}}
generate: {{max_new_tokens: 6, temperature: 1.0, num_generations: 2}}
verifier: {{name: exact}}
output: {{progress: false}}
mesh: {{data: 1}}
"""
SHORT = "--outer.steps 2 --train.max-steps 4 --certify.no-enabled"
BRIEF = f"{SHORT} --retrain.variants uniform learned"
ON_TEXT = (
    "--model.name-or-path {made}/model --lora.r 0 --data.train {made}/train.jsonl --data.validation "
    "{made}/validation.jsonl --data.test {made}/test.jsonl --data.split 1 0 0 --data.label-field label "
    "--train.global-batch-size 8"
)

RUNS = {
    # name: (command, flags)
    "train": ("train", ""),
    "train, weights of a file": ("train", "--weights.file {made}/weights.jsonl"),
    "train, weights of a file, some missing": (
        "train", "--weights.file {made}/half.jsonl --weights.missing drop --weights.mean-one"
    ),
    "train, constant weights": ("train", "--weights.constant 0.5"),
    "train, a score": ("train", "--weights.score loss"),
    "train, a score, refreshed": ("train", "--weights.score loss --weights.refresh 3 --weights.scaling quantiles"),
    "train, reducible": ("train", "--weights.score reducible --weights.refresh 2 --weights.mean-one"),
    "train, ica": ("train", "--weights.score ica --weights.refresh 2"),
    "train, oneshot": ("train", "--weights.score oneshot"),
    "train, alignment": ("train", "--weights.score alignment --weights.scaling ranks"),
    "train, streaming": ("train", "--data.streaming --data.shuffle-buffer 5 --train.max-steps 6"),
    "train, streaming, two epochs, weights of a file": (
        "train",
        "--data.streaming --data.shuffle-buffer 0 --train.max-steps 8 --weights.file {made}/weights.jsonl",
    ),
    "train, streaming, a prefix": ("train", "--data.streaming --data.shuffle-buffer 4 --train.max-steps 2"),
    "train, dpo": ("train", f"--objective.name dpo {PAIRS}"),
    "train, dpo, lora, bfloat16": (
        "train", f"--objective.name dpo {PAIRS} --lora.r 2 --model.base-dtype bfloat16 --output.model adapter"
    ),
    "train, simpo": ("train", f"--objective.name simpo {PAIRS}"),
    "train, simpo, a score": ("train", f"--objective.name simpo {PAIRS} --weights.score margin"),
    "train, lora, best": ("train", "--lora.r 2 --train.load-best"),
    "train, packing, parts": ("train", "--data.packing --train.gradient-accumulation-steps 2"),
    "train, without validation": ("train", "--data.validation --data.dev --weights.score loss"),
    "train, skipping": ("train", "--train.max-nonfinite-steps 2 --optimizer.max-grad-norm 1"),
    "select": ("select", ""),
    "select, dev": ("select", f"{BRIEF} --data.dev {{made}}/dev.jsonl --outer.patience 1 --outer.steps 4"),
    "select, validation trains": (
        "select",
        "--outer.steps 2 --train.max-steps 4 --outer.validation-folds 2 --data.dev {made}/dev.jsonl --retrain.variants "
        "learned+validation low_loss_dev validation_early_stop validation_model",
    ),
    "select, warm, sigmoid": ("select", f"{BRIEF} --outer.restart warm --outer.weighting sigmoid"),
    "select, warm start": ("select", f"{BRIEF} --outer.warm-start loss"),
    "select, linearize": ("select", f"{BRIEF} --outer.linearize"),
    "select, states on disk": ("select", f"{BRIEF} --outer.offload disk --outer.memory-gib 1e-3"),
    "select, window": ("select", f"{BRIEF} --outer.method window --outer.window 2"),
    "select, window, on disk": (
        "select", f"{BRIEF} --outer.method window --outer.window 3 --outer.offload disk --outer.memory-gib 1e-3"
    ),
    "select, implicit": ("select", f"{BRIEF} --outer.method implicit --outer.proximal 0.5"),
    "select, alignment": ("select", f"{BRIEF} --outer.method alignment"),
    "select, penalty": ("select", f"{BRIEF} --outer.method penalty --single-loop.steps 6"),
    "select, penalty, one model": (
        "select", f"{BRIEF} --outer.method penalty --single-loop.steps 6 --single-loop.second-model none"
    ),
    "select, bmo": ("select", f"{BRIEF} --outer.method bmo --single-loop.steps 6"),
    "select, mixing": ("select", f"{BRIEF} --outer.method mixing --single-loop.steps 6"),
    "select, no retrains": ("select", "--outer.steps 1 --train.max-steps 4 --retrain.no-enabled"),
    "select, retrains by a score": ("select", f"{SHORT} --retrain.variants random selected top_alignment low_loss"),
    "select, lora": ("select", f"{BRIEF} --lora.r 2"),
    "select, dpo": ("select", f"{BRIEF} {SELECT_PAIRS} --objective.name dpo"),
    "select, simpo": ("select", f"{BRIEF} {SELECT_PAIRS} --objective.name simpo"),
    "select, the built-in task": (
        "select",
        f"{BRIEF} --model.name-or-path builtin:cipher --data.train builtin:cipher --data.validation builtin:cipher "
        "--data.test builtin:cipher",
    ),
    "compare": ("compare", "--compare.methods unrolled penalty --compare.seeds 1"),
    "compare, other methods": ("compare", "--compare.methods implicit window bmo mixing --compare.seeds 2"),
    "compare, text": (
        "compare",
        f"{ON_TEXT} --train.max-steps 3 --compare.budget 45 --compare.seeds 1 --compare.methods penalty unrolled",
    ),
    "compare, proxies": (
        "compare",
        "--compare.methods proxy_fit --compare.baselines stratified --compare.proxy-runs 5 --compare.seeds 2",
    ),
    "compare, proxies on text": (
        "compare",
        f"{ON_TEXT} --data.source-field label --train.max-steps 3 --compare.budget 45 --compare.seeds 1 "
        "--compare.methods proxy_fit --compare.baselines --compare.proxy-runs 4",
    ),
    "tune": ("tune", ""),
    "tune, text": (
        "tune",
        f"{ON_TEXT} --optimizer.name adamw --train.max-steps 4 --tune.learning-rates 0.3 --tune.eps-roots 1e-6 "
        "--tune.batch-sizes --tune.budget 40",
    ),
    "audit": ("audit", ""),
    "audit, scores alone": ("audit", "--audit.estimators --certify.no-enabled"),
    "audit, on disk": ("audit", "--outer.offload disk --outer.memory-gib 1e-3"),
    "audit, text": (
        "audit",
        f"{ON_TEXT} --train.max-steps 4 --audit.scores ica random --audit.queries 0 --audit.checkpoints start end",
    ),
    "select, rater": (
        "select",
        f"{BRIEF} --outer.weighting rater --rater.link sigmoid --rater.residual-scale 0.3 --rater.directions 2 "
        "--rater.folds 2 "
        "--rater.features length kind source tokens likeness loss margin hidden hidden_likeness validation_loss "
        "reducible uniform_loss",
    ),
    "select, rater, lora": ("select", f"{BRIEF} --lora.r 2 --outer.weighting rater"),
    "select, sources": ("select", f"{BRIEF} --outer.weighting per_source --data.source-field label"),
    "compare, rater": (
        "compare",
        "--compare.methods unrolled --compare.seeds 1 --outer.weighting rater --rater.features uniform_loss "
        "validation_loss hidden --rater.directions 2",
    ),
    "score": ("score", "--score.features"),
    "evaluate": ("evaluate", "--evaluate.harness"),
    "rank": ("rank", ""),
    "rank, two answers": ("rank", "--generate.num-generations 2 --generate.temperature 0.7"),
    "rank, some metrics": ("rank", "--rank.metrics sppl perplexity --rank.own-answers {made}/own.jsonl"),
    "rank, trials": (
        "rank",
        "--rank.metrics perplexity --rank.pick-by perplexity --rank.train-examples 8 --rank.train-seeds 2 "
        "--train.max-steps 3 --train.global-batch-size 4 --optimizer.warmup-steps 1",
    ),
    "refine": ("refine", ""),
    "refine, single-loop methods": (
        "refine", "--refine.methods penalty bmo mixing --refine.rounds 1 --refine.ratio sequence"
    ),
    "refine, all questions, filtered": (
        "refine",
        "--refine.questions all --refine.verifier-use filter --refine.keep-offline --refine.methods uniform",
    ),
    "refine, no questions": ("refine", "--refine.questions none --refine.methods unrolled --refine.rounds 1"),
    "refine, from the first": (
        "refine", "--refine.start-from first --refine.questions fixed --refine.methods unrolled --lora.r 2"
    ),
}  # fmt: skip
CONFIG_CLASSES = {command: config_class for config_class, command in load.COMMANDS.items()}
PROCESS_RECORDS = ("log.jsonl", "environment.json", ".lock", "seals.jsonl", "manifest.json")
"""What tells of the processes that made a run: their steps, one by one, and their machine; and the seals of the files,
which hold the random digits of the run and the random names of orbax's files."""


@pytest.fixture(scope="session")
def table_inputs(made):
    """The folder of the tiny task, with a config for every command, weights, strategies and arrays."""
    rows = [json.loads(line) for line in (made / "train.jsonl").read_text().splitlines()]
    blobs.write(made / "blobs.npz")
    (made / "compare.yaml").write_text(blobs.CONFIG.format(path=made / "blobs.npz"))
    (made / "audit.yaml").write_text(AUDIT.format(made=made))
    (made / "tune.yaml").write_text(TUNE.format(made=made))
    (made / "rank.yaml").write_text(RANK.format(made=made))
    from bilevel_jax.lm.data.examples import load_examples

    ids = [example.id for example in load_examples([str(made / "train.jsonl")])]
    weights = [{"id": id, "weight": 0.5 + place % 3} for place, id in enumerate(ids)]
    write_rows(made / "weights.jsonl", weights)
    write_rows(made / "half.jsonl", weights[::2])
    asked = [row["prompt"] for row in rows[:20]]
    strategies = [
        {
            "prompt": prompt,
            "responses": {name: cipher.rotate_letters(prompt[:4], by) for name, by in (("next", 1), ("same", 0))},
            "result": cipher.rotate_letters(prompt[:4], 1),
        }
        for prompt in asked
    ]
    write_rows(made / "strategies.jsonl", strategies)
    if not (made / "rater").exists():
        write_rater(made, made)
    (made / "score.yaml").write_text(SCORE.format(made=made))
    (made / "evaluate.yaml").write_text(EVALUATE.format(made=made))
    write_rows(made / "own.jsonl", [{"prompt": prompt, "response": prompt[:4]} for prompt in asked])
    return made


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def start(inputs, name, out, *flags):
    """Make one of RUNS in a folder."""
    command, options = RUNS[name]
    file = inputs / f"{command}.yaml"
    flags = [*options.format(made=inputs).split(), *flags, "--out", str(out)]
    return getattr(commands, command)(load.load_config(CONFIG_CLASSES[command], file, flags))


@contextlib.contextmanager
def without_clock(*, save_every=0):
    """No time passes and no memory is measured; what is due to be saved is so at every `save_every`-th question."""
    asked = 0

    def save_seconds(self):
        nonlocal asked
        asked += 1
        return -1.0 if save_every and asked % save_every == 0 else 1e9

    clock = SimpleNamespace(**vars(time) | {"monotonic": lambda: 0.0})
    for command in CONFIG_CLASSES:
        importlib.import_module(f"bilevel_jax.commands.{command}.run")  # a module that came later would have the clock
    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if not name.startswith("bilevel_jax.") or name.startswith("bilevel_jax.storage."):  # a lease needs the time
                continue
            if hasattr(module, "time") and hasattr(module.time, "monotonic"):
                patch.setattr(module, "time", clock)
        patch.setattr(Session, "_save_seconds", property(save_seconds, lambda self, value: None), raising=False)
        patch.setattr(usage, "peak_memory", lambda: (1.0, "process"))
        patch.setattr(usage, "_measure_usage", lambda *given, **more: {**NOTHING_MEASURED})
        patch.setattr(TrainingLoop, "_timing", lambda self: TrainingTiming(0.0, None, 0))
        describe = identity.describe_environment
        patch.setattr(identity, "describe_environment", lambda: describe() | {"command": ["bilevel-jax"]})
        yield


NOTHING_MEASURED = {
    "passes": 0.0, "memory": 1.0, "memory_of": "process", "disk": 1, "seconds_per_pass": 1.0, "device": "none"
}  # fmt: skip


def files(folder):
    """name -> the bytes of every file of a run, apart from the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def contents(folder):
    """As `files`, of a run without the clock: without records of processes, and what a checkpoint holds for its files.

    orbax names the files of arrays by a random number, so that no two have the same.
    """
    import orbax.checkpoint as ocp

    held = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        inside = next((parent for parent in path.parents if parent.name.startswith("step_")), None)
        if path.is_dir() and path.name == "arrays" and inside:
            tree = ocp.StandardCheckpointer().restore(path.absolute())
            held[name] = {key: np.asarray(value).tobytes() for key, value in tree.items()}
        elif path.name == "manifest.json" and inside:
            body = json.loads(path.read_text())
            held[name] = {key: body[key] for key in ("step", "meta", "leaves")}
        elif path.is_file() and not inside and path.name == "responses.jsonl":
            lines = map(json.loads, path.read_text().splitlines())
            held[name] = [{key: value for key, value in line.items() if key != "seal"} for line in lines]
        elif path.is_file() and not inside and name not in PROCESS_RECORDS:
            held[name] = path.read_bytes()
        elif path.is_dir() and not any(path.iterdir()):
            held[name] = "an empty folder"
    return held


def differences(one, other):
    """The names of what two folders do not have in common."""
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))
