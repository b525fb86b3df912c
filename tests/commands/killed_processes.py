"""Kills processes of a run at its calls that change the disk, and resumes it in another: for test_killed.py.

Every process is forked from this one, which has imported everything and asked for no device.
"""

import json
import os
import pickle
import shutil
import signal
import sys
from pathlib import Path

import tests.conftest  # noqa: F401  # the flags of the devices, before jax starts
from tests.commands.run_table import contents, start, without_clock
from tests.commands.test_killed import SAVE_EVERY, DiskCalls, ends_otherwise, spread


def in_a_process(work):
    """The exit status of a child that does the work."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def main(inputs, name, folder, count):
    """Write told.json: how many were killed, and which of them ended otherwise than the one that was not."""
    out, whole_file, found_file = folder / "run", folder / "whole", folder / "found"

    def count_calls():
        with without_clock(save_every=SAVE_EVERY), DiskCalls(lambda number: None) as calls:
            start(inputs, name, out)
        whole_file.write_bytes(pickle.dumps((contents(out), calls.count)))

    def killed_at(call):
        def kill(number):
            if number == call:
                os.kill(os.getpid(), signal.SIGKILL)

        with without_clock(save_every=SAVE_EVERY), DiskCalls(kill):
            start(inputs, name, out)

    def resumed():
        found_file.write_text(json.dumps(ends_otherwise(inputs, name, out, pickle.loads(whole_file.read_bytes())[0])))

    assert in_a_process(count_calls) == 0
    calls = pickle.loads(whole_file.read_bytes())[1]
    chosen, killed, wrong = spread(range(int(calls * 0.97)), count), 0, {}  # threads make a few more or less
    for call in chosen:
        shutil.rmtree(out, ignore_errors=True)
        killed += in_a_process(lambda call=call: killed_at(call)) == -signal.SIGKILL
        if in_a_process(resumed) != 0:
            wrong[call] = "it was not resumed"
        elif found := json.loads(found_file.read_text()):
            wrong[call] = found
    (folder / "told.json").write_text(json.dumps({"tried": len(chosen), "killed": killed, "wrong": wrong}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
