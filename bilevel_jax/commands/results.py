"""The results of the commands: frozen dataclasses with arrays, read from the folder of a finished run."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int, Shaped

from bilevel_jax.core.certify import Verdict
from bilevel_jax.runs.budget.usage import format_bytes
from bilevel_jax.runs.config.load import (
    COMMANDS,
    AuditConfig,
    CompareConfig,
    EvaluateConfig,
    RankConfig,
    RefineConfig,
    ScoreConfig,
    SelectConfig,
    TrainConfig,
    TuneConfig,
    load_config,
)
from bilevel_jax.runs.config.yaml_reader import field_types, read_yaml
from bilevel_jax.runs.engine.recommendation import Recommendation
from bilevel_jax.runs.evaluation.summary import ANSWERS_FILE, RUN_FOLDER
from bilevel_jax.runs.infra import run_dir, seals
from bilevel_jax.runs.report.results import float_or_nan
from bilevel_jax.runs.stats import BootstrapInterval
from bilevel_jax.storage import copies

Column = Shaped[np.ndarray, "rows"]
"""Texts, or numbers, one to a row of a table."""
LabelColumn = Column
"""The known label of each row as a text, None where it has none."""


@dataclass(frozen=True, eq=False)
class AnswerComparison:
    """Two models of a run compared by their answers to evaluate.prompts; arrays hold one entry for each answer.

    Of `compare`, an arm and the baseline, and the models of all seeds: their draws come one seed after the other.
    """

    summary: str
    """Whether the model is better than the other, in one sentence."""
    level: str
    """better, worse, none (no difference told), open (no direction is better) or undecided."""
    result: dict[str, Any]
    """`metrics` has the values of both models and their paired difference, with intervals."""
    ids: Column
    """Of the prompts."""
    roles: Column
    """model, or baseline: what it is compared with."""
    draws: Int[np.ndarray, "rows"]
    """Number of the answer to its prompt."""
    answers: Column
    measures: dict[str, Float[np.ndarray, "rows"]]
    """Of each answer: accuracy, chrf, bleu, rouge_l, safety, refusal, as configured; nan where there is none."""
    fingerprints: Column
    """Of the parameters of the model that gave it."""
    seeds: Int[np.ndarray, "rows"] | None
    """Of `compare`: the seed of that model, from 0; else None."""


@dataclass(frozen=True, eq=False, repr=False)
class SelectResult:
    """What `select` learned. Arrays hold one entry for each training example, in the order of `ids`."""

    folder: Path
    """The run's folder."""
    report: Path
    """The report, a page of HTML."""
    summary: str
    """The verdict in one sentence; with evaluate.prompts a line on the answers, too."""
    config: SelectConfig
    """The config of the run, with every key."""
    result: dict[str, Any]
    """What result.json holds: the outer loop, certificates, retrains, AUC, work."""
    verdict: Verdict
    """Whether to believe the hypergradients at uniform weights."""
    recommendation: Recommendation
    """Which arm of the comparison to use, chosen on dev; its `use` is None where nothing could be chosen."""
    ids: Column
    """Hash of the example's content and the number of its occurrence."""
    sources: Column
    labels: LabelColumn
    weights: Float[np.ndarray, "examples"]
    """Factor of the example's loss; the mean of a competing weighting is 1."""
    hypergradients: Float[np.ndarray, "examples"] | None
    """d L_v / d weight at `weights`, in result["unit"] per unit of weight; below 0: more weight lowers the validation
    loss L_v. None for a single-loop method, which has none."""
    first_hypergradients: Float[np.ndarray, "examples"] | None
    """The same at weight 1 for every example."""
    alignment: Float[np.ndarray, "examples"]
    """-<grad loss_i, grad L_v> / examples at the end of uniform training; same sign as `hypergradients`."""
    losses: Float[np.ndarray, "examples"]
    """Of each example at the end of uniform training; NaN where it does not fit data.max_length."""
    selected: Bool[np.ndarray, "examples"]
    """Whether it stands in selected.jsonl."""
    model: Path
    """Folder of the model trained with `weights`."""
    evaluations: dict[str, AnswerComparison]
    """With evaluate.prompts: that model compared with one of `uniform` weights and with the one `before` training."""

    def rows(self, ids: Iterable[str]) -> Int[np.ndarray, "wanted"]:
        """The places of some ids: `result.weights[result.rows(ids)]`. Raises ValueError for one that is not there."""
        return _find_rows(self.ids, ids)

    def __repr__(self) -> str:
        examples = f"{_describe_weights(self.weights)}, {self.selected.sum():,} selected"
        lines = {"verdict": self.summary, "recommendation": self.recommendation.sentence, "examples": examples}
        return _describe(self, lines)


