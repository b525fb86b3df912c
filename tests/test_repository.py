"""What the repository says about itself is true: README's tree, README's command, the pins."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def tree(readme: str) -> list[str]:
    """The files named in README's fenced block ```tree: one per line, `path  what it is`.

    Paths start at the repository or, shorter, at the package: `core/types.py  the few types`. A line that ends in /
    is a folder's heading.
    """
    blocks = re.findall(r"^```tree\n(.*?)^```", readme, flags=re.DOTALL | re.MULTILINE)
    lines = [
        re.fullmatch(r"\s*(\S+)(?:\s{2,}(\S.*))?", line) for block in blocks for line in block.splitlines() if line
    ]
    assert lines, "README has no block that starts with ```tree"
    assert all(lines), "a line of the tree is not `path  what it is`"
    silent = [line[1] for line in lines if not line[2] and not line[1].endswith("/")]
    assert not silent, f"the tree does not say what these are: {silent}"
    return [line[1] for line in lines]


def files() -> set[str]:
    """What the tree must name: the package's modules, the configs, the notebooks."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    names = listed.stdout.split("\n") if listed.returncode == 0 else [str(p.relative_to(ROOT)) for p in ROOT.rglob("*")]
    wanted = re.compile(r"bilevel_jax/(.*/)?(?!__init__)\w+\.py|configs/.*\.yaml|notebooks/.*\.(py|md|ipynb)")
    return {name for name in names if wanted.fullmatch(name) and (ROOT / name).is_file()}


def whole(name: str) -> str:
    """A path of the tree as a path of the repository."""
    return f"bilevel_jax/{name}" if (ROOT / "bilevel_jax" / name).exists() else name


def test_the_tree_in_readme_is_true():
    named = [whole(name) for name in tree(README.read_text(encoding="utf-8"))]
    assert sorted(name for name in set(named) if named.count(name) > 1) == [], "named twice"
    assert [name for name in named if not (ROOT / name).exists()] == [], "in the tree, not in the repository"
    assert sorted(files() - set(named)) == [], "in the repository, not in the tree"


def test_readme_and_ci_run_the_same_line():
    lines = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if "-m pytest" in line]
    assert len(lines) == 1
    assert lines[0] in README.read_text(encoding="utf-8").splitlines()


def test_the_reader_of_the_tree():
    text = (
        "x\n```tree\nbilevel_jax/\n  core/types.py   the few types\n\nconfigs/a.yaml  a run\n```\n```\nno  tree\n```\n"
    )
    assert tree(text) == ["bilevel_jax/", "core/types.py", "configs/a.yaml"]
    with pytest.raises(AssertionError, match="does not say what these are"):
        tree("```tree\ncore/types.py\n```\n")
    with pytest.raises(AssertionError, match="no block"):
        tree("# nothing")


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_constraints_name_versions_and_no_place():
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", f"{name}=={version}") for name, version in pins().items())


def test_every_dependency_is_pinned_within_its_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    pinned = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins().items()}
    for requirement in map(Requirement, [*project["dependencies"], *extras]):
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert name in pinned, f"{name} is not in constraints.txt"
        assert requirement.specifier.contains(pinned[name]), f"{name}: {pinned[name]} is outside of {requirement}"


def test_torch_is_only_asked_for_where_it_is_small():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in map(Requirement, project["optional-dependencies"]["parity"]):
        assert requirement.marker is not None
        for python, wanted in (("3.11", True), ("3.12", False)):
            assert requirement.marker.evaluate(default_environment() | {"python_version": python}) == wanted
