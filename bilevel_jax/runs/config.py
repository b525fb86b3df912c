"""What each verb is told: its sections, filled from a YAML file and the command line, checked at the border."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from bilevel_jax.runs.read import read
from bilevel_jax.runs.rules import check, leaves
from bilevel_jax.runs.sections import (
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


@dataclass(frozen=True)
class SelectConfig:
    """Learn one weight per training row from a trusted validation set.

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
    """Fine-tune a language model with a weight for each training row.

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
    person should act on. Where another verb would stop, it counts, names the first place, and goes on.
    CONFIG is the file of any other verb: the sections that are not below are passed over.
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
    """Judge cheap scores of training rows by exact ones, and all of them by retraining without some rows.

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

    In each round the present model answers some questions of data.train (section generate; their offline rows leave);
    every method of refine.methods weighs the rows, with V_fit as the judge (sections outer, single), and trains a
    candidate; and the best candidate replaces the model where the lower bound of its gain on V_select, by paired
    bootstrap, is above 0. V_report is read once, at the end. CONFIG is a YAML file of the sections below; every flag
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

    CONFIG is the file of a run of `select`, `train`, `compare` or `audit`, and every flag of that verb may follow it:
    `bilevel-jax select --help` lists them. Parameters are shapes only, so that a model may be larger than this machine:
    its config.json is enough, with --estimate.train-examples where data and tokenizer are not here, --estimate.devices for a mesh
    of devices that are not here, --estimate.tflops for their speed and --estimate.memory-gib for their memory. On
    the folder of a finished run it prints what was estimated beside what was measured. Short form:
    --out FOLDER = --estimate.dir FOLDER.
    """

    estimate: EstimateSection = EstimateSection()


Config = TypeVar(
    "Config",
    SelectConfig,
    TrainConfig,
    InspectConfig,
    ExportConfig,
    CompareConfig,
    AuditConfig,
    RankConfig,
    RefineConfig,
)
VERBS: dict[type, str] = {
    SelectConfig: "select", TrainConfig: "train", InspectConfig: "inspect", ExportConfig: "export",
    CompareConfig: "compare", AuditConfig: "audit", RankConfig: "rank", RefineConfig: "refine",
}  # fmt: skip

RUN: dict[str, tuple[str, ...]] = {"--resume": ("--output.resume",), "--out": ("--output.dir",)}
SHORT: dict[type, dict[str, tuple[str, ...]]] = {
    SelectConfig: RUN | {"--fast": ("--retrain.no-enabled", "--certify.no-enabled")},
    TrainConfig: RUN,
    CompareConfig: RUN,
    AuditConfig: RUN | {"--fast": ("--certify.no-enabled",)},
    RankConfig: RUN,
    RefineConfig: RUN,
    ExportConfig: {"--out": ("--export.dir",)},
}

# What may differ when a run is resumed: nothing here changes what is computed.
MAY_DIFFER = (
    "output.dir",
    "output.resume",
    "output.progress",
    "output.save_minutes",
    *(f"mesh.{key}" for key in ("data", "fsdp", "sharding_rules")),
    *(f"distributed.{key}" for key in ("coordinator_address", "num_processes", "process_id")),
)


def load(kind: type[Config], path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (None: the defaults), apply command-line overrides, check every rule.

    Trouble in the file is one ValueError that lists all of it; a wrong flag ends the program as tyro does, with the
    nearest flags named. `--help` among the overrides prints every key, its default and what it means.
    """
    runs = (SelectConfig, TrainConfig, CompareConfig, AuditConfig, RankConfig, RefineConfig)
    others = () if kind in runs else sections()
    config = kind() if path is None else read(kind, find(path), others)
    flags = [flag for override in overrides for flag in _long(kind, override)]
    prog = f"bilevel-jax {VERBS[kind]} {'CONFIG' if path is None else path}"
    config = tyro.cli(kind, prog=prog, args=flags, default=config)
    check(config, "the defaults and the command line" if path is None else f"{path} and the command line")
    return config