@dataclass(frozen=True, eq=False, repr=False)
class TrainResult:
    """What `train` did. Arrays hold one entry for each training example, in the order of `ids`."""

    folder: Path
    report: Path
    summary: str
    """What the loss on held-out examples did; with evaluate.prompts a line on the answers, too."""
    config: TrainConfig
    result: dict[str, Any]
    """What result.json holds: losses before and after, their course, work."""
    ids: Column
    sources: Column
    labels: LabelColumn
    weights: Float[np.ndarray, "examples"]
    """Factor of the example's loss; of a score that was refreshed, its mean over the run."""
    model: Path
    """Folder of the trained model, or of the adapter where that alone is written."""
    evaluations: dict[str, AnswerComparison]
    """With evaluate.prompts: that model compared with the one `before` training."""

    def rows(self, ids: Iterable[str]) -> Int[np.ndarray, "wanted"]:
        """The places of some ids: `result.weights[result.rows(ids)]`. Raises ValueError for one that is not there."""
        return _find_rows(self.ids, ids)

    def __repr__(self) -> str:
        return _describe(self, {"summary": self.summary, "examples": _describe_weights(self.weights)})


@dataclass(frozen=True, eq=False, repr=False)
class CompareResult:
    """What `compare` measured. Arrays hold one entry for each training example and seed, in the order of `ids`."""

    folder: Path
    report: Path
    summary: str
    """Which method is best, in one sentence; with evaluate.prompts a line on the answers, too."""
    config: CompareConfig
    result: dict[str, Any]
    """What result.json holds; `rows` is the table of methods with means and 95 % intervals over the seeds."""
    seeds: Int[np.ndarray, "rows"]
    """Number of the repetition."""
    ids: Column
    sources: Column
    labels: LabelColumn
    alignment: Float[np.ndarray, "rows"]
    losses: Float[np.ndarray, "rows"]
    """Of each example at the end of uniform training."""
    weights: dict[str, Float[np.ndarray, "rows"]]
    """By method."""
    evaluations: dict[str, AnswerComparison]
    """With evaluate.prompts: each arm compared with evaluate.baseline."""

    def __repr__(self) -> str:
        lines = {
            "summary": self.summary,
            "rows": f"{len(self.ids):,} (examples x {len(np.unique(self.seeds))} seeds), weights of "
            f"{', '.join(self.weights) or 'no method'}",
        }
        return _describe(self, lines)


@dataclass(frozen=True, eq=False)
class ExtremeRemovals:
    """Changes of losses when the examples with the highest scores, or the lowest, leave training: after - before.

    Arrays hold one entry for each of `shares`. Parts are validation, dev, test and queries (the mean of theirs).
    """

    shares: Float[np.ndarray, "shares"]
    """Of the training examples that left."""
    best: dict[str, dict[str, Float[np.ndarray, "shares"]]]
    """By score (a key of `AuditResult.scores`) and part, without the highest scores; above 0 for a good score."""
    worst: dict[str, dict[str, Float[np.ndarray, "shares"]]]
    """Without the lowest scores; below 0 for a good score."""
    random: dict[str, Float[np.ndarray, "shares 3"]]
    """By part, without random examples: the mean, and the ends of where 95 % of such removals fall."""


