"""Time, memory and error of one hypergradient, next to PyTorch and other libraries.

    pip install --no-deps -r tests/benchmarks/requirements.txt
    python -m tests.benchmarks.peers

An hour on two busy CPU cores, most of it the transformer; prints a markdown table for each problem. A library that is
not there, or does not run, leaves its row with the reason. The problems, made of random numbers (peers_problems.py):

    mlp          d (held-out loss after 100 Adam steps of 128 rows) / d (weights of 1,024 rows), 199,210 parameters
    transformer  the same for a Llama of 1.89 million parameters, 16 steps of 16 rows of 64 tokens, 256 weights
    solve        d (held-out loss at the minimum of softmax regression) / d (weights of 2,000 rows): CG to 1e-6

All contestants start from the same numbers, read the same batches and take the same Adam steps in float32. Each lives
in a process of its own with the same number of cores; after a run that compiles and one that measures memory, the
processes take turns, one of them at work at a time, and medians over the rounds are compared, so that a busy machine
slows all. Memory is a run's largest resident size above that before it: imports, data and compiled programs are there,
and what was freed has been given back to the system. The error is |found - exact| / |exact|, where exact is jax.grad
through a scan of the whole training in float64 (for `solve`: the Hessian in closed form, solved directly, in numpy).

With --retrains N each hypergradient foretells the held-out losses of N trainings without a random half of the rows, by
the sum of the parts that leave; Spearman's correlation with what they are, and its 95 % interval by bootstrap over the
retrains, which are the same for all.
"""

import argparse
import ctypes
import gc
import importlib
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import spearmanr

from tests.benchmarks import peers_problems

LARGE = 2000
"""MB that a process may keep between its turns; several of five thousand would fill a machine."""


class Contestant(NamedTuple):
    """Who, which function of which module makes it, and the row that is its own plain training."""

    name: str
    module: str
    function: str
    plain: str = ""
    options: dict[str, Any] = {}  # noqa: B006, RUF012


JAX, TORCH, OURS = "plain training, JAX", "plain training, PyTorch", "plain training, bilevel_jax"
TRAINING = (
    Contestant(JAX, "peers_jax", "plain", JAX),
    Contestant(TORCH, "peers_torch", "plain", TORCH),
    Contestant(OURS, "peers_jax", "alone", OURS),
    Contestant("jax.grad through a scan", "peers_jax", "scanned", JAX, {"checkpoint": False}),
    Contestant("the same, jax.checkpoint on each step", "peers_jax", "scanned", JAX, {"checkpoint": True}),
    Contestant("PyTorch autograd", "peers_torch", "autograd", TORCH),
    Contestant("TorchOpt", "peers_torch", "torchopt", TORCH),
    Contestant("higher, its own Adam", "peers_torch", "higher", TORCH, {"own": True}),
    Contestant("higher, an Adam with eps_root", "peers_torch", "higher", TORCH, {"own": False}),
    Contestant("hypertorch, reverse_unroll", "peers_torch", "hypertorch", TORCH, {"unroll": True}),
    Contestant("hypertorch, reverse", "peers_torch", "hypertorch", TORCH, {"unroll": False}),
    Contestant("bergson MAGIC, √T checkpoints", "peers_torch", "bergson", TORCH),
    Contestant("bilevel_jax, every state kept", "peers_jax", "swept", OURS, {"kept": "everything"}),
    Contestant("bilevel_jax, √T snapshots", "peers_jax", "swept", OURS, {"kept": "square root"}),
    Contestant("the same, linearised", "peers_jax", "swept", OURS, {"kept": "square root, linear"}),
    Contestant("bilevel_jax, half of √T", "peers_jax", "swept", OURS, {"kept": "half"}),
)
ON_ARRAYS = (
    Contestant("bilevel_jax, unroll on arrays, every state kept", "peers_jax", "compiled", OURS, {"memory": "all"}),
    Contestant("bilevel_jax, unroll on arrays, √T", "peers_jax", "compiled", OURS, {"memory": "sqrt"}),
)
"""Of the MLP: a language model's batches come from a stream."""
SOLVE = "jax.scipy's CG, one program"
SOLVING = (
    Contestant(SOLVE, "peers_jax", "closed", SOLVE),
    Contestant("TorchOpt, solve_cg", "peers_solve", "torchopt", SOLVE),
    Contestant("hypertorch, CG", "peers_solve", "hypertorch", SOLVE),
    Contestant("Betty, cg", "peers_solve", "betty", SOLVE),
    Contestant("bilevel_jax, implicit", "peers_jax", "solved", SOLVE),
)
ORACLE = Contestant("oracle", "peers_jax", "oracle")
RETRAINS = Contestant("retrains", "peers_jax", "retrained")


