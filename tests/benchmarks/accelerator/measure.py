"""What each cell measures, in the process that it is given."""

import statistics
import tempfile
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from bilevel_jax.core import tree
from bilevel_jax.core.training import forward_only_step
from bilevel_jax.core.types import CheckpointPlan, TrainState
from bilevel_jax.runs.budget.usage import peak_memory
from bilevel_jax.runs.config.schema import OuterSection
from bilevel_jax.runs.engine.trajectory_store import PINNED_HOST, device_memory_bytes, make_state_store
from bilevel_jax.runs.infra.placement import make_mesh, replicate, replicate_unplaced
from tests.benchmarks import peers
from tests.benchmarks.accelerator import machine, problem
from tests.benchmarks.accelerator.cells import MOST_ROUNDS, PRECISION_PAIRS, ROUND_SECONDS, Cell
from tests.benchmarks.accelerator.problem import SIZES, Size, step_back_flops, training_flops
from tests.benchmarks.cost import timed

Values = dict[str, Any]
WARM_STEPS = 2
"""Of the first run, which compiles."""
SHARE_OF_MEMORY = 0.95
"""Of a device's: what is predicted to take more is not tried."""


class NotRun(Exception):
    """Why a cell has no numbers: it does not fit, or what it needs is not there."""


class Bench:
    """A problem with its compiled steps: what is timed."""

    def __init__(self, size: Size, lora: bool, *, product_precision: Any = "highest", **options: Any):
        self.size, self.lora = size, lora
        self.setting = problem.make_setting(size, lora, **options)
        given = self.setting
        self.mesh = make_mesh(1)
        self.weights = replicate(self.mesh, jnp.ones(given.rows, jax.tree.leaves(given.params)[0].dtype))
        self.step = bj.train_step(given.problem, given.optimizer, product_precision=product_precision)
        self.estimator = bj.unrolled_estimator(given.problem, self.step)
        self.plain_step = forward_only_step(given.problem, given.optimizer)

    def start(self) -> TrainState:
        """The state before the first step."""
        return replicate_unplaced(self.mesh, self.setting.start())

    def train_plainly(self, steps: int | None = None) -> TrainState:
        """As anybody trains: JAX's default precision, no state is kept."""
        state = jax.tree.map(jnp.copy, self.start())
        for index in range(steps or self.size.steps):
            batch = self.setting.train.batch(index)
            state, _ = self.plain_step(state, self.weights, self.setting.fixed, batch)
        return state

    def train(
        self,
        plan: CheckpointPlan = bj.checkpointing.NO_CHECKPOINTS,
        snapshots: MutableMapping[int, TrainState] | None = None,
        steps: int | None = None,
    ) -> bj.Trajectory:
        """As a run trains whose hypergradients are computed."""
        stream = self.setting.train._replace(steps=steps or self.size.steps)
        given = self.start(), self.weights, self.setting.fixed, stream
        return bj.train(self.step, *given, plan=plan, snapshots=snapshots)

    def differentiate(
        self,
        plan: CheckpointPlan,
        snapshots: MutableMapping[int, TrainState] | None = None,
        steps: int | None = None,
    ) -> bj.Estimate:
        """A training and its backward pass."""
        trained = self.train(plan, snapshots, steps)
        stream = self.setting.train._replace(steps=trained.steps)
        return self.estimator(trained, self.weights, self.setting.fixed, stream, self.setting.validation)

    def warm_up(self, linearize: bool = False) -> None:
        """Compile everything, on a short run of which a step is replayed."""
        plan = bj.checkpointing.single_replay_plan(WARM_STEPS, 1)._replace(linearize=linearize)
        jax.block_until_ready(self.differentiate(plan, steps=WARM_STEPS).grad)


def measure(cell: Cell) -> Values:
    """The values of a cell. Raises NotRun."""
    return MEASURES[cell.row](cell)


# ---- rows


def _machine(cell: Cell) -> Values:
    values = machine.describe()
    small = cell.variant == "small"
    side, num_bytes, seconds = (512, 2**22, 0.2) if small else (8192, 2**28, 1.0)
    if values["platform"] == "cpu":
        side = min(side, 2048)
    values |= {"measured_tflops": machine.measure_peaks(side, seconds), "side": side}
    values["maker_tflops"] = {
        precision: machine.maker_tflops(values["kind"], values["platform"], precision)
        for precision in machine.PRECISIONS
    }
    known = machine.known_peak(values["kind"])
    values["maker_tflops"]["bfloat16"] = known.bfloat16 or None if known else None
    values["transfers"] = machine.measure_transfers(num_bytes, seconds)
    return values


