"""Config file loading, command-line overrides and resume checks"""

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from bilevel_jax.runs.config import schema
from bilevel_jax.runs.config.flags import parse_flags, print_help, split_flags
from bilevel_jax.runs.config.rules import check_config, flatten_config
from bilevel_jax.runs.config.yaml_reader import read_yaml_config, suggest_nearest
from bilevel_jax.storage import copies


@dataclass(frozen=True)
class SelectConfig:
    """Learn one weight per training example from a small trusted validation set.

    Data weighting by exact hypergradients (metagradients). Writes the weights, the selected subset, a model trained
    with the weights, and a report that says whether to believe them. With evaluate.prompts that model answers them at
    the end, beside one of uniform weights and the one before training, and the report says whether it is better.
    """

    model: schema.ModelSection = schema.ModelSection()
    lora: schema.LoraSection = schema.LoraSection()
    data: schema.DataSection = schema.DataSection()
    objective: schema.ObjectiveSection = schema.ObjectiveSection()
    target: schema.TargetSection = schema.TargetSection()
    optimizer: schema.OptimizerSection = schema.OptimizerSection()
    train: schema.TrainSection = schema.TrainSection()
    outer: schema.OuterSection = schema.OuterSection()
    rater: schema.RaterSection = schema.RaterSection()
    single_loop: schema.SingleLoopSection = schema.SingleLoopSection()
    scores: schema.ScoresSection = schema.ScoresSection()
    contradictions: schema.ContradictionsSection = schema.ContradictionsSection()
    output: schema.OutputSection = schema.OutputSection()
    selection: schema.SelectionSection = schema.SelectionSection()
    retrain: schema.RetrainSection = schema.RetrainSection()
    certify: schema.CertifySection = schema.CertifySection()
    evaluate: schema.EvaluateOwnSection = schema.EvaluateOwnSection()
    generate: schema.GenerateSection = schema.GenerateSection(temperature=0.0)
    verifier: schema.VerifierSection = schema.VerifierSection()
    judge: schema.JudgeSection = schema.JudgeSection()
    mesh: schema.MeshSection = schema.MeshSection()
    distributed: schema.DistributedSection = schema.DistributedSection()


@dataclass(frozen=True)
class TrainConfig:
    """Fine-tune a language model with a weight for each training example.

    SFT, DPO or SimPO, of all parameters or LoRA adapters, with the weights of `select`, of a data score, or all 1.
    Writes the model and a report. With evaluate.prompts the models after and before training answer prompts at the end,
    and the report says whether training made the answers better.
    """

    model: schema.ModelSection = schema.ModelSection()
    lora: schema.LoraSection = schema.LoraSection()
    data: schema.DataSection = schema.DataSection()
    objective: schema.ObjectiveSection = schema.ObjectiveSection()
    weights: schema.WeightsSection = schema.WeightsSection()
    scores: schema.ScoresSection = schema.ScoresSection()
    optimizer: schema.OptimizerSection = schema.OptimizerSection()
    train: schema.FineTuneSection = schema.FineTuneSection()
    evaluate: schema.EvaluateOwnSection = schema.EvaluateOwnSection()
    generate: schema.GenerateSection = schema.GenerateSection(temperature=0.0)
    verifier: schema.VerifierSection = schema.VerifierSection()
    judge: schema.JudgeSection = schema.JudgeSection()
    output: schema.TrainOutputSection = schema.TrainOutputSection()
    mesh: schema.MeshSection = schema.MeshSection()
    distributed: schema.DistributedSection = schema.DistributedSection()


@dataclass(frozen=True)
class InspectConfig:
    """Show the training examples as training sees them; nothing is trained and no weights are loaded.

    Prints lengths, tokens with the loss, truncation, sources, duplicates and leaks, some examples token by token, and
    what to act on. Where another command stops with an error, it counts, names the first place and continues. CONFIG
    may be the file of any other command; sections that are not listed below are ignored.
    """

    model: schema.ModelSection = schema.ModelSection()
    lora: schema.LoraSection = schema.LoraSection()
    data: schema.DataSection = schema.DataSection()
    objective: schema.ObjectiveSection = schema.ObjectiveSection()
    target: schema.TargetSection = schema.TargetSection()
    show: schema.ShowSection = schema.ShowSection()


