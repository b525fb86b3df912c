"""Short trainings on each strategy's responses, tested on validation examples."""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from bilevel_jax.commands.rank.strategies import StrategyResponses, draw_blocks
from bilevel_jax.core.unrolled import validation_loss_fn
from bilevel_jax.lm.data.examples import load_examples
from bilevel_jax.lm.losses.sft import assemble_params
from bilevel_jax.runs.config.load import RankConfig
from bilevel_jax.runs.config.schema import (
    DataSection,
    LoraSection,
    MeshSection,
    ModelSection,
    ObjectiveSection,
    OptimizerSection,
    OuterSection,
    TrainSection,
)
from bilevel_jax.runs.engine.trainer import Trainer
from bilevel_jax.runs.infra.session import Session
from bilevel_jax.runs.scoring.generation import make_generator_factory, make_task_prompts
from bilevel_jax.runs.scoring.verifiers import make_verifier
from bilevel_jax.runs.stats import mean_interval
from bilevel_jax.runs.tasks import splits
from bilevel_jax.runs.tasks.text import TextTask, prepare_text_task


def run_trials(config: RankConfig, strategy_responses: StrategyResponses, session: Session) -> dict[str, Any]:
    """The validation loss before and after training on responses of each strategy, for each seed.

    Each strategy trains on rank.train_examples responses. One task for all: the same questions, start, data order and
    number of steps, so that strategies differ in their responses alone. With a verifier, the accuracy of greedy
    responses to the questions of data.validation as well. Questions that stand in data.validation are not trained on.
    Raises ValueError for too few questions, and as `prepare_text_task` does.
    """
    task = _prepare_trial_task(config, strategy_responses, session)
    # nothing is estimated; alignment keeps no states of training
    trainer, count = Trainer(task, OuterSection(method="alignment"), session), config.rank.train_examples
    indices_by_strategy = {
        name: task.trainable_indices()[np.isin(task.trainable_indices(), np.arange(at * count, (at + 1) * count))]
        for at, name in enumerate(strategy_responses.strategies)
    }
    session.set_phase(
        "training", total=session.work_done + len(indices_by_strategy) * config.rank.train_seeds * task.num_steps
    )
    train_and_score = partial(_run_trial, config, task, trainer, session)
    before = session.run_once("trials/before", partial(train_and_score, None, 0))
    lines = []
    for name, indices in indices_by_strategy.items():
        session.set_phase(f"training on {name}")
        seeds = range(config.rank.train_seeds)
        runs = [session.run_once(f"trials/{name}/{seed}", partial(train_and_score, indices, seed)) for seed in seeds]
        means = {key: mean_interval([one[key] for one in runs]) for key in runs[0]}
        lines.append({"name": name, "rows": len(indices), "runs": runs, "mean": means})
        session.print_line(
            f"{name:<28}L_v {means['loss'][0]:.4f} ± {means['loss'][1]:.4f} after {task.num_steps} steps"
        )
    return {
        "before": before,
        "strategies": lines,
        "decided_by": "accuracy" if "accuracy" in before else "loss",
        "unit": task.objective.loss_unit,
        "steps": task.num_steps,
        "batch": task.batch_size,
        "validation": len(task.held_out_examples["validation"]),
        "seconds": session.job_cost("trials/")[1],
    }


class TrialSections(NamedTuple):
    """The sections of the task that the strategies train; see `TextTaskConfig`."""

    model: ModelSection
    lora: LoraSection
    data: DataSection
    objective: ObjectiveSection
    optimizer: OptimizerSection
    train: TrainSection
    mesh: MeshSection


def _prepare_trial_task(config: RankConfig, strategy_responses: StrategyResponses, session: Session) -> TextTask:
    validation = load_examples(config.data.validation, splits.make_data_options(config.data))
    validation_questions = {
        turn.content.strip() for example in validation for turn in example.turns if turn.role == "user"
    }
    available = [
        question for question in strategy_responses.questions if question.text.strip() not in validation_questions
    ]
    if len(available) < config.rank.train_examples:
        raise ValueError(
            f"rank.train_examples = {config.rank.train_examples}, but only {len(available)} of "
            f"{len(strategy_responses.questions)} questions do not stand in data.validation. Lower it, or give more "
            "questions."
        )
    questions = draw_blocks(available, config.rank.train_examples, 1, config.data.seed)[0]
    examples = [
        question.with_response(question.responses[at])._replace(source=name)
        for at, name in enumerate(strategy_responses.strategies)
        for question in questions
    ]
    examples = [example._replace(row=row) for row, example in enumerate(examples)]
    sections = TrialSections(
        model=config.model,
        lora=config.lora,
        data=replace(config.data, packing=False),
        objective=ObjectiveSection(),
        optimizer=config.optimizer,
        train=config.train,
        mesh=config.mesh,
    )
    dataset = splits.DataSplits(examples, {"validation": validation, "dev": [], "test": []}, [])
    return prepare_text_task(
        sections, dataset, session.folder, num_steps=config.train.max_steps, seeds=[config.data.seed]
    )


def _run_trial(
    config: RankConfig, task: TextTask, trainer: Trainer, session: Session, indices: np.ndarray | None, seed: int
) -> dict[str, float]:
    """The scores after one training run on the chosen examples (None: before training)."""
    start = trainer.init_state(task.init_params(config.train.seed + seed))
    params = start.params
    if indices is not None:
        stream = task.training_stream(config.data.seed + seed, indices, packed=False)
        params = trainer.run(jnp.ones(task.corpus.num_examples), start, stream).end.params
    scores = {
        "loss": float(
            validation_loss_fn(task.problem)(params, task.frozen(start.params), task.held_out_streams["validation"])
        )
    }
    if config.verifier.name:
        validation = task.held_out_examples["validation"]
        judge = make_verifier(config.verifier, validation)
        greedy = replace(config.generate, backend="embedded", temperature=0.0)  # a service has not been trained here
        generate = make_generator_factory(greedy, task.decoder, task.tokenizer, task.mesh, session)(
            assemble_params(params, task.base_params)
        )
        validation_prompts = make_task_prompts(task, config.data, validation)
        responses = [draws[0].text for draws in generate(validation_prompts, [0])]
        scores["accuracy"] = float(
            np.mean([judge(example, text) for example, text in zip(validation, responses, strict=True)])
        )
    return scores