class Result(NamedTuple):
    """One contestant's row: numbers, or why there are none."""

    seconds: list[float]
    megabytes: float = float("nan")
    error: float | None = None
    """None: it gives no hypergradient."""
    rank: tuple[float, float, float] | None = None
    """Spearman's correlation with retrains, and its 95 % interval by bootstrap over them; None where none were made."""
    reason: str = ""


def main(*, problems: list[str], only: list[str], rounds: int, threads: int, clock: str, retrains: int) -> None:
    """Print the tables."""
    os.environ["OMP_NUM_THREADS"] = str(threads)  # before any process starts
    print(f"{threads} threads, {clock} time, {rounds} rounds; load {os.getloadavg()[0]:.1f} at the beginning")
    with tempfile.TemporaryDirectory() as folder:
        for name in problems:
            problem = PROBLEMS[name](Path(folder))
            chosen = {"mlp": TRAINING + ON_ARRAYS, "transformer": TRAINING, "solve": SOLVING}[name]
            kept = {one.plain for one in chosen if _matches(one, only)} | {chosen[0].name}
            chosen = [one for one in chosen if one.name in kept or _matches(one, only)]
            measured = Measured(exact_hypergradient(problem, threads), *_retrain(problem, threads, retrains))
            table(name, compete(chosen, problem, measured, rounds, threads, clock), chosen)
    print(f"\nload {os.getloadavg()[0]:.1f} at the end")


class Measured(NamedTuple):
    """What hypergradients are compared with."""

    exact: np.ndarray
    removed: np.ndarray
    """bool[retrains, rows]: what each left out."""
    losses: np.ndarray
    """The held-out loss of each retrain."""

    def rank(self, weights: np.ndarray, found: np.ndarray) -> tuple[float, float, float] | None:
        """How well the sum of the parts that leave, to first order, ranks the losses."""
        if not len(self.losses):
            return None
        foretold = -(self.removed @ (weights * found))
        draws = np.random.default_rng(0).integers(len(foretold), size=(1000, len(foretold)))
        values = [spearmanr(foretold[at], self.losses[at]).statistic for at in draws]
        return (spearmanr(foretold, self.losses).statistic, *np.quantile(values, [0.025, 0.975]))


def compete(
    chosen: list[Contestant], problem: Any, measured: Measured, rounds: int, threads: int, clock: str
) -> dict[str, Result]:
    """Every contestant's result; their processes live at the same time and work in turns."""
    workers, results = {}, {}
    for one in chosen:
        worker = Worker(one, problem, threads)
        try:
            found, megabytes = worker.receive()
        except Failure as failure:
            results[one.name] = Result([], reason=str(failure))
            continue
        print(f"{one.name} is ready", file=sys.stderr, flush=True)
        error, rank = None, None
        if found is not None:
            error = float(np.linalg.norm(found - measured.exact) / np.linalg.norm(measured.exact))
            rank = measured.rank(problem.weights, found)
        workers[one.name], results[one.name] = worker, Result([], megabytes, error, rank)
    for _ in range(rounds):
        for name, worker in workers.items():
            results[name].seconds.append(worker.ask(clock))
    for worker in workers.values():
        worker.stop()
    return results


