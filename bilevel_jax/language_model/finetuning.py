"""Fine-tuning with a weight for every example, and the hypergradients of the weights."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Float

from bilevel_jax.core import certify, checkpointing, curvature, solvers, tree
from bilevel_jax.core.certify import Certificates, Verdict
from bilevel_jax.core.implicit import implicit_estimator
from bilevel_jax.core.solve.scanned import start_and_hyperparameter_gradients
from bilevel_jax.core.solve.solution import BilevelSolver, Solution, Status
from bilevel_jax.core.training import (
    ProductPrecision,
    check_product_precision,
    init_train_state,
    train,
    with_product_precision,
)
from bilevel_jax.core.types import (
    CheckpointPlan,
    Checks,
    CompositeLoss,
    Estimate,
    Estimator,
    LinearSolver,
    Params,
    Problem,
    StepMetrics,
    Stream,
    TrainState,
    TrainStep,
    Trajectory,
)
from bilevel_jax.core.unrolled import backward_pass, check_differentiable, validation_loss_fn
from bilevel_jax.lm import models
from bilevel_jax.lm.data.examples import Example, describe_unread_keys, find_leaks, format_count, summarize_examples
from bilevel_jax.runs.config.rules import PARAMETERS_TARGET, check_config
from bilevel_jax.runs.config.schema import (
    DataSection,
    LoraSection,
    MeshSection,
    ModelSection,
    ObjectiveSection,
    OuterSection,
    Remat,
    TargetSection,
    TrainSection,
)
from bilevel_jax.runs.engine.nonfinite import find_first_nonfinite
from bilevel_jax.runs.engine.trainer import FINITE_CHECK_INTERVAL, describe_example
from bilevel_jax.runs.engine.trajectory_store import plan_checkpoints
from bilevel_jax.runs.infra import sharding
from bilevel_jax.runs.infra.distributed import fetch_to_host
from bilevel_jax.runs.infra.placement import place_table, replicate_unplaced
from bilevel_jax.runs.infra.progress import make_progress_bar
from bilevel_jax.runs.scoring.token_hypergradients import TokenHypergradients, compute_token_hypergradients
from bilevel_jax.runs.tasks.reference import compute_pair_log_probs, measure_pairs, reference_margins
from bilevel_jax.runs.tasks.splits import DataSplits
from bilevel_jax.runs.tasks.targets import TargetLoss, TargetSpec, list_targets
from bilevel_jax.runs.tasks.text import (
    TextPrograms,
    TextTask,
    TokenizedData,
    build_programs,
    check_target_functions,
    compose_text_task,
    corpora_with_reference,
    group_by_corpus,
    tokenize_parts,
)

if TYPE_CHECKING:
    from bilevel_jax.language_model.model import LanguageModel

Weights = Any
"""One float for each example: an array, or {id: weight}; None: 1 for each."""
Target = TargetLoss | Mapping[str, tuple[float, TargetLoss]] | TargetSection | None
"""What validation examples judge by: a loss, several by source with their coefficients, or the training loss."""
SOLVERS = {
    "unroll": "L_v of the model after this training run",
    "implicit": "L_v of the minimizer of the training loss with the prior; with Gauss-Newton curvature, of the "
    "proximal Bregman problem at the end of this run",
    "alignment": "nothing: the first-order effect of one more step at the end of this run, a baseline",
}
"""How the hypergradient is computed -> what it is the derivative of."""
MAX_RESIDUAL, MAX_GAP = 1e-3, 1e-2
"""The relative residual from which a linear system counts as not solved, and the share of L_v that finishing training
may change to first order; as of `bj.implicit`."""


@dataclass(frozen=True, eq=False, repr=False)
class FineTuned:
    """A fine-tuned model with the hypergradients of the examples' weights."""

    lm: "LanguageModel"
    """The model after training; everything that a loaded model can do, it can."""
    solution: Solution
    """Parameters, L_v, its derivatives, checks and status, as of the solvers of `core`."""
    examples: list[Example]
    """The training examples as they were read: ids, turns, source, label."""
    losses: Float[np.ndarray, "steps"]
    """The weighted training loss, with the prior, before each step."""
    estimand: str
    """What the hypergradient is the derivative of, in words."""
    certificates: Certificates | None
    """What retraining says of the hypergradient, where it was asked for."""
    notes: list[str]
    """What a person should know of the data: duplicates, truncation, keys that are not read."""
    tuning: "FineTuning"
    """The prepared run; see `rerun`."""
    seed: int = 0
    """Of the data order."""

    def __repr__(self) -> str:
        return (
            f"FineTuned({self.lm.folder!r}, {len(self.losses):,} steps on {len(self.examples):,} examples, "
            f"value {self.value:.4g}, status {self.status.name})"
        )

    @property
    def value(self) -> float:
        """L_v, the mean validation loss of the trained model, nats per token (of pairs: per pair); nan without
        validation."""
        return float(self.solution.value)

    @property
    def grad(self) -> Float[np.ndarray, "examples"]:
        """d L_v / d weight of each example, in their order, nats: below 0 where more weight lowers L_v. 0 for an
        example that no step saw or that was dropped as too long; nan without a solver."""
        if not isinstance(self.solution.grad, jax.Array):
            return np.full(len(self.examples), np.nan)
        return np.asarray(fetch_to_host(self.solution.grad), float)[: len(self.examples)]

    @property
    def hypergradients(self) -> dict[str, float]:
        """Example id -> d L_v / d weight."""
        return {example.id: value for example, value in zip(self.examples, self.grad.tolist(), strict=True)}

    @property
    def grad_optimizer(self) -> dict[str, jax.Array]:
        """unroll: d L_v / d (each hyperparameter that `optax.inject_hyperparams` holds), by name; else empty."""
        return self.solution.grad_optimizer

    @property
    def checks(self) -> Checks:
        """Numerical diagnostics of the hypergradient."""
        return self.solution.checks

    @property
    def status(self) -> Status:
        """What the solution is worth: `Status.OK`, or the reason why it is not."""
        return Status(int(self.solution.status))

    @property
    def verdict(self) -> Verdict:
        """The certificates in one sentence: `print(result.verdict)`."""
        missing = "the hypergradient was not certified. Give certify=True to `finetune` or `rerun`."
        return (self.certificates or Certificates(None, None, None, self.checks, self.status, missing=missing)).verdict

    def rerun(
        self,
        weights: Weights = None,
        *,
        seed: int | None = None,
        certify: bool = False,
        throw: bool = True,
        progress: bool = False,
    ) -> "FineTuned":
        """The same fine-tuning, from the same model, with other weights: nothing is compiled again.

        Args:
            weights: one for each example, as an array or by id; default 1.
            seed: of the data order; default that of the first run. Fresh adapters keep theirs.
            certify: as of `finetune`.
            throw: as of `finetune`.
            progress: as of `finetune`.

        Returns:
            The model and its hypergradients.

        Raises:
            ValueError: as of `finetune`.
            FloatingPointError: as of `finetune`.

        Example:
            >>> weights = jnp.exp(-result.grad / jnp.abs(result.grad).max())  # result: of `finetune`
            >>> result.rerun(weights).value < result.value
            True
        """
        return self.tuning.run(weights, seed=seed, with_certificates=certify, throw=throw, progress=progress)

    def token_hypergradients(self) -> TokenHypergradients:
        """Which tokens of the examples help and which harm: d L_v / d factor of each token's loss, through the run.

            loss_i = sum_t v_t n_t / |y| (by objective.reduction), at v = 1

        Trains once more, as this run did, and goes back through it: as much as `rerun`, for any number of tokens. The
        values of an example's tokens sum to its weight times its hypergradient. Wrong where that is.

        Returns:
            Token ids and derivatives of each example, nan for tokens without a loss.

        Raises:
            ValueError: without solver='unroll', and for preference pairs.

        Example:
            >>> found = result.token_hypergradients()  # result: of `finetune`
            >>> bool(jnp.allclose(jnp.nansum(found.values[0]), found.examples[0], atol=1e-4))  # its weight is 1
            True
        """
        if self.tuning.solver.name != "unroll":
            raise ValueError(
                f"solver is {self.tuning.solver.name!r}; token hypergradients go back through the training: give "
                "solver='unroll'."
            )
        return self.tuning.differentiate_tokens(self.solution.hyper, self.seed)


