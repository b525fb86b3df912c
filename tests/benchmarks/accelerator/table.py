"""The markdown tables that are made of the lines of results."""

from typing import Any

Line = dict[str, Any]
"""A cell's row, name, size, lora and variant; its status and why; seconds, predicted_seconds; and its values."""
GIB = 2.0**30


def format_tables(lines: list[Line]) -> str:
    """All tables, and what was not run and why. Of several lines of a cell the last one counts."""
    last = {line["name"]: line for line in lines}
    measured: dict[str, list[Line]] = {}
    for line in last.values():
        if line["status"] == "measured":
            measured.setdefault(line["row"], []).append(line)
    machine = measured["machine"][0]["values"] if "machine" in measured else {}
    parts = []
    if machine:
        parts.append(_table("Machine", _machine_rows(machine)))
    sweeps = measured.get("sweep", [])
    with_memory = [line for row in ("sweep", "memory", "linearise") for line in measured.get(row, [])]
    parts += [
        _table("Training and backward pass", [_sweep_row(line) for line in sweeps]),
        _table("Speed", [row for line in sweeps for row in _speed_rows(line, machine)]),
        _table("Memory", [_memory_row(line) for line in with_memory]),
        _table("Precision", [row for line in measured.get("precision", []) for row in _precision_rows(line)]),
        _table("Repeated bits", [_replay_row(line) for line in measured.get("replay", [])]),
        _table("Stored linearisations", [_linearise_row(line) for line in measured.get("linearise", [])]),
        _table("States in the host's memory", [_offload_row(line) for line in measured.get("offload", [])]),
        _table("bergson, on the CPU", [row for line in measured.get("bergson", []) for row in _bergson_rows(line)]),
    ]  # fmt: skip
    missing = [
        {"not measured": line["name"], "why": f"{line['status']}: {line['why']}"}
        for line in last.values()
        if line["status"] != "measured"
    ]
    parts.append(_table("Not measured", missing))
    return "\n".join(part for part in parts if part)


def share_of_peaks(machine: Line, tflops: float, precision: str) -> str:
    """A rate as a share of the maker's peak and of the measured one; what has no number is named."""
    measured = machine.get("measured_tflops", {}).get(precision)
    maker = machine.get("maker_tflops", {}).get(precision)
    shares = [
        f"{tflops / maker:.0%} of {maker:.4g} (maker)" if maker else "the maker's is not known",
        f"{tflops / measured:.0%} of {measured:.3g} (measured)" if measured else "not measured",
    ]
    return ", ".join(shares)


# ---- rows


def _machine_rows(machine: Line) -> list[Line]:
    memory = machine["bytes_limit"]
    rows = [
        {"what": "device", "value": f"{machine['devices']} x {machine['kind']} ({machine['platform']})"},
        {"what": "memory", "value": f"{memory / GIB:.1f} GiB for arrays" if memory else "not told by the device"},
        {"what": "kinds of memory", "value": ", ".join(machine["memory_kinds"])},
        {"what": "jax, jaxlib", "value": f"{machine['jax']}, {machine['jaxlib']}"},
    ]
    for name, measured in machine["measured_tflops"].items():
        kind = "bfloat16" if name == "bfloat16" else f"float32, {name}"
        maker = machine["maker_tflops"].get(name)
        said = f"{maker:.4g} by the maker" if maker else "the maker's is not known"
        what = f"product of {machine['side']} x {machine['side']}, {kind}"
        rows.append({"what": what, "value": f"{measured:.3g} Tflop/s measured, {said}"})
    for name, rate in machine["transfers"].items():
        rows.append({"what": f"copies {name}", "value": f"{rate:.3g} GB/s"})
    return rows


def _sweep_row(line: Line) -> Line:
    values = line["values"]
    seconds, steps = values["seconds"], values["steps"]
    tokens = steps * values["tokens"]
    return {
        **_names(line),
        "plan": _plan(values),
        "plain training, tokens/s": _round(tokens / seconds["plain"]),
        "training at highest, tokens/s": _round(tokens / seconds["training"]),
        "with backward pass, tokens/s": _round(tokens / seconds["hypergradient"]),
        "/ plain": f"{seconds['hypergradient'] / seconds['plain']:.2f}",
        "/ training": f"{seconds['hypergradient'] / seconds['training']:.2f}",
        "by count": f"{values['by_count']:.2f}",
        "replayed bits": _yes(values["replayed"]),
    }