def table(name: str, results: dict[str, Result], chosen: list[Contestant]) -> None:
    """Print one problem's rows."""
    medians = {name: np.median(result.seconds) for name, result in results.items() if result.seconds}
    first = chosen[0].name
    print(f"\n| {name} | s | / own plain | / {first} | MB | error | rank correlation |\n|---|---|---|---|---|---|---|")
    for one in chosen:
        result = results[one.name]
        if result.reason:
            print(f"| {one.name} | {result.reason} | | | | | |")
            continue
        seconds = medians[one.name]
        ratios = [f"{seconds / medians[base]:.2f}" if base in medians else "" for base in (one.plain, first)]
        error = "" if result.error is None else f"{result.error:.1e}"
        rank = "" if result.rank is None else "{:.4f} ({:.4f} to {:.4f})".format(*result.rank)
        cells = [one.name, f"{seconds:.3f}", *ratios, f"{result.megabytes:.0f}", error, rank]
        print(f"| {' | '.join(cells)} |", flush=True)


class Failure(Exception):
    """Why a contestant has no numbers."""


class Worker:
    """A contestant's process, and the pipe to it."""

    def __init__(self, one: Contestant, problem: Any, threads: int):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, one, problem, threads), daemon=True)
        self.process.start()
        theirs.close()

    def receive(self) -> Any:
        """What it sends next."""
        try:
            kind, value = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise Failure(f"its process ended with code {self.process.exitcode}") from None
        if kind == "failed":
            raise Failure(value)
        return value

    def ask(self, what: str) -> Any:
        """One run, measured."""
        self.pipe.send(what)
        return self.receive()

    def stop(self) -> None:
        """End it, so that its memory is free."""
        self.pipe.send("stop")
        self.process.join()


def _work(pipe: Connection, one: Contestant, problem: Any, threads: int) -> None:
    sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - progress bars
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])  # XLA makes as many threads as it may use cores
    try:
        module = importlib.import_module(f"tests.benchmarks.{one.module}")
        run = getattr(module, one.function)(problem, **one.options)
        found = run()
        megabytes = peak_megabytes(run)
        pipe.send(("found", (found, megabytes)))
        while (asked := pipe.recv()) != "stop":
            pipe.send(("seconds", _seconds(CLOCKS[asked], run, megabytes > LARGE)))
    except ImportError as missing:
        pipe.send(("failed", f"not installed: {missing}"))
    except Exception as error:  # noqa: BLE001 - a contestant's failure is a row of the table
        pipe.send(("failed", f"does not run: {type(error).__name__}: {' '.join(str(error).split())[:200]}"))


def peak_megabytes(run: Callable) -> float:
    """A run's largest resident size above that before it, MB."""
    _give_back()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1e6


def _seconds(clock: Callable[[], float], run: Callable, large: bool) -> float:
    """Of a run in memory that the process has already; a large one fetches it before, and gives it back."""
    if large:
        run()
    began = clock()
    run()
    seconds = clock() - began
    if large:
        _give_back()
    return seconds


def _give_back() -> None:
    """Freed memory to the system, which C's allocator would keep."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status(key: str) -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PROBLEMS = {
    "mlp": lambda folder: peers_problems.mlp(),
    "transformer": lambda folder: peers_problems.transformer(folder),
    "solve": lambda folder: peers_problems.regression(),
}


def exact_hypergradient(problem: Any, threads: int) -> np.ndarray:
    if isinstance(problem, peers_problems.Regression):
        return problem.exact
    worker = Worker(ORACLE, problem, threads)
    exact, _ = worker.receive()
    worker.stop()
    return exact


def _retrain(problem: Any, threads: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(what each retrain left out, its loss): of a problem that trains, random halves of the rows."""
    if isinstance(problem, peers_problems.Regression) or not count:
        return np.zeros((0, 0), bool), np.zeros(0)
    worker = Worker(RETRAINS._replace(options={"count": count}), problem, threads)
    found, _ = worker.receive()
    worker.stop()
    return found


def _matches(one: Contestant, only: list[str]) -> bool:
    return not only or any(part.lower() in one.name.lower() for part in only)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--only", nargs="+", default=[], help="parts of contestants' names; their baselines run too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="cores, and threads, of each contestant")
    parser.add_argument("--retrains", type=int, default=0, help="trainings that the hypergradients foretell")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: seconds of all its threads")
    main(**vars(parser.parse_args()))