def load_estimated(path: str | Path | None, overrides: Sequence[str] = ()) -> tuple[Any, EstimateSection]:
    """The config of the run that is to be estimated, as its verb would load it, and what is asked of the estimate.

    Raises ValueError for a file that no verb which can be estimated would read, and for one that several would.
    """
    flags = ["--estimate.dir" if flag == "--out" else flag.replace("--out=", "--estimate.dir=") for flag in overrides]
    asked, others = tyro.cli(
        EstimateConfig,
        prog="bilevel-jax estimate CONFIG",
        args=flags,
        default=EstimateConfig(),
        return_unknown_args=True,
    )
    check(asked, "the command line")
    if path is None:
        raise ValueError("estimate: give the config of the run, or the folder of one that is finished.")
    kinds: dict[str, Any] = {VERBS[kind]: kind for kind in (SelectConfig, TrainConfig, CompareConfig, AuditConfig)}
    verb = asked.estimate.command if asked.estimate.command != "auto" else _verb_of(find(path), kinds)
    return load(kinds[verb], path, others), asked.estimate


def _verb_of(path: Path, kinds: dict[str, Any]) -> str:
    """The one verb whose config a file is."""
    fit, trouble = [], {}
    for verb, kind in kinds.items():
        try:
            read(kind, path)
            fit.append(verb)
        except ValueError as error:
            trouble[verb] = str(error)
    if len(fit) == 1:
        return fit[0]
    if fit:
        raise ValueError(f"{path} may be a config of {' or '.join(fit)}: say of which by --estimate.command.")
    nearest = min(trouble, key=lambda verb: trouble[verb].count("\n"))
    raise ValueError(
        f"{path} is a config of none of {', '.join(kinds)}, which can be estimated. As one of {nearest}: "
        f"{trouble[nearest]}"
    )


def sections() -> set[str]:
    """The sections of all verbs."""
    return {field.name for kind in VERBS for field in dataclasses.fields(kind)}


def find(path: str | Path) -> Path:
    """The file itself, or the one of that name among the configs that come with the package."""
    package = Path(__file__).resolve().parent.parent
    shipped = [package / "configs", package.parent / "configs"]  # in a wheel; in a clone
    for candidate in (Path(path), *(folder / Path(path).name for folder in shipped)):
        if candidate.is_file():
            return candidate
    known = sorted({file.name for folder in shipped if folder.is_dir() for file in folder.glob("*.yaml")})
    raise FileNotFoundError(f"{path}: no such config. Those that come with the package: {', '.join(known) or 'none'}.")


def resolved(config: Any) -> str:
    """The whole config as YAML text that `load` reads back to an equal config."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False, width=120, allow_unicode=True)


def config_hash(config: Any) -> str:
    """SHA-256 of every key that changes what is computed: MAY_DIFFER is left out."""
    text = "\n".join(f"{key}={value!r}" for key, value in leaves(config) if key not in MAY_DIFFER)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(before: Any, now: Any) -> list[str]:
    """One line per key that keeps `now` from resuming a run of `before`; empty when it may."""
    old = dict(leaves(before))
    return [
        f"{key}: {old[key]!r} in the run, {value!r} now"
        for key, value in leaves(now)
        if key not in MAY_DIFFER and old[key] != value
    ]


def refuse_another(config: Any, path: Path) -> None:
    """Resuming under another config than the one stored at `path` would mix two runs; the differences are named."""
    if different := differences(load(type(config), path), config):
        raise ValueError(
            f"{path.parent} was started with another config, so it cannot be resumed: {'; '.join(different)}. "
            "Start a new run with --out, or give the config that it was started with."
        )


def _long(kind: type, flag: str) -> tuple[str, ...]:
    name, equals, value = flag.partition("=")
    *others, last = SHORT.get(kind, {}).get(name, (name,))
    return (*others, f"{last}{equals}{value}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