@dataclass(frozen=True)
class TaskSections:
    """The settings that a text task is composed from, in the words of a config."""

    model: ModelSection
    lora: LoraSection
    data: DataSection
    objective: ObjectiveSection
    train: TrainSection
    mesh: MeshSection
    target: TargetSection = TargetSection()


@dataclass(frozen=True)
class SolverOptions:
    """How the hypergradient of a fine-tuning is computed."""

    name: str | None
    window: int | None
    proximal: float
    curvature: str
    linear_solver: LinearSolver | None
    curvature_batches: int | None
    memory_gib: float
    product_precision: ProductPrecision = "highest"


class FineTuning:
    """A fine-tuning that is prepared: its data as tokens, its model, its compiled programs. `run` trains."""

    def __init__(self, lm: "LanguageModel", task: TextTask, solver: SolverOptions, seed: int):
        self.lm, self.task, self.solver, self.seed = lm, task, solver, seed

    def run(
        self,
        weights: Weights = None,
        *,
        seed: int | None = None,
        with_certificates: bool = False,
        throw: bool = True,
        progress: bool = False,
    ) -> FineTuned:
        """As `FineTuned.rerun`."""
        task, name = self.task, self.solver.name
        if with_certificates and name is None:
            raise ValueError("certify checks a hypergradient, and with solver=None there is none: give a solver.")
        table, seed = self._read_weights(weights), self.seed if seed is None else seed
        with make_progress_bar(progress) as bar:
            entry = bar.add_task("training", total=task.num_steps)
            solver = self._make_solver(seed, on_step=lambda: bar.advance(entry))
            trajectory, losses = self._train(table, seed, plan=self._plan(), on_step=lambda: bar.advance(entry))
            certificates = None
            if name is None:
                value = self._validation_loss(trajectory) if "validation" in task.held_out_streams else math.nan
                no_status = jnp.asarray(int(Status.OK))
                solution = Solution(trajectory.end.params, jnp.asarray(value), (), (), {}, Checks(), no_status)
            else:
                bar.update(entry, description="differentiating")
                solution = self._solve(trajectory, table, seed, task.held_out_streams["validation"])
                if throw:
                    raise_if_bad(Status(int(solution.status)), solution.checks)
            if with_certificates:
                bar.update(entry, description="certifying by retraining", total=None)
                streams = self._stream(seed), task.held_out_streams["validation"]
                certificates = certify.check(solver, solution, *streams, num_retrains=0, seed=self.seed)
        base = task.base_params
        trained = (trajectory.end.params, None) if base is None else (base, trajectory.end.params)
        return FineTuned(
            dataclasses.replace(self.lm, params=trained[0], adapters=trained[1]),
            solution,
            task.examples,
            losses,
            SOLVERS[name] if name else "",
            certificates,
            task.notes,
            self,
            seed,
        )

    def differentiate_tokens(self, table: jax.Array, seed: int) -> TokenHypergradients:
        """As `FineTuned.token_hypergradients`, of a run with these weights and this data order."""
        return compute_token_hypergradients(
            self.task,
            table,
            self.task.init_params(self.seed),
            self._stream(seed),
            self.task.held_out_streams["validation"],
            plan=self._plan(),
            window=self.solver.window,
        )

    # ---- parts

    def _train(
        self, table: jax.Array, seed: int, *, plan: CheckpointPlan, on_step: Callable[[], Any]
    ) -> tuple[Trajectory, Float[np.ndarray, "steps"]]:
        """The run, and its losses; a FloatingPointError at the first number that is not finite."""
        task = self.task
        start = self._start()
        frozen, stream = task.frozen(start.params), self._stream(seed)
        losses: list[jax.Array] = []

        def explain(step: int) -> str:
            return find_first_nonfinite(
                task.problem, task.optimizer, task.objective.losses, start, step, frozen,
                lambda at: (table, stream.batch(at)), lambda index: describe_example(task, index),
            )  # fmt: skip

        def note_step(state: TrainState, metrics: StepMetrics) -> None:
            losses.append(metrics.loss)
            on_step()
            if len(losses) % FINITE_CHECK_INTERVAL == 0 or len(losses) == task.num_steps:
                recent = np.array(jax.device_get(losses[-FINITE_CHECK_INTERVAL:]))
                if np.isfinite(recent).all() and bool(tree.all_finite(state.params)):
                    return
                raise FloatingPointError(
                    f"training is not finite any more within {len(losses)} of {task.num_steps} steps: "
                    f"{explain(len(losses) - 1)}. Lower the learning rate, clip the gradient, or look at these rows."
                )

        trajectory = train(
            task.train_step,
            start,
            table,
            frozen,
            stream,
            plan=plan,
            first_backward_step=task.num_steps - self._num_backward_steps,
            on_step=note_step,
        )
        return trajectory, np.array(jax.device_get(losses), float)

    def _solve(self, trajectory: Trajectory, table: jax.Array, seed: int, validation: Stream) -> Solution:
        """The derivatives of a run that was trained with these weights."""
        task, frozen = self.task, self.task.frozen(trajectory.start.params)
        if self.solver.name == "unroll":
            estimate, grad_start, grad_optimizer = self._unroll(trajectory, table, seed, validation)
        else:
            estimator = _cached_estimator(task.problem, task.objective.composite_loss, self.solver)
            is_balanced = self.solver.name == "implicit" and task.base_params is not None
            end = trajectory.end
            if is_balanced:  # a LoRA product has many factorings; a prior on the factors singles out the balanced one
                end = end._replace(params=models.balance_adapters(end.params))
            summed = task.full_pass_stream(seed=0)
            estimate = estimator(trajectory._replace(end=end), table, frozen, summed, validation)
            if is_balanced:  # the prior's centre is not balanced along, so its slope would depend on the factoring
                estimate = estimate._replace(checks=estimate.checks._replace(gap=math.nan))
            grad_start, grad_optimizer = jax.tree.map(jnp.zeros_like, trajectory.start.params), {}
        status = judge_status(estimate, self.solver, grad_is_finite=bool(tree.all_finite(estimate.grad)))
        return Solution(
            trajectory.end.params, estimate.validation_loss, estimate.grad, grad_start, grad_optimizer, estimate.checks,
            jnp.asarray(int(status)), start=trajectory.start.params, hyper=table,
        )  # fmt: skip

    def _unroll(
        self, trajectory: Trajectory, table: jax.Array, seed: int, validation: Stream
    ) -> tuple[Estimate, Params, dict[str, jax.Array]]:
        """The estimate, and the derivatives by the start and by the optimizer's hyperparameters."""
        task, frozen, stream = self.task, self.task.frozen(trajectory.start.params), self._stream(seed)
        if task.num_steps not in (checked := _cached_checks(task.train_step)):
            check_differentiable(task.train_step, task.optimizer, trajectory, table, frozen, stream)
            checked.add(task.num_steps)
        step = with_product_precision(task.train_step, task.problem, task.optimizer, self.solver.product_precision)
        passes = backward_pass(task.problem, step, window=self.solver.window)
        state = passes.init(trajectory, table, frozen, validation)
        while not passes.is_done(trajectory, state):
            state = passes.advance(trajectory, table, frozen, stream, state)
        gradients = start_and_hyperparameter_gradients(task.optimizer, trajectory.start, state.adjoint)
        return passes.finish(trajectory, state), *gradients

    def _make_solver(self, seed: int, on_step: Callable[[], Any]) -> BilevelSolver:
        """This fine-tuning in the form of core's solvers, for `certify.check`: it trains, whatever differentiates."""

        def run(
            params: Params, table: jax.Array, train: Any, valid: Any, *, frozen: Any, model_state: Any, key: Any,
            throw: bool,
        ) -> Solution:  # fmt: skip
            trajectory = self._train(table, seed, plan=self._plan(), on_step=on_step)[0]
            return self._solve(trajectory, table, seed, valid)

        def value(
            params: Params, table: jax.Array, train: Any, valid: Any, *, frozen: Any, model_state: Any, key: Any
        ) -> Any:
            plan = checkpointing.NO_CHECKPOINTS
            return self._validation_loss(self._train(table, seed, plan=plan, on_step=on_step)[0])

        at_highest = None
        if self.solver.product_precision != "highest":
            options = dataclasses.replace(self.solver, product_precision="highest")
            at_highest = FineTuning(self.lm, self.task, options, self.seed)._make_solver(seed, on_step)
        return BilevelSolver(run, value, SOLVERS.get(self.solver.name or "", ""), True, True, at_highest)

    def _start(self) -> TrainState:
        task = self.task
        return replicate_unplaced(task.mesh, init_train_state(task.optimizer, task.init_params(self.seed)))

    def _stream(self, seed: int) -> Any:
        return self.task.training_stream(seed, packed=seed == self.seed)  # the packed shape holds that order alone

    def _validation_loss(self, trajectory: Trajectory) -> float:
        frozen = self.task.frozen(trajectory.start.params)
        loss_fn = validation_loss_fn(self.task.problem)
        return float(loss_fn(trajectory.end.params, frozen, self.task.held_out_streams["validation"]))

    @property
    def _num_backward_steps(self) -> int:
        if self.solver.name != "unroll":
            return 0
        return min(self.solver.window or self.task.num_steps, self.task.num_steps)

    def _plan(self) -> CheckpointPlan:
        if self.solver.name != "unroll":
            return checkpointing.NO_CHECKPOINTS
        outer = OuterSection(method="unrolled", memory_gib=self.solver.memory_gib)
        return plan_checkpoints(outer, self._num_backward_steps, self._start(), self.task.base_params)

    def _read_weights(self, weights: Weights) -> jax.Array:
        """The weight table on the mesh."""
        task = self.task
        dtype = jax.tree.leaves(task.init_params(self.seed))[0].dtype
        if weights is None:
            values = np.ones(task.num_examples)
        elif isinstance(weights, Mapping):
            missing = [example for example in task.examples if example.id not in weights]
            if missing or len(weights) > task.num_examples:
                what = f"{len(missing)} examples, the first {missing[0].where}, have none" if missing else (
                    f"{len(weights) - task.num_examples} ids are those of no example"
                )  # fmt: skip
                raise ValueError(f"the weights by id do not fit the examples: {what}. Give each example one.")
            values = np.array([weights[example.id] for example in task.examples])
        else:
            values = np.asarray(weights)
        if values.shape != (task.num_examples,):
            raise ValueError(
                f"weights {values.shape} for {task.num_examples} examples; give one for each, in their order or by id."
            )
        if not np.issubdtype(values.dtype, np.floating):
            raise ValueError(f"weights are {values.dtype}; floats are wanted, as in weights.astype(float).")
        if not np.isfinite(values).all():
            place = int(np.flatnonzero(~np.isfinite(values))[0])
            raise ValueError(f"the weight of {task.examples[place].where} is {values[place]}; give finite numbers.")
        return place_table(task.mesh, values.astype(dtype))


