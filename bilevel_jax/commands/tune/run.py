"""The `tune` command, which looks for a setting of training at which hypergradients can be believed."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa

from bilevel_jax.commands.tune import report
from bilevel_jax.commands.tune.search import BELIEVE, Outcome, Trained, Trial, search
from bilevel_jax.commands.tune.settings import (
    Setting,
    apply_setting,
    count_batch_factor,
    format_flags,
    list_changes,
    name_setting,
)
from bilevel_jax.core import certify
from bilevel_jax.core.certify import Certificates, Metasmoothness, Verdict
from bilevel_jax.core.types import Checks, Frozen, Params
from bilevel_jax.core.unrolled import validation_loss_fn
from bilevel_jax.runs.budget.work import count_tune_costs
from bilevel_jax.runs.config.load import AuditConfig, SelectConfig, TuneConfig, config_hash, config_to_yaml
from bilevel_jax.runs.config.rules import choose_command_after_tune
from bilevel_jax.runs.config.schema import AuditSection
from bilevel_jax.runs.engine.certificates import (
    GradientPoint,
    certificates_to_json,
    compute_certificates,
    compute_finite_differences,
    draw_smoothness,
)
from bilevel_jax.runs.engine.folds import Turn, take_turn, turn_training_stream, turn_validation_stream
from bilevel_jax.runs.engine.outer_loop import data_order_seed, train_and_estimate
from bilevel_jax.runs.engine.reliability import fields_to_json, measure_estimate_reliability, reliability_from_json
from bilevel_jax.runs.engine.trainer import Trainer, check_hypergradient_finite
from bilevel_jax.runs.infra import distributed, inputs, run_dir, seals
from bilevel_jax.runs.infra.checkpoint import keep_last_checkpoints
from bilevel_jax.runs.infra.distributed import fetch_to_host
from bilevel_jax.runs.infra.placement import replicate
from bilevel_jax.runs.infra.session import Session, open_run_dir, start_session
from bilevel_jax.runs.tasks.arrays import ArrayDataset, ArrayTask
from bilevel_jax.runs.tasks.evaluation import (
    count_examples,
    evaluate_per_example,
    held_out_indices,
    held_out_losses,
    judges_by_examples,
)
from bilevel_jax.runs.tasks.optimizers import build_adjustable_optimizer
from bilevel_jax.runs.tasks.prepare import build_task, load_data
from bilevel_jax.runs.tasks.protocol import Task
from bilevel_jax.runs.tasks.splits import DataSplits
from bilevel_jax.runs.tasks.text import TextTask

TUNED_FILE = "tuned.yaml"
GRADIENTS_FOLDER = "gradients"
LOSS_DIGITS = 6
"""Decimals of the losses of single examples that are kept, in the unit of the loss."""
NUM_BOOTSTRAPS = 2000


def tune(config: TuneConfig) -> dict[str, Any]:
    """Run the command in `config.output.dir` and return what result.json holds.

    Raises as `select` does, but for a training that diverges: that setting does not hold.
    """
    if distributed.is_multiprocess():
        raise ValueError("tune runs in one process: start it on one host, without section distributed.")
    with open_run_dir(config) as folder:
        resolved, dataset = load_data(config, folder)
        if isinstance(dataset, DataSplits) and len(dataset.train) < 2:
            raise ValueError(f"{len(dataset.train)} training example; weights compare rows, so give at least 2.")
        settings = Settings(resolved, dataset, folder)
        task = settings.build({})
        with start_session(config, folder) as session:
            for note in task.notes:
                session.print_line(note)
            return _run_search(config, settings, task, session)


class Settings:
    """The config with other settings, and the task of each.

    One model is in memory at a time, and one program is compiled for all settings that differ in the optimizer alone.
    """

    def __init__(self, config: TuneConfig, dataset: ArrayDataset | DataSplits, folder: Path):
        self.config, self._dataset, self._folder = config, dataset, folder
        self._built: tuple[Setting, ArrayTask | TextTask] | None = None
        self._trainer: Trainer | None = None

    def apply(self, setting: Setting) -> TuneConfig:
        """The config with a setting."""
        return apply_setting(self.config, setting)

    def build(self, setting: Setting) -> ArrayTask | TextTask:
        """The task of a setting."""
        config = self.apply(setting)
        optimizer = build_adjustable_optimizer(config.optimizer, config.train.max_steps)
        compiled_for = {key: value for key, value in setting.items() if not key.startswith("optimizer.")}
        if self._built is None or self._built[0] != compiled_for:
            self._built = self._trainer = None  # before the next is built
            steps = range(config.outer.steps + 1)  # as select has them, for the same batches
            seeds = [data_order_seed(config.data, config.outer, step) for step in steps]
            self._built = compiled_for, build_task(config, self._dataset, self._folder, seeds, optimizer)
        return self._built[1]._replace(optimizer=optimizer)

    def make_trainer(self, setting: Setting, session: Session) -> Trainer:
        """The trainer of a setting."""
        task = self.build(setting)
        if self._trainer is None:
            self._trainer = Trainer(task, self.config.outer, session)
        self._trainer.task = task
        return self._trainer


class Gradient(NamedTuple):
    """The hypergradient of a setting at uniform weights, and what is known of it without training again."""

    point: GradientPoint
    reliability: certify.Reliability | None


class SettingJudge:
    """Trains and certifies settings; each piece is a finished job of the session."""

    def __init__(self, settings: Settings, session: Session, part: str):
        self.settings, self.session, self.part = settings, session, part
        self.certificates: dict[str, dict[str, Any]] = {}
        """By the name of the setting, as result.json holds them."""
        self.example_losses: dict[str, list[float] | None] = {}
        """Of the examples of `part`, by the name of the setting; None where they have no loss each."""
        self._gradient: tuple[str, Gradient] | None = None
        self._numbers: dict[str, int] = {}
        """Of the settings that were differentiated, by name: of their files and their checkpoints."""

    def cost_factor(self, setting: Setting) -> float:
        """What a setting costs, relative to the config's own."""
        return count_batch_factor(self.settings.config, setting)

    def train(self, setting: Setting) -> Trained:
        """Train once with uniform weights."""
        name = name_setting(setting)
        self.session.set_phase(f"training: {name}")
        found = self.session.run_once(f"train/{name}", lambda: self._log("trained", setting, self._train(setting)))
        loss = math.inf if found["failure"] else found["losses"][self.part]
        trained = Trained(found["losses"], loss, found["failure"])
        self.example_losses[name] = found["examples"]
        self.session.print_line(f"{name:<44}{self._describe(trained)}")
        return trained

    def draw(self, setting: Setting) -> tuple[float | None, str]:
        """The hypergradient at uniform weights, and one draw of metasmoothness."""
        name, config = name_setting(setting), self.settings.config
        self.session.set_phase(f"hypergradient: {name}")
        self._numbers.setdefault(name, len(self._numbers))  # in this order after a stop, too
        found = self.session.run_once(f"draw/{name}", lambda: self._draw(setting))
        share = max(config.certify.removed)
        cosine = "none" if found["cosine"] is None else f"{found['cosine']:.2f}"
        words = found["failure"] or f"metasmoothness {cosine} by one draw without {share:.0%} of the examples"
        self.session.print_line(f"{name:<44}{words}")
        return found["cosine"], found["failure"]

    def certify(self, setting: Setting) -> Verdict:
        """All certificates, as `select` computes them at uniform weights."""
        name = name_setting(setting)
        self.session.set_phase(f"certifying: {name}")
        found = self.session.run_once(
            f"certified/{name}", lambda: self._log("certified", setting, self._certify(setting))
        )
        verdict = Verdict(**found["verdict"])
        self.certificates[name] = found["certificates"]
        self.session.print_line(f"{name:<44}{verdict.level} {verdict.scope}")
        return verdict

    def compare(self, setting: Setting) -> Verdict | None:
        """The verdict by finite differences and one draw, where no more draws could make it BELIEVE."""
        name = name_setting(setting)
        self.session.set_phase(f"finite differences: {name}")
        found = self.session.run_once(f"compared/{name}", lambda: self._compare(setting))
        if found is None:
            return None
        verdict = Verdict(**found["verdict"])
        self.certificates[name] = found["certificates"]
        self.session.print_line(f"{name:<44}{verdict.level} by finite differences")
        return verdict

    def _log(self, event: str, setting: Setting, found: dict[str, Any]) -> dict[str, Any]:
        """Write what was found to the log, and return it."""
        facts = {"setting": name_setting(setting), "loss": found.get("losses"), "verdict": found.get("verdict")}
        known = {key: value for key, value in facts.items() if value is not None}
        self.session.log.write({"event": event, "step": len(self.example_losses), **known})
        return found

    def _describe(self, trained: Trained) -> str:
        if trained.failure:
            return trained.failure
        return "  ".join(f"{part} {loss:.4f}" for part, loss in trained.losses.items() if loss is not None)

    def _train(self, setting: Setting) -> dict[str, Any]:
        config, trainer = self.settings.apply(setting), self.settings.make_trainer(setting, self.session)
        task, turn = trainer.task, self._turn(trainer.task)
        start = trainer.init_state(task.init_params(config.train.seed))
        try:
            end = trainer.run(self._weights(task), start, turn_training_stream(task, config.data.seed, turn)).end
        except FloatingPointError as error:
            return {"losses": {}, "examples": None, "failure": str(error)}
        frozen = task.frozen(start.params)
        losses = self._losses(task, end.params, frozen)
        if not math.isfinite(losses[self.part] or 0.0):
            return {"losses": {}, "examples": None, "failure": f"{self.part} loss is {losses[self.part]}"}
        examples = None
        if len(task.outer_objective.targets) == 1 and turn is None:
            held_out, count = task.held_out_streams[self.part], len(task.held_out_examples[self.part])
            values = evaluate_per_example(task.outer_objective.losses, end.params, frozen, held_out, count)
            examples = [round(float(value), LOSS_DIGITS) for value in values[held_out_indices(held_out)]]
        return {"losses": losses, "examples": examples, "failure": ""}

    def _turn(self, task: Task) -> Turn | None:
        """Who trains and who judges, as in the first step of `select`."""
        return take_turn(task, self.settings.config.outer.validation_folds, self.settings.config.data.seed, 0)

    def _weights(self, task: Task) -> jax.Array:
        """Uniform ones."""
        has_folds = self.settings.config.outer.validation_folds > 0
        return replicate(task.mesh, jnp.ones(task.corpus.num_examples if has_folds else task.num_examples))

    def _losses(self, task: Task, params: Params, frozen: Frozen) -> dict[str, float | None]:
        validation = turn_validation_stream(task, self._turn(task))
        return held_out_losses(task, validation_loss_fn(task.problem), params, frozen, validation=validation)

    def _draw(self, setting: Setting) -> dict[str, Any]:
        share = max(self.settings.config.certify.removed)
        try:
            trainer, gradient = self._differentiate(setting)
            cosine = draw_smoothness(trainer.task, trainer, self.session, gradient.point, share)
        except (FloatingPointError, ValueError) as error:
            if not isinstance(error, FloatingPointError) and (setting or isinstance(error, seals.DamagedFileError)):
                raise  # only at the config's own setting a ValueError says that the optimizer has no derivative
            return {"cosine": None, "failure": str(error)}
        return {"cosine": cosine, "failure": ""}

    def _compare(self, setting: Setting) -> dict[str, Any] | None:
        trainer, gradient = self._differentiate(setting)
        settings, point, task = self.settings.config.certify, gradient.point, trainer.task
        share = max(settings.removed)
        cosine = draw_smoothness(task, trainer, self.session, point, share)
        certificates = Certificates(
            compute_finite_differences(task, trainer, self.session, settings, point),
            Metasmoothness((share,), (float("nan") if cosine is None else cosine,)),
            None,
            point.checks,
            effective_share=certify.effective_share(point.weights),
            reliability=gradient.reliability,
            is_sampled=judges_by_examples(task),
        )
        smooth = Metasmoothness(tuple(settings.removed), (1.0,) * len(settings.removed))
        if certify.judge_certificates(certificates._replace(metasmoothness=smooth)).level == BELIEVE:
            return None
        verdict = certify.judge_certificates(certificates)
        found = {"verdict": verdict._asdict(), "certificates": certificates_to_json(certificates)}
        return self._log("certified", setting, found)

    def _certify(self, setting: Setting) -> dict[str, Any]:
        try:
            trainer, gradient = self._differentiate(setting)
            certificates = compute_certificates(
                trainer.task, trainer, self.session, self.settings.config.certify, gradient.point
            )._replace(reliability=gradient.reliability)
        except FloatingPointError as error:  # of a training without some of the examples
            verdict = Verdict("DO NOT BELIEVE", "", f"a training that the certificates repeat fails: {error}", "")
            return {"verdict": verdict._asdict(), "certificates": None}
        verdict = certify.judge_certificates(certificates)
        return {"verdict": verdict._asdict(), "certificates": certificates_to_json(certificates)}

    def _differentiate(self, setting: Setting) -> tuple[Trainer, Gradient]:
        """The first step of `select`: a training at uniform weights and its hypergradient, which a file keeps."""
        name, trainer = name_setting(setting), self.settings.make_trainer(setting, self.session)
        if self._gradient is None or self._gradient[0] != name:
            number = self._numbers[name]
            path = self.session.folder / "checkpoints" / GRADIENTS_FOLDER / f"{number}.parquet"
            facts = self.session.run_once(
                f"gradient/{name}", lambda: self._estimate(setting, trainer, number, path), is_kept=path.is_file()
            )
            point = GradientPoint(
                name,
                fetch_to_host(self._weights(trainer.task)),
                run_dir.read_parquet(path)["hypergradient"].to_numpy(),
                facts["validation_loss"],
                Checks(**{key: value for key, value in facts["checks"].items() if value is not None}),
                start_seed=self.settings.config.train.seed,
                order_seed=self.settings.config.data.seed,
                data_seed=self.settings.config.data.seed,
                turn=self._turn(trainer.task),
            )
            reliability = facts["reliability"] and reliability_from_json(facts["reliability"])
            self._gradient = name, Gradient(point, reliability)
        return trainer, self._gradient[1]

    def _estimate(self, setting: Setting, trainer: Trainer, number: int, path: Path) -> dict[str, Any]:
        config, task, turn = self.settings.config, trainer.task, self._turn(trainer.task)
        weights, seed = self._weights(task), config.data.seed if config.outer.reliability_every else None
        reads_dev = trainer.has_halves("dev")
        trajectory, estimate = train_and_estimate(
            trainer,
            weights,
            trainer.init_state(task.init_params(config.train.seed)),
            turn_training_stream(task, config.data.seed, turn),
            number,
            is_first=not setting,
            halves_seed=None if reads_dev and len(task.outer_objective.targets) == 1 else seed,
            dev_seed=seed if reads_dev else None,
            turn=turn,
            with_product_error=True,
        )
        check_hypergradient_finite(estimate, name_setting(setting))
        reliability = measure_estimate_reliability(
            task, trainer, weights, estimate, turn, trained=task.trainable_indices(), is_learned=False
        )
        losses = self._losses(task, trajectory.end.params, task.frozen(trajectory.start.params))
        path.parent.mkdir(exist_ok=True)
        run_dir.write_parquet(path, pa.table({"hypergradient": fetch_to_host(estimate.grad)}))
        return {
            "validation_loss": losses["validation"],
            "checks": fields_to_json(estimate.checks),
            "reliability": reliability and fields_to_json(reliability),
        }


