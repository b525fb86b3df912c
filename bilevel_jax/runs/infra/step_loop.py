"""Resumable training-step loop with progress, signals and checkpoints."""

from collections.abc import Callable
from typing import TypeVar

from bilevel_jax.runs.infra.session import Session

State = TypeVar("State")


def save_when_due(steps_done: int, state: object, save_due: bool) -> bool:
    """Save when the last save is long ago or a signal came, and at no other step."""
    return save_due


def run_steps(
    session: Session,
    take_step: Callable[[int, State], State],
    state: State,
    steps: range,
    *,
    work: float = 1.0,
    on_step: Callable[[int, State, bool], bool] = save_when_due,
    save: Callable[[int, State], None] | None = None,
) -> State:
    """Take the steps in order and return the last state.

    Args:
        session: counts the work, notices signals and knows when a save is due.
        take_step: (step, state before it) -> state after it; it may take the memory of the state that it is given.
        state: the state before the first of `steps`.
        steps: the steps to take; after a resume they begin at the step that was saved.
        work: the work of one step, in training steps.
        on_step: (steps done, state, whether a save is due) -> whether to save now; called after each step.
        save: (steps done, state) -> None. Without it nothing is saved, and a signal stops the loop after its step: for
            work that is cheaper to repeat than to save.

    Raises:
        Interrupted: after a signal, when the state is saved.
    """
    for step in steps:
        state = take_step(step, state)
        session.advance(work)
        if save is None:
            session.check_signals()
        elif on_step(step + 1, state, session.should_save()):
            save(step + 1, state)
            session.mark_saved()
    return state