def prepare(
    lm: "LanguageModel",
    examples: Any,
    validation: Any,
    optimizer: optax.GradientTransformation | None,
    *,
    steps: int,
    batch_size: int,
    gradient_accumulation_steps: int,
    lora: int | LoraSection,
    objective: str | ObjectiveSection,
    target: Target,
    solver: SolverOptions,
    leaks: str,
    seed: int,
) -> FineTuning:
    """Check the arguments, read and tokenize the data, and compose the task."""
    _check_solver(solver, validation, target)
    for name, count in (("steps", steps), ("batch_size", batch_size), ("seed", seed)):
        check_count(name, count, least=0 if name == "seed" else 1)
    check_count("gradient_accumulation_steps", gradient_accumulation_steps)
    if leaks not in ("error", "keep"):
        raise ValueError(f"leaks is {leaks!r}; it is 'error' or 'keep'.")
    optimizer = optax.adamw(1e-4, eps_root=1e-12) if optimizer is None else optimizer
    if not callable(getattr(optimizer, "init", None)) or not callable(getattr(optimizer, "update", None)):
        raise ValueError(
            f"the optimizer is {optimizer!r}; one of optax is wanted, as optax.adamw(1e-4, eps_root=1e-12)."
        )
    sections = make_sections(
        lm,
        lora=lora,
        objective=objective,
        train=TrainSection(steps, batch_size, gradient_accumulation_steps, seed),
        target=target if isinstance(target, TargetSection) else TargetSection(),
    )
    specs = make_target_specs(target, sections.objective, has_validation=validation is not None)
    train_examples = lm.read(examples)
    held_out = lm.read(validation, name="validation") if validation is not None else []
    if leaks == "error" and (leaked := find_leaks(train_examples, held_out)):
        num_leaked = len({example.id for example, _ in leaked})
        raise ValueError(
            f"{format_count('training example', num_leaked)} also {'stands' if num_leaked == 1 else 'stand'} in the "
            f"validation examples, the first: {leaked[0][0].where} equals {leaked[0][1].where}. Their weights would be "
            "rewarded for being copied. Remove them, or set leaks='keep'."
        )
    task = make_task(lm, sections, train_examples, held_out, optimizer, solver.proximal, specs=specs)
    return FineTuning(lm, task, solver, seed)