@dataclass(frozen=True)
class ExportConfig:
    """Write the examples that their weights select, in the input format of another trainer, with a dataset card.

    CONFIG is the folder of a run of `select` or `train`, whose data and weights are used, or a config file with
    weights.file; sections that are not listed below are ignored. Section selection says which examples are written:
    the top share, those above a threshold, whole repeats by weight (for trainers without weights), or a mix of sources.
    """

    data: schema.DataSection = schema.DataSection()
    weights: schema.WeightsSection = schema.WeightsSection()
    selection: schema.SelectionSection = schema.SelectionSection()
    export: schema.ExportSection = schema.ExportSection()


@dataclass(frozen=True)
class CompareConfig:
    """Compare methods that learn weights on one data set at one compute budget, with several seeds.

    data.train names one .npz file (classification, section arrays) or files of text examples. Every method's weights
    are judged by retraining from scratch. Writes a table, figures and a report. With evaluate.prompts (text alone) the
    retrained model of every arm and seed answers prompts, and is compared with that of one arm (evaluate.baseline).
    """

    model: schema.ModelSection = schema.ModelSection()
    lora: schema.LoraSection = schema.LoraSection()
    data: schema.DataSection = schema.DataSection()
    arrays: schema.ArraysSection = schema.ArraysSection()
    objective: schema.ObjectiveSection = schema.ObjectiveSection()
    target: schema.TargetSection = schema.TargetSection()
    optimizer: schema.OptimizerSection = schema.OptimizerSection()
    train: schema.TrainSection = schema.TrainSection()
    outer: schema.OuterSection = schema.OuterSection()
    rater: schema.RaterSection = schema.RaterSection()
    single_loop: schema.SingleLoopSection = schema.SingleLoopSection()
    compare: schema.CompareSection = schema.CompareSection()
    evaluate: schema.EvaluateArmsSection = schema.EvaluateArmsSection()
    generate: schema.GenerateSection = schema.GenerateSection(temperature=0.0)
    verifier: schema.VerifierSection = schema.VerifierSection()
    judge: schema.JudgeSection = schema.JudgeSection()
    output: schema.OutputSection = schema.OutputSection()
    mesh: schema.MeshSection = schema.MeshSection()
    distributed: schema.DistributedSection = schema.DistributedSection()


@dataclass(frozen=True)
class AuditConfig:
    """Test data scores and hypergradients by leave-k-out retraining (linear datamodeling score, LDS).

    data.train names one .npz file (classification, section arrays) or files of text examples. Writes which score
    predicts the effect of removing examples best, at which cost, and a report.
    """

    model: schema.ModelSection = schema.ModelSection()
    lora: schema.LoraSection = schema.LoraSection()
    data: schema.DataSection = schema.DataSection()
    arrays: schema.ArraysSection = schema.ArraysSection()
    objective: schema.ObjectiveSection = schema.ObjectiveSection()
    target: schema.TargetSection = schema.TargetSection()
    optimizer: schema.OptimizerSection = schema.OptimizerSection()
    train: schema.TrainSection = schema.TrainSection()
    outer: schema.OuterSection = schema.OuterSection()
    scores: schema.ScoresSection = schema.ScoresSection()
    audit: schema.AuditSection = schema.AuditSection()
    certify: schema.CertifySection = schema.CertifySection()
    output: schema.OutputSection = schema.OutputSection()
    mesh: schema.MeshSection = schema.MeshSection()
    distributed: schema.DistributedSection = schema.DistributedSection()


