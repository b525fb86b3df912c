"""The ranks of the package, read from its imports: arrows point down, fences hold, folders stay small."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "bilevel_jax"
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))

# lowest first; a file imports files of its own rank and of those before it. The longest prefix of a path decides.
RANKS = (
    "core",
    "storage",
    "lm",
    "scores",
    "runs/stats.py",
    "runs/terminal.py",
    "runs/tensorboard.py",
    "runs/compiled_programs.py",
    "runs/config",
    "runs/infra",
    "runs/tasks",
    "runs/scoring",
    "runs/evaluation",
    "runs/engine",
    "runs/budget",
    "runs/report",
    "commands",
    "language_model",  # of which `lm` gives names that it imports when they are read
    "",  # the public names and the command line
)
CORE_MAY_IMPORT = {"jax", "optax", "numpy", "jaxtyping"}  # and the standard library
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
MOST_FILES, MOST_FLOORS = 14, 8


def imports(path: Path, source: str) -> set[str]:
    """Dotted names of all that a file of the package imports, at the top or inside a function."""
    here = ["bilevel_jax", *path.parts[:-1]]
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def rank(path: str) -> int:
    """The place in RANKS of a path such as `runs/infra/mesh`; for a folder that holds several ranks, the highest."""
    fit = [r for r in RANKS if r and (path + "/").startswith(r.removesuffix(".py") + "/")]
    if fit:
        return RANKS.index(max(fit, key=len))
    inside = [RANKS.index(r) for r in RANKS if r.startswith(path + "/")]
    return max(inside, default=len(RANKS) - 1)


def command(path: str) -> str:
    """The command whose folder a path lies in, or nothing."""
    parts = path.split("/")
    return parts[1] if parts[0] == "commands" and len(parts) > 2 else ""


def target(name: str) -> str:
    """`bilevel_jax.runs.infra.placement.place_table` as the path that it is in: `runs/infra/placement`."""
    parts = name.split(".")[1:]
    while parts and not (PACKAGE / "/".join(parts)).is_dir() and not (PACKAGE / ("/".join(parts) + ".py")).is_file():
        parts.pop()
    return "/".join(parts)


def faults(path: Path, source: str) -> list[str]:
    """What is wrong with the imports of one file."""
    here = str(path.with_suffix(""))
    floor = path.parts[0] if len(path.parts) > 1 else ""
    wrong = []
    for name in sorted(imports(path, source)):
        top = name.split(".")[0]
        if top == "bilevel_jax":
            there = target(name)
            if rank(there) > rank(here):
                wrong.append(f"{here} imports {name}, which is above it")
            owner = command(there)
            if command(here) and owner and owner != command(here):
                wrong.append(f"the command {command(here)} imports {name}, another command")
        elif floor == "core" and top not in CORE_MAY_IMPORT and top not in sys.stdlib_module_names:
            wrong.append(f"core imports {name}; it may import {sorted(CORE_MAY_IMPORT)}")
        if top == "flax" and floor != "lm":
            wrong.append(f"{name}: flax is fenced in lm")
        if top == "optax" and floor in ("lm", "scores"):
            wrong.append(f"{name}: {floor} never sees an optimiser")
        if top in PICKLES:
            wrong.append(f"{name}: never pickle")
    if "allow_pickle=True" in source or "weights_only=False" in source:
        wrong.append("reads pickles")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bilevel_jax"):
            wrong += [f"{a.name} as {a.asname}: call it by its name" for a in node.names if a.asname]
    return wrong


@pytest.mark.parametrize("path", FILES, ids=str)
def test_arrows_point_down_and_fences_hold(path):
    assert faults(path, (PACKAGE / path).read_text(encoding="utf-8")) == []


def test_folders_are_at_most_two_deep():
    assert [str(path) for path in FILES if len(path.parts) > 3] == []


def test_no_folder_holds_more_than_a_reader_scans():
    counts = {
        folder: sum(path.parent == folder and path.name != "__init__.py" for path in FILES)
        for folder in {path.parent for path in FILES}
    }
    assert {str(folder): count for folder, count in counts.items() if count > MOST_FILES} == {}


def test_runs_stands_on_few_floors():
    """The longest chain of imports between folders of `runs`, and no circle among modules."""
    below = {
        str(path.with_suffix("")): {target(name) for name in imports(path, (PACKAGE / path).read_text())}
        for path in FILES
        if path.parts[0] == "runs" and path.name != "__init__.py"
    }
    below = {here: {there for there in names if there in below} for here, names in below.items()}
    heights: dict[str, int] = {}

    def height(module: str, above: tuple[str, ...] = ()) -> int:
        assert module not in above, f"a circle: {' -> '.join([*above, module])}"
        if module not in heights:
            heights[module] = 1 + max((height(one, (*above, module)) for one in below[module]), default=0)
        return heights[module]

    folders: dict[str, set[str]] = {}
    for module, names in below.items():
        height(module)
        folders.setdefault(str(Path(module).parent), set()).update(str(Path(name).parent) for name in names)
    floors: dict[str, int] = {}

    def floor(folder: str) -> int:
        if folder not in floors:
            floors[folder] = 1 + max((floor(one) for one in folders.get(folder, ()) if one != folder), default=0)
        return floors[folder]

    assert max(map(floor, folders)) <= MOST_FLOORS


@pytest.mark.parametrize(
    "path, source, bites",
    [
        ("core/a.py", "import jax.numpy as jnp, optax, math\nfrom .tree import dot\nfrom . import types", False),
        ("core/a.py", "import flax", True),
        ("core/a.py", "import scipy", True),
        ("core/a.py", "from bilevel_jax.lm.losses import sft", True),
        ("core/a.py", "from bilevel_jax import runs", True),
        ("core/a.py", "from .. import lm", True),
        ("core/a.py", "from ..runs.config.load import load_config", True),
        ("core/a.py", "def f():\n    import bilevel_jax.runs", True),
        ("lm/models/a.py", "from ...core import types\nfrom ..losses import sft\nfrom flax import nnx", False),
        ("lm/models/a.py", "from ...runs.infra import run_dir", True),
        ("lm/a.py", "import optax", True),
        ("lm/a.py", "from bilevel_jax.scores import perplexity", True),
        ("scores/a.py", "from bilevel_jax.lm.inference.loglik import Request\nimport jax", False),
        ("scores/a.py", "from bilevel_jax.runs.infra import run_dir", True),
        ("scores/a.py", "from ..runs.infra import placement", True),
        ("scores/a.py", "import optax", True),
        ("scores/a.py", "from flax import nnx", True),
        ("runs/tasks/a.py", "import optax, yaml\nfrom bilevel_jax.core import tree", False),
        ("runs/tasks/a.py", "from bilevel_jax.runs.infra import session", False),
        ("runs/infra/a.py", "from bilevel_jax.runs.tasks import text", True),
        ("runs/infra/a.py", "from bilevel_jax.commands.select import run", True),
        ("runs/infra/a.py", "from flax import nnx", True),
        ("runs/infra/a.py", "from bilevel_jax import cli", True),
        ("runs/infra/a.py", "import pickle", True),
        ("runs/infra/a.py", "np.load(path, allow_pickle=True)", True),
        ("runs/infra/a.py", "from bilevel_jax.runs.infra import placement as placing", True),
        ("commands/rank/a.py", "from bilevel_jax.commands.rank import run", False),
        ("commands/rank/a.py", "from bilevel_jax.commands.select import run", True),
        ("commands/estimate/a.py", "from bilevel_jax.commands.select import run", True),
        ("cli.py", "from bilevel_jax.runs.config import load", False),
        ("language_model/a.py", "from bilevel_jax.runs.engine import trainer\nimport optax", False),
        ("language_model/a.py", "from bilevel_jax import cli", True),
        ("commands/rank/a.py", "from bilevel_jax.language_model import model", True),
        ("lm/a.py", "def f():\n    from bilevel_jax.language_model import model", True),
    ],
)
def test_the_reader_of_imports_bites(path, source, bites):
    assert bool(faults(Path(path), source)) == bites
