"""The command line: `bilevel-jax COMMAND CONFIG [options]`, one line each into runs/."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

USAGE = """usage: bilevel-jax COMMAND CONFIG [options]

  select CONFIG   learn a weight for every training example from a small trusted validation set, by exact hypergradients;
                  writes the weights, the selected subset, a model and a report
  compare CONFIG  compare methods that learn weights: one data set, one budget, several seeds; a table and a picture
  audit CONFIG    judge cheap scores of training examples by exact ones, and all of them by retraining without some rows
  rank CONFIG     which way of generating responses will train a model best, from a small sample, without training:
                  self-aligned perplexity and other scores, with intervals; a pick, or no clear winner
  refine CONFIG   let a model answer questions itself, train on that under the eyes of validation examples, and accept what is
                  better, in rounds; every response traceable, every decision with its interval
  train CONFIG    fine-tune with a weight for every training example (those of `select`, a score, or 1): SFT, DPO or SimPO,
                  all parameters or LoRA; writes the model and a report
  inspect CONFIG  show what training would see: tokens and their labels, lengths, truncation, duplicates, leaks
  estimate CONFIG say what a run will take: memory of each device, disk, work, hours; for models and devices that are
                  not here, too. On the folder of a finished run: the estimate beside what was measured
  export RUN      write the rows that their weights choose, in the input form of another trainer; RUN is a run's folder,
                  or a CONFIG that names weights

On several hosts start the same select or train on each, with --distributed.coordinator-address (auto on TPU pods, SLURM and
Kubernetes) and one folder that all of them see. --mesh.fsdp N splits a large model over N devices.

CONFIG is a YAML file (configs/quickstart.yaml needs no data of yours; configs/select.yaml and configs/train.yaml are
for your own). `bilevel-jax COMMAND --help` explains every option; any of them may follow CONFIG, as in

  bilevel-jax select configs/select.yaml --model.name-or-path FOLDER --data.train rows.jsonl --out out/first
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0 when it succeeded, 1 for trouble told in one line, 128 + signal when it was stopped."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    command, *command_arguments = arguments
    if command not in COMMANDS:
        print(f"bilevel-jax: no command {command!r}; the commands are: {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    return COMMANDS[command](command_arguments)


def _select(arguments: list[str]) -> int:
    def work(config):
        from bilevel_jax.commands.select.run import select

        result = select(config)
        return f"{result['verdict']['sentence']}\nreport: {config.output.dir}/report.html"

    from bilevel_jax.runs.config.load import SelectConfig

    return _run_command(SelectConfig, arguments, work)


def _compare(arguments: list[str]) -> int:
    def work(config):
        from bilevel_jax.commands.compare.run import compare

        return f"{compare(config)['sentence']}\nreport: {config.output.dir}/report.html"

    from bilevel_jax.runs.config.load import CompareConfig

    return _run_command(CompareConfig, arguments, work)


def _audit(arguments: list[str]) -> int:
    def work(config):
        from bilevel_jax.commands.audit.run import audit

        return f"{audit(config)['verdict']['sentence']}\nreport: {config.output.dir}/report.html"

    from bilevel_jax.runs.config.load import AuditConfig

    return _run_command(AuditConfig, arguments, work)


def _rank(arguments: list[str]) -> int:
    def work(config):
        from bilevel_jax.commands.rank.run import rank

        return f"{rank(config)['verdict']['sentence']}\nreport: {config.output.dir}/report.html"

    from bilevel_jax.runs.config.load import RankConfig

    return _run_command(RankConfig, arguments, work)


def _refine(arguments: list[str]) -> int:
    def work(config):
        from bilevel_jax.commands.refine.run import refine

        return f"{refine(config)['sentence']}\nreport: {config.output.dir}/report.html"

    from bilevel_jax.runs.config.load import RefineConfig

    return _run_command(RefineConfig, arguments, work)


def _train(arguments: list[str]) -> int:
    def work(config):
        from bilevel_jax.commands.train.run import summarize_training, train

        return f"{summarize_training(train(config))}\nreport: {config.output.dir}/report.html"

    from bilevel_jax.runs.config.load import TrainConfig

    return _run_command(TrainConfig, arguments, work)


def _inspect(arguments: list[str]) -> int:
    def work(config):
        from bilevel_jax.commands.inspect.run import inspect

        return inspect(config)

    from bilevel_jax.runs.config.load import InspectConfig

    return _run_command(InspectConfig, arguments, work)


def _export(arguments: list[str]) -> int:
    def work(config):
        from bilevel_jax.commands.export.run import export

        return export(config, run, f"bilevel-jax export {shlex.join(arguments)}")

    from bilevel_jax.runs.config.load import ExportConfig

    run = Path(arguments[0]) if arguments and Path(arguments[0]).is_dir() else None
    if run is None:
        return _run_command(ExportConfig, arguments, work)
    if not (run / "config.yaml").is_file():
        print(
            f"bilevel-jax: {run} holds no run: config.yaml is missing. Give a run's folder or a config.",
            file=sys.stderr,
        )
        return 1
    from bilevel_jax.commands.export.run import flags_for_run

    return _run_command(ExportConfig, [str(run / "config.yaml"), *flags_for_run(run), *arguments[1:]], work)


def _estimate(arguments: list[str]) -> int:
    def work():
        from bilevel_jax.commands.estimate.run import compare_with_measured, estimate
        from bilevel_jax.runs.config.load import load_config_to_estimate

        if config_paths and Path(config_paths[0]).is_dir():
            return compare_with_measured(Path(config_paths[0]))
        run, estimate_settings = load_config_to_estimate(
            config_paths[0] if config_paths else None, arguments[len(config_paths) :]
        )
        _enable_float64(run)
        return estimate(run, estimate_settings)

    config_paths = [] if not arguments or arguments[0].startswith("-") else [arguments[0]]
    return _report_errors(work)


def _run_command(config_type: type, arguments: list[str], command: Callable[[Any], str]) -> int:
    """Read the config, do the work, print what it says; trouble of the user's or the machine's is one line."""
    from bilevel_jax.runs.config.load import load_config

    def load_and_run():
        settings = load_config(config_type, config_paths[0] if config_paths else None, arguments[len(config_paths) :])
        if "distributed" in vars(settings):
            from bilevel_jax.runs.infra import distributed

            distributed.initialize_distributed(settings.distributed)
        _enable_float64(settings)
        return command(settings)

    config_paths = [] if not arguments or arguments[0].startswith("-") else [arguments[0]]
    return _report_errors(load_and_run)


def _enable_float64(settings: Any) -> None:
    """Let jax have float64 where a config trains in it."""
    if "model" in vars(settings) and settings.model.param_dtype == "float64":
        import jax

        jax.config.update("jax_enable_x64", True)


def _report_errors(work: Callable[[], str]) -> int:
    """Print what the work says; trouble of the user's or the machine's is one line."""
    from bilevel_jax.runs.infra import session

    try:
        print(work())
    except session.Interrupted as stop:
        print(f"bilevel-jax: {stop}", file=sys.stderr)
        return 128 + stop.number
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        print(f"bilevel-jax: {error}", file=sys.stderr)
        return 1
    return 0


COMMANDS = {
    "select": _select, "compare": _compare, "audit": _audit, "rank": _rank, "refine": _refine, "train": _train,
    "inspect": _inspect, "estimate": _estimate, "export": _export,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
