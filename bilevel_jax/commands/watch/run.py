"""`bilevel-jax watch`: a terminal view of a run, drawn again while it runs."""

import time
from typing import Any

from rich.live import Live

from bilevel_jax.commands.watch.read import RunState, read_state
from bilevel_jax.commands.watch.view import render_state
from bilevel_jax.runs.config.load import WatchConfig
from bilevel_jax.runs.terminal import make_console


def watch(config: WatchConfig, *, console: Any = None) -> RunState:
    """Draw the view of a run until it ends, or once: with watch.once, and where the output is no terminal.

    Args:
        config: `watch.dir` names the folder of the run, or its URL.
        console: what to draw on; None: stdout.

    Returns:
        The run as it was last read.

    Raises:
        ValueError: for a folder that holds no run.
    """
    folder, console = config.watch.dir, console or make_console()
    state = read_state(folder)
    if config.watch.once or not console.is_terminal:
        console.print(render_state(state))
        return state
    with Live(render_state(state), console=console, auto_refresh=False) as live:
        while state.result is None or state.progress is not None:
            time.sleep(config.watch.seconds)
            state = read_state(folder)
            live.update(render_state(state), refresh=True)
    return state
