"""Work of a run, counted in training steps before it begins."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from bilevel_jax.lm.data import batches
from bilevel_jax.runs.config.load import (
    AuditConfig,
    CompareConfig,
    OuterLoopConfig,
    RunConfig,
    SelectConfig,
    TrainConfig,
    TuneConfig,
)
from bilevel_jax.runs.config.schema import (
    EXACT_ESTIMATOR,
    SINGLE_LOOP_METHODS,
    AuditSection,
    CertifySection,
    FineTuneSection,
    OuterSection,
    RefineMethod,
    SingleLoopSection,
)
from bilevel_jax.runs.engine.arms import SHARE_ON_DEV, count_trainings, why_absent, with_source_baselines
from bilevel_jax.runs.engine.raters import rater_work
from bilevel_jax.runs.engine.reliability import RoundSizes, choose_round_evidence, measures_reliability
from bilevel_jax.runs.engine.single_loop import FORWARD_WORK, count_single_loop_work
from bilevel_jax.runs.engine.trainer import EXTRA_LOSS_WORK, HVP_WORK, REPLAY_WORK, measures_product_error
from bilevel_jax.runs.scoring.pooling import count_validation_models_work, pooling_work, pools_steps
from bilevel_jax.runs.tasks.evaluation import KnownLabels, has_target_readings, num_judges, read_labels
from bilevel_jax.runs.tasks.protocol import Task
from bilevel_jax.runs.tasks.targets import find_place
from bilevel_jax.runs.tasks.text import TextTask


class WorkStage(NamedTuple):
    """A part of a run: how often it makes each kind of step."""

    name: str
    forward_steps: float = 0.0
    """Training steps, replayed ones too."""
    backward_steps: float = 0.0
    """Steps back through a training step."""
    other_work: float = 0.0
    """All else, in training steps: products of a solve, hypergradients of all examples, single-loop steps."""

    @property
    def work(self) -> float:
        """In training steps, as a run counts them."""
        return self.forward_steps + HVP_WORK * self.backward_steps + self.other_work

    def repeat(self, count: float, name: str) -> "WorkStage":
        """The same, so many times."""
        return WorkStage(name, count * self.forward_steps, count * self.backward_steps, count * self.other_work)


def select_run_stages(task: Task, config: SelectConfig) -> list[WorkStage]:
    """The stages of a `select` run that goes through to its end.

    It is the most that a run does: a loop may end early (outer.patience, outer.ess_floor), a solve before
    outer.max_iterations, and the certificates at the learned weights are left out where no step was better than the
    first; so are smaller shares of certify.removed where the largest is smooth. It does more where `implicit` doubles
    outer.curvature_batches, and where the ratios of the certificates are off 1 at the smallest step asked for: two
    trainings for each smaller one. Not counted, as a run does not count them: readings of losses, and scores made to
    start from or to compare with.
    """
    outer, steps = config.outer, task.num_steps
    epoch_steps = _count_epoch_steps(task, outer)
    training, estimate = WorkStage("", forward_steps=steps), _hypergradient_stage(outer, steps, epoch_steps)
    baselines = WorkStage("", other_work=count_baseline_work(task))
    contradictions_stages: list[WorkStage] = []
    if config.contradictions.draws:
        training_runs = training.repeat(1 + config.contradictions.folds, "")
        draw = _add_stages("", training_runs, estimate, _estimate_of_each(outer, estimate, config.contradictions.folds))
        contradictions_stages.append(draw.repeat(config.contradictions.draws, "contradictions within validation"))
    if outer.method in SINGLE_LOOP_METHODS:
        single_loop_stage = WorkStage(
            "", other_work=count_single_loop_work(config.single_loop, outer, steps, len(task.outer_objective.targets))
        )
        stages = [_add_stages("learning", training, baselines, single_loop_stage)]
    else:
        loop = _add_stages("", training, estimate).repeat(outer.steps + 1, "")
        num_measured = sum(measures_reliability(outer, step, outer.steps) for step in range(outer.steps + 1))
        measured = _reliability_stage(task, outer, steps, epoch_steps).repeat(num_measured, "")
        pooling = WorkStage("", other_work=pooling_work(task, outer))
        highest = _product_error_stage(outer, estimate)
        stages = [_add_stages("learning", loop, measured, highest, baselines, pooling)]
        if outer.weighting == "rater":
            stages.insert(0, WorkStage("features", other_work=rater_work(task, outer, config.rater, config.scores)))
            if config.rater.folds:
                one_step = _add_stages("", training, estimate)
                stages.append(one_step.repeat(config.rater.folds * outer.steps, "intervals of the rater"))
    if config.certify.enabled and outer.method not in SINGLE_LOOP_METHODS:
        retrains, estimates = count_certificate_retrains(config.certify), count_certificate_estimates(config.certify)
        certificate_count = 2 if outer.restart == "cold" else 1
        parts = training.repeat(retrains + estimates, ""), estimate.repeat(estimates, "")
        certificates = _add_stages("", *parts).repeat(certificate_count, "certificates")
        if certificate_count > 1 and measures_product_error(outer):  # at uniform weights the first step has measured it
            certificates = _add_stages(
                "certificates", certificates, training, estimate, _product_error_stage(outer, estimate)
            )
        stages.append(certificates)
    if config.retrain.enabled:
        labels = read_labels(task, config.data)
        trainings = count_trainings(config.retrain.variants, task, labels, config.retrain.seeds)
        stages.append(training.repeat(trainings, "comparison"))
    if config.evaluate.prompts:
        stages.append(training.repeat(1, "the model of uniform weights that answers prompts"))
    return [*contradictions_stages, *stages, training.repeat(1, "the model that is written")]


def evaluation_work(task: TextTask, config: RunConfig, target_costs: Sequence[float] = (1.0,)) -> float:
    """What evaluating the validation loss adds to the stages, in training steps: a forward pass is a third of one.

    Each estimate takes the gradient of L_v too, and each retrain of a certificate reads validation alone.
    `target_costs` are those of the gradient of a batch of each target, in training steps. DPO's reference model reads
    all pairs once.
    """
    part_work = {
        part: sum(target_costs[find_place(stream.batch(step))] for step in range(stream.steps))
        for part, stream in task.held_out_streams.items()
    }
    all_parts_work, validation_work = sum(part_work.values()) * FORWARD_WORK, part_work.get("validation", 0.0)
    reference_work = _count_reference_work(task, target_costs)
    if isinstance(config, TrainConfig):
        return reference_work + all_parts_work * (task.num_steps // config.train.eval_steps + 2)
    if isinstance(config, TuneConfig):  # each training is read; those of certificates on validation alone
        trainings = 2 + sum(rate != 1 for rate in config.tune.learning_rates)
        retrains, estimates = count_certificate_retrains(config.certify), count_certificate_estimates(config.certify)
        return reference_work + trainings * all_parts_work + (retrains * FORWARD_WORK + estimates + 1) * validation_work
    total = reference_work + (config.outer.steps + 1) * (all_parts_work + validation_work)
    if not isinstance(config, CompareConfig) and config.certify.enabled:
        certificate_count = 2 if config.outer.restart == "cold" else 1
        total += (
            certificate_count
            * (count_certificate_retrains(config.certify) * FORWARD_WORK + count_certificate_estimates(config.certify))
            * validation_work
        )
    if isinstance(config, SelectConfig):
        total += config.rater.folds * config.outer.steps * validation_work
    if isinstance(config, SelectConfig) and config.retrain.enabled:
        labels = read_labels(task, config.data)
        trainings = count_trainings(config.retrain.variants, task, labels, config.retrain.seeds)
        dev_work = part_work.get("dev", 0.0) * FORWARD_WORK  # once more for the losses of single examples
        total += trainings * (all_parts_work + dev_work)
        if has_target_readings(task):  # each target's loss and accuracy, too
            beside = sum(stream.steps for stream in task.reported.streams.values()) if task.reported else 0
            total += trainings * 2 * (all_parts_work + FORWARD_WORK * beside)
    return total


def _count_reference_work(task: TextTask, target_costs: Sequence[float]) -> float:
    """Reading DPO's pairs by the reference model, in training steps."""
    return sum(
        FORWARD_WORK
        * (1.0 if place is None else target_costs[place])
        * batches.steps_per_epoch(num_pairs, task.batch_size)
        for corpus, place in task.reference_corpora()
        if (num_pairs := len(corpus.kept_indices))
    )