@dataclass(frozen=True, eq=False, repr=False)
class AuditResult:
    """What `audit` judged. Arrays hold one entry for each example that training reads, in the order of `ids`."""

    folder: Path
    report: Path
    summary: str
    """Which score to use, in one sentence."""
    config: AuditConfig
    result: dict[str, Any]
    """What result.json holds; `rows` is the table of scores with their linear datamodeling scores (LDS)."""
    use: str | None
    """Key of the score in `scores` that predicts the effect of removing examples best; None where none does."""
    ids: Column
    scores: dict[str, Float[np.ndarray, "examples"]]
    """By name, larger is better; estimators are -dL_v/dweight."""
    lds: dict[str, dict[str, BootstrapInterval]]
    """By score and part (validation, dev, test, queries): the rank correlation of the sums of scores with the loss
    after retraining without the first of audit.removed, with its 95 % interval. No score has read dev or test."""
    others_part: str | None
    """The part whose correlation tells whether `use` speaks for other examples: dev, test without a dev, or None."""
    others_level: str
    """BELIEVE, UNDECIDED or DO NOT BELIEVE: whether it does."""
    verdict: Verdict | None
    """Whether to believe the exact hypergradients; None without them or their certificates."""
    extremes: ExtremeRemovals | None
    """Retrains without the best and without the worst examples; None where audit.extremes is empty."""

    def rows(self, ids: Iterable[str]) -> Int[np.ndarray, "wanted"]:
        """The places of some ids: `scores["loss"][rows(ids)]`. Raises ValueError for one that is not there."""
        return _find_rows(self.ids, ids)

    def __repr__(self) -> str:
        lines = {
            "summary": self.summary,
            "use": str(self.use),
            "scores": f"{', '.join(self.scores)} of {len(self.ids):,} examples",
        }
        return _describe(self, lines)


@dataclass(frozen=True, eq=False)
class TriedSetting:
    """A setting that `tune` trained once with uniform weights."""

    name: str
    """What differs from the config's own setting, in words."""
    values: dict[str, Any]
    """The same as keys of the config, "section.key", and values; {} is the config's own."""
    losses: dict[str, float | None]
    """Of validation, dev and test; empty where training failed."""
    smoothness: float | None
    """The cosine of the first draw of metasmoothness; None where it was not measured."""
    verdict: Verdict | None
    """None where not all certificates were computed."""


@dataclass(frozen=True, eq=False, repr=False)
class TuneResult:
    """The settings that `tune` tried, and the one that it proposes."""

    folder: Path
    report: Path
    summary: str
    """What is proposed and what it costs in loss, or the closest setting."""
    config: TuneConfig
    result: dict[str, Any]
    """What result.json holds; `rows` has every setting with its certificates."""
    settings: tuple[TriedSetting, ...]
    """In the order in which they were tried; the first is the config's own."""
    proposed: TriedSetting | None
    """One of `settings`; None where none holds within tune.max_loss_increase."""
    tuned: Path | None
    """tuned.yaml, the config with the proposed setting, ready for `select` or `audit` (`result["tuned_for"]`)."""

    def __repr__(self) -> str:
        levels = [setting.verdict.level for setting in self.settings if setting.verdict]
        lines = {
            "summary": self.summary,
            "settings": f"{len(self.settings)} trained, {len(levels)} certified, {levels.count('BELIEVE')} hold",
            "tuned": str(self.tuned),
        }
        return _describe(self, lines)


@dataclass(frozen=True, eq=False, repr=False)
class RankResult:
    """What `rank` measured. Arrays hold one entry for each question and strategy, in the order of `ids`."""

    folder: Path
    report: Path
    summary: str
    """The pick, or that there is no clear winner, in one sentence."""
    config: RankConfig
    result: dict[str, Any]
    """What result.json holds; `metrics` has the score of each strategy by each metric, with intervals."""
    pick: str | None
    """The strategy to train on; None where there is no clear winner."""
    ids: Column
    """Of the questions."""
    strategies: Column
    blocks: Int[np.ndarray, "rows"]
    """Number of the block of questions."""
    measures: dict[str, Float[np.ndarray, "rows"]]
    """What the metrics read of each response: sppl, perplexity, ifd, self_similarity, rewards, as configured."""

    def __repr__(self) -> str:
        names = list(dict.fromkeys(self.strategies.tolist()))
        lines = {
            "summary": self.summary,
            "pick": str(self.pick),
            "rows": f"{len(self.ids):,} (questions x strategies {', '.join(names)}); {', '.join(self.measures)}",
        }
        return _describe(self, lines)


