"""The commands as a user runs them: another process, on one device, with the compiler's optimisations."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import ROOT


def run_verb(verb: str, config: str, out: Path, *flags: object) -> dict[str, Any]:
    """Run it, without the flags that make the tests compile fast and train slowly; what result.json holds."""
    command = [sys.executable, "-m", "bilevel_jax.cli", verb, config, *map(str, flags)]
    command += ["--out", str(out), "--output.no-progress"]
    subprocess.run(command, env=os.environ | {"XLA_FLAGS": ""}, cwd=ROOT, check=True)
    return json.loads((out / "result.json").read_text())