def count_train_steps(train: FineTuneSection, num_examples: int) -> int:
    """Optimiser steps of a `train` run: train.max_steps, or those of train.num_epochs over so many examples."""
    if train.max_steps:
        return train.max_steps
    return math.ceil(train.num_epochs * batches.steps_per_epoch(num_examples, train.global_batch_size))


NUM_RANDOM_REMOVALS = 16
"""Random removals of each share of audit.extremes: they give the range of what chance does to about a fifth."""


def count_audit_work(
    task: Task, audit: AuditSection, certify: CertifySection, num_queries: int, names: Sequence[str]
) -> float:
    """The whole `audit` run in training steps, for the ETA; solves and scores are counted when they are done.

    `names` are those of the cheap scores.
    """
    num_losses = 1 + (num_judges(task) > 1) + num_queries  # L_v, the halves of validation, the queries
    backward = 2 * REPLAY_WORK + num_losses * HVP_WORK if EXACT_ESTIMATOR in audit.estimators else 0
    estimates = count_certificate_estimates(certify) * (1 + REPLAY_WORK + HVP_WORK)
    certified = count_certificate_retrains(certify) + estimates if certify.enabled else 0
    retrains = len(audit.removed) * _round_up(audit.subsets, audit_vmap_size(audit))
    tokens = 1 + REPLAY_WORK + HVP_WORK if differentiates_tokens(task, audit) else 0
    return task.num_steps * (1 + backward + certified + retrains + count_extreme_retrains(audit, names) + tokens)