@dataclass(frozen=True, eq=False, repr=False)
class RankRecordsResult:
    """What `rank` with rank.records measured. Arrays hold one entry for each pair and metric."""

    folder: Path
    report: Path
    summary: str
    """What picking by rank.pick_by reaches, and its gain over the best other metric."""
    config: RankConfig
    result: dict[str, Any]
    """What result.json holds; `subsets` has accuracies of picks and rank correlations with intervals."""
    models: Column
    tasks: Column
    metrics: Column
    picks: Column
    """The strategy that the metric picks; of several that tie, all."""
    accuracies: Float[np.ndarray, "rows"]
    """Of the pick, as a share."""
    best_accuracies: Float[np.ndarray, "rows"]
    """Of the best strategy of the pair."""
    rank_correlations: Float[np.ndarray, "rows"]
    """Spearman's, of the metric with the accuracies; nan where one of them is constant."""

    def __repr__(self) -> str:
        lines = {"summary": self.summary, "rows": f"{len(self.models):,} (pairs of a model and a task x metrics)"}
        return _describe(self, lines)


@dataclass(frozen=True, eq=False, repr=False)
class RefineResult:
    """What `refine` did. Arrays hold one entry for each example of each round, in the order of `ids`."""

    folder: Path
    report: Path
    summary: str
    """Whether the model became better, in one sentence; with evaluate.prompts a line on the answers, too."""
    config: RefineConfig
    result: dict[str, Any]
    """What result.json holds; `records` has the rounds and `test` the losses at the start and at the end."""
    accepted: int
    """Rounds whose candidate became the model."""
    rounds: Int[np.ndarray, "rows"]
    ids: Column
    questions: Column
    """Id of the offline example whose prompt was answered."""
    generated: Bool[np.ndarray, "rows"]
    """Whether the model wrote the response."""
    sources: Column
    labels: LabelColumn
    multiplicity: Float[np.ndarray, "rows"]
    """What the example counts before any weight; the mean is 1."""
    weights: Float[np.ndarray, "rows"]
    rewards: Float[np.ndarray, "rows"]
    """Of the responses of a generator that is trained: minus the derivative of L_v by the weight; NaN for others."""
    scores: Float[np.ndarray, "rows"]
    """With refine.methods = ica, by the model that the round starts from; NaN without."""
    model: Path
    """Folder of the last accepted model."""
    generator: Path | None
    """Folder of the generator after the last round; None where none is trained."""
    evaluations: dict[str, AnswerComparison]
    """With evaluate.prompts: that model compared with the `first` one."""

    def __repr__(self) -> str:
        lines = {
            "summary": self.summary,
            "rows": f"{_describe_weights(self.weights)}; {self.generated.sum():,} generated, "
            f"{self.accepted} of {len(self.result['records'])} rounds accepted",
        }
        return _describe(self, lines)


@dataclass(frozen=True, eq=False, repr=False)
class ScoreResult:
    """What `score` gave. Arrays hold one entry for each new example, in the order of `ids`."""

    folder: Path
    report: Path
    summary: str
    """How many rows were scored and chosen, and what has drifted."""
    config: ScoreConfig
    result: dict[str, Any]
    """What result.json holds: counts, weights, logits, drift of each feature, rows per second."""
    drifted: tuple[str, ...]
    """Features whose values are not as those of the rater's training examples."""
    ids: Column
    sources: Column
    labels: LabelColumn
    logits: Float[np.ndarray, "examples"]
    """NaN where it does not fit the length that the rater was learned with."""
    weights: Float[np.ndarray, "examples"]
    """Factor of the example's loss, as if it had stood among the rater's training examples."""
    selected: Bool[np.ndarray, "examples"]
    """Whether it stands in selected.jsonl."""

    def rows(self, ids: Iterable[str]) -> Int[np.ndarray, "wanted"]:
        """The places of some ids: `result.weights[result.rows(ids)]`. Raises ValueError for one that is not there."""
        return _find_rows(self.ids, ids)

    def __repr__(self) -> str:
        examples = f"{_describe_weights(self.weights)}, {self.selected.sum():,} selected"
        return _describe(self, {"summary": self.summary, "examples": examples})