@dataclass(frozen=True)
class TuneConfig:
    """Find a setting of training at which exact hypergradients can be believed.

    CONFIG is that of a run of `select` (or `audit`, `compare`) whose certificates say DO NOT BELIEVE or UNDECIDED:
    training amplifies small changes, because the learning rate is too high or rises too fast, eps_root is too small, a
    network has kinks, gradients are clipped or batches tiny. Each run trains once with uniform weights; a few of them
    get the hypergradient and the certificates that `select` computes.

    Search: the config's own setting first. Then the learning rate (tune.learning_rates): each candidate is trained
    once; those whose loss is at most tune.max_loss_increase above the config's own go on, least loss first; one draw of
    metasmoothness, which costs a quarter of all certificates, passes over what is rough; the first whose certificates
    hold is the best of them. Then one of the other settings is changed, around the best that holds or the smoothest.
    It ends with a setting that holds at a loss not above the config's own; a lower one may be there.

    Writes tuned.yaml, the config with the proposed setting, ready for `bilevel-jax select` (or `audit`, tune.command),
    and a report with the picture: loss against metasmoothness. A verdict at uniform weights says nothing of learned
    ones; `select` certifies again. One process (metasmooth search of Engstrom et al., arXiv 2503.13751, judged by these
    certificates).
    """

    tune: schema.TuneSection = schema.TuneSection()
    model: schema.ModelSection = schema.ModelSection()
    lora: schema.LoraSection = schema.LoraSection()
    data: schema.DataSection = schema.DataSection()
    arrays: schema.ArraysSection = schema.ArraysSection()
    objective: schema.ObjectiveSection = schema.ObjectiveSection()
    target: schema.TargetSection = schema.TargetSection()
    optimizer: schema.OptimizerSection = schema.OptimizerSection()
    train: schema.TrainSection = schema.TrainSection()
    outer: schema.OuterSection = schema.OuterSection()
    rater: schema.RaterSection = schema.RaterSection()
    single_loop: schema.SingleLoopSection = schema.SingleLoopSection()
    scores: schema.ScoresSection = schema.ScoresSection()
    contradictions: schema.ContradictionsSection = schema.ContradictionsSection()
    output: schema.OutputSection = schema.OutputSection()
    selection: schema.SelectionSection = schema.SelectionSection()
    retrain: schema.RetrainSection = schema.RetrainSection()
    audit: schema.AuditSection = schema.AuditSection()
    certify: schema.CertifySection = schema.CertifySection()
    evaluate: schema.EvaluateOwnSection = schema.EvaluateOwnSection()
    generate: schema.GenerateSection = schema.GenerateSection(temperature=0.0)
    verifier: schema.VerifierSection = schema.VerifierSection()
    judge: schema.JudgeSection = schema.JudgeSection()
    mesh: schema.MeshSection = schema.MeshSection()
    distributed: schema.DistributedSection = schema.DistributedSection()


@dataclass(frozen=True)
class RankConfig:
    """Rank response generation strategies for a model before training on any of them.

    data.train names one table whose examples map strategies to responses (data.prompt_field, rank.responses_field), or
    one file of responses per strategy, named after it; or, with candidates.strategies, questions that a model or a
    service answers by shipped prompts. The model answers a sample of the questions itself (section
    generate). Metrics: self-aligned perplexity (sppl), perplexity, instruction-following difficulty (ifd), similarity
    to its own answers (self_similarity), a mix of the last two kinds, and rewards over loss (car). Ends with a pick or
    "no clear winner". Sections optimizer, train and lora are for rank.train_examples only.

    With rank.records it reads scores and accuracies of many models and tasks instead, and judges the metrics by them:
    the accuracy of each one's pick, and its rank correlation with the accuracies.
    """

    model: schema.ModelSection = schema.ModelSection()
    lora: schema.LoraSection = schema.LoraSection()
    data: schema.DataSection = schema.DataSection()
    rank: schema.RankSection = schema.RankSection()
    candidates: schema.CandidatesSection = schema.CandidatesSection()
    generate: schema.GenerateSection = schema.GenerateSection(temperature=0.95, top_k=50, top_p=0.7)
    verifier: schema.VerifierSection = schema.VerifierSection()
    optimizer: schema.OptimizerSection = schema.OptimizerSection()
    train: schema.TrainSection = schema.TrainSection()
    output: schema.OutputSection = schema.OutputSection()
    mesh: schema.MeshSection = schema.MeshSection()
    distributed: schema.DistributedSection = schema.DistributedSection()