def differentiates_tokens(task: Task, audit: AuditSection) -> bool:
    """Whether `audit` computes hypergradients of tokens: of text with a loss for each token."""
    is_asked_for = audit.token_examples > 0 and EXACT_ESTIMATOR in audit.estimators
    return is_asked_for and isinstance(task, TextTask) and task.corpus.sequences_per_example == 1


def audit_vmap_size(audit: AuditSection) -> int:
    """Retrains of `audit` that run at once."""
    return min(audit.vmap_size, audit.subsets)


def count_extreme_retrains(audit: AuditSection, names: Sequence[str]) -> int:
    """Trainings without the best and without the worst examples of each score, at random, and with all examples."""
    if not audit.extremes:
        return 0
    cheap = {
        (name, checkpoint)
        for name in names
        for checkpoint in audit.checkpoints
        if name != "random" and not (name == "alignment" and checkpoint == "end" and name in audit.estimators)
    }
    removals = 2 * (len(audit.estimators) + len(cheap)) + NUM_RANDOM_REMOVALS
    return _round_up(1 + len(audit.extremes) * removals, audit_vmap_size(audit))


def _round_up(count: int, group_size: int) -> int:
    """The trainings of whole groups: what a group lacks is filled up, so that all compile to one program."""
    return math.ceil(count / group_size) * group_size


def count_certificate_retrains(certify: CertifySection) -> int:
    """Trainings of one set of certificates: differences, rounding, and those without some examples."""
    return 2 * len(certify.step_sizes) + 1 + certify.retrains


def count_certificate_estimates(certify: CertifySection) -> int:
    """Hypergradients of one set of certificates, each with a training, at most."""
    return len(certify.removed) * certify.draws


class TuneCosts(NamedTuple):
    """What the pieces of work of `tune` cost at the config's own setting, in trainings."""

    training: float
    draw: float
    """The hypergradient with its training, and that of a draw of metasmoothness."""
    ratios: float
    """The finite differences."""
    certificates: float
    """All others, at most."""


def count_tune_costs(task: Task, outer: OuterSection, certify: CertifySection) -> TuneCosts:
    """What a setting costs at each stage of the search, with the batches of the config."""
    estimate, beside_first = _tune_gradient_stages(task, outer)
    gradient = estimate.work / task.num_steps
    retrains, more_draws = count_certificate_retrains(certify), count_certificate_estimates(certify) - 1
    certificates = certify.retrains + more_draws * gradient
    draw = 2 * gradient + beside_first.work / task.num_steps
    return TuneCosts(1.0, draw, retrains - certify.retrains, certificates)


def tune_run_stages(task: Task, config: TuneConfig) -> list[WorkStage]:
    """The stages of a `tune` run, at most: the config's own setting, a training for each learning rate, and what
    tune.budget leaves for certifying these and for other settings."""
    outer, certify, steps = config.outer, config.certify, task.num_steps
    estimate, beside_first = _tune_gradient_stages(task, outer)
    own = _add_stages(
        "the config's own setting and its certificates",
        WorkStage("", forward_steps=(1 + count_certificate_retrains(certify)) * steps),
        estimate.repeat(count_certificate_estimates(certify) + 1, ""),
        beside_first,
    )
    left = max(0.0, config.tune.budget * steps - own.work)
    rates = WorkStage(
        "learning rates", forward_steps=min(left, steps * sum(rate != 1 for rate in config.tune.learning_rates))
    )
    rest = WorkStage("their certificates and other settings (tune.budget)", other_work=left - rates.work)
    return [own, *(stage for stage in (rates, rest) if stage.work)]