@dataclass(frozen=True, eq=False, repr=False)
class EvaluateResult:
    """What `evaluate` found. Arrays hold one entry for each answer, those of the model first."""

    folder: Path
    report: Path
    summary: str
    """Whether the model is better, in one sentence."""
    config: EvaluateConfig
    result: dict[str, Any]
    """What result.json holds; `metrics` has the values of both models and their paired difference, with intervals."""
    level: str
    """better, worse, none (no difference told), open (no direction is better), undecided or single (one model)."""
    ids: Column
    """Of the prompts."""
    roles: Column
    """model or baseline."""
    draws: Int[np.ndarray, "rows"]
    """Number of the answer to its prompt."""
    answers: Column
    measures: dict[str, Float[np.ndarray, "rows"]]
    """Of each answer: accuracy, chrf, bleu, rouge_l, safety, refusal, as configured; nan where there is none."""

    def __repr__(self) -> str:
        lines = {
            "summary": self.summary,
            "level": self.level,
            "rows": f"{len(self.ids):,} answers; {', '.join(self.measures)}",
        }
        return _describe(self, lines)


@dataclass(frozen=True, eq=False)
class InspectedPart:
    """One part of the data as training sees it; arrays hold one entry for each example that can be read."""

    ids: Column
    sources: Column
    tokens: Int[np.ndarray, "examples"]
    """Before any cut; of a preference pair, those of its longer side."""
    targets: Int[np.ndarray, "examples"]
    """Tokens that have the loss, after the cut to data.max_length; of a pair, those of both sides."""


@dataclass(frozen=True, eq=False, repr=False)
class InspectResult:
    """What `inspect` found; what it printed is on the terminal."""

    summary: str
    """How many things there are to act on."""
    findings: tuple[str, ...]
    """What to act on; empty where there is nothing."""
    parts: dict[str, InspectedPart]
    """training, validation, dev and test, as far as they have examples."""

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(part.ids):,} {name}" for name, part in self.parts.items())
        lines = {f"{number}.": line for number, line in enumerate(self.findings, 1)}
        return _describe(self, {"summary": self.summary, "examples": counts} | lines)


@dataclass(frozen=True, eq=False, repr=False)
class EstimateResult:
    """What `estimate` predicts; the tables that it printed are on the terminal."""

    summary: str
    """Whether the run fits, or what a finished run took."""
    peak_bytes: float
    """Most memory of one device."""
    training_steps: float
    """Work of the whole run, at most."""
    hours: float | None
    """Of the whole run; None where nothing was timed."""
    result: dict[str, Any]
    """All of the estimate, as estimate.json holds it."""

    def __repr__(self) -> str:
        lines = {
            "summary": self.summary,
            "peak": f"{format_bytes(self.peak_bytes)} of one device",
            "work": f"{self.training_steps:,.0f} training steps"
            + (f", {self.hours:.3g} hours" if self.hours is not None else ""),
        }
        return _describe(self, lines)


@dataclass(frozen=True, eq=False, repr=False)
class ExportResult:
    """What `export` wrote. Arrays hold one entry for each example that has a weight, in the order of `ids`."""

    folder: Path
    file: Path
    """The examples in the trainer's format: a file, or a folder for the container datasets."""
    card: Path
    """The dataset card."""
    summary: str
    ids: Column
    sources: Column
    weights: Float[np.ndarray, "examples"]
    repeats: Int[np.ndarray, "examples"]
    """How often the example was written; 0: it was left out."""

    def __repr__(self) -> str:
        return _describe(self, {"summary": self.summary, "examples": _describe_weights(self.weights)})


RunResult = (
    SelectResult
    | TrainResult
    | CompareResult
    | AuditResult
    | TuneResult
    | RankResult
    | RankRecordsResult
    | RefineResult
    | ScoreResult
    | EvaluateResult
)
"""Of the commands that make a run's folder."""
Result = RunResult | InspectResult | EstimateResult | ExportResult


def read_result(folder: str | Path) -> RunResult:
    """The result of a finished run of a command that makes a folder: any but `inspect`, `estimate`, `export`.

    Args:
        folder: the run's folder, output.dir of its config; of a URL a copy is made, which lasts until Python ends.

    Returns:
        What the command returned when it made the run.

    Raises:
        FileNotFoundError: for a folder that holds no run, or one that is not finished.
        ValueError: for a file that is not as the run wrote it, and for a run of another version.

    Example:
        >>> result = bj.commands.read_result("out/quickstart")  # doctest: +SKIP
        >>> result.weights[result.rows(["0c5d1b1a1d4e#0"])]  # doctest: +SKIP
    """
    copies.forget_copies()
    with copies.shown_errors():
        return _read_finished_run(copies.local_path(os.fspath(folder)))


