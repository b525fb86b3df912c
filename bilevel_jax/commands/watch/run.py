"""`bilevel-jax watch`: a terminal view of a run, drawn again while it runs."""

import contextlib
import time
from typing import Any

from rich.live import Live

from bilevel_jax.commands.watch.read import RunState, read_state, seconds_of_silence
from bilevel_jax.commands.watch.view import has_ended, render_state
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
    silence = seconds_of_silence(state)
    if config.watch.once or not console.is_terminal:
        console.print(render_state(state, silence))
        return state
    heard, wait = time.monotonic(), config.watch.seconds
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        live.update(render_state(state, silence), refresh=True)
        while not has_ended(state, silence):
            time.sleep(wait)
            try:
                new = read_state(folder)
            except OSError as error:  # of the network: what was read stays
                live.console.print(f"not read: {error}")
                continue
            # by this machine's clock alone: that of the run's may be another
            if new != state:
                heard = time.monotonic()
            state, silence = new, time.monotonic() - heard
            live.update(render_state(state, silence), refresh=True)
    return state
