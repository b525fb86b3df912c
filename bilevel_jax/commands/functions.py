"""The commands as functions of Python values, which return typed results.

Each takes a config and sections by keyword; `bj.commands.select(...)` is `bilevel-jax select ...` without a command
line. Messages speak of flags; in Python `--out` is `output={"dir": ...}` and `--resume` is `output={"resume": True}`.
"""

import contextlib
import importlib
import os
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from bilevel_jax.commands.results import (
    AuditResult,
    CompareResult,
    EstimateResult,
    EvaluateResult,
    ExportResult,
    InspectResult,
    RankRecordsResult,
    RankResult,
    RefineResult,
    Result,
    RunResult,
    ScoreResult,
    SelectResult,
    TrainResult,
    TuneResult,
    read_run,
)
from bilevel_jax.runs.config.load import (
    COMMANDS,
    AuditConfig,
    CompareConfig,
    EvaluateConfig,
    ExportConfig,
    InspectConfig,
    RankConfig,
    RefineConfig,
    RunConfig,
    ScoreConfig,
    SelectConfig,
    TrainConfig,
    TuneConfig,
    load_config,
)
from bilevel_jax.runs.config.python_values import make_config, make_config_to_estimate
from bilevel_jax.runs.infra import distributed, identity, inputs, seals
from bilevel_jax.storage import copies, urls

ConfigLike = Mapping[str, Any] | str | os.PathLike[str] | None
"""Sections by name, the name of a YAML file, or nothing for the defaults."""
AnyConfig = (
    SelectConfig
    | TrainConfig
    | CompareConfig
    | AuditConfig
    | TuneConfig
    | RankConfig
    | RefineConfig
    | ScoreConfig
    | EvaluateConfig
    | InspectConfig
    | ExportConfig
)


def select(config: SelectConfig | ConfigLike = None, **sections: Any) -> SelectResult:
    """Learn a weight for every training example from a small trusted validation set, by exact hypergradients.

    The weights w minimise L_v(theta_T(w)), the validation loss of the model that is trained with them. A run takes
    minutes to hours and writes its folder, output.dir: the report, weights.parquet, selected.jsonl and the model.

    Args:
        config: a `SelectConfig`, a dict of sections or the name of a YAML file; None for the defaults of the keys.
        **sections: sections of the config by name, each a dict of its keys or its dataclass, which override `config`:
            model, lora, data, objective, optimizer, train, outer, single_loop, scores, output, selection, retrain,
            certify, mesh, distributed. A single key is `**{"train.max_steps": 100}`; `bj.commands.schema` has the
            dataclasses of the sections with the meaning of each key.

    Returns:
        The verdict, and arrays with one entry for each training example.

    Raises:
        ValueError: one line for each key that is unknown, renamed, wrongly typed or out of its bounds, or one sentence
            for data, a model or a machine that do not fit; no work is done before.
        FileNotFoundError: for a config or file that is not there; other kinds of OSError for one that cannot be read.
        FileExistsError: where output.dir holds a run and output.resume is false, or something else.
        RuntimeError: where another process uses output.dir, or another thread runs a command.
        FloatingPointError: where training diverges.
        Interrupted: when the run is asked to stop (SIGTERM, or SIGINT as a notebook's button sends); it has saved.

    Example:
        The built-in task, and a run on own files:

        >>> result = bj.commands.select("configs/quickstart.yaml", outer={"steps": 3})  # doctest: +SKIP
        >>> trusted = result.ids[result.weights > 1]  # doctest: +SKIP
        >>> result = bj.commands.select(  # doctest: +SKIP
        ...     model={"name_or_path": "models/mine"},
        ...     data={"train": ["rows.jsonl"], "validation": ["trusted.jsonl"]},
        ...     output={"dir": "out/mine"},
        ... )

        A wrong key is named before anything is read:

        >>> bj.commands.select("configs/quickstart.yaml", train={"max_step": 3})
        Traceback (most recent call last):
        ValueError: select: unknown key 'train.max_step'; did you mean 'max_steps'? the keys of train: max_steps, ...

    Wrong when:
        the verdict is DO NOT BELIEVE: training is too rough for derivatives to say what a change of weights does.
    """
    return _run(SelectConfig, config, sections)