def make_sections(
    lm: "LanguageModel",
    *,
    lora: int | LoraSection,
    objective: str | ObjectiveSection,
    train: TrainSection,
    target: TargetSection = TargetSection(),  # noqa: B008 (frozen)
) -> TaskSections:
    """The arguments in the words of a config, checked as those of a config are."""
    if isinstance(lora, int) and not isinstance(lora, bool):
        lora = LoraSection(r=lora)
    if not isinstance(lora, LoraSection):
        raise ValueError(f"lora is {lora!r}; a rank or lm.LoraSection(r=, alpha=, target_modules=) is wanted.")
    if isinstance(objective, str):
        objective = ObjectiveSection(name=objective)  # type: ignore[arg-type]
    if not isinstance(objective, ObjectiveSection) or objective.name not in ("sft", "dpo", "simpo"):
        name = objective.name if isinstance(objective, ObjectiveSection) else objective
        raise ValueError(f"objective is {name!r}; it is 'sft', 'dpo', 'simpo' or an lm.ObjectiveSection.")
    base_dtype = jax.tree.leaves(lm.params)[0].dtype
    if base_dtype == jnp.bfloat16 and not lora.r:
        raise ValueError("the parameters are bfloat16, which only a frozen base can be: give lora, or load as float32.")
    model = ModelSection(
        lm.folder,
        base_dtype="bfloat16" if base_dtype == jnp.bfloat16 else "float32",
        param_dtype="float64" if base_dtype == jnp.float64 else "float32",
        remat=lm.remat,
    )
    mesh = MeshSection(lm.mesh.shape["data"], lm.mesh.shape["fsdp"])
    data = dataclasses.replace(lm.data, train=("examples",), validation=("validation",))  # as a config names its files
    sections = TaskSections(model, lora, data, objective, train, mesh, target)
    check_config(sections, "the arguments")
    return sections