def _read_finished_run(folder: Path) -> RunResult:
    for name in (run_dir.CONFIG_FILE, run_dir.RESULT_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: no {name}. Give the folder of a finished run.")
    seals.check(folder / run_dir.CONFIG_FILE)
    content = read_yaml(folder / run_dir.CONFIG_FILE)[1]
    names = set(content) if isinstance(content, dict) else set()
    for config_class, command in COMMANDS.items():
        if command in _READERS and names == set(field_types(config_class)):
            return read_run(load_config(config_class, folder / run_dir.CONFIG_FILE), folder)
    raise ValueError(f"{folder / run_dir.CONFIG_FILE} has the sections of no command of this version.")


def read_run(config: Any, folder: str | Path) -> RunResult:
    """The result of a run, by its config, from what it has written to its folder."""
    folder = Path(folder)
    result = run_dir.read_json(folder / run_dir.RESULT_FILE)
    command = COMMANDS[type(config)]
    shared = {"folder": folder, "report": folder / "report.html", "config": config, "result": result}
    try:
        return _READERS[command](shared, result, folder)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}: its files are those of another version or command ({type(error).__name__}: {error})."
        ) from error


def _read_select(shared: dict[str, Any], result: dict[str, Any], folder: Path) -> SelectResult:
    table = run_dir.read_parquet(folder / "weights.parquet")
    verdict = {name: result["verdict"][name] for name in Verdict._fields}
    return SelectResult(
        **shared,
        summary=_with_evaluation(result["verdict"]["sentence"], result),
        verdict=Verdict(**verdict),
        recommendation=Recommendation.from_json(result["recommendation"]),
        **_facts(table),
        weights=_numbers(table, "weight"),
        hypergradients=_optional(table, "hypergradient"),
        first_hypergradients=_optional(table, "first_hypergradient"),
        alignment=_numbers(table, "alignment"),
        losses=_numbers(table, "loss"),
        selected=_numbers(table, "selected"),
        model=folder / "model",
        evaluations=_read_evaluations(result, folder),
    )


def _read_train(shared: dict[str, Any], result: dict[str, Any], folder: Path) -> TrainResult:
    table = run_dir.read_parquet(folder / "weights.parquet")
    model = folder / "model" if (folder / "model").is_dir() else folder / "model-adapter"
    return TrainResult(
        **shared,
        summary=_with_evaluation(summarize_training(result), result),
        **_facts(table),
        weights=_numbers(table, "weight"),
        model=model,
        evaluations=_read_evaluations(result, folder),
    )


def _read_compare(shared: dict[str, Any], result: dict[str, Any], folder: Path) -> CompareResult:
    table, prefix = run_dir.read_parquet(folder / "weights.parquet"), "weight "
    methods = [name.removeprefix(prefix) for name in table.column_names if name.startswith(prefix)]
    return CompareResult(
        **shared,
        summary=_with_evaluation(result["sentence"], result),
        seeds=_numbers(table, "seed"),
        **_facts(table),
        alignment=_numbers(table, "alignment"),
        losses=_numbers(table, "loss"),
        weights={name: _numbers(table, f"{prefix}{name}") for name in methods},
        evaluations=_read_evaluations(result, folder),
    )


def _read_audit(shared: dict[str, Any], result: dict[str, Any], folder: Path) -> AuditResult:
    table = run_dir.read_parquet(folder / "scores.parquet")
    names = [name for name in table.column_names if pa.types.is_floating(table.schema.field(name).type)]
    use, certificate = result["verdict"]["use"], result["certificate"]
    return AuditResult(
        **shared,
        summary=result["verdict"]["sentence"],
        use=use and _score_column(use),
        ids=_texts(table, "id"),
        scores={name: _numbers(table, name) for name in names},
        lds={
            _score_column(row["name"]): {
                part: BootstrapInterval(*(float_or_nan(value) for value in readings[0]))
                for part, readings in row["lds"].items()
            }
            for row in result["rows"]
        },
        others_part=result["verdict"]["others_part"],
        others_level=result["verdict"]["others_level"],
        verdict=Verdict(**{name: certificate[name] for name in Verdict._fields}) if certificate else None,
        extremes=_read_extremes(result["extremes"]) if result["extremes"] else None,
    )