def _speed_rows(line: Line, machine: Line) -> list[Line]:
    values = line["values"]
    seconds, steps, flops = values["seconds"], values["steps"], values["flops"]
    rows = []
    for what, of, each, precision in (
        ("plain training step", "training", seconds["plain"] / steps, "default"),
        ("training step", "training", seconds["training"] / steps, "highest"),
        ("step back", "step back", values["seconds_of_step_back"], "highest"),
    ):
        tflops = flops[of] / each / 1e12 if each > 0 else float("nan")
        rows.append(
            {
                **_names(line),
                "what": what,
                "precision": precision,
                "ms": f"{1e3 * each:.3g}",
                "Gflop by formula": f"{flops[of] / 1e9:.4g}",
                "counted / formula": f"{flops[f'{of}, counted'] / flops[of]:.2f}",
                "Tflop/s by formula": f"{tflops:.3g}",
                "share of peak": share_of_peaks(machine, tflops, precision),
            }
        )
    return rows


def _memory_row(line: Line) -> Line:
    values = line["values"]
    predicted, measured = values["predicted_bytes"], values["measured_bytes"]
    return {
        **_names(line),
        "plan": _plan(values) + (", linearised" if line["row"] == "linearise" else ""),
        "predicted, MiB": f"{predicted / 2**20:,.0f}",
        "measured, MiB": f"{measured / 2**20:,.0f}" if measured else "not told",
        "measured / predicted": f"{measured / predicted:.2f}" if measured else "",
        "of": values["memory_of"],
    }


def _precision_rows(line: Line) -> list[Line]:
    values = line["values"]
    exact = values.get("error_to_float64")
    rows = []
    for name, times in values["seconds"].items():
        training, product = name.split(", ")
        rows.append(
            {
                **_names(line),
                "training": training,
                "products of steps back": product,
                "training, s": f"{times['training']:.3g}",
                "with backward pass, s": f"{times['hypergradient']:.3g}",
                "error to highest": f"{values['error'][name]:.2g}",
                "error to float64": f"{exact[name]:.2g}" if exact else values.get("float64", ""),
            }
        )
    return rows


def _replay_row(line: Line) -> Line:
    values = line["values"]
    return {
        **_names(line),
        "flags of XLA": values["flags"] or "none",
        "two trainings equal": _yes(values["trainings_equal"]),
        "replays equal": _yes(values["replayed"]),
        "two hypergradients equal": _yes(values["hypergradients_equal"]),
        "their relative difference": f"{values['difference']:.2g}",
        "with backward pass, s": f"{values['seconds']['hypergradient']:.3g}",
    }


def _linearise_row(line: Line) -> Line:
    values = line["values"]
    seconds = values["seconds"]
    return {
        **_names(line),
        "plan": _plan(values),
        "linearised, s": f"{seconds['linearised']:.3g}",
        "not, s": f"{seconds['hypergradient']:.3g}",
        "ratio": f"{seconds['linearised'] / seconds['hypergradient']:.2f}",
        "difference": f"{values['error']:.2g}",
        "replayed bits": _yes(values["replayed"]),
    }


def _offload_row(line: Line) -> Line:
    values = line["values"]
    seconds, measured = values["seconds"], values["measured_bytes"]
    return {
        **_names(line),
        "plan": _plan(values),
        "host, s": f"{seconds['host']:.3g}",
        "device, s": f"{seconds['device']:.3g}",
        "ratio": f"{seconds['host'] / seconds['device']:.2f}",
        "hypergradients equal": _yes(values["equal"]),
        "peak of the device, MiB": f"{measured / 2**20:,.0f}" if measured else "not told",
    }


def _bergson_rows(line: Line) -> list[Line]:
    values = line["values"]
    measured = [
        {"who": name, "s": f"{seconds:.3g}", "error": f"{values['error'][name]:.1e}" if name in values["error"] else ""}
        for name, seconds in values["seconds"].items()
    ]
    return measured + [{"who": name, "s": why, "error": ""} for name, why in values["failed"].items()]


# ---- cells


def _names(line: Line) -> Line:
    return {"model": line["size"], "trained": "LoRA" if line["lora"] else "all"}


def _plan(values: Line) -> str:
    plan = values["plan"]
    return f"{plan['snapshots']} snapshot{'s' * (plan['snapshots'] != 1)}, {plan['stored_steps']} steps"


def _yes(condition: bool) -> str:
    return "yes" if condition else "no"


def _round(number: float) -> str:
    return f"{float(f'{number:.3g}'):,.0f}"


def _table(title: str, rows: list[Line]) -> str:
    """Markdown, with the keys of the first row as headings; nothing without rows."""
    if not rows:
        return ""
    heads = list(rows[0])
    lines = [f"### {title}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines += [f"| {' | '.join(str(row[head]).replace('|', '/') for head in heads)} |" for row in rows]
    return "\n".join(lines) + "\n"