def _run_search(config: TuneConfig, settings: Settings, task: Task, session: Session) -> dict[str, Any]:
    part = "dev" if "dev" in task.held_out_streams else "validation"
    changes = list_changes(settings.config, len(task.trainable_indices()))
    costs, steps, unit, counts = (
        count_tune_costs(task, config.outer, config.certify),
        task.num_steps,
        task.outer_objective.unit,
        count_examples(task),
    )
    notes, train_examples = task.notes, task.num_examples
    session.set_phase("starting", total=steps * max(config.tune.budget, sum(costs)))
    judge = SettingJudge(settings, session, part)
    outcome = search(settings.config, changes, judge, costs)
    session.set_phase("writing")
    result: dict[str, Any] = {
        "part": part,
        "unit": unit,
        "counts": {"train": train_examples, **counts},
        "steps": steps,
        "own": {key: read_key(config, key) for key in changes},
        "rows": [_describe_trial(trial, judge) for trial in outcome.trials],
        "proposed": outcome.proposed and outcome.proposed.name,
        "beyond": outcome.beyond and outcome.beyond.name,
        "limit": outcome.limit,
        "max_loss_increase": config.tune.max_loss_increase,
        "flags": format_flags(outcome.proposed.setting) if outcome.proposed else None,
        "trainings": outcome.spent,
        "budget": config.tune.budget,
        "stopped_by_budget": outcome.stopped_by_budget,
        "optimism": estimate_optimism(outcome, judge.example_losses, config.data.seed),
        "tuned": name_tuned_file(config) if outcome.proposed else None,
        "tuned_for": choose_command_after_tune(config),
        "notes": notes,
        "seconds": sum(session.job_cost(f"{job}/")[1] for job in ("train", "draw", "compared", "certified")),
        "config_hash": config_hash(config),
    }
    result["sentence"] = report.summarize_tuning(result)
    if outcome.proposed is not None:
        text = format_tuned(inputs.name_by_urls(config), outcome.proposed.setting, result)
        run_dir.write_atomic(session.folder / TUNED_FILE, text)
    run_dir.remove_folder(session.folder / "checkpoints" / GRADIENTS_FOLDER)
    keep_last_checkpoints(session.folder)
    run_dir.write_result(session.folder, result)
    report.write_tune_report(session.folder)
    return result