def train(config: TrainConfig | ConfigLike = None, **sections: Any) -> TrainResult:
    """Fine-tune a language model with a weight for every training example: SFT, DPO or SimPO, in full or with LoRA.

    Args:
        config: a `TrainConfig`, a dict of sections or the name of a YAML file; None for the defaults of the keys.
        **sections: as of `select`: model, lora, data, objective, weights, scores, optimizer, train, output, mesh,
            distributed.

    Returns:
        Losses before and after, the weights, and where the model is.

    Raises:
        ValueError: and other errors as `select` does; for ids without a weight, too.

    Example:
        >>> result = bj.commands.train(  # doctest: +SKIP
        ...     "configs/train.yaml", weights={"file": selected.folder / "weights.parquet"}, output={"dir": "out/tuned"}
        ... )
    """
    return _run(TrainConfig, config, sections)


def compare(config: CompareConfig | ConfigLike = None, **sections: Any) -> CompareResult:
    """Compare methods that learn weights on one data set at one compute budget, with several seeds.

    Args:
        config: a `CompareConfig`, a dict of sections or the name of a YAML file; None for the defaults of the keys.
        **sections: as of `select`: model, lora, data, arrays, objective, target, optimizer, train, outer, rater,
            single_loop, compare, evaluate, generate, verifier, judge, output, mesh, distributed.

    Returns:
        The table of methods, and the weights of each by example and seed; with evaluate.prompts each arm's answers
        beside those of evaluate.baseline.

    Raises:
        ValueError: and other errors as `select` does; where the budget moves no weight twice, too.

    Example:
        >>> result = bj.commands.compare("configs/compare_mnist.yaml", compare={"seeds": 5})  # doctest: +SKIP
        >>> result.weights["unrolled"][result.seeds == 0]  # doctest: +SKIP
    """
    return _run(CompareConfig, config, sections)


def audit(config: AuditConfig | ConfigLike = None, **sections: Any) -> AuditResult:
    """Test data scores and hypergradients by leave-k-out retraining (linear datamodeling score, LDS).

    Args:
        config: an `AuditConfig`, a dict of sections or the name of a YAML file; None for the defaults of the keys.
        **sections: as of `select`: model, lora, data, arrays, objective, optimizer, train, outer, scores, audit,
            certify, output, mesh, distributed.

    Returns:
        Which score to use, the table of scores, and the scores of each example.

    Raises:
        ValueError: and other errors as `select` does.

    Example:
        >>> result = bj.commands.audit("configs/audit_mnist.yaml", audit={"subsets": 64})  # doctest: +SKIP
        >>> result.use, result.scores["alignment_end"]  # doctest: +SKIP
    """
    return _run(AuditConfig, config, sections)


def tune(config: TuneConfig | ConfigLike = None, **sections: Any) -> TuneResult:
    """Find a setting of training at which exact hypergradients can be believed, by a few runs with uniform weights.

    Args:
        config: a `TuneConfig`, a dict of sections or the name of a YAML file, as of a run of `select` whose verdict is
            DO NOT BELIEVE or UNDECIDED; None for the defaults of the keys.
        **sections: as of `select`, and tune: the values to try, the budget and how much loss may rise; audit, which
            goes into tuned.yaml. With one .npz in data.train also arrays, as of `audit`.

    Returns:
        The settings that were tried with their losses and verdicts, the proposed one, and where the config with it is.

    Raises:
        ValueError: and other errors as `select` does, for several processes, too; a training that diverges is no error
            but a setting that does not hold.

    Example:
        >>> result = bj.commands.tune("configs/quickstart.yaml", output={"dir": "out/tune"})  # doctest: +SKIP
        >>> bj.commands.select(result.tuned)  # doctest: +SKIP

    Wrong when:
        its verdict is taken for one at learned weights: it is at uniform weights, and `select` certifies again.
    """
    return _run(TuneConfig, config, sections)