def _sweep(cell: Cell) -> Values:
    size = SIZES[cell.size]
    estimated = problem.estimate(size, cell.lora)
    plan, predicted = _planned(estimated, "this run")
    _require_memory(predicted)
    bench = Bench(size, cell.lora)
    bench.warm_up()
    jax.block_until_ready(bench.train_plainly(WARM_STEPS).params)
    seconds: dict[str, list[float]] = {"plain": [], "training": [], "hypergradient": []}
    found: list[bj.Estimate] = []

    def differentiate() -> Any:
        found[:] = [bench.differentiate(plan)]
        return found[0].grad

    growth = None
    for number in range(MOST_ROUNDS):
        if sum(sum(values) for values in seconds.values()) > ROUND_SECONDS:
            break
        seconds["plain"].append(timed(lambda: bench.train_plainly().params))
        seconds["training"].append(timed(lambda: bench.train().end.params))
        if number == 0:
            growth = _process_growth(lambda: seconds["hypergradient"].append(timed(differentiate)))
        else:
            seconds["hypergradient"].append(timed(differentiate))
    replays = bj.checkpointing.count_replayed_steps(size.steps, plan)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    step = medians["training"] / size.steps
    forward, backward = training_flops(size, cell.lora), step_back_flops(size, cell.lora)
    programs = estimated["programs"]
    return {
        "plan": {"snapshots": plan.snapshots, "stored_steps": plan.stored_steps},
        "seconds": medians,
        "rounds": seconds,
        "steps": size.steps,
        "tokens": size.tokens,
        "parameters": estimated["parameters"],
        "seconds_of_step_back": (medians["hypergradient"] - medians["training"] - replays * step) / size.steps,
        "by_count": (4 + replays / size.steps),
        "replayed": bool(found[0].checks.replayed),
        "finite": bool(tree.all_finite(found[0].grad)),
        "flops": {
            "training": forward,
            "step back": backward,
            "training, counted": programs["forward"]["flops"],
            "step back, counted": programs["backward"]["flops"],
        },
        "compile_seconds": {name: program["seconds_to_compile"] for name, program in programs.items()},
        **_memory_values(predicted, growth),
        "working_seconds": sum(sum(values) for values in seconds.values()),
        "working_flops": len(seconds["plain"]) * (3 * size.steps * forward + replays * forward + size.steps * backward),
    }


def _precision(cell: Cell) -> Values:
    size = SIZES[cell.size]
    plan = bj.checkpointing.square_root_plan(size.steps)
    params = problem.random_params(size.config, jax.random.key(0))
    grads, seconds = {}, {}
    for training, product in PRECISION_PAIRS:
        bench = Bench(size, cell.lora, product_precision=product, precision=training, params=params)
        bench.warm_up()
        name = f"{training}, {product}"
        times = {"training": timed(lambda bench=bench: bench.train().end.params)}
        found: list[bj.Estimate] = []
        times["hypergradient"] = timed(lambda bench=bench, found=found: _append(found, bench.differentiate(plan)).grad)
        grads[name], seconds[name] = np.asarray(found[0].grad, float), times
        del bench, found
    exact = grads["highest, highest"]
    values: Values = {
        "seconds": seconds,
        "error": {name: _relative(grad, exact) for name, grad in grads.items()},
    }
    if cell.variant == "float64":
        if jax.default_backend() == "tpu":
            values["float64"] = "a TPU has no float64"
            return values
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
            bench = Bench(size, cell.lora, params=wide, dtype=jnp.float64)
            exact = np.asarray(bench.differentiate(plan).grad)
        values["error_to_float64"] = {name: _relative(grad, exact) for name, grad in grads.items()}
    return values


def _replay(cell: Cell) -> Values:
    size = SIZES[cell.size]
    plan = bj.checkpointing.square_root_plan(size.steps)
    bench = Bench(size, cell.lora)
    bench.warm_up()
    ends = [bench.train().end for _ in range(2)]
    found: list[bj.Estimate] = []
    seconds = [timed(lambda: _append(found, bench.differentiate(plan)).grad) for _ in range(2)]
    return {
        "flags": cell.flags,
        "trainings_equal": bool(tree.bitwise_equal(*ends)),
        "replayed": all(bool(one.checks.replayed) for one in found),
        "hypergradients_equal": bool(tree.bitwise_equal(found[0].grad, found[1].grad)),
        "difference": _relative(found[0].grad, found[1].grad),
        "seconds": {"hypergradient": min(seconds)},
    }


def _memory(cell: Cell) -> Values:
    size = SIZES[cell.size]
    plan, predicted = _planned(problem.estimate(size, cell.lora), cell.variant)
    _require_memory(predicted)
    bench = Bench(size, cell.lora)
    bench.warm_up()
    times: list[float] = []
    growth = _process_growth(lambda: times.append(timed(lambda: bench.differentiate(plan).grad)))
    return {
        "plan": {"snapshots": plan.snapshots, "stored_steps": plan.stored_steps},
        "seconds": {"hypergradient": times[0]},
        **_memory_values(predicted, growth),
    }


