"""Terminal tables of estimated memory, work and disk use."""

from collections.abc import Iterable
from typing import Any

from rich import box
from rich.table import Table

from bilevel_jax.runs.budget.usage import DTYPE_BYTES, compare_usage, format_bytes
from bilevel_jax.runs.terminal import make_console

COMMAND_NOTES = {
    "compare": "Memory is that of the outer loop with outer.method; penalty and bmo may hold a second model.",
    "audit": "Memory is that of one training run and its backward pass; audit.vmap_size retrains hold as many states.",
    "tune": "The search ends early where a setting holds at no higher loss; larger batches cost as many times more.",
}
STEP_LABELS = {
    "forward": "training step", "linearize": "training step, linearised", "backward": "step back",
    "slope": "slope of L_v", "alone": "step of both models",
}  # fmt: skip


def print_estimate(estimated: dict[str, Any]) -> str:
    """Print an estimate, and return its verdict in a sentence."""
    console = make_console()
    for part in (
        _parameters_table(estimated),
        _memory_table(estimated),
        _compiled_table(estimated),
        _checkpoint_plans_table(estimated),
        _work_table(estimated),
        _disk_table(estimated),
        _hosts_table(estimated),
    ):
        if part is not None:
            console.print(part)
            console.print()
    for line in _notes(estimated):
        console.print(line, soft_wrap=True)
    return _verdict(estimated)


def print_comparison(estimated: dict[str, Any], measured: dict[str, Any]) -> str:
    """Print the estimate next to what was measured, and return the work in a sentence."""
    console = make_console()
    table = _make_table("", "estimated", "measured")
    lines = compare_usage(estimated, measured)
    for name, before, after, _ in lines:
        table.add_row(name, before, after)
    console.print(table)
    console.print()
    for name, _, _, note in lines:
        console.print(f"{name}: {note}.", soft_wrap=True)
    planned_steps, steps_done = estimated["passes"], measured["passes"]
    return f"The run took {steps_done:,.0f} of at most {planned_steps:,.0f} training steps that were planned."


# ---- the tables


def _parameters_table(estimated: dict[str, Any]) -> Table:
    table = _make_table("parameters", "dtype", "number", "bytes")
    for name, counts in estimated["parameters"].items():
        for dtype, count in counts.items():
            table.add_row(name, dtype, f"{count:,}", format_bytes(count * DTYPE_BYTES[dtype]))
    return table


def _memory_table(estimated: dict[str, Any]) -> Table:
    phases = estimated["phases"]
    table = _make_table("on one device", *(phase["name"] for phase in phases))
    for name in dict.fromkeys(part for phase in phases for part in phase["parts"]):
        cells = [phase["parts"].get(name, 0) for phase in phases]
        if any(cells):
            table.add_row(name, *(format_bytes(cell) if cell else "" for cell in cells))
    table.add_section()
    table.add_row("in all", *(format_bytes(phase["bytes"]) for phase in phases))
    return table


def _compiled_table(estimated: dict[str, Any]) -> Table | None:
    if "programs" not in estimated:
        return None
    table = _make_table("compiled", "workspace", "Tflop", "seconds a call", "seconds to compile")
    for name, step in estimated["programs"].items():
        seconds = estimated["speed"].get(name)
        table.add_row(
            _label_step(name), format_bytes(step["workspace"]), f"{step['flops'] / 1e12:,.4g}",
            "" if seconds is None else f"{seconds:.3g}", f"{step['seconds_to_compile']:.1f}",
        )  # fmt: skip
    return table


def _label_step(name: str) -> str:
    kind, comma, target = name.partition(", ")
    return f"{STEP_LABELS[kind]}{comma}{target}"


def _checkpoint_plans_table(estimated: dict[str, Any]) -> Table | None:
    if "kept" not in estimated:
        return None
    table = _make_table("kept for a sweep", "snapshots", "tape", "memory of both", "x training", "by these seconds")
    for plan in estimated["kept"]:
        measured = plan["times_measured"]
        table.add_row(
            plan["name"], f"{plan['snapshots']:,}", f"{plan['tape']:,}", format_bytes(plan["bytes"]),
            f"{plan['times']:.2f}",
            "" if measured is None else f"{measured:.2f}",
        )  # fmt: skip
    return table