def rank(config: RankConfig | ConfigLike = None, **sections: Any) -> RankResult | RankRecordsResult:
    """Rank response generation strategies for a model, before training on any of them.

    Args:
        config: a `RankConfig`, a dict of sections or the name of a YAML file; None for the defaults of the keys.
        **sections: as of `select`: model, lora, data, rank, generate, verifier, optimizer, train, output, mesh,
            distributed.

    Returns:
        The pick, the scores of the strategies, and what was measured of each response; with rank.records, what
        picking by each metric reached.

    Raises:
        ValueError: and other errors as `select` does.

    Example:
        >>> bj.commands.rank("configs/rank.yaml", rank={"metrics": ["sppl", "ifd"]}).pick  # doctest: +SKIP
    """
    return _run(RankConfig, config, sections)


def refine(config: RefineConfig | ConfigLike = None, **sections: Any) -> RefineResult:
    """Improve a model with its own responses in rounds, and accept a round only if it helps on held-out examples.

    Args:
        config: a `RefineConfig`, a dict of sections or the name of a YAML file; None for the defaults of the keys.
        **sections: as of `select`: model, lora, data, objective, refine, generate, verifier, optimizer, train, outer,
            single_loop, output, mesh, distributed.

    Returns:
        The rounds, the weights of their examples, and where the last accepted model is.

    Raises:
        ValueError: and other errors as `select` does.

    Example:
        >>> result = bj.commands.refine("configs/refine_exact.yaml", refine={"rounds": 2})  # doctest: +SKIP
        >>> result.accepted, result.weights[result.generated]  # doctest: +SKIP
    """
    return _run(RefineConfig, config, sections)


def score(config: ScoreConfig | ConfigLike = None, **sections: Any) -> ScoreResult:
    """Apply a rater, which `select` has learned, to examples that it has never seen: weights without a training.

    Args:
        config: a `ScoreConfig`, a dict of sections or the name of a YAML file; None for the defaults of the keys.
        **sections: as of `select`: score, data, selection, output, distributed. score.rater is the folder rater/ of a
            run of `select`, data.train the new examples.

    Returns:
        The logit and the weight of each example, by id, and the features that have drifted.

    Raises:
        ValueError: and other errors as `select` does; for another model than the rater's, a rater that is damaged, and
            a feature that is no finite number, with the id of the row.

    Example:
        >>> result = bj.commands.score(  # doctest: +SKIP
        ...     score={"rater": "out/mine/rater"}, data={"train": ["new.jsonl"]}, output={"dir": "out/scored"}
        ... )
        >>> result.ids[result.weights > 1], result.drifted  # doctest: +SKIP

    Wrong when:
        features have drifted: the new examples are unlike those that the rater was learned from.
    """
    return _run(ScoreConfig, config, sections)


def evaluate(config: EvaluateConfig | ConfigLike = None, **sections: Any) -> EvaluateResult:
    """Ask one or two models a set of prompts, judge their answers, and say whether the first is better.

    Args:
        config: an `EvaluateConfig`, a dict of sections or the name of a YAML file; None for the defaults of the keys.
        **sections: as of `select`: evaluate, data, generate, verifier, judge, output, mesh, distributed. data.test has
            the prompts, evaluate.model and evaluate.baseline the models: folders of models, adapters or runs, or
            services as NAME@URL.

    Returns:
        Better, worse or no difference told, with paired intervals; every answer, and what was measured of it.

    Raises:
        ValueError: and other errors as `select` does; for prompts without references where a metric needs them, too.
        RuntimeError: where a service refuses or does not answer; what it answered before is stored, and the run goes
            on with output={"resume": True}.

    Example:
        >>> result = bj.commands.evaluate(  # doctest: +SKIP
        ...     evaluate={"model": "out/mine", "baseline": "models/mine"}, data={"test": ["asked.jsonl"]},
        ...     verifier={"name": "numeric"}, output={"dir": "out/evaluated"},
        ... )
        >>> result.level, result.answers[result.roles == "model"]  # doctest: +SKIP

    Wrong when:
        the prompts were trained on, or a judge prefers what has nothing to do with quality, as length.
    """
    return _run(EvaluateConfig, config, sections)