def make_target_specs(target: Target, objective: ObjectiveSection, *, has_validation: bool) -> tuple[TargetSpec, ...]:
    """The targets of the argument; a ValueError for what is none."""
    if target is None:
        target = TargetSection()
    elif isinstance(target, str) or callable(target):
        target = {"" if has_validation else PARAMETERS_TARGET: (1.0, target)}
    if isinstance(target, TargetSection):
        if 0 in target.coefficients:
            raise ValueError(
                "target.coefficients has a 0, which is for targets that are reported on dev and test, and finetune "
                "reads validation examples alone: leave that target out."
            )
        return list_targets(target, objective)
    if not target:
        raise ValueError("target is an empty dict; wanted {source: (factor, loss)}, or nothing for the training loss.")
    specs = []
    for source, term in dict(target).items():
        coefficient, loss = term if isinstance(term, tuple) and len(term) == 2 else (math.nan, term)
        if not isinstance(coefficient, int | float) or not math.isfinite(coefficient) or not coefficient:
            raise ValueError(f"target[{source!r}] is {term!r}; wanted (a factor other than 0, a loss).")
        if callable(loss):
            specs.append(TargetSpec(source, loss, float(coefficient), None))
            continue
        section = TargetSection(losses=(loss,), sources=(source,) if source else ())
        check_config(TargetOnly(section), "the argument target")
        specs.append(list_targets(section, objective)[0]._replace(coefficient=float(coefficient)))
    return tuple(sorted(specs, key=lambda spec: not spec.has_examples))