def _read_tune(shared: dict[str, Any], result: dict[str, Any], folder: Path) -> TuneResult:
    settings = tuple(
        TriedSetting(
            row["name"], row["setting"], row["losses"], row["draw"], row["verdict"] and Verdict(**row["verdict"])
        )
        for row in result["rows"]
    )
    return TuneResult(
        **shared,
        summary=result["sentence"],
        settings=settings,
        proposed=next((one for one in settings if one.name == result["proposed"]), None),
        tuned=folder / "tuned.yaml" if result["proposed"] else None,
    )


def _score_column(name: str) -> str:
    """The column of a score: `loss, start` of the tables is loss_start."""
    return name.replace(", ", "_")


def _read_extremes(found: dict[str, Any]) -> ExtremeRemovals:
    best, worst = (
        {
            _score_column(row["name"]): {part: np.array(values, float) for part, values in row[end].items()}
            for row in found["rows"]
        }
        for end in ("best", "worst")
    )
    random = {part: np.array(values, float) for part, values in found["random"].items()}
    return ExtremeRemovals(np.array(found["shares"], float), best, worst, random)


def _read_rank(shared: dict[str, Any], result: dict[str, Any], folder: Path) -> RankResult | RankRecordsResult:
    if shared["config"].rank.records:
        table = run_dir.read_parquet(folder / "records.parquet")
        return RankRecordsResult(
            **shared,
            summary=result["sentence"],
            models=_texts(table, "model"),
            tasks=_texts(table, "task"),
            metrics=_texts(table, "metric"),
            picks=_texts(table, "pick"),
            accuracies=_numbers(table, "accuracy"),
            best_accuracies=_numbers(table, "best_accuracy"),
            rank_correlations=_numbers(table, "rank_correlation"),
        )
    table = run_dir.read_parquet(folder / "rank.parquet")
    names = [name for name in table.column_names if pa.types.is_floating(table.schema.field(name).type)]
    return RankResult(
        **shared,
        summary=result["verdict"]["sentence"],
        pick=result["verdict"]["use"],
        ids=_texts(table, "id"),
        strategies=_texts(table, "strategy"),
        blocks=_numbers(table, "block"),
        measures={name: _numbers(table, name) for name in names},
    )


def _read_refine(shared: dict[str, Any], result: dict[str, Any], folder: Path) -> RefineResult:
    table = run_dir.read_parquet(folder / "weights.parquet")
    return RefineResult(
        **shared,
        summary=_with_evaluation(result["sentence"], result),
        accepted=result["accepted"],
        rounds=_numbers(table, "round"),
        **_facts(table),
        questions=_texts(table, "question"),
        generated=_numbers(table, "generated"),
        multiplicity=_numbers(table, "base"),
        weights=_numbers(table, "weight"),
        rewards=_optional_numbers(table, "reward"),
        scores=_optional_numbers(table, "score"),
        model=folder / "model",
        generator=folder / "generator" if result.get("generator") else None,  # runs of earlier versions have none
        evaluations=_read_evaluations(result, folder),
    )


def _read_score(shared: dict[str, Any], result: dict[str, Any], folder: Path) -> ScoreResult:
    table = run_dir.read_parquet(folder / "scores.parquet")
    return ScoreResult(
        **shared,
        summary=result["sentence"],
        drifted=tuple(column["name"] for column in result["drift"] if column["sentence"]),
        **_facts(table),
        logits=_numbers(table, "logit"),
        weights=_numbers(table, "weight"),
        selected=_numbers(table, "selected"),
    )


def _read_evaluate(shared: dict[str, Any], result: dict[str, Any], folder: Path) -> EvaluateResult:
    table = run_dir.read_parquet(folder / ANSWERS_FILE)
    return EvaluateResult(**shared, summary=result["sentence"], level=result["level"], **_read_answers(table))


def _read_answers(table: pa.Table) -> dict[str, Any]:
    names = [name for name in table.column_names if pa.types.is_floating(table.schema.field(name).type)]
    return {
        "ids": _texts(table, "id"),
        "roles": _texts(table, "role"),
        "draws": _numbers(table, "draw"),
        "answers": _texts(table, "answer"),
        "measures": {name: _numbers(table, name) for name in names},
    }