def inspect(config: AnyConfig | ConfigLike = None, **sections: Any) -> InspectResult:
    """Print the training examples as training sees them, and what to act on; nothing is trained.

    Args:
        config: an `InspectConfig` or the config of any other command, a dict of sections or the name of a YAML file.
        **sections: as of `select`: model, lora, data, objective, show.

    Returns:
        The findings, and the tokens of each example.

    Raises:
        ValueError: for keys as `select` does, and for files, examples or a template that no command could begin with.
        FileNotFoundError: for a config or file that is not there.

    Example:
        >>> found = bj.commands.inspect("configs/quickstart.yaml", show={"examples": 2})  # doctest: +SKIP
        >>> found.findings, found.parts["training"].tokens.max()  # doctest: +SKIP
    """
    return _run(InspectConfig, config, sections)


def estimate(config: RunConfig | RunResult | ConfigLike = None, **sections: Any) -> EstimateResult:
    """Print and return the memory, disk, work and hours of a run before it starts; or next to those of a finished run.

    Args:
        config: the config of a run of `select`, `train`, `compare` or `audit`: its dataclass, a dict of sections or
            the name of a YAML file; or the folder or result of a finished run.
        **sections: sections of that config, and `estimate` for the machine and how to estimate.

    Returns:
        The peak of memory, the work, the hours and all of their parts.

    Raises:
        ValueError: for a config that its command would not run either, and for more devices than this process has,
            which only a process of its own can simulate: `bilevel-jax estimate`.
        FileNotFoundError: for a config or model that is not there.

    Example:
        >>> sizes = bj.commands.estimate("configs/quickstart.yaml", estimate={"measure": False})  # doctest: +SKIP
        >>> sizes.peak_bytes  # doctest: +SKIP
    """
    with _explain_flags():
        return _estimate(config, sections)


def export(config: AnyConfig | RunResult | ConfigLike = None, **sections: Any) -> ExportResult:
    """Write the examples that their weights select, in the input format of another trainer, with a dataset card.

    Args:
        config: the folder or result of a run of `select` or `train`, whose data and weights are used; or an
            `ExportConfig`, the config of another command, a dict of sections or the name of a YAML file.
        **sections: as of `select`: data, weights, selection, export.

    Returns:
        Where the files are, and how often each example was written.

    Raises:
        ValueError: for keys as `select` does, and for examples that lack a weight or do not fit the format.
        FileExistsError: where export.dir is there already.
        FileNotFoundError: for a config or file that is not there.

    Example:
        >>> bj.commands.export("out/quickstart", export={"dir": "out/chosen", "format": "trl"})  # doctest: +SKIP
    """
    with _explain_flags():
        return _export(config, sections)


# ---- what the command line calls, too


FLAGS_IN_PYTHON = (
    "In Python, --section.key VALUE is section={'key': VALUE}, --out is output={'dir': ...}, --resume is "
    "output={'resume': True}."
)
"""Note on errors whose text names flags."""
_process = threading.Lock()
"""Held while a command runs."""


def run_command(config: Any) -> Result:
    """Run the command of a checked config: of any but `estimate` and `export`."""
    command = COMMANDS[type(config)]
    copies.forget_copies()
    if "distributed" in vars(config):
        distributed.initialize_distributed(config.distributed, lambda: identity.list_shared_values(config))
    function = _import(f"bilevel_jax.commands.{command}.run:{command}")
    with _hold_process(config):
        config = inputs.pin_hub_names(config)
        with copies.shown_errors():
            outcome = function(inputs.copy_inputs(config))
        if isinstance(outcome, InspectResult):
            return outcome
        result = read_run(config, copies.local_path(config.output.dir))
        if urls.is_remote(config.output.dir):
            distributed.wait_for_all_processes()  # the first removes its copy when it ends
        return result