@dataclass(frozen=True)
class TargetOnly:
    """A target in the form of a config, for its checks."""

    target: TargetSection


def make_task(
    lm: "LanguageModel",
    sections: TaskSections,
    examples: list[Example],
    validation: list[Example],
    optimizer: optax.GradientTransformation,
    proximal: float = 0.0,
    *,
    specs: tuple[TargetSpec, ...] | None = None,
) -> TextTask:
    """The examples and the model as a task, which training and scores read."""
    held_out = {"validation": validation} if validation else {}
    notes = [f"examples: {summarize_examples(examples)}"]
    notes += [f"validation: {summarize_examples(validation)}"] if validation else []
    notes += describe_unread_keys([*examples, *validation])
    specs = specs or list_targets(TargetSection(), sections.objective)
    text = tokenize_parts(
        sections, DataSplits(examples, held_out, notes), lm.tokenizer, lm.architecture, dict(lm.source_files), specs
    )
    text = _with_reference_margins(lm, text, sections)
    whole = lm.merged_params

    def init_params(seed: int) -> Params:
        if not sections.lora.r:
            return whole
        adapters = models.init_lora(
            lm.architecture,
            jax.random.key(seed),
            rank=sections.lora.r,
            alpha=sections.lora.alpha,
            target_modules=sections.lora.target_modules,
            dtype=jnp.dtype(sections.model.param_dtype),
        )
        return sharding.shard_tree(lm.mesh, lm.sharding_rules, adapters)

    programs = _cached_programs(
        lm.architecture, sections.objective, optimizer, lm.mesh, tuple(lm.sharding_rules.items()), lm.remat,
        sections.lora.r > 0, float(proximal), specs,
    )  # fmt: skip
    task = compose_text_task(
        sections,
        text,
        whole if sections.lora.r else None,
        init_params,
        programs,
        lm.mesh,
        num_steps=sections.train.max_steps,
        seeds=[sections.train.seed],
    )
    check_target_functions(task, sections.train.seed, specs)
    return task