def estimate_optimism(outcome: Outcome, example_losses: Mapping[str, list[float] | None], seed: int) -> float | None:
    """By how much the loss of the proposed setting is too low because it is the least of several on the same examples.

        mean over bootstraps b of the examples: L(k_b) - L_b(k_b) - (L(k) - L_b(k)),  k_b = argmin_j L_b(j)

    where k is the proposed setting, over the settings that were within the limit and not found too rough, as if all of
    them held. Those that were found too rough are left out: one of them may have the least loss, and was no choice.
    None where nothing was proposed, or examples have no loss each.
    """
    within = [trial for trial in outcome.trials if trial.trained.loss <= outcome.limit and not trial.is_rough]
    if outcome.proposed is None or any(example_losses[trial.name] is None for trial in within):
        return None
    losses = np.array([example_losses[trial.name] for trial in within])
    drawn = np.random.default_rng((seed, 5)).integers(losses.shape[1], size=(NUM_BOOTSTRAPS, losses.shape[1]))
    resampled = np.stack([row[drawn].mean(1) for row in losses])
    errors = losses.mean(1, keepdims=True) - resampled
    chosen = next(place for place, trial in enumerate(within) if trial is outcome.proposed)
    errors -= errors[chosen]  # whose mean is 0: less noise, and none where there is no choice
    return float(errors[resampled.argmin(0), np.arange(NUM_BOOTSTRAPS)].mean())