def _work_table(estimated: dict[str, Any]) -> Table:
    hours = estimated.get("hours", {})
    table = _make_table("work", "training steps", "x one training", "hours")
    for name, work in estimated["work"].items():
        table.add_row(name, f"{work:,.0f}", f"{work / estimated['shape']['steps']:.1f}", _format_hours(hours.get(name)))
    if "readings of losses" in hours:
        table.add_row("readings of losses", "", "", _format_hours(hours["readings of losses"]))
    table.add_section()
    table.add_row(
        "in all",
        f"{estimated['passes']:,.0f}",
        f"{estimated['trainings']:.1f}",
        _format_hours(sum(hours.values()) or None),
    )
    return table


def _disk_table(estimated: dict[str, Any]) -> Table:
    table = _make_table("disk", "at most")
    for name, amount in estimated["disk"].items():
        if amount:
            table.add_row(name, format_bytes(amount))
    return table


def _hosts_table(estimated: dict[str, Any]) -> Table | None:
    if "hosts" not in estimated:
        return None
    hosts = estimated["hosts"]
    table = _make_table(f"each of {hosts['count']} hosts", "")
    table.add_row("devices", f"{hosts['devices']:,}")
    table.add_row("rows of a step", f"{hosts['rows of a step']:,}")
    for place in ("on its devices", "files that it reads", "in its memory"):
        table.add_section()
        for name, amount in hosts[place].items():
            if amount != 0:
                table.add_row(f"{place}: {name}", "unknown: not here" if amount is None else format_bytes(amount))
    return table


def _notes(estimated: dict[str, Any]) -> Iterable[str]:
    devices, shape = estimated["devices"], estimated["shape"]
    kind = "simulated" if devices["simulated"] else devices["kind"]
    micro, count = shape["micro"], devices["count"]
    yield (
        f"{shape['steps']:,} steps of {shape['batch']:,} rows in {micro} micro-batch{'es' * (micro > 1)}, "
        f"{shape['places']:,} token places a step; {count} device{'s' * (count > 1)} ({kind})."
    )
    if "programs" in estimated and (devices["simulated"] or devices["backend"] == "cpu"):
        yield (
            "Workspaces are those of XLA's CPU compiler. Another one fuses other operations and lays arrays out "
            "otherwise: for a GPU or a TPU take them for a guess, and the arrays for exact."
        )
    if devices["simulated"] and "bfloat16" in estimated["parameters"]["base"]:
        yield (
            "The CPU compiler would keep a float32 copy of a whole bfloat16 base; workspaces are those with a float32 "
            "base, and a layer and the embedding in float32 besides."
        )
    if note := COMMAND_NOTES.get(estimated["command"]):
        yield note
    if "hosts" in estimated:
        yield (
            "Every host reads all rows and all of the model, and keeps the parts of its own devices. Its memory is "
            "counted without the program, the text of the rows and what reading takes."
        )
    if "flops" in estimated:
        yield (
            f"{estimated['flops']:.3g} floating-point operations of matrix products, "
            f"{estimated['trainings_by_flops']:.1f} x one training. Seconds: {estimated['speed']['source']}."
        )
    if "kept" in estimated:
        yield (
            "A sweep goes back through the steps on the tape and replays others from snapshots; what is kept changes "
            "no number. outer.memory_gib says how much it may take, outer.offload where snapshots lie."
        )
    yield f"The estimate took {estimated['seconds_to_estimate']:.0f} s."


def _verdict(estimated: dict[str, Any]) -> str:
    peak, budget = estimated["peak"], estimated["budget"]
    peak_words = f"{format_bytes(peak)} of one device at the most, in the phase “{estimated['peak_phase']}”"
    if "programs" not in estimated:
        peak_words += ", without the workspace of a step"
    if not budget:
        return f"{peak_words}. Say by --estimate.memory-gib what a device has."
    if peak <= budget:
        return f"It fits: {peak_words}; {format_bytes(budget)} are there."
    remedy_lines = [
        f"  {remedy['change']:<32}{format_bytes(remedy['peak'])}" for remedy in estimated.get("remedies", [])
    ]
    lines = ["It does not fit: " + f"{peak_words}; {format_bytes(budget)} are there."]
    return "\n".join([*lines, *(["What would help, with the peak then:", *remedy_lines] if remedy_lines else [])])


# ---- numbers in words


def _format_hours(value: float | None) -> str:
    return "" if value is None else f"{value:,.3g}"


def _make_table(*heads: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(heads[0], no_wrap=True)
    for head in heads[1:]:
        table.add_column(head, justify="right", no_wrap=True)
    return table