def _linearise(cell: Cell) -> Values:
    size = SIZES[cell.size]
    plan, predicted = _planned(problem.estimate(size, cell.lora, linearize=True), "square root")
    _require_memory(predicted)
    bench = Bench(size, cell.lora)
    bench.warm_up(linearize=True)
    found: list[bj.Estimate] = []
    times: list[float] = []

    def differentiate(plan: CheckpointPlan) -> Any:
        return _append(found, bench.differentiate(plan)).grad

    growth = _process_growth(lambda: times.append(timed(lambda: differentiate(plan))))
    memory = _memory_values(predicted, growth)
    bench.warm_up()
    times.append(timed(lambda: differentiate(plan._replace(linearize=False))))
    return {
        "plan": {"snapshots": plan.snapshots, "stored_steps": plan.stored_steps},
        "seconds": {"linearised": times[0], "hypergradient": times[1]},
        "error": _relative(found[0].grad, found[1].grad),
        "replayed": bool(found[0].checks.replayed),
        **memory,
    }


def _offload(cell: Cell) -> Values:
    kinds = machine.describe()["memory_kinds"]
    if PINNED_HOST not in kinds:
        raise NotRun(f"the platform has no memory {PINNED_HOST}, only {', '.join(kinds)}")
    size = SIZES[cell.size]
    plan = bj.checkpointing.square_root_plan(size.steps)
    _require_memory(_planned(problem.estimate(size, cell.lora), "square root")[1])
    bench = Bench(size, cell.lora)
    bench.warm_up()
    found: list[bj.Estimate] = []
    seconds: dict[str, float] = {}
    for where in ("host", "device"):
        store = make_state_store(OuterSection(offload=where), Path(), bench.start())
        seconds[where] = timed(lambda store=store: _append(found, bench.differentiate(plan, store)).grad)
        if where == "host":
            peak = peak_memory()
    return {
        "plan": {"snapshots": plan.snapshots, "stored_steps": plan.stored_steps},
        "seconds": seconds,
        "equal": bool(tree.bitwise_equal(found[0].grad, found[1].grad)),
        "replayed": bool(found[0].checks.replayed),
        "measured_bytes": peak[0] if peak[1] == "device" else None,
    }


def _bergson(cell: Cell) -> Values:
    try:
        import bergson  # noqa: F401
    except ImportError as missing:
        raise NotRun(
            f"bergson is not installed ({missing}): pip install --no-deps -r tests/benchmarks/requirements.txt"
        ) from missing
    chosen = [one for one in peers.TRAINING if one.name in (peers.JAX, peers.OURS) or "bergson" in one.name]
    chosen += [one for one in peers.TRAINING if one.name == "bilevel_jax, √T snapshots"]
    with tempfile.TemporaryDirectory() as folder:
        given = peers.PROBLEMS["transformer"](Path(folder))
        measured = peers.Measured(peers.exact_hypergradient(given, 1), np.zeros((0, 0), bool), np.zeros(0))
        results = peers.compete(chosen, given, measured, 1, 1, "wall")
    return {
        "seconds": {name: result.seconds[0] for name, result in results.items() if result.seconds},
        "error": {name: result.error for name, result in results.items() if result.error is not None},
        "failed": {name: result.reason for name, result in results.items() if result.reason},
    }


MEASURES: dict[str, Callable[[Cell], Values]] = {
    "machine": _machine, "sweep": _sweep, "precision": _precision, "replay": _replay, "memory": _memory,
    "linearise": _linearise, "offload": _offload, "bergson": _bergson,
}  # fmt: skip


# ---- helpers


def _planned(estimated: Values, name: str) -> tuple[CheckpointPlan, float]:
    """A checkpoint plan of `estimate` and the peak that it predicts; those like the run's own are listed as that."""
    kept = {plan["name"]: plan for plan in estimated["kept"]}
    plan = kept.get(name, kept["this run"])
    linearize = "linearize" in estimated["programs"]
    return CheckpointPlan(plan["snapshots"], plan["tape"], linearize), plan["bytes"]


def _require_memory(predicted: float) -> None:
    limit = device_memory_bytes()
    if limit and predicted > SHARE_OF_MEMORY * limit:
        raise NotRun(f"memory (predicted {predicted / 2**30:.1f} GiB, the device has {limit / 2**30:.1f})")


def _memory_values(predicted: float, growth: float | None) -> Values:
    """The peak: of the device where it tells, or else the live arrays and what the process grew by during a run."""
    peak, memory_of = peak_memory()
    measured = peak if memory_of == "device" else growth
    return {"predicted_bytes": predicted, "measured_bytes": measured, "memory_of": memory_of}


def _process_growth(run: Callable[[], Any]) -> float | None:
    """Run, and the most bytes of arrays and workspaces during it by the process's size; None where it is not told."""
    if (
        "peak_bytes_in_use" in (jax.local_devices()[0].memory_stats() or {})
        or not Path("/proc/self/clear_refs").exists()
    ):
        run()
        return None
    live = sum(array.nbytes for array in jax.live_arrays())
    return live + 1e6 * peers.peak_megabytes(run)


def _relative(found: Any, exact: Any) -> float:
    found, exact = np.asarray(found, np.float64), np.asarray(exact, np.float64)  # JAX would make float32 of it
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def _append(found: list[Any], one: Any) -> Any:
    found.append(one)
    return one