@dataclass(frozen=True)
class RefineConfig:
    """Improve a model with its own responses in rounds, and accept a round only if it helps on held-out examples.

    In each round the present model answers some questions of data.train (section generate), every method of
    refine.methods weights the examples by the validation loss (sections outer, single_loop) and trains a candidate,
    and the best candidate replaces the model where the lower bound of its gain on dev (paired bootstrap) is above 0.
    The method ica takes the weights from a score of the round's first model instead (sections scores, weights).
    With refine.generator = reinforce a separate generator answers, and is trained by what its responses were worth.
    The test examples are evaluated once, at the end; evaluate.prompts are then answered by the first and last model.
    """

    model: schema.ModelSection = schema.ModelSection()
    lora: schema.LoraSection = schema.LoraSection()
    data: schema.DataSection = schema.DataSection()
    objective: schema.ObjectiveSection = schema.ObjectiveSection()
    target: schema.TargetSection = schema.TargetSection()
    refine: schema.RefineSection = schema.RefineSection()
    reinforce: schema.ReinforceSection = schema.ReinforceSection()
    evaluate: schema.EvaluateOwnSection = schema.EvaluateOwnSection()
    generate: schema.GenerateSection = schema.GenerateSection(num_generations=4)
    verifier: schema.VerifierSection = schema.VerifierSection()
    judge: schema.JudgeSection = schema.JudgeSection()
    optimizer: schema.OptimizerSection = schema.OptimizerSection()
    train: schema.TrainSection = schema.TrainSection()
    outer: schema.OuterSection = schema.OuterSection()
    single_loop: schema.SingleLoopSection = schema.SingleLoopSection()
    scores: schema.ScoresSection = schema.ScoresSection()
    weights: schema.ScoreWeightsSection = schema.ScoreWeightsSection()
    output: schema.OutputSection = schema.OutputSection()
    mesh: schema.MeshSection = schema.MeshSection()
    distributed: schema.DistributedSection = schema.DistributedSection()


@dataclass(frozen=True)
class ScoreConfig:
    """Apply a rater, which `select` has learned (outer.weighting = rater), to examples that it has never seen.

    data.train names the new examples; they are read as a stream, in memory that does not grow with them. Writes
    scores.parquet (id, logit, weight), the rows that section selection chooses, and which features have drifted.
    Several processes share the work.
    """

    score: schema.ScoreSection = schema.ScoreSection()
    data: schema.DataSection = schema.DataSection()
    selection: schema.SelectionSection = schema.SelectionSection()
    output: schema.OutputSection = schema.OutputSection()
    distributed: schema.DistributedSection = schema.DistributedSection()


@dataclass(frozen=True)
class EvaluateConfig:
    """Ask one or two models the prompts of data.test, judge the answers, and say whether the first is better.

    A model is a folder of Hugging Face, of a PEFT adapter or of a run of ours, or a service, NAME@URL. Answers are
    greedy or sampled (section generate) and judged by a verifier, by their references (perplexity, chrF, BLEU, ROUGE-L)
    or by a model behind the OpenAI-compatible API (section judge), which sees each pair in both orders. Ends with
    better, worse, or no difference told, by paired intervals over the questions. What was answered and judged before a
    stop is not asked again. Prompts that do not fit a model's context are errors, or left out by data.truncation drop.
    """

    evaluate: schema.EvaluateSection = schema.EvaluateSection()
    data: schema.DataSection = schema.DataSection()
    generate: schema.GenerateSection = schema.GenerateSection(temperature=0.0)
    verifier: schema.VerifierSection = schema.VerifierSection()
    judge: schema.JudgeSection = schema.JudgeSection()
    output: schema.OutputSection = schema.OutputSection()
    mesh: schema.MeshSection = schema.MeshSection()
    distributed: schema.DistributedSection = schema.DistributedSection()


@dataclass(frozen=True)
class EstimateConfig:
    """Estimate memory per device, disk, work and hours of a run before it starts; loads no weights.

    CONFIG is the file of a run of `select`, `train`, `compare`, `audit` or `tune`, and every flag of that command may
    follow (`bilevel-jax select --help-all`); a file without section tune needs --estimate.command tune for that. A
    model larger than this machine needs only its config.json, with --estimate.train-examples where data and tokenizer
    are absent, --estimate.devices for a mesh of absent devices, --estimate.tflops for their speed and
    --estimate.memory-gib for their memory. With the folder of a finished run it prints the estimate next to what was
    measured.
    """

    estimate: schema.EstimateSection = schema.EstimateSection()


@dataclass(frozen=True)
class WatchConfig:
    """Draw a terminal view of a run while it runs: what it does, how long it will take, and the curves of its log.

    `bilevel-jax watch DIR` reads the files of the run's folder and changes nothing. DIR may be a URL (s3://bucket/run),
    and the folder of a run on another machine that is mounted here or that a tool copies. It ends when the run does;
    Ctrl-C ends it before, and not the run.
    """

    watch: schema.WatchSection = schema.WatchSection()


