"""The `bilevel-jax` command line"""

import contextlib
import errno
import importlib
import os
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Command(NamedTuple):
    """One command of the command line. Names are imported when the command runs, so that help is quick."""

    config: str
    """Class of its config, in runs/config/load.py."""
    help: str


COMMANDS = {
    "select": Command(
        "SelectConfig", "learn a weight for every training example from a small validation set, by hypergradients"
    ),
    "train": Command(
        "TrainConfig", "fine-tune with a weight for every training example: SFT, DPO or SimPO, all parameters or LoRA"
    ),
    "compare": Command(
        "CompareConfig", "compare methods that learn weights at one compute budget, with several seeds"
    ),
    "audit": Command(
        "AuditConfig", "test data scores and hypergradients by leave-k-out retraining"
    ),
    "tune": Command(
        "TuneConfig", "find a setting of training at which exact hypergradients can be believed"
    ),
    "rank": Command(
        "RankConfig", "rank response generation strategies for a model, without training"
    ),
    "refine": Command(
        "RefineConfig", "improve a model with its own responses in rounds, each accepted only if it helps"
    ),
    "score": Command(
        "ScoreConfig", "apply a rater of select to new examples: weights, a selection, and what has drifted"
    ),
    "evaluate": Command(
        "EvaluateConfig", "ask one or two models a set of prompts, judge the answers, and say whether one is better"
    ),
    "inspect": Command(
        "InspectConfig", "show the examples as training sees them: tokens, lengths, truncation, duplicates, leaks"
    ),
    "estimate": Command(
        "EstimateConfig", "estimate memory, disk, work and hours of a run before it starts"
    ),
    "watch": Command(
        "WatchConfig", "draw a view of a running run in the terminal: its progress and the curves of its log"
    ),
    "export": Command(
        "ExportConfig",
        "write the examples that their weights select, for another trainer; CONFIG may be a run's folder",
    ),
}  # fmt: skip

DEBUG_VARIABLE = "BILEVEL_JAX_DEBUG"
"""The environment variable that, where it is set, lets an unexpected error pass with its traceback."""
MAX_LINE = 1600
"""Characters of a line of an error."""
OS_REMEDIES = {
    errno.ENOENT: "Look at its spelling; paths are relative to the current folder.",
    errno.EACCES: "Change its permissions, or choose another with --out.",
    errno.EPERM: "Change its permissions, or choose another with --out.",
    errno.EROFS: "Choose a folder that can be written with --out.",
    errno.EISDIR: "Name a file.",
    errno.ENOTDIR: "A part of the path is a file: name a folder.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.EMFILE: "Raise the limit of open files (ulimit -n).",
    errno.ENOSPC: "Free space, then --resume.",
    errno.EDQUOT: "Free space, then --resume.",
}
"""What helps against an error of the operating system, by its number."""

