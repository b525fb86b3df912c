"""What each command is told: its sections, filled from a YAML file and the command line, checked at the border."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from bilevel_jax.runs.config.rules import check_config, flatten_config
from bilevel_jax.runs.config.schema import (
    ArraysSection,
    AuditSection,
    CertifySection,
    CompareSection,
    DataSection,
    DistributedSection,
    EstimateSection,
    ExportSection,
    FineTuneSection,
    GenerateSection,
    LoraSection,
    MeshSection,
    ModelSection,
    ObjectiveSection,
    OptimizerSection,
    OuterSection,
    OutputSection,
    RankSection,
    RefineSection,
    RetrainSection,
    ScoresSection,
    SelectionSection,
    ShowSection,
    SingleLoopSection,
    TrainOutputSection,
    TrainSection,
    VerifierSection,
    WeightsSection,
)
from bilevel_jax.runs.config.yaml_reader import read_yaml_config


@dataclass(frozen=True)
class SelectConfig:
    """Learn one weight per training example from a trusted validation set.

    CONFIG is a YAML file of the sections below; every flag overrides one of its keys. Paths are relative to where you
    stand. Short forms: --fast = --retrain.no-enabled --certify.no-enabled; --resume = --output.resume;
    --out FOLDER = --output.dir FOLDER.
    """

    model: ModelSection = ModelSection()
    lora: LoraSection = LoraSection()
    data: DataSection = DataSection()
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection = OptimizerSection()
    train: TrainSection = TrainSection()
    outer: OuterSection = OuterSection()
    single_loop: SingleLoopSection = SingleLoopSection()
    scores: ScoresSection = ScoresSection()
    output: OutputSection = OutputSection()
    selection: SelectionSection = SelectionSection()
    retrain: RetrainSection = RetrainSection()
    certify: CertifySection = CertifySection()
    mesh: MeshSection = MeshSection()
    distributed: DistributedSection = DistributedSection()


@dataclass(frozen=True)
class TrainConfig:
    """Fine-tune a language model with a weight for each training example.

    CONFIG is a YAML file of the sections below; every flag overrides one of its keys. Paths are relative to where you
    stand. Short forms: --resume = --output.resume; --out FOLDER = --output.dir FOLDER.
    """

    model: ModelSection = ModelSection()
    lora: LoraSection = LoraSection()
    data: DataSection = DataSection()
    objective: ObjectiveSection = ObjectiveSection()
    weights: WeightsSection = WeightsSection()
    scores: ScoresSection = ScoresSection()
    optimizer: OptimizerSection = OptimizerSection()
    train: FineTuneSection = FineTuneSection()
    output: TrainOutputSection = TrainOutputSection()
    mesh: MeshSection = MeshSection()
    distributed: DistributedSection = DistributedSection()


@dataclass(frozen=True)
class InspectConfig:
    """Show what training would see, before anyone spends an hour: nothing is trained, and no weights are loaded.

    Prints lengths, targets, BOS and EOS, truncation, sources, copies and leaks, some rows token by token, and what a
    person should act on. Where another command would stop, it counts, names the first place, and goes on.
    CONFIG is the file of any other command: the sections that are not below are passed over.
    """

    model: ModelSection = ModelSection()
    lora: LoraSection = LoraSection()
    data: DataSection = DataSection()
    objective: ObjectiveSection = ObjectiveSection()
    show: ShowSection = ShowSection()


@dataclass(frozen=True)
class ExportConfig:
    """Write the rows that their weights choose, in the input form of another trainer, with a card that says how.

    CONFIG is the folder of a run of `select` or `train`, whose data and weights are used, or a config file with
    weights.file; the sections that are not below are passed over. The section keep says which rows are written: the
    top share, those above a threshold, whole repeats by weight (for trainers that read no weight), or a mix of sources.
    Short form: --out FOLDER = --export.dir FOLDER.
    """

    data: DataSection = DataSection()
    weights: WeightsSection = WeightsSection()
    selection: SelectionSection = SelectionSection()
    export: ExportSection = ExportSection()


@dataclass(frozen=True)
class CompareConfig:
    """Compare methods that learn weights: one data set, one budget, several seeds, models trained again from cold.

    CONFIG is a YAML file of the sections below; every flag overrides one of its keys. data.train names one .npz file (a
    classification task, section arrays) or rows of text. Short forms: --resume = --output.resume;
    --out FOLDER = --output.dir FOLDER.
    """

    model: ModelSection = ModelSection()
    lora: LoraSection = LoraSection()
    data: DataSection = DataSection()
    arrays: ArraysSection = ArraysSection()
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection = OptimizerSection()
    train: TrainSection = TrainSection()
    outer: OuterSection = OuterSection()
    single_loop: SingleLoopSection = SingleLoopSection()
    compare: CompareSection = CompareSection()
    output: OutputSection = OutputSection()
    mesh: MeshSection = MeshSection()
    distributed: DistributedSection = DistributedSection()


@dataclass(frozen=True)
class AuditConfig:
    """Judge cheap scores of training examples by exact ones, and all of them by retraining without some rows.

    CONFIG is a YAML file of the sections below; every flag overrides one of its keys. data.train names one .npz file (a
    classification task, section arrays) or rows of text. Short forms: --fast = --certify.no-enabled;
    --resume = --output.resume; --out FOLDER = --output.dir FOLDER.
    """

    model: ModelSection = ModelSection()
    lora: LoraSection = LoraSection()
    data: DataSection = DataSection()
    arrays: ArraysSection = ArraysSection()
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection = OptimizerSection()
    train: TrainSection = TrainSection()
    outer: OuterSection = OuterSection()
    scores: ScoresSection = ScoresSection()
    audit: AuditSection = AuditSection()
    certify: CertifySection = CertifySection()
    output: OutputSection = OutputSection()
    mesh: MeshSection = MeshSection()
    distributed: DistributedSection = DistributedSection()


@dataclass(frozen=True)
class RankConfig:
    """Which way of generating responses will train a model best, from a small sample and without training.

    CONFIG is a YAML file of the sections below; every flag overrides one of its keys. data.train names one table whose
    rows map strategies to responses (data.prompt_field, rank.responses_field), or a file of responses for each
    strategy, called after it. The model answers a sample of the questions itself (section generate), and each strategy
    is judged by how the model takes its responses: self-aligned perplexity after answers of its own (sppl),
    perplexity, instruction-following difficulty (ifd), likeness to its own answers (self_similarity), a mix of the
    last and perplexity, and rewards over loss (car). Ends in a pick, or "no clear winner". Sections
    optimizer and train, and the model's LoRA, are those of rank.train_examples alone. Short forms:
    --resume = --output.resume; --out FOLDER = --output.dir FOLDER.
    """

    model: ModelSection = ModelSection()
    lora: LoraSection = LoraSection()
    data: DataSection = DataSection()
    rank: RankSection = RankSection()
    generate: GenerateSection = GenerateSection(temperature=0.95, top_k=50, top_p=0.7)
    verifier: VerifierSection = VerifierSection()
    optimizer: OptimizerSection = OptimizerSection()
    train: TrainSection = TrainSection()
    output: OutputSection = OutputSection()
    mesh: MeshSection = MeshSection()
    distributed: DistributedSection = DistributedSection()


@dataclass(frozen=True)
class RefineConfig:
    """Refine a model on its own responses, in rounds, and replace it only where that helps on rows nobody trained on.

    In each round the present model answers some questions of data.train (section generate; their offline examples leave);
    every method of refine.methods weighs the rows, with validation as the judge (sections outer, single), and trains a
    candidate; and the best candidate replaces the model where the lower bound of its gain on dev, by paired
    bootstrap, is above 0. test is read once, at the end. CONFIG is a YAML file of the sections below; every flag
    overrides one of its keys. Short forms: --resume = --output.resume; --out FOLDER = --output.dir FOLDER.
    """

    model: ModelSection = ModelSection()
    lora: LoraSection = LoraSection()
    data: DataSection = DataSection()
    objective: ObjectiveSection = ObjectiveSection()
    refine: RefineSection = RefineSection()
    generate: GenerateSection = GenerateSection(num_generations=4)
    verifier: VerifierSection = VerifierSection()
    optimizer: OptimizerSection = OptimizerSection()
    train: TrainSection = TrainSection()
    outer: OuterSection = OuterSection(weighting="sigmoid")
    single_loop: SingleLoopSection = SingleLoopSection()
    output: OutputSection = OutputSection()
    mesh: MeshSection = MeshSection()
    distributed: DistributedSection = DistributedSection()


@dataclass(frozen=True)
class EstimateConfig:
    """Say what a run will take before it begins: memory of each device, disk, work, hours. Loads no weights.

    CONFIG is the file of a run of `select`, `train`, `compare` or `audit`, and every flag of that command may follow it:
    `bilevel-jax select --help` lists them. Parameters are shapes only, so that a model may be larger than this machine:
    its config.json is enough, with --estimate.train-examples where data and tokenizer are not here, --estimate.devices for a mesh
    of devices that are not here, --estimate.tflops for their speed and --estimate.memory-gib for their memory. On
    the folder of a finished run it prints what was estimated beside what was measured. Short form:
    --out FOLDER = --estimate.dir FOLDER.
    """

    estimate: EstimateSection = EstimateSection()


ConfigT = TypeVar(
    "ConfigT",
    SelectConfig,
    TrainConfig,
    InspectConfig,
    ExportConfig,
    CompareConfig,
    AuditConfig,
    RankConfig,
    RefineConfig,
)
COMMANDS: dict[type, str] = {
    SelectConfig: "select", TrainConfig: "train", InspectConfig: "inspect", ExportConfig: "export",
    CompareConfig: "compare", AuditConfig: "audit", RankConfig: "rank", RefineConfig: "refine",
}  # fmt: skip

RUN_SHORT_FLAGS: dict[str, tuple[str, ...]] = {"--resume": ("--output.resume",), "--out": ("--output.dir",)}
SHORT_FLAGS: dict[type, dict[str, tuple[str, ...]]] = {
    SelectConfig: RUN_SHORT_FLAGS | {"--fast": ("--retrain.no-enabled", "--certify.no-enabled")},
    TrainConfig: RUN_SHORT_FLAGS,
    CompareConfig: RUN_SHORT_FLAGS,
    AuditConfig: RUN_SHORT_FLAGS | {"--fast": ("--certify.no-enabled",)},
    RankConfig: RUN_SHORT_FLAGS,
    RefineConfig: RUN_SHORT_FLAGS,
    ExportConfig: {"--out": ("--export.dir",)},
}

# What may differ when a run is resumed: nothing here changes what is computed.
RESUME_EXEMPT_KEYS = (
    "output.dir",
    "output.resume",
    "output.progress",
    "output.save_minutes",
    *(f"mesh.{key}" for key in ("data", "fsdp", "sharding_rules")),
    *(f"distributed.{key}" for key in ("coordinator_address", "num_processes", "process_id")),
)


def load_config(config_class: type[ConfigT], path: str | Path | None, overrides: Sequence[str] = ()) -> ConfigT:
    """Read a YAML file (None: the defaults), apply command-line overrides, check every rule.

    Trouble in the file is one ValueError that lists all of it; a wrong flag ends the program as tyro does, with the
    nearest flags named. `--help` among the overrides prints every key, its default and what it means.
    """
    commands_with_own_sections = (SelectConfig, TrainConfig, CompareConfig, AuditConfig, RankConfig, RefineConfig)
    ignored_sections = () if config_class in commands_with_own_sections else section_names()
    config = config_class() if path is None else read_yaml_config(config_class, find_config(path), ignored_sections)
    flags = [flag for override in overrides for flag in _expand_short_flag(config_class, override)]
    prog = f"bilevel-jax {COMMANDS[config_class]} {'CONFIG' if path is None else path}"
    config = tyro.cli(config_class, prog=prog, args=flags, default=config)
    check_config(config, "the defaults and the command line" if path is None else f"{path} and the command line")
    return config


def load_config_to_estimate(path: str | Path | None, overrides: Sequence[str] = ()) -> tuple[Any, EstimateSection]:
    """The config of the run that is to be estimated, as its command would load it, and what is asked of the estimate.

    Raises ValueError for a file that no command which can be estimated would read, and for one that several would.
    """
    flags = ["--estimate.dir" if flag == "--out" else flag.replace("--out=", "--estimate.dir=") for flag in overrides]
    options, command_flags = tyro.cli(
        EstimateConfig,
        prog="bilevel-jax estimate CONFIG",
        args=flags,
        default=EstimateConfig(),
        return_unknown_args=True,
    )
    check_config(options, "the command line")
    if path is None:
        raise ValueError("estimate: give the config of the run, or the folder of one that is finished.")
    config_classes: dict[str, Any] = {
        COMMANDS[config_class]: config_class for config_class in (SelectConfig, TrainConfig, CompareConfig, AuditConfig)
    }
    command = (
        options.estimate.command
        if options.estimate.command != "auto"
        else _detect_command(find_config(path), config_classes)
    )
    return load_config(config_classes[command], path, command_flags), options.estimate


def _detect_command(path: Path, config_classes: dict[str, Any]) -> str:
    """The one command whose config a file is."""
    matches, errors = [], {}
    for command, config_class in config_classes.items():
        try:
            read_yaml_config(config_class, path)
            matches.append(command)
        except ValueError as error:
            errors[command] = str(error)
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ValueError(f"{path} may be a config of {' or '.join(matches)}: say of which by --estimate.command.")
    closest_command = min(errors, key=lambda command: errors[command].count("\n"))
    raise ValueError(
        f"{path} is a config of none of {', '.join(config_classes)}, which can be estimated. As one of {closest_command}: "
        f"{errors[closest_command]}"
    )


def section_names() -> set[str]:
    """The sections of all commands."""
    return {field.name for config_class in COMMANDS for field in dataclasses.fields(config_class)}


def find_config(path: str | Path) -> Path:
    """The file itself, or the one of that name among the configs that come with the package."""
    package = Path(__file__).resolve().parent.parent
    shipped_folders = [package / "configs", package.parent / "configs"]  # in a wheel; in a clone
    for candidate in (Path(path), *(folder / Path(path).name for folder in shipped_folders)):
        if candidate.is_file():
            return candidate
    shipped_names = sorted(
        {file.name for folder in shipped_folders if folder.is_dir() for file in folder.glob("*.yaml")}
    )
    raise FileNotFoundError(
        f"{path}: no such config. Those that come with the package: {', '.join(shipped_names) or 'none'}."
    )


def config_to_yaml(config: Any) -> str:
    """The whole config as YAML text that `load` reads back to an equal config."""
    return yaml.safe_dump(_tuples_to_lists(dataclasses.asdict(config)), sort_keys=False, width=120, allow_unicode=True)


def config_hash(config: Any) -> str:
    """SHA-256 of every key that changes what is computed: MAY_DIFFER is left out."""
    text = "\n".join(f"{key}={value!r}" for key, value in flatten_config(config) if key not in RESUME_EXEMPT_KEYS)
    return hashlib.sha256(text.encode()).hexdigest()


def diff_configs(old_config: Any, new_config: Any) -> list[str]:
    """One line per key that keeps `now` from resuming a run of `before`; empty when it may."""
    old_values = dict(flatten_config(old_config))
    return [
        f"{key}: {old_values[key]!r} in the run, {value!r} now"
        for key, value in flatten_config(new_config)
        if key not in RESUME_EXEMPT_KEYS and old_values[key] != value
    ]


def check_same_config(config: Any, path: Path) -> None:
    """Resuming under another config than the one stored at `path` would mix two runs; the differences are named."""
    if changed_keys := diff_configs(load_config(type(config), path), config):
        raise ValueError(
            f"{path.parent} was started with another config, so it cannot be resumed: {'; '.join(changed_keys)}. "
            "Start a new run with --out, or give the config that it was started with."
        )


def _expand_short_flag(config_class: type, flag: str) -> tuple[str, ...]:
    name, equals, value = flag.partition("=")
    *leading_flags, last_flag = SHORT_FLAGS.get(config_class, {}).get(name, (name,))
    return (*leading_flags, f"{last_flag}{equals}{value}")


def _tuples_to_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples_to_lists(item) for key, item in value.items()}
    return [_tuples_to_lists(item) for item in value] if isinstance(value, tuple) else value
