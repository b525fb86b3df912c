"""What the repository says about itself is true: the READMEs' trees, README's size and command, the pins."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
MOST_LINES, MOST_BYTES = 240, 12_000
FEW_MODULES = 2  # a folder of the package with more of them stands in the tree of a README, its own or its parent's


def read_tree(readme: str) -> list[str]:
    """The names in a README's fenced blocks ```tree: one per line, `path  what it is`.

    Paths start at the README's folder. A line that ends in / may be a heading, without a description.
    """
    blocks = re.findall(r"^```tree\n(.*?)^```", readme, flags=re.DOTALL | re.MULTILINE)
    lines = [
        re.fullmatch(r"\s*(\S+)(?:\s{2,}(\S.*))?", line) for block in blocks for line in block.splitlines() if line
    ]
    assert lines, "no block that starts with ```tree"
    assert all(lines), "a line of the tree is not `path  what it is`"
    silent = [line[1] for line in lines if not line[2] and not line[1].endswith("/")]
    assert not silent, f"the tree does not say what these are: {silent}"
    return [line[1] for line in lines]


def list_files() -> list[Path]:
    """The repository's files, relative to its root."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    names = listed.stdout.split("\n") if listed.returncode == 0 else [str(p.relative_to(ROOT)) for p in ROOT.rglob("*")]
    return sorted(Path(name) for name in names if (ROOT / name).is_file())


FILES = list_files()
MODULES = [
    path for path in FILES if path.parts[0] == "bilevel_jax" and path.suffix == ".py" and path.name != "__init__.py"
]


def folders_with_tree() -> list[Path]:
    """The folders whose README must name their files: those that have one, and larger folders below none."""
    described = {path.parent for path in FILES if path.name == "README.md" and path.parent != Path(".")}
    large = {path.parent for path in MODULES if sum(other.parent == path.parent for other in MODULES) > FEW_MODULES}
    alone = {folder for folder in large if not described & {folder, *folder.parents}}
    return sorted({*described, *alone, Path("configs"), Path("tests/benchmarks")})


def files_to_name(folder: Path) -> list[str]:
    """The modules or configs of a folder, and those of small folders below it that have no README of their own."""
    suffix = ".yaml" if folder == Path("configs") else ".py"
    own = set(folders_with_tree())
    inside = [path for path in FILES if folder in path.parents and path.suffix == suffix and path.stem != "__init__"]
    nearest = {path: next((parent for parent in path.parents if parent in own), None) for path in inside}
    return [path.relative_to(folder).as_posix() for path in inside if nearest[path] == folder]


@pytest.mark.parametrize("folder", folders_with_tree(), ids=str)
def test_the_tree_of_a_folder_names_its_files(folder):
    readme = ROOT / folder / "README.md"
    assert readme.is_file(), f"{folder} has no README.md with a ```tree of its files"
    named = read_tree(readme.read_text(encoding="utf-8"))
    assert sorted(name for name in set(named) if named.count(name) > 1) == [], "named twice"
    assert [name for name in named if not (ROOT / folder / name).exists()] == [], "in the tree, not in the folder"
    assert sorted(set(files_to_name(folder)) - set(named)) == [], "in the folder, not in the tree"


def test_the_tree_in_readme_names_all_folders():
    named = [name.removesuffix("/") for name in read_tree(README.read_text(encoding="utf-8"))]
    assert len(set(named)) == len(named), "named twice"
    assert [name for name in named if not (ROOT / name).is_dir()] == [], "in the tree, not a folder"
    top = {path.parts[0] for path in FILES if len(path.parts) > 1 and not path.parts[0].startswith(".")}
    package = {path.as_posix() for path in folders_with_tree()}
    missing = [
        folder
        for folder in sorted((top | package) - {"bilevel_jax"})
        if not any(f"{folder}/".startswith(f"{name}/") or name.startswith(f"{folder}/") for name in named)
    ]
    assert missing == [], "folders that the tree does not name"


def test_readme_is_short():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    assert len(text.encode()) <= MOST_BYTES


@pytest.mark.parametrize("readme", [path for path in FILES if path.suffix == ".md"], ids=str)
def test_links_between_documents_lead_somewhere(readme):
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / readme).read_text(encoding="utf-8")):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / readme.parent / path).resolve() if path else ROOT / readme
        assert target.exists(), f"{link} does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{link}: no such heading; there are {anchors}"


def test_readme_and_ci_run_the_same_tests():
    ci, readme = (path.read_text(encoding="utf-8") for path in (ROOT / ".ci" / "run", README))
    setup, thorough = [line for line in ci.splitlines() if "-m pytest" in line]
    assert setup in readme.splitlines()
    assert re.search(rf"^{re.escape(thorough)} +#", readme, flags=re.MULTILINE)


def test_the_reader_of_the_tree():
    text = "x\n```tree\naudit/\n  audit/run.py   the work\n\na.yaml  a run\n```\n```\nno  tree\n```\n"
    assert read_tree(text) == ["audit/", "audit/run.py", "a.yaml"]
    with pytest.raises(AssertionError, match="does not say what these are"):
        read_tree("```tree\ncore/types.py\n```\n")
    with pytest.raises(AssertionError, match="no block"):
        read_tree("# nothing")


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


def test_versions_before_1_have_an_upper_bound():
    """Their next minor version may break, and an environment without constraints.txt would take it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    pinned = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins().items()}
    for requirement in map(Requirement, [*project["dependencies"], *extras]):
        version = pinned[re.sub(r"[-_.]+", "-", requirement.name).lower()]
        bounded = requirement.extras or not requirement.specifier.contains("0.999")  # jax[cuda12] is jax
        assert not version.startswith("0.") or bounded, str(requirement)


def test_python_versions_are_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [line.rpartition(" ")[2] for line in project["classifiers"] if line.startswith("Programming Language")]
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert re.search(r"python: \[(.*)\]", workflow)[1].replace('"', "").split(", ") == listed
    assert project["requires-python"] == f">={listed[0]}"
    tested = f"Python {listed[0]} or newer (CI is set up for {', '.join(listed[:-1])} and {listed[-1]})"
    assert tested in README.read_text(encoding="utf-8")


def test_torch_is_only_asked_for_where_it_is_small():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in map(Requirement, project["optional-dependencies"]["parity"]):
        assert requirement.marker is not None
        for python, wanted in (("3.11", True), ("3.12", False), ("3.13", False)):
            assert requirement.marker.evaluate(default_environment() | {"python_version": python}) == wanted