def format_tuned(config: TuneConfig, setting: Setting, result: dict[str, Any]) -> str:
    """The config of the command that goes on with the proposed setting, as YAML with a comment."""
    command = choose_command_after_tune(config)
    config_class = AuditConfig if command == "audit" else SelectConfig
    tuned = apply_setting(config, setting)
    output = dataclasses.replace(tuned.output, dir=f"{tuned.output.dir.rstrip('/')}-tuned", resume=False)
    names = {field.name for field in dataclasses.fields(config_class)}
    sections = {name: section for name, section in vars(tuned).items() if name in names} | {"output": output}
    if command == "audit" and not config.outer.proximal and config.audit.estimators == AuditSection().estimators:
        sections["audit"] = dataclasses.replace(config.audit, estimators=("unrolled", "alignment"))  # not implicit
    text = config_to_yaml(config_class(**sections))
    return f"# bilevel-jax {command} {config.output.dir.rstrip('/')}/{TUNED_FILE}\n# {result['sentence']}\n{text}"


def name_tuned_file(config: TuneConfig) -> str:
    """tuned.yaml in output.dir; of an absolute one its name alone, as result.json may leave this machine."""
    folder = config.output.dir.rstrip("/")
    return f"{Path(folder).name if Path(folder).is_absolute() else folder}/{TUNED_FILE}"


def read_key(config: TuneConfig, key: str) -> Any:
    """The value of `section.key`."""
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _describe_trial(trial: Trial, judge: SettingJudge) -> dict[str, Any]:
    """What result.json holds of a setting."""
    return {
        "name": trial.name,
        "setting": dict(trial.setting),
        "losses": dict(trial.trained.losses),
        "failure": trial.trained.failure or trial.failure,
        "draw": trial.smoothness,
        "share": max(judge.settings.config.certify.removed),
        "verdict": trial.verdict and trial.verdict._asdict(),
        "certificates": judge.certificates.get(trial.name),
        "cost_factor": judge.cost_factor(trial.setting),
    }
