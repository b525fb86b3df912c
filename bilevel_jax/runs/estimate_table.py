"""An estimate as a person reads it on a terminal: memory, work, disk, what would not fit and what to do about it."""

from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bilevel_jax.runs.memory import MIDWAY
from bilevel_jax.runs.states import GIB

OF_VERB = {
    "compare": "Memory is that of the outer loop with outer.method; penalty and bmo may hold a second model beside it.",
    "audit": "Memory is that of one training and its sweep; audit.vmap_size of them, side by side, take as many states.",
}
STEPS = {
    "forward": "training step", "linearize": "training step, linearised", "backward": "step back",
    "slope": "slope of L_v", "alone": "step of both models",
}  # fmt: skip


def show(found: dict[str, Any]) -> str:
    """Print an estimate, and return its verdict in a sentence."""
    console = Console(markup=False, emoji=False, highlight=False, force_jupyter=False)
    for part in (_subject(found), _memory(found), _compiled(found), _kept(found), _work(found), _disk(found)):
        if part is not None:
            console.print(part)
            console.print()
    for line in _notes(found):
        console.print(line, soft_wrap=True)
    return _verdict(found)


def beside(estimated: dict[str, Any], measured: dict[str, Any]) -> str:
    """Print what was estimated beside what was measured, and return the work in a sentence."""
    console = Console(markup=False, emoji=False, highlight=False, force_jupyter=False)
    table = _table("", "estimated", "measured")
    lines = comparison(estimated, measured)
    for name, one, other, _ in lines:
        table.add_row(name, one, other)
    console.print(table)
    console.print()
    for name, _, _, note in lines:
        console.print(f"{name}: {note}.", soft_wrap=True)
    passes, done = estimated["passes"], measured["passes"]
    return f"The run took {done:,.0f} of at most {passes:,.0f} training steps that were planned."


