"""The cells of the table in the order of their importance, and what each is predicted to cost."""

from typing import NamedTuple

from tests.benchmarks.accelerator.problem import SIZES, step_back_flops, training_flops

DETERMINISTIC = "--xla_gpu_exclude_nondeterministic_ops=true"
"""Flag of XLA with which a GPU adds in one order: else the gradient of an embedding is summed by atomic additions."""
PRECISION_PAIRS = (
    ("highest", "highest"), ("highest", "high"), ("highest", "default"), ("high", "high"), ("default", "default"),
)  # fmt: skip
"""(of training, of the products of the steps back)."""
MOST_ROUNDS, ROUND_SECONDS = 3, 20.0
"""Times that a sweep is timed: three at most, and no further one once they have taken so many seconds."""
BERGSON_SECONDS = 240.0
"""Of its row, most of it the exact hypergradient in float64 that errors are measured by; on two CPU cores."""


class Cell(NamedTuple):
    """One measurement, in a process of its own where memory or flags are those of a process."""

    row: str
    size: str = ""
    lora: bool = False
    variant: str = ""
    flags: str = ""
    """For XLA_FLAGS of its process."""

    @property
    def name(self) -> str:
        """Unique, and what the log calls it."""
        if self.row == "machine":
            return self.row
        trained = ("LoRA" if self.lora else "all") if self.size else ""
        return " ".join(part for part in (self.row, self.size, trained, self.variant) if part)


ROWS = {
    "machine": "platform, device, memory, peak rates as measured and by the maker's data sheet",
    "sweep": "training and backward pass over plain training, tokens per second, share of peak, memory",
    "precision": "errors and times of lower precisions of training and of the products of the steps back",
    "replay": "whether trainings, replays and backward passes repeat bit for bit, by flags of XLA",
    "memory": "measured peaks by checkpoint plan beside what `estimate` predicts",
    "linearise": "time and error of steps back by stored linearisations",
    "offload": "states in the host's memory: time, and whether the bits are equal",
    "bergson": "one hypergradient by bergson beside ours, where it is installed",
}
"""Rows of the table, for --only."""


def list_cells(platform: str, small: bool) -> list[Cell]:
    """All of them but `machine`, which comes first, the most important ones first."""
    if small:
        return [
            Cell("sweep", "25k"),
            Cell("precision", "25k", variant="float64"),
            Cell("replay", "25k"),
            Cell("sweep", "25k", lora=True),
            Cell("memory", "100k", variant="square root"),
            Cell("linearise", "25k"),
            Cell("offload", "25k"),
            Cell("sweep", "100k"),
            Cell("bergson"),
        ]
    flagged = [Cell("replay", "10M", variant="deterministic", flags=DETERMINISTIC)] if platform == "gpu" else []
    return [
        Cell("sweep", "10M"),
        Cell("sweep", "100M"),
        Cell("precision", "1M", variant="float64"),
        Cell("replay", "10M"),
        *flagged,
        Cell("sweep", "1000M", lora=True),
        Cell("sweep", "1000M"),
        Cell("sweep", "100M", lora=True),
        Cell("precision", "100M"),
        Cell("memory", "100M", variant="square root"),
        Cell("memory", "100M", variant="fewer"),
        Cell("linearise", "10M"),
        Cell("offload", "100M"),
        Cell("memory", "100M", variant="every state"),
        Cell("linearise", "100M"),
        Cell("sweep", "10M", lora=True),
        Cell("bergson"),
    ]


class Work(NamedTuple):
    """What a cell does, as far as its time depends on it."""

    programs: int
    """Large ones that are compiled."""
    flops: float
    """By the formulas."""


def count_work(cell: Cell) -> Work:
    """Programs and operations of a cell; a run with its backward pass is counted with each step replayed once."""
    if not cell.size:
        return Work(0, 0.0)
    size = SIZES[cell.size]
    forward, backward = training_flops(size, cell.lora), step_back_flops(size, cell.lora)
    run = size.steps * (2 * forward + backward)
    warm = 2 * (forward + backward)
    if cell.row == "sweep":
        return Work(5, warm + run + 2 * size.steps * forward)
    if cell.row == "precision":
        # twice each, one to compile; a GPU's float64 may be slow
        pairs = len(PRECISION_PAIRS)
        return Work(11, 2 * pairs * run + (30 * run if cell.variant == "float64" else 0))
    runs, programs = {"replay": (3, 3), "memory": (2, 4), "linearise": (4, 6), "offload": (3, 4)}[cell.row]
    return Work(programs, warm + runs * run)


class Costs:
    """Predicts the seconds of a cell from those before it: a start, so much for a program, so much for an operation."""

    def __init__(self, flops_per_second: float, program_seconds: float, start_seconds: float):
        self.first_rate, self.program_seconds, self.start_seconds = flops_per_second, program_seconds, start_seconds
        self.rates: dict[str, float] = {}
        """Operations a second by size."""

    def predict(self, cell: Cell) -> float:
        """Seconds."""
        if cell.row == "bergson":
            return BERGSON_SECONDS
        work = count_work(cell)
        # larger models reach more than smaller ones; what is predicted wrongly is stopped in time all the same
        rate = self.rates.get(cell.size) or max([self.first_rate, *self.rates.values()])
        seconds = work.flops / rate
        if cell.row == "sweep":
            seconds = max(seconds, min(MOST_ROUNDS * seconds, seconds + ROUND_SECONDS))
        return self.start_seconds + work.programs * self.program_seconds + seconds

    def learn(self, cell: Cell, seconds: float, working_seconds: float, flops: float) -> None:
        """Take note of a cell that was measured: its seconds in all, and those of `flops` operations alone."""
        if flops and working_seconds > 0:
            self.rates[cell.size] = flops / working_seconds
        if (programs := count_work(cell).programs) and working_seconds > 0:
            self.program_seconds = max(0.0, seconds - working_seconds - self.start_seconds) / programs
