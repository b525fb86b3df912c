"""A run that was stopped goes on with other devices and its parameters in another layout."""

import json
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest

from bilevel_jax.cli import main
from bilevel_jax.core import unrolled
from bilevel_jax.runs.infra.session import Session

pytestmark = pytest.mark.slow

SMALL = ("--model.param-dtype", "float64", "--optimizer.eps-root", "1e-6", "--optimizer.learning-rate", "1e-3")
SELECT = (
    *SMALL, "--train.max-steps", "4", "--outer.steps", "1", "--certify.no-enabled", "--retrain.variants", "uniform",
    "learned",
)  # fmt: skip
TRAIN = (*SMALL, "--train.load-best", "--train.eval-steps", "2")
LAYOUTS = {
    "8 x 1": ("--mesh.data", "8"),
    "2 x 2": ("--mesh.data", "2", "--mesh.fsdp", "2"),
    "1 x 4": ("--mesh.data", "1", "--mesh.fsdp", "4"),
}


class Phases:
    """What a run says that it does, and how often it has counted work since."""

    def __init__(self, patch):
        self.phase, self.counts, self.amount = "", 0, 0.0
        self.stops = lambda: False
        set_phase, advance = Session.set_phase, Session.advance

        def note_phase(session, description, total=None):
            self.phase, self.counts = description, 0
            set_phase(session, description, total)

        def note_work(session, amount=1.0):
            self.counts, self.amount = self.counts + 1, amount
            if self.stops():
                self.stops = lambda: False
                signal.raise_signal(signal.SIGTERM)
            advance(session, amount)

        patch.setattr(Session, "set_phase", note_phase)
        patch.setattr(Session, "advance", note_work)


@pytest.fixture
def stop_where(monkeypatch):
    """Stops the next run where a condition first holds of what it does (`Phases`); after each step back, too."""
    monkeypatch.setattr(unrolled, "STEPS_PER_ADVANCE", 1)
    phases = Phases(monkeypatch)

    def stop(condition):
        phases.stops = lambda: condition(phases)

    return stop


PLACES = {
    "training": lambda now: now.phase == "outer step 1 of 1" and now.counts == 3,
    "step back": lambda now: now.phase == "outer step 1 of 1" and now.amount > 1,
    "retrain": lambda now: now.phase.endswith(": learned") and now.counts == 2,
}


def run(command, made, out, *flags, code=0):
    """A command, as a user runs it; what it printed is on the standard output."""
    assert main([command, str(made / f"{command}.yaml"), "--out", str(out), *flags]) == code
    return out


def read(out):
    """result.json."""
    return json.loads((out / "result.json").read_text())


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory, eight_devices):
    """A run of `select` on eight devices that was not stopped."""
    return run("select", made, tmp_path_factory.mktemp("whole") / "run", *SELECT, *LAYOUTS["8 x 1"])


@pytest.mark.parametrize(
    ("place", "layout"),
    [
        ("training", "2 x 2"),
        ("step back", "2 x 2"),
        ("step back", "1 x 4"),
        ("retrain", "1 x 4"),
        ("step back", "8 x 1"),
    ],
)
def test_select_goes_on_elsewhere(place, layout, made, whole, tmp_path, stop_where, capsys):
    """The step that was stopped in its middle is made again, so that replayed steps have the bits of trained ones; not
    where nothing has changed."""
    stop_where(PLACES[place])
    run("select", made, tmp_path / "run", *SELECT, *LAYOUTS["8 x 1"], code=128 + signal.SIGTERM)
    assert not (tmp_path / "run" / "result.json").exists()
    capsys.readouterr()
    out = run("select", made, tmp_path / "run", *SELECT, *LAYOUTS[layout], "--resume")
    told = f"outer step 1 was stopped in its middle on 8 x 1 devices of 1 process; on {layout} devices of 1 process"
    assert (told in capsys.readouterr().err) == (place != "retrain" and layout != "8 x 1")
    wanted, found = (np.array(pq.read_table(one / "weights.parquet")["hypergradient"]) for one in (whole, out))
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9 * np.abs(wanted).max())  # sums in another order
    resumed, result = read(out), read(whole)
    for record, other in zip(resumed["records"], result["records"], strict=True):
        np.testing.assert_allclose(record["loss"]["validation"], other["loss"]["validation"], rtol=1e-9)
        assert record["checks"]["replayed"] and other["checks"]["replayed"]
    for line, other in zip(resumed["compare"], result["compare"], strict=True):
        np.testing.assert_allclose(line["mean"]["test"], other["mean"]["test"], rtol=1e-9)


@pytest.mark.parametrize("layout", ["2 x 2", "1 x 4"])
def test_train_goes_on_elsewhere(layout, made, tmp_path, stop_where, eight_devices):
    """Stopped after its fifth step, with the best parameters so far beside it."""
    whole = run("train", made, tmp_path / "whole", *TRAIN, *LAYOUTS["8 x 1"])
    stop_where(lambda now: now.phase == "training" and now.counts == 6)
    run("train", made, tmp_path / "run", *TRAIN, *LAYOUTS["8 x 1"], code=128 + signal.SIGTERM)
    out = run("train", made, tmp_path / "run", *TRAIN, *LAYOUTS[layout], "--resume")
    records, others = read(out)["records"], read(whole)["records"]
    assert len(records) == len(others) > 2
    for record, other in zip(records, others, strict=True):
        assert record["step"] == other["step"]
        for part, loss in other["loss"].items():
            np.testing.assert_allclose(record["loss"][part], loss, rtol=1e-9, err_msg=part)


def test_refine_goes_on_elsewhere(made, tmp_path, stop_where, eight_devices):
    """In its second training of a round: the responses of that round are of the same model, wherever it lies."""
    whole = run("refine", made, tmp_path / "whole", *SMALL, *LAYOUTS["8 x 1"])
    stop_where(lambda now: now.phase == "round 1: unrolled" and now.counts == 3)
    run("refine", made, tmp_path / "run", *SMALL, *LAYOUTS["8 x 1"], code=128 + signal.SIGTERM)
    stored = (tmp_path / "run" / "checkpoints" / "responses.jsonl").read_bytes()
    out = run("refine", made, tmp_path / "run", *SMALL, *LAYOUTS["2 x 2"], "--resume")
    assert (out / "checkpoints" / "responses.jsonl").read_bytes().startswith(stored)
    found, wanted = (pq.read_table(one / "responses.parquet").to_pydict() for one in (out, whole))
    assert found["id"] == wanted["id"] and found["text"] == wanted["text"]
    np.testing.assert_allclose(found["weight"], wanted["weight"], rtol=1e-9)  # float64, sums in another order
    for record, other in zip(read(out)["records"], read(whole)["records"], strict=True):
        assert (record["accepted"], record["best"]) == (other["accepted"], other["best"])
        np.testing.assert_allclose(record["present"], other["present"], rtol=1e-9)