OuterLoopConfig = SelectConfig | CompareConfig | AuditConfig | TuneConfig
RunConfig = OuterLoopConfig | TrainConfig
"""Of the commands whose memory and work are estimated."""
ConfigT = TypeVar(
    "ConfigT",
    SelectConfig,
    TrainConfig,
    InspectConfig,
    ExportConfig,
    CompareConfig,
    AuditConfig,
    TuneConfig,
    RankConfig,
    RefineConfig,
    ScoreConfig,
    EvaluateConfig,
)
COMMANDS: dict[type, str] = {
    SelectConfig: "select", TrainConfig: "train", InspectConfig: "inspect", ExportConfig: "export",
    CompareConfig: "compare", AuditConfig: "audit", RankConfig: "rank", RefineConfig: "refine",
    ScoreConfig: "score", EvaluateConfig: "evaluate", TuneConfig: "tune",
}  # fmt: skip

COMMANDS_WITHOUT_RUN: dict[type, str] = {EstimateConfig: "estimate", WatchConfig: "watch"}
"""Commands whose config no file holds: they read the config, or the folder, of a run."""

SHIPPED_CONFIGS: dict[type, str] = {SelectConfig: "configs/select.yaml", TrainConfig: "configs/train.yaml"}
"""Configs that come with the package and are used where none is given."""

RESUME_ROUNDING_KEYS = ("mesh.data", "mesh.fsdp", "mesh.sharding_rules")
"""Keys that may differ when a run is resumed, where the numbers are then equal up to rounding."""
_DISTRIBUTED_KEYS = tuple(
    f"distributed.{key}" for key in ("coordinator_address", "num_processes", "process_id", "initialization_timeout")
)
_SERVICE_KEYS = (
    "generate.concurrency",
    "generate.timeout",
    "judge.concurrency",
    "judge.timeout",
    "judge.retries",
    "candidates.concurrency",
    "candidates.timeout",
)
RESUME_EXEMPT_KEYS = (
    "output.dir",
    "output.resume",
    "output.progress",
    "output.tensorboard",
    "output.save_minutes",
    *_SERVICE_KEYS,
    *RESUME_ROUNDING_KEYS,
    *_DISTRIBUTED_KEYS,
)
"""Keys that may differ when a run is resumed: none of them changes what is computed."""
PROCESS_OWN_KEYS = ("output.progress", "output.save_minutes", *_DISTRIBUTED_KEYS)
"""Keys that may differ between the processes of a run: how they find each other, and what the first alone decides."""


def load_config(config_class: type[ConfigT], path: str | Path | None, overrides: Sequence[str] = ()) -> ConfigT:
    """Read a YAML file (None: the defaults), apply command-line overrides and check every value.

    Args:
        config_class: the config class of a command.
        path: the file; None for the defaults.
        overrides: command-line flags, as `["--train.max-steps", "100"]`.

    Raises:
        ValueError: that lists all errors of the file, or all values that violate a bound or a rule.
        FlagError: for a wrong flag, with the nearest one.
    """
    config = (
        config_class()
        if path is None
        else read_yaml_config(config_class, find_config(path), ignored_sections(config_class))
    )
    prog = f"bilevel-jax {COMMANDS[config_class]} {'CONFIG' if path is None else path}"
    config = parse_flags(config, overrides, prog, _keys_of_other_commands())
    check_config(config, f"{path or 'the defaults'} and the command line")
    return config


def load_shipped_config(config_class: type[ConfigT], overrides: Sequence[str] = ()) -> ConfigT:
    """The config of a command that comes with the package, without its model and data, and with the overrides.

    Commands without such a config start from the defaults of the keys. Raises as `load_config`.
    """
    if config_class not in SHIPPED_CONFIGS:
        return load_config(config_class, None, overrides)
    path = SHIPPED_CONFIGS[config_class]
    config = _remove_inputs(read_yaml_config(config_class, find_config(path)))
    prog = f"bilevel-jax {COMMANDS[config_class]} [CONFIG]"
    config = parse_flags(config, overrides, prog, _keys_of_other_commands())
    check_config(config, f"{path} and the command line")
    return config