def _tune_gradient_stages(task: Task, outer: OuterSection) -> tuple[WorkStage, WorkStage]:
    """(a training and its hypergradient, what is measured beside the first one of a setting): of `implicit` at most,
    with all batches, as the budget is a bound."""
    steps, epoch_steps = task.num_steps, _count_epoch_steps(task, outer)
    if outer.method == "implicit":
        outer = dataclasses.replace(outer, curvature_batches=epoch_steps)
    estimate = _add_stages("", WorkStage("", forward_steps=steps), _hypergradient_stage(outer, steps, epoch_steps))
    reliability = _reliability_stage(task, outer, steps, epoch_steps).repeat(bool(outer.reliability_every), "")
    return estimate, _add_stages("", _product_error_stage(outer, estimate), reliability)


def count_compare_work(task: Task, config: CompareConfig, labels: KnownLabels | None) -> list[WorkStage]:
    """The whole `compare` run in training steps, by stage.

    With evaluate.prompts the model of an arm answers right after its retrain; that of one that has chosen on dev is
    trained again, as others were trained since.
    """
    compare, steps = config.compare, task.num_steps
    names = with_source_baselines(compare.baselines, task)
    baselines = steps + count_baseline_work(task) + count_trainings(names, task, labels, 1) * steps
    budgets = [compare.proxy_runs * steps if name == "proxy_fit" else compare.budget for name in compare.methods]
    total = compare.seeds * (baselines + sum(budgets) + len(budgets) * 2 * steps)
    stages = [WorkStage("all methods and baselines", other_work=total)]
    again = [name for name in compare.baselines if name in SHARE_ON_DEV and "dev" in task.held_out_streams]
    if config.evaluate.prompts and (again := [name for name in again if not why_absent(name, task, labels)]):
        work = compare.seeds * len(again) * steps
        stages.append(WorkStage("models chosen on dev, again to answer prompts", forward_steps=work))
    return stages


def sum_work(stages: Sequence[WorkStage]) -> float:
    """The work of all stages, in training steps."""
    return sum(stage.work for stage in stages)


def count_outer_step_work(task: Task, outer: OuterSection) -> float:
    """The most that one outer step costs, in passes: a training run and an estimate."""
    epoch = _count_epoch_steps(task, outer)
    estimate = {
        "unrolled": (REPLAY_WORK + HVP_WORK) * task.num_steps,
        "window": (REPLAY_WORK + HVP_WORK) * min(outer.window, task.num_steps),
        "alignment": 2.0 * epoch,
        "implicit": 2.0 * epoch + HVP_WORK * outer.max_iterations * epoch,
    }
    halves = _reliability_stage(task, outer, task.num_steps, epoch).work if pools_steps(task, outer) else 0.0
    return task.num_steps + estimate[outer.method] + halves


def count_baseline_work(task: Task) -> float:
    """What the first outer step costs in addition, in passes: the baselines at uniform weights."""
    return 2.0 * math.ceil(len(task.trainable_indices()) / task.batch_size)


def count_candidate_work(
    name: RefineMethod,
    outer: OuterSection,
    single_loop: SingleLoopSection,
    max_steps: int,
    sizes: RoundSizes,
    *,
    is_fitted: bool,
    num_targets: int = 1,
    pooled_epoch: int | None = None,
) -> float:
    """The most that one candidate of `refine` costs, in training steps; `outer` is that of the candidate.

    `is_fitted` says whether the round begins with what follows validation. Its weights may stop at
    outer.reliability_floor. `pooled_epoch` is the number of batches that hold all rows once, where steps are pooled:
    these read the halves of validation beside dev, too. The scores of
    `ica` are not counted here: they depend on the rows.
    """
    if name in SINGLE_LOOP_METHODS:
        return count_single_loop_work(single_loop, outer, max_steps, num_targets)
    if name in ("uniform", "ica"):
        return max_steps
    is_pooled = pooled_epoch is not None
    num_extra_losses = {"": 0, "halves": 1, "dev": 3 if is_pooled else 2}
    extra_losses = sum(
        num_extra_losses[choose_round_evidence(outer, step, sizes, is_fitted=is_fitted or step > 0)]
        for step in range(outer.steps)
    )
    work = max_steps * (1 + outer.steps * (1 + REPLAY_WORK + HVP_WORK) + EXTRA_LOSS_WORK * extra_losses)
    work += max_steps * HVP_WORK * measures_product_error(outer)
    if pooled_epoch is not None:  # the losses at the end of the first training, and models of validation
        work += FORWARD_WORK * pooled_epoch + count_validation_models_work(max_steps, pooled_epoch)
    return work