def comparison(estimated: dict[str, Any], measured: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(what, estimated before the run, measured, what to know of it), for a terminal and for a report."""
    whole = measured["memory_of"] == "process"
    return [
        ("work, training steps", f"{estimated['passes']:,.0f}", f"{measured['passes']:,.0f}", "estimated: at most"),
        (
            "memory",
            size(estimated["peak"]),
            size(measured["memory"]),
            "estimated: arrays on one device, without the workspace of a step; measured: "
            + (
                f"the whole process, {size(estimated['memory_before'])} of it before training began"
                if whole
                else "one device"
            ),
        ),
        (
            "disk",
            size(sum(amount for name, amount in estimated["disk"].items() if name != MIDWAY)),
            size(measured["disk"]),
            "estimated: checkpoints and models, without what is saved in the middle of an outer step",
        ),
        (
            "seconds a training step",
            "",
            f"{measured['seconds_per_pass']:.3g}",
            f"on {measured['device']}, all included",
        ),
    ]


# ---- the tables


def _subject(found: dict[str, Any]) -> Table:
    table = _table("parameters", "dtype", "number", "bytes")
    for name, counts in found["parameters"].items():
        for dtype, count in counts.items():
            table.add_row(name, dtype, f"{count:,}", size(count * WIDTHS[dtype]))
    return table


def _memory(found: dict[str, Any]) -> Table:
    phases = found["phases"]
    table = _table("on one device", *(phase["name"] for phase in phases))
    for name in dict.fromkeys(part for phase in phases for part in phase["parts"]):
        cells = [phase["parts"].get(name, 0) for phase in phases]
        if any(cells):
            table.add_row(name, *(size(cell) if cell else "" for cell in cells))
    table.add_section()
    table.add_row("in all", *(size(phase["bytes"]) for phase in phases))
    return table


def _compiled(found: dict[str, Any]) -> Table | None:
    if "programs" not in found:
        return None
    table = _table("compiled", "workspace", "Tflop", "seconds a call", "seconds to compile")
    for name, one in found["programs"].items():
        seconds = found["speed"].get(name)
        table.add_row(
            STEPS[name], size(one["workspace"]), f"{one['flops'] / 1e12:,.4g}",
            "" if seconds is None else f"{seconds:.3g}", f"{one['seconds_to_compile']:.1f}",
        )  # fmt: skip
    return table


def _kept(found: dict[str, Any]) -> Table | None:
    if "kept" not in found:
        return None
    table = _table("kept for a sweep", "snapshots", "tape", "memory of both", "x training", "by these seconds")
    for one in found["kept"]:
        measured = one["times_measured"]
        table.add_row(
            one["name"], f"{one['snapshots']:,}", f"{one['tape']:,}", size(one["bytes"]), f"{one['times']:.2f}",
            "" if measured is None else f"{measured:.2f}",
        )  # fmt: skip
    return table


def _work(found: dict[str, Any]) -> Table:
    hours = found.get("hours", {})
    table = _table("work", "training steps", "x one training", "hours")
    for name, work in found["work"].items():
        table.add_row(name, f"{work:,.0f}", f"{work / found['shape']['steps']:.1f}", _hours(hours.get(name)))
    if "readings of losses" in hours:
        table.add_row("readings of losses", "", "", _hours(hours["readings of losses"]))
    table.add_section()
    table.add_row("in all", f"{found['passes']:,.0f}", f"{found['trainings']:.1f}", _hours(sum(hours.values()) or None))
    return table


def _disk(found: dict[str, Any]) -> Table:
    table = _table("disk", "at most")
    for name, amount in found["disk"].items():
        if amount:
            table.add_row(name, size(amount))
    return table


def _notes(found: dict[str, Any]) -> Iterable[str]:
    devices, shape = found["devices"], found["shape"]
    kind = "simulated" if devices["simulated"] else devices["kind"]
    micro, count = shape["micro"], devices["count"]
    yield (
        f"{shape['steps']:,} steps of {shape['batch']:,} rows in {micro} micro-batch{'es' * (micro > 1)}, "
        f"{shape['places']:,} token places a step; {count} device{'s' * (count > 1)} ({kind})."
    )
    if "programs" in found and (devices["simulated"] or devices["backend"] == "cpu"):
        yield (
            "Workspaces are those of XLA's CPU compiler. Another one fuses other operations and lays arrays out "
            "otherwise: for a GPU or a TPU take them for a guess, and the arrays for exact."
        )
    if devices["simulated"] and "bfloat16" in found["parameters"]["base"]:
        yield (
            "The CPU compiler would keep a float32 copy of a whole bfloat16 base; workspaces are those with a float32 "
            "base, and a layer and the embedding in float32 besides."
        )
    if remark := OF_VERB.get(found["verb"]):
        yield remark
    if "flops" in found:
        yield (
            f"{found['flops']:.3g} floating-point operations of matrix products, {found['trainings_by_flops']:.1f} x "
            f"one training. Seconds: {found['speed']['source']}."
        )
    if "kept" in found:
        yield (
            "A sweep goes back through the steps on the tape and replays others from snapshots; what is kept changes "
            "no number. outer.memory_gib says how much it may take, outer.offload where snapshots lie."
        )
    yield f"The estimate took {found['seconds_to_estimate']:.0f} s."


def _verdict(found: dict[str, Any]) -> str:
    peak, budget = found["peak"], found["budget"]
    most = f"{size(peak)} of one device at the most, in the phase “{found['peak_phase']}”"
    if "programs" not in found:
        most += ", without the workspace of a step"
    if not budget:
        return f"{most}. Say by --estimate.memory-gib what a device has."
    if peak <= budget:
        return f"It fits: {most}; {size(budget)} are there."
    cures = [f"  {one['change']:<32}{size(one['peak'])}" for one in found.get("remedies", [])]
    lines = ["It does not fit: " + f"{most}; {size(budget)} are there."]
    return "\n".join([*lines, *(["What would help, with the peak then:", *cures] if cures else [])])


# ---- numbers in words

WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def size(amount: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, bytes_ in (("GiB", GIB), ("MiB", 2.0**20), ("KiB", 2.0**10)):
        if amount >= bytes_:
            return f"{amount / bytes_:,.4g}\u00a0{unit}"
    return f"{amount:.0f}\u00a0B"


def _hours(value: float | None) -> str:
    return "" if value is None else f"{value:,.3g}"


def _table(*heads: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(heads[0], no_wrap=True)
    for head in heads[1:]:
        table.add_column(head, justify="right", no_wrap=True)
    return table