USAGE = """usage: bilevel-jax COMMAND [CONFIG] [flags]

commands:
{commands}

CONFIG is a YAML file; configs/quickstart.yaml needs no data and no model of yours. Every key is also a flag:

  bilevel-jax select configs/quickstart.yaml --outer.steps 3
  bilevel-jax select --model FOLDER --train rows.jsonl --validation trusted.jsonl --out out/mine

  bilevel-jax COMMAND --help                        the keys that most runs set
  bilevel-jax COMMAND --help-all                    all keys
  bilevel-jax --version                             the version
  bilevel-jax --tyro-print-completion bash          a completion script for bash, zsh or tcsh

{exit_codes}
Compiled programs are kept in ~/.cache/bilevel_jax, about 2 GB for each kind of CPU, so that the next run of the same
shapes starts sooner; JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false keeps none.
On several hosts start the same command on each, with --distributed.coordinator-address (auto on TPU pods, SLURM and
Kubernetes) and one output folder that all of them see. --mesh.fsdp N shards a large model over N devices.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command of the command line.

    Args:
        arguments: the command, its config and flags; None: those of the process.

    Returns:
        The exit code: 0 for success, 1 for an error, 2 for a wrong command line, 128 + N when stopped by signal N.
    """
    from bilevel_jax.runs.terminal import guard_streams

    with guard_streams():
        return _main(sys.argv[1:] if arguments is None else arguments)


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "--help-all"):
        print(_usage(), end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"bilevel-jax {version('bilevel-jax')}")
        return 0
    if arguments[0].startswith("--tyro-"):
        return _print_completion(arguments)
    name, *command_arguments = arguments
    if name not in COMMANDS:
        from bilevel_jax.runs.config.yaml_reader import suggest_nearest

        hint = suggest_nearest(name, COMMANDS)
        print(f"bilevel-jax: no command {name!r}; {hint}the commands: {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    if {"-h", "--help", "--help-all"} & set(command_arguments):
        from bilevel_jax.runs.config.load import print_config_help

        def show_help() -> str:
            path = _split_config(command_arguments)[0]
            path = None if path == "CONFIG" else path  # the word of the usage line, typed as it stands there
            print_config_help(_config_class(name), path, show_all="--help-all" in command_arguments)
            return ""

        return _report_errors(show_help)
    return _report_errors(lambda: RUNNERS.get(name, _run)(name, command_arguments))


def _usage() -> str:
    from bilevel_jax.runs.config.flags import EXIT_CODES

    lines = "\n".join(f"  {name:<10}{command.help}" for name, command in COMMANDS.items())
    return USAGE.format(commands=lines, exit_codes=EXIT_CODES)


def _run(name: str, arguments: list[str]) -> str:
    """Read the config, run the command and return its summary."""
    from bilevel_jax.runs.config.load import load_config, load_shipped_config

    path, flags = _copy_config(arguments)
    _check_config_file(path)
    config_class = _config_class(name)
    config = load_config(config_class, path, flags) if path else load_shipped_config(config_class, flags)
    return _call("run_command", config)


def _run_export(name: str, arguments: list[str]) -> str:
    """Run `export` on a config, or on the folder of a run with the config, data and weights of that run."""
    from bilevel_jax.commands.export.run import flags_for_run
    from bilevel_jax.runs.config.load import ExportConfig, load_config

    path, flags = _copy_config(arguments)
    run = Path(path) if path and Path(path).is_dir() else None
    if run and not (run / "config.yaml").is_file():
        raise ValueError(f"{run} holds no run: config.yaml is missing. Give a run's folder or a config.")
    if run:
        path, flags = str(run / "config.yaml"), [*flags_for_run(run), *flags]
    _check_config_file(path)
    return _call("run_export", load_config(ExportConfig, path, flags), run, _quote_export(arguments))


def _quote_export(arguments: list[str]) -> str:
    """The command as the card of the export quotes it."""
    from bilevel_jax.runs.config.local_paths import hide_paths_in_arguments

    return f"bilevel-jax export {shlex.join(hide_paths_in_arguments(arguments))}"


def _run_estimate(name: str, arguments: list[str]) -> str:
    """Run `estimate` on the config of a run, or compare the estimate of a finished run with what was measured."""
    from bilevel_jax.commands.estimate.run import compare_with_measured
    from bilevel_jax.runs.config.load import load_config_to_estimate

    path, flags = _copy_config(arguments)
    if path and Path(path).is_dir():
        return compare_with_measured(Path(path)).summary
    _check_config_file(path)
    return _call("run_estimate", *load_config_to_estimate(path, flags))


def _run_watch(name: str, arguments: list[str]) -> str:
    """Draw the view of the run in a folder."""
    from bilevel_jax.commands.watch.run import watch
    from bilevel_jax.runs.config.load import load_watch_config

    state = watch(load_watch_config(*_split_config(arguments)))
    return "It has ended." if state.result is not None else "It has not ended."


def _check_config_file(path: str | None) -> None:
    """Raise an error for the config of a run's folder that is not as the run wrote it."""
    from bilevel_jax.runs.infra import seals

    if path:
        seals.check(path)


RUNNERS: dict[str, Callable[[str, list[str]], str]] = {
    "export": _run_export, "estimate": _run_estimate, "watch": _run_watch,
}  # fmt: skip
"""Commands that take something else than a config file; the others are run by `_run`."""


def _call(function: str, config: Any, *more: Any) -> str:
    """Call a function of commands/functions.py, and summarize its result."""
    from bilevel_jax.runs.compiled_programs import keep_compiled_programs
    from bilevel_jax.runs.infra.distributed import find_coordinator

    distributed = getattr(config, "distributed", None)
    if distributed is None or not find_coordinator(distributed):
        # of several processes the first alone would write, and might run another program than the others compile
        keep_compiled_programs()
    result = _import(f"bilevel_jax.commands.functions:{function}")(config, *more)
    return f"{result.summary}\nreport: {config.output.dir}/report.html" if "report" in vars(result) else result.summary


def _report_errors(work: Callable[[], str]) -> int:
    """Print what the work returns; an error is one sentence, also one that nobody thought of."""
    from bilevel_jax.runs.config.renamed_keys import FlagError
    from bilevel_jax.runs.infra import distributed, session

    try:
        summary = work()
        if distributed.is_first_process():
            print(summary, flush=True)
    except session.Interrupted as stop:
        _print_error(str(stop))
        distributed.exit_after_error(str(stop), 128 + stop.number)
        return 128 + stop.number
    except KeyboardInterrupt:
        reason = "stopped at once by SIGINT; a run that had begun to save goes on with --resume."
        _print_error(reason)
        distributed.exit_after_error(reason, 128 + signal.SIGINT)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        with contextlib.suppress(OSError):  # who read the output has gone: | head
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        distributed.wait_for_cause()
        if (text := _describe_error(error)) is None:
            if os.environ.get(DEBUG_VARIABLE) and not distributed.is_multiprocess():  # others wait for a word
                raise
            text = _describe_unexpected(error)
        _print_error(text)
        code = 2 if isinstance(error, FlagError) else 1
        distributed.exit_after_error(text, code)
        return code
    return 0


def _print_error(text: str) -> None:
    """Print an error; of a long line, which quotes what was given, the beginning and the end with the remedy."""
    lines = [
        line if len(line) <= MAX_LINE else f"{line[: MAX_LINE // 2]} ... {line[-MAX_LINE // 2 :]}"
        for line in text.split("\n")  # the other line ends are shown
    ]
    print("bilevel-jax: " + "\n".join(lines), file=sys.stderr)


def _describe_error(error: Exception) -> str | None:
    """The sentence of an error of the user or the machine; None for one that nobody thought of."""
    if isinstance(error, MemoryError) or ("RESOURCE_EXHAUSTED" in str(error) and not _is_raised_here(error)):
        return (
            f"the memory is full ({str(error).splitlines()[0][:200] if str(error) else 'of this machine'}). "
            "`bilevel-jax estimate CONFIG` says what a run needs; raise train.gradient_accumulation_steps, lower "
            "data.max_length, or set model.remat to full."
        )
    if "Unable to initialize backend" in str(error):
        return f"{str(error).splitlines()[0]} Look at JAX_PLATFORMS, and at which jaxlib is installed for this machine."
    if isinstance(error, OSError) and error.strerror:
        if error.filename is None:
            remedy = OS_REMEDIES.get(error.errno or 0, "")
            is_whole = not remedy or error.strerror.endswith(remedy)
            return error.strerror if is_whole else f"{error.strerror.rstrip('.')}. {remedy}"
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else error.filename
        remedy = OS_REMEDIES.get(error.errno or 0, "Look at the file or the folder, or name another.")
        return f"{name}: {error.strerror[:1].lower()}{error.strerror[1:]}. {remedy}"
    is_known = isinstance(error, ValueError | OSError | RuntimeError | FloatingPointError)
    return str(error) if is_known and _is_raised_here(error) else None


def _is_raised_here(error: Exception) -> bool:
    """Whether code of this package raised the error, and not a library that it calls."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(__file__).parent)


def _describe_unexpected(error: Exception) -> str:
    """One sentence, with the file where the traceback is."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    try:
        with tempfile.NamedTemporaryFile("w", prefix="bilevel-jax-", suffix=".txt", delete=False) as file:
            file.write("".join(traceback.format_exception(error)).encode("utf-8", "replace").decode())
        place = f"the traceback is in {file.name}"
    except OSError:
        place = f"{DEBUG_VARIABLE}=1 shows the traceback"
    return (
        f"unexpected {type(error).__name__}: {text[:300].rstrip('.') or 'no text'}. If your input is right, please "
        f"report it; {place}."
    )


def _print_completion(arguments: list[str]) -> int:
    """Print a completion script for a shell, with the commands and their flags."""
    import functools
    import operator
    from typing import Annotated

    import tyro

    configs: list[Any] = [
        Annotated[_config_class(name), tyro.conf.subcommand(name, description=command.help)]
        for name, command in COMMANDS.items()
    ]
    tyro.cli(functools.reduce(operator.or_, configs), prog="bilevel-jax", args=arguments)
    return 0


def _split_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The config's path, where the first argument is no flag, and the flags."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    return None, arguments


def _copy_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    """As `_split_config`, of a URL the path of a copy."""
    from bilevel_jax.storage import copies

    path, flags = _split_config(arguments)
    return copies.copy_if_url(path), flags


def _config_class(name: str) -> Any:
    return _import(f"bilevel_jax.runs.config.load:{COMMANDS[name].config}")


def _import(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


if __name__ == "__main__":
    sys.exit(main())