@lru_cache(maxsize=8)
def _cached_programs(
    architecture: models.DecoderConfig,
    objective: ObjectiveSection,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    sharding_rules: tuple[tuple[str, sharding.MeshAxes], ...],
    remat: Remat,
    lora: bool,
    proximal_strength: float,
    specs: tuple[TargetSpec, ...],
) -> TextPrograms:
    """`build_programs`; those of the same model and the same optimizer object are not compiled again."""
    return build_programs(
        architecture, objective, optimizer, mesh, dict(sharding_rules),
        remat=remat, lora=lora, proximal_strength=proximal_strength, specs=specs,
    )  # fmt: skip


@lru_cache(maxsize=8)
def _cached_estimator(problem: Problem, composite_loss: CompositeLoss, options: SolverOptions) -> Estimator:
    """The estimator of a solver that reads the end of a run; compiled once for the programs of a task."""
    product = (
        curvature.hessian(problem)
        if options.curvature == "hessian"
        else curvature.gauss_newton(problem, composite_loss)
    )
    if options.name == "alignment":
        return implicit_estimator(problem, product, solvers.identity())
    linear_solver = options.linear_solver or solvers.cg(tolerance=1e-4, max_steps=100)
    return implicit_estimator(problem, product, linear_solver, batches=options.curvature_batches)


@lru_cache(maxsize=8)
def _cached_checks(train_step: TrainStep) -> set[int]:
    """Numbers of steps within which the optimizer of a step is known to have a derivative."""
    return set()


def judge_status(estimate: Estimate, solver: SolverOptions, *, grad_is_finite: bool) -> Status:
    """What an estimate is worth. Gauss-Newton assumes no stationary point: it is exact for another problem, of which
    every point is a minimizer."""
    checks = estimate.checks
    if not grad_is_finite or not math.isfinite(float(estimate.validation_loss)):
        return Status.NOT_FINITE
    if solver.name != "implicit":
        return Status.OK
    if checks.curvature <= 0:
        return Status.NOT_POSITIVE_DEFINITE
    if checks.residual > MAX_RESIDUAL:
        return Status.NOT_SOLVED
    is_far = solver.curvature == "hessian" and abs(float(checks.gap)) > MAX_GAP * abs(float(estimate.validation_loss))
    return Status.NOT_STATIONARY if is_far else Status.OK