def _count_epoch_steps(task: Task, outer: OuterSection) -> int:
    """Batches of a pass over what the outer loop trains on: with folds all of validation but the smallest one, too."""
    num_validation = len(task.validation_indices())
    others = num_validation - num_validation // outer.validation_folds if outer.validation_folds else 0
    return math.ceil((len(task.trainable_indices()) + others) / task.batch_size)


def _hypergradient_stage(outer: OuterSection, steps: int, epoch_steps: int) -> WorkStage:
    """One hypergradient of a finished training run."""
    if outer.method in ("unrolled", "window"):
        backward_steps = min(outer.window, steps) if outer.method == "window" else steps
        return WorkStage("", forward_steps=REPLAY_WORK * backward_steps, backward_steps=backward_steps)
    if outer.method != "implicit":
        return WorkStage("", other_work=2 * epoch_steps)
    # a direct solve makes as many products as there are parameters, which are few where it is used
    products = outer.max_iterations if outer.solver in ("cg", "neumann") else 0
    return WorkStage("", other_work=2 * epoch_steps + HVP_WORK * products * min(outer.curvature_batches, epoch_steps))


def _estimate_of_each(outer: OuterSection, hypergradient: WorkStage, num_losses: int) -> WorkStage:
    """What the hypergradients of so many outer losses side by side add to that of one."""
    if outer.method not in ("unrolled", "window"):
        return hypergradient.repeat(num_losses - 1, "")
    return WorkStage("", other_work=(num_losses - 1) * EXTRA_LOSS_WORK * hypergradient.backward_steps)


def _product_error_stage(outer: OuterSection, hypergradient: WorkStage) -> WorkStage:
    """What it adds to a hypergradient to have it once more at the highest precision, with primal passes of its own."""
    return WorkStage("", backward_steps=hypergradient.backward_steps * measures_product_error(outer))


def _reliability_stage(task: Task, outer: OuterSection, steps: int, epoch_steps: int) -> WorkStage:
    """What measuring the reliability adds to a hypergradient: dev and its halves, or the halves of validation.

    Pooled steps read the halves of validation in any case.
    """
    hypergradient = _hypergradient_stage(outer, steps, epoch_steps)
    return _estimate_of_each(outer, hypergradient, 1 + count_reliability_losses(task, outer))


def count_reliability_losses(task: Task, outer: OuterSection) -> int:
    """The outer losses that go back beside L_v in a step that measures its reliability."""
    sizes = {part: len(task.held_out_examples.get(part, ())) for part in ("dev", "validation")}
    extra_losses = 2 if sizes["dev"] > 1 else 0
    # of several targets, whose sizes differ from dev's, the first step reads both
    reads_both = pools_steps(task, outer) or len(task.outer_objective.targets) > 1
    return extra_losses + (sizes["validation"] > 1 and (not extra_losses or reads_both))


def count_backward_losses(task: Task, config: OuterLoopConfig) -> int:
    """The most outer losses whose hypergradients one backward pass of the run computes."""
    if isinstance(config, AuditConfig):
        return 1 + (num_judges(task) > 1) + config.audit.queries
    parts = config.contradictions.folds if isinstance(config, SelectConfig) and config.contradictions.draws else 1
    beside = 1 + measures_product_error(config.outer)
    if config.outer.reliability_every or pools_steps(task, config.outer):
        beside += count_reliability_losses(task, config.outer)
    return max(parts, beside)


def _add_stages(name: str, *stages: WorkStage) -> WorkStage:
    return WorkStage(
        name,
        sum(stage.forward_steps for stage in stages),
        sum(stage.backward_steps for stage in stages),
        sum(stage.other_work for stage in stages),
    )