def _read_evaluations(result: Mapping[str, Any], folder: Path) -> dict[str, AnswerComparison]:
    if not result.get("evaluate"):  # `compare` of earlier versions had none
        return {}
    found = {}
    for key, one in result["evaluate"]["comparisons"].items():
        table = run_dir.read_parquet(folder / RUN_FOLDER / key / ANSWERS_FILE)
        found[key] = AnswerComparison(
            one["sentence"],
            one["level"],
            one,
            **_read_answers(table),
            fingerprints=_texts(table, "fingerprint"),
            seeds=_numbers(table, "seed") if "seed" in table.column_names else None,
        )
    return found


def _with_evaluation(summary: str, result: Mapping[str, Any]) -> str:
    """With a line on the answers of the run's models, where prompts were asked."""
    return f"{summary}\nAnswers: {result['evaluate']['sentence']}" if result.get("evaluate") else summary


_READERS: Mapping[str, Any] = {
    "select": _read_select, "train": _read_train, "compare": _read_compare,
    "audit": _read_audit, "rank": _read_rank, "refine": _read_refine, "score": _read_score,
    "evaluate": _read_evaluate, "tune": _read_tune,
}  # fmt: skip
"""The commands that make a run's folder, and what reads it."""


def summarize_training(result: Mapping[str, Any]) -> str:
    """One sentence on a result of `train`: what the validation loss did."""
    parts = result["parts"]
    steps_text = f"{result['steps']:,} steps on {result['rows']['train']:,} rows"
    part = next((name for name in ("test", "dev", "validation") if name in parts), None)
    if part is None:
        return f"{steps_text}; no validation examples were given, so nothing says whether the model became better."
    before, after = parts[part]["before"]["loss"], parts[part]["after"]["loss"]
    direction = "fell" if after < before else "ROSE"
    return f"{steps_text}; {part} loss {direction} from {before:.4f} to {after:.4f} {result['unit']}."


# ---- columns and words


def _facts(table: pa.Table) -> dict[str, Any]:
    return {
        "ids": _texts(table, "id"),
        "sources": _texts(table, "source"),
        "labels": np.array(table["label"].to_pylist(), object),
    }


def _texts(table: pa.Table, name: str) -> Column:
    return np.array(table[name].to_pylist(), str)


def _numbers(table: pa.Table, name: str) -> Any:
    return np.array(table[name].to_numpy())  # a copy, which may be written to and does not hold the table


def _optional_numbers(table: pa.Table, name: str) -> Any:
    """Numbers of a column; NaN where it, or one of its values, is not there."""
    return _numbers(table, name) if name in table.column_names else np.full(table.num_rows, np.nan)


def _optional(table: pa.Table, name: str) -> Any:
    return _numbers(table, name) if name in table.column_names else None


def _find_rows(ids: Column, wanted: Iterable[str]) -> Int[np.ndarray, "wanted"]:
    wanted = [wanted] if isinstance(wanted, str) else list(wanted)
    places = {example_id: place for place, example_id in enumerate(ids.tolist())}
    if missing := [example_id for example_id in wanted if example_id not in places]:
        more = f", and {len(missing) - 3:,} more" if len(missing) > 3 else ""
        raise ValueError(
            f"no example has the id {', '.join(map(repr, missing[:3]))}{more}; there are {len(ids):,} ids."
        )
    return np.array([places[example_id] for example_id in wanted], int)


def _describe_weights(weights: np.ndarray) -> str:
    if not len(weights):
        return "0"
    effective = weights.sum() ** 2 / max((weights**2).sum(), np.finfo(float).tiny)
    return f"{len(weights):,}, weights {weights.min():.3g} to {weights.max():.3g}, effective size {effective:,.0f}"


def _describe(result: Any, lines: Mapping[str, str]) -> str:
    """The class with its folder, some lines, the names of its arrays, and where the report is."""
    fields = vars(result)
    columns = [name for name, value in fields.items() if isinstance(value, np.ndarray)]
    lines = {**lines, **({"arrays": ", ".join(columns)} if columns else {})}
    if "report" in fields:
        lines["report"] = str(fields["report"])
    width = max(map(len, lines))
    shown = [f"  {name:<{width}}  {text}".replace("\n", f"\n  {'':<{width}}  ") for name, text in lines.items()]
    return "\n".join([f"{type(result).__name__}({fields.get('folder', '')})", *shown])