def print_config_help(config_class: Any, path: str | None, show_all: bool) -> None:
    """Print the keys of a command with the values that they have under a file, or without one, and what they mean.

    Shows the keys that most runs set, or all.
    """
    command = (COMMANDS | COMMANDS_WITHOUT_RUN)[config_class]
    if path is not None and config_class in COMMANDS and not Path(path).is_dir():
        config = read_yaml_config(config_class, find_config(path), ignored_sections(config_class))
        print_help(config, f"bilevel-jax {command} {path}", show_all)
        return
    shipped = SHIPPED_CONFIGS.get(config_class)
    config = _remove_inputs(read_yaml_config(config_class, find_config(shipped))) if shipped else config_class()
    if shipped:
        print(
            f"Without CONFIG the defaults are those of {shipped}, as below. Keys that a CONFIG does not set have "
            f"defaults of their own: bilevel-jax {command} CONFIG --help shows them.\n"
        )
    print_help(config, f"bilevel-jax {command} {'DIR' if config_class is WatchConfig else '[CONFIG]'}", show_all)


def ignored_sections(config_class: Any) -> Collection[str]:
    """Sections of other commands, which a command that reads any command's config passes over."""
    commands_with_own_sections = (
        SelectConfig, TrainConfig, CompareConfig, AuditConfig, RankConfig, RefineConfig, ScoreConfig, EvaluateConfig
    )  # fmt: skip
    if config_class is TuneConfig:
        return ("compare",)  # tuned.yaml has it not: the proposal stands as flags, too
    return () if config_class in commands_with_own_sections else section_names()


def _remove_inputs(config: Any) -> Any:
    """The same config without the model and data that stand in for those of a user."""
    data = dataclasses.replace(config.data, train=(), validation=(), dev=(), test=())
    return dataclasses.replace(config, model=dataclasses.replace(config.model, name_or_path=""), data=data)


def load_watch_config(folder: str | None, overrides: Sequence[str] = ()) -> WatchConfig:
    """The settings of `watch` for a run's folder.

    Raises:
        ValueError: without a folder, or for a wrong value.
        FlagError: for a wrong flag.
    """
    own = ["--watch.dir", folder] if folder else []
    config = parse_flags(WatchConfig(), [*own, *overrides], "bilevel-jax watch DIR", _keys_of_other_commands())
    check_config(config, "the command line")
    return config


def load_config_to_estimate(
    path: str | Path | None, overrides: Sequence[str] = ()
) -> tuple[Any, schema.EstimateSection]:
    """The config of the run to estimate, as its command loads it, and the settings of the estimate.

    Raises:
        ValueError: for a file that no command reads that can be estimated, and for one that several read.
        FlagError: for a wrong flag.
    """
    flags = split_flags(overrides)
    own_flags = [flag for flag in flags if flag.name == "--out" or flag.name.startswith("--estimate.")]
    options = parse_flags(EstimateConfig(), [word for flag in own_flags for word in flag.words], "bilevel-jax estimate")
    command_flags = [word for flag in flags if flag not in own_flags for word in flag.words]
    check_config(options, "the command line")
    if path is None:
        raise ValueError("estimate: give the config of the run, or the folder of one that is finished.")
    config_class = choose_config_to_estimate(
        options.estimate.command,
        lambda kind: read_yaml_config(kind, find_config(path), ignored_sections(kind)),
        str(path),
    )
    return load_config(config_class, path, command_flags), options.estimate


def choose_config_to_estimate(command: str, read: Callable[[Any], Any], config_source: str) -> Any:
    """The config class of the run to estimate: that of `command`, or for "auto" of the one that can read the config.

    Args:
        command: select, train, compare, audit, tune or auto. Auto takes for tune's what sets a key of section tune.
        read: config class -> the config; a ValueError lists what does not fit the class.
        config_source: names the config, for errors.
    """
    config_classes: dict[str, Any] = {
        COMMANDS[config_class]: config_class
        for config_class in (SelectConfig, TrainConfig, CompareConfig, AuditConfig, TuneConfig)
    }
    if command != "auto":
        return config_classes[command]
    matches, errors = [], {}
    for name, config_class in config_classes.items():
        try:
            config = read(config_class)
        except ValueError as error:
            errors[name] = str(error)
            continue
        if name != "tune" or config.tune != schema.TuneSection():  # tune reads files of others, faulty ones among them
            matches.append(name)
    if len(matches) == 1:
        return config_classes[matches[0]]
    if matches:
        raise ValueError(
            f"{config_source} may be a config of {' or '.join(matches)}: choose one by --estimate.command."
        )
    closest = min(errors, key=lambda name: errors[name].count("\n"))
    raise ValueError(
        f"{config_source} is a config of none of {', '.join(config_classes)}, which can be estimated. "
        f"As one of {closest}: {errors[closest]}"
    )


