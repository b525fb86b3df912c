"""The floors of the house, read from the imports: arrows point down, fences hold."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "bilevel_jax"
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))

# floor -> the floors it may import. Files beside the floors (the command line, the friendly face) stand on top.
FLOORS = {
    "core": {"core"},
    "lm": {"core", "lm"},
    "scores": {"core", "lm", "scores"},
    "runs": {"core", "lm", "scores", "runs"},
}
CORE_MAY_IMPORT = {"jax", "optax", "numpy", "jaxtyping"}  # and the standard library
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def imports(path: Path, source: str) -> set[str]:
    """Dotted names of all that a file of the package imports, at the top or inside a function."""
    here = ["bilevel_jax", *path.parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def trouble(path: Path, source: str) -> list[str]:
    """What is wrong with the imports of one file."""
    floor = path.parts[0] if len(path.parts) > 1 else ""
    found = []
    for name in sorted(imports(path, source)):
        top, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if top == "bilevel_jax":
            if floor in FLOORS and target not in FLOORS[floor]:
                found.append(f"{floor} imports {name}, which is above it")
        elif floor == "core" and top not in CORE_MAY_IMPORT and top not in sys.stdlib_module_names:
            found.append(f"core imports {name}; it may import {sorted(CORE_MAY_IMPORT)}")
        if top == "flax" and floor != "lm":
            found.append(f"{name}: flax is fenced in lm")
        if top == "optax" and floor in ("lm", "scores"):
            found.append(f"{name}: {floor} never sees an optimiser")
        if top in PICKLES:
            found.append(f"{name}: never pickle")
    if "allow_pickle=True" in source or "weights_only=False" in source:
        found.append("reads pickles")
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_arrows_point_down_and_fences_hold(path):
    assert trouble(path, (PACKAGE / path).read_text(encoding="utf-8")) == []


def test_folders_are_at_most_two_deep():
    assert [str(path) for path in FILES if len(path.parts) > 3] == []


def test_every_folder_is_a_floor():
    assert {path.parts[0] for path in FILES if len(path.parts) > 1} <= set(FLOORS)


@pytest.mark.parametrize(
    "path, source, bites",
    [
        ("core/a.py", "import jax.numpy as jnp, optax, math\nfrom .tree import dot\nfrom . import types", False),
        ("core/a.py", "import flax", True),
        ("core/a.py", "import scipy", True),
        ("core/a.py", "from bilevel_jax.lm import losses", True),
        ("core/a.py", "from bilevel_jax import runs", True),
        ("core/a.py", "from .. import lm", True),
        ("core/a.py", "from ..runs.config import load", True),
        ("core/a.py", "def f():\n    import bilevel_jax.runs", True),
        ("lm/models/a.py", "from ...core import types\nfrom ..losses import sft\nfrom flax import nnx", False),
        ("lm/models/a.py", "from ...runs import files", True),
        ("lm/a.py", "import optax", True),
        ("lm/a.py", "from bilevel_jax.scores import perplexity", True),
        (
            "scores/a.py",
            "from bilevel_jax.lm.loglik import Request\nfrom bilevel_jax.core import certify\nimport jax",
            False,
        ),
        ("scores/a.py", "from bilevel_jax.runs import files", True),
        ("scores/a.py", "from ..runs.mesh import placed", True),
        ("scores/a.py", "import optax", True),
        ("scores/a.py", "from flax import nnx", True),
        ("runs/a.py", "import optax, yaml\nfrom bilevel_jax.core import tree", False),
        ("runs/a.py", "from flax import nnx", True),
        ("runs/a.py", "from bilevel_jax import cli", True),
        ("runs/a.py", "import pickle", True),
        ("runs/a.py", "np.load(path, allow_pickle=True)", True),
        ("cli.py", "from bilevel_jax.runs import config", False),
    ],
)
def test_the_reader_of_imports_bites(path, source, bites):
    assert bool(trouble(Path(path), source)) == bites
