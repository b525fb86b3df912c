"""A file of a run that was changed, cut, swapped or deleted is named by --resume, or made again bit for bit."""

import importlib
import shutil
import warnings
from collections import Counter
from pathlib import Path

import pytest

from bilevel_jax.runs.config import load
from bilevel_jax.runs.infra.session import Interrupted, open_run_dir
from tests.commands.run_table import (
    CONFIG_CLASSES,
    RUNS,
    contents,
    differences,
    start,
    table_inputs,  # noqa: F401
    without_clock,
)
from tests.runs import damage
from tests.tiny_task import stop_session_at

pytestmark = pytest.mark.slow

DAMAGED = {
    # name of the run: (flags that make another run of it, the piece of work at which one is stopped)
    "train": ("--train.seed 5 --data.seed 5", 30),
    "train, dpo": ("--train.seed 5 --data.seed 5", 30),
    "select": ("--train.seed 5 --data.seed 5", 60),
    "select, the built-in task": ("--data.seed 5", 12),
    "compare": ("--data.seed 5", 60),
    "compare, proxies": ("--data.seed 5", 40),
    "tune": ("--data.seed 5", 20),
    "audit": ("--data.seed 5", 40),
    "rank": ("--data.seed 5", 2),
    "refine": ("--data.seed 5", 60),
    "score": ("--selection.top-share 0.3", 1),
}
TOLD = {
    "log.jsonl": ("report.html",),
    "checkpoints/responses.jsonl": ("checkpoints/responses.jsonl",),
    "checkpoints/done.json": ("checkpoints/done.json",),
}
"""Records that a run may go on without, and says so, and what lacks them then: the rounds of refine have checkpoints
and tables of their own."""
TRIES = 60
"""Of each kind of damage, for each run, finished and stopped."""


@pytest.fixture(scope="module", params=DAMAGED)
def runs(request, table_inputs, tmp_path_factory):  # noqa: F811
    """(its name, state -> (a run, another one))."""
    name, folder = request.param, tmp_path_factory.mktemp("runs")
    flags, count = DAMAGED[name]
    importlib.import_module(f"bilevel_jax.commands.{RUNS[name][0]}.run")  # or its clock would go on
    made = {}
    with without_clock():
        for state in ("finished", "stopped"):
            made[state] = (folder / state / "run", folder / state / "other" / "run")
            for out, more in zip(made[state], ((), flags.split()), strict=True):
                with pytest.MonkeyPatch.context() as patch:
                    if state == "stopped":
                        stop_session_at(patch, count)
                    try:
                        start(table_inputs, name, out, *more)
                    except Interrupted:
                        assert state == "stopped"
    return name, made


def contents_without_place(folder, made):
    """What a run holds, without the names of the folders of these runs: its config, report and proposal have them."""
    held = contents(folder)
    for name in ("config.yaml", "report.html", "tuned.yaml"):
        for place in (made["finished"][0], made["stopped"][0], folder):
            if name in held:
                held[name] = held[name].replace(str(place).encode(), b"PLACE")
    return held


def names_case(text: str, folder: Path, case: damage.Case) -> bool:
    """Whether a message names the damaged file, or the checkpoint that it is of."""
    names = [name for name in (case.name, case.other, part_of(case)) if name]
    return any(str(folder / name) in text for name in names)


def part_of(case: damage.Case) -> str:
    """The checkpoint, or else the file."""
    return next((str(parent) for parent in Path(case.name).parents if parent.name.startswith("step_")), case.name)


def open_damaged(config, folder: Path, case: damage.Case) -> str:
    """What `--resume` says to a damaged run before it works: "named", or "goes on"."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            with open_run_dir(config):
                raise Interrupted(15)  # nothing is written
        except Interrupted:
            pass
        except (ValueError, OSError) as error:
            return "named" if names_case(str(error), folder, case) else f"wrong: {error}"
    return "goes on, and names it" if any(names_case(str(one.message), folder, case) for one in warned) else "goes on"


@pytest.mark.parametrize("state", ["finished", "stopped"])
@pytest.mark.parametrize("kind", damage.KINDS)
def test_every_damage_is_named_or_healed(runs, table_inputs, tmp_path, kind, state):  # noqa: F811
    """What goes on is resumed to its end, one of each kind: all that it writes is what was written without damage."""
    name, made = runs
    one, other = made[state]
    whole = contents_without_place(made["finished"][0], made)
    command, options = RUNS[name]
    file = table_inputs / f"{command}.yaml"
    place, healed = tmp_path / "run", {}
    flags = [*options.format(made=table_inputs).split(), "--resume", "--out", str(place)]
    config = load.load_config(CONFIG_CLASSES[command], file, flags)
    found: Counter = Counter()
    for folder, case in damage.damaged_copies(kind, one, other, place, TRIES):
        again = tmp_path / "again" / "run"
        shutil.rmtree(again, ignore_errors=True)
        shutil.copytree(folder, again)
        told = open_damaged(config, folder, case)
        assert not told.startswith("wrong"), (case, told)
        if told.startswith("goes on") and part_of(case) not in healed:
            with without_clock(), warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                try:
                    start(table_inputs, name, again, "--resume")
                except (ValueError, OSError) as error:
                    assert names_case(str(error), again, case), (case, error)
                    healed[part_of(case)] = "named when it is read"
        if told.startswith("goes on") and part_of(case) not in healed:
            is_named = any(names_case(str(one.message), again, case) for one in warned)
            different = differences(whole, contents_without_place(again, made))
            if is_named and case.name in TOLD:
                different = [name for name in different if name not in TOLD[case.name]]
            assert different == [], (case, is_named)
            healed[part_of(case)] = "healed, and named" if is_named else "healed"
        found["named" if told == "named" else healed[part_of(case)]] += 1
    print("FIGURES", name, state, kind, dict(found), healed)
    assert found.total() == TRIES