def _keys_of_other_commands() -> dict[str, list[str]]:
    """Every key of every command -> the commands that have it."""
    keys: dict[str, list[str]] = {}
    for config_class, command in (COMMANDS | COMMANDS_WITHOUT_RUN).items():
        for key, _ in flatten_config(config_class()):
            keys.setdefault(key, []).append(command)
    return keys


def section_names() -> set[str]:
    """Names of the sections of all commands."""
    return {field.name for config_class in COMMANDS for field in dataclasses.fields(config_class)}


def find_config(path: str | Path) -> Path:
    """The file itself, or the config of that name that comes with the package.

    A config of the package is meant only by its name alone or under configs/, so that a mistyped folder is an error.
    """
    package = Path(__file__).resolve().parents[2]
    shipped_folders = [package / "configs", package.parent / "configs"]  # in a wheel; in a clone
    if Path(path).is_file():
        return Path(path)
    if Path(path).parent in (Path("."), Path("configs")):
        for folder in shipped_folders:
            if (folder / Path(path).name).is_file():
                return folder / Path(path).name
    shipped_names = sorted(
        {file.name for folder in shipped_folders if folder.is_dir() for file in folder.glob("*.yaml")}
    )
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path}: a folder, and no config. Name a YAML file.")
    siblings = [str(file) for file in Path(path).parent.glob("*.yaml")] if Path(path).parent.is_dir() else []
    hint = suggest_nearest(path, [*siblings, *shipped_names])
    raise FileNotFoundError(
        f"{path}: no such config. {hint[:1].upper()}{hint[1:]}Those that come with the package: "
        f"{', '.join(shipped_names) or 'none'}."
    )


def config_to_yaml(config: Any) -> str:
    """The whole config as YAML text that `load_config` reads back to an equal config."""
    return yaml.safe_dump(_tuples_to_lists(dataclasses.asdict(config)), sort_keys=False, width=120, allow_unicode=True)


def config_hash(config: Any) -> str:
    """SHA-256 of every key that changes what is computed: all but RESUME_EXEMPT_KEYS."""
    text = "\n".join(f"{key}={value!r}" for key, value in flatten_config(config) if key not in RESUME_EXEMPT_KEYS)
    return hashlib.sha256(copies.show(text).encode()).hexdigest()


def diff_configs(old_config: Any, new_config: Any) -> list[str]:
    """One line per key whose change keeps a run of the old config from being resumed with the new one."""
    old_values = dict(flatten_config(old_config))
    return [
        f"{key}: {old_values[key]!r} in the run, {value!r} now"
        for key, value in flatten_config(new_config)
        if key not in RESUME_EXEMPT_KEYS and old_values[key] != value
    ]


def describe_rounding_changes(config: Any, path: Path) -> list[str]:
    """The keys of RESUME_ROUNDING_KEYS that differ from those of the run to resume, in words."""
    old_values = dict(flatten_config(load_config(type(config), path)))
    return [
        f"{key} = {old_values[key]!r} then, {value!r} now"
        for key, value in flatten_config(config)
        if key in RESUME_ROUNDING_KEYS and old_values[key] != value
    ]


def check_same_config(config: Any, path: Path) -> None:
    """Raise a ValueError that lists the differences, where a config differs from the one of the run to resume."""
    if changed_keys := diff_configs(load_config(type(config), path), config):
        raise ValueError(
            f"{path.parent} was started with another config, so it cannot be resumed: {'; '.join(changed_keys)}. "
            "Start a new run with --out, or give the config that it was started with."
        )


def _tuples_to_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples_to_lists(item) for key, item in value.items()}
    return [_tuples_to_lists(item) for item in value] if isinstance(value, tuple) else value