def run_estimate(config: Any, options: Any) -> EstimateResult:
    """Estimate the run of a checked config."""
    copies.forget_copies()
    with _hold_process(config), copies.shown_errors():
        config = inputs.copy_inputs(inputs.pin_hub_names(config))
        return _import("bilevel_jax.commands.estimate.run:estimate")(config, options)


def run_export(config: ExportConfig, run: Path | None = None, command: str = "") -> ExportResult:
    """Export by a checked config, of a run's folder if there is one; `command` is quoted in the card."""
    copies.forget_copies()
    with copies.shown_errors():
        config = inputs.copy_inputs(inputs.pin_hub_names(config))
        return _import("bilevel_jax.commands.export.run:export")(config, run, command)


@contextlib.contextmanager
def _hold_process(config: Any) -> Iterator[None]:
    """Inside, this command alone runs, and JAX has 64 bits if model.param_dtype asks for them and else not.

    So the config alone decides what is computed, whatever the program that calls has set; then all is as before. The
    setting holds for all threads, so that two commands at once could change each other's numbers.
    """
    if not _process.acquire(blocking=False):
        raise RuntimeError(
            "another command runs in this process, in another thread. Call them one after the other, or in processes."
        )
    before = jax.config.read("jax_enable_x64")
    try:
        if "model" in vars(config):
            jax.config.update("jax_enable_x64", config.model.param_dtype == "float64")
        elif "evaluate" in vars(config):  # evaluate.dtype has no 64 bits
            jax.config.update("jax_enable_x64", False)
        yield
    finally:
        jax.config.update("jax_enable_x64", before)
        _process.release()


def _run(config_class: Any, config: Any, sections: Mapping[str, Any]) -> Any:
    config = copies.copy_if_url(config)
    with _explain_flags():
        _check_config_file(config)
        return run_command(make_config(config_class, config, sections))


def _estimate(config: Any, sections: Mapping[str, Any]) -> EstimateResult:
    config = copies.copy_if_url(config)
    if folder := _find_run(config):
        if sections:
            raise ValueError(f"estimate: {folder} is a finished run, which has no {', '.join(sections)} to change.")
        return _import("bilevel_jax.commands.estimate.run:compare_with_measured")(folder)
    _check_config_file(config)
    run_config, options = make_config_to_estimate(config, sections)
    if options.devices > len(jax.devices()):
        raise ValueError(
            f"estimate.devices = {options.devices}, and this process has {len(jax.devices())}: others are simulated in "
            "a process of its own. Call `bilevel-jax estimate CONFIG --estimate.devices N`."
        )
    return run_estimate(run_config, options)


def _export(config: Any, sections: Mapping[str, Any]) -> ExportResult:
    config = copies.copy_if_url(config)
    run = _find_run(config)
    if run is None:
        _check_config_file(config)
        return run_export(make_config(ExportConfig, config, sections))
    _check_config_file(run / "config.yaml")
    flags = _import("bilevel_jax.commands.export.run:flags_for_run")(run)
    own_config = load_config(ExportConfig, run / "config.yaml", flags)
    return run_export(make_config(ExportConfig, own_config, sections), run)


@contextlib.contextmanager
def _explain_flags() -> Iterator[None]:
    """Add to an error whose text names flags of the command line how they are given in Python."""
    try:
        yield
    except Exception as error:
        if re.search(r"--[a-z]", str(error)):
            error.add_note(FLAGS_IN_PYTHON)
        raise


def _check_config_file(config: Any) -> None:
    """Raise an error for the config of a run's folder that is not as the run wrote it."""
    if isinstance(config, str | os.PathLike):
        seals.check(Path(config))


def _find_run(config: Any) -> Path | None:
    """The folder of a run, where one is given or the result of one."""
    if isinstance(config, RunResult):
        return config.folder
    if not isinstance(config, str | os.PathLike) or not Path(config).is_dir():
        return None
    if not (Path(config) / "config.yaml").is_file():
        raise ValueError(f"{config} holds no run: config.yaml is missing. Give a run's folder or a config.")
    return Path(config)


def _import(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