def check_count(name: str, value: Any, *, least: int = 1) -> None:
    """Raise ValueError for what is no whole number, or too small a one."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} is {value!r}; a whole number of {least} or more is wanted.")


def _with_reference_margins(lm: "LanguageModel", text: TokenizedData, sections: TaskSections) -> TokenizedData:
    """The pairs that dpo compares, with the margins of the model before training."""
    corpora = {name: text.corpora[name] for name in corpora_with_reference(text, sections.objective)}
    batch_size, parts = sections.train.global_batch_size, sections.train.gradient_accumulation_steps
    log_probs = measure_pairs(
        corpora,
        group_by_corpus(text),
        lambda name: compute_pair_log_probs(lm.decoder, lm.joined_params, corpora[name], batch_size, parts, lm.mesh),
    )
    with_margins = {
        name: corpus.with_reference_margins(reference_margins(log_probs[name])) for name, corpus in corpora.items()
    }
    return text._replace(corpora=text.corpora | with_margins)


def _check_solver(solver: SolverOptions, validation: Any, target: Any) -> None:
    """Raise ValueError for a solver that is none, and for what it lacks or does not read."""
    name = solver.name
    if name is not None and name not in SOLVERS:
        raise ValueError(f"solver is {name!r}; it is one of {', '.join(map(repr, SOLVERS))}, or None to train alone.")
    if name is not None and validation is None and not callable(target):
        raise ValueError(
            f"solver={name!r} differentiates the validation loss, and there are no validation examples. Give them, or "
            "solver=None to train alone."
        )
    if not math.isfinite(solver.proximal) or solver.proximal < 0:
        raise ValueError(f"proximal is {solver.proximal!r}; 0 or a positive number is wanted.")
    if name == "implicit" and not solver.proximal:
        raise ValueError(
            "solver='implicit' needs a minimiser that is unique: give proximal above 0 (try 0.1), or solver='unroll'."
        )
    readers = {"window": "unroll", "memory_gib": "unroll", "linear_solver": "implicit", "curvature_batches": "implicit"}
    for key, reader in readers.items():
        if getattr(solver, key) and name != reader:
            raise ValueError(f"{key} is an argument of solver={reader!r}, and solver is {name!r}: leave it out.")
    check_product_precision(solver.product_precision)
    if solver.product_precision != "highest" and name != "unroll":
        raise ValueError(f"product_precision is an argument of solver='unroll', and solver is {name!r}: leave it out.")
    if solver.curvature not in ("gauss_newton", "hessian"):
        raise ValueError(f"curvature is {solver.curvature!r}; it is 'gauss_newton' or 'hessian'.")
    for key in ("window", "curvature_batches"):
        if getattr(solver, key) is not None:
            check_count(key, getattr(solver, key))


def raise_if_bad(status: Status, checks: Checks) -> None:
    """The error of a status, in one sentence."""
    if status != Status.OK:
        raise FloatingPointError(
            f"{status.name}: {REASONS[status].format(**checks._asdict())} throw=False returns the numbers."
        )


REASONS = {
    Status.NOT_FINITE: "the hypergradient is not finite, although training was: raise eps_root of the optimizer, or "
    "lower its learning rate.",
    Status.NOT_POSITIVE_DEFINITE: "the curvature is not positive definite (least {curvature:.2g}): raise proximal, or "
    "use curvature='gauss_newton' or solver='unroll'.",
    Status.NOT_SOLVED: "the linear system was not solved (relative residual {residual:.2g} after {steps} products): "
    "raise proximal, or give linear_solver=bj.solvers.cg(max_steps=...) more of them.",
    Status.NOT_STATIONARY: "training ended where the loss with the prior still falls (by {gap:.2g} nats of L_v, to "
    "first order), and the Hessian is that of its minimum: train longer, or use curvature='gauss_newton' or "
    "solver='unroll'.",
}
"""Why a status is not OK, and what helps here."""
