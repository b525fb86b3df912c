"""A notebook is what its script says, and its outputs are those of one run, from top to bottom, that ended well."""

import ast
import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
SCRIPTS = sorted(FOLDER.glob("[0-9]*.py"))
AGAIN = "make it again: python notebooks/execute.py notebooks/{}.py"
PLACE = re.compile(r"(?<![\w.:/<])/(?:[\w.-]+/)+[\w.-]+|[A-Z]:\\\w|site-packages")


def cells(script: str) -> list[tuple[str, str]]:
    """(kind, source) of each cell of a percent script, read without jupytext."""
    found = []
    for part in re.split(r"^# %%", script, flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        kind = "markdown" if head.strip() == "[markdown]" else "code"
        if kind == "markdown":
            body = "\n".join(re.sub(r"^# ?", "", line) for line in body.splitlines())
        found.append((kind, body.strip("\n")))
    return found


def text(source: str | list[str]) -> str:
    return source if isinstance(source, str) else "".join(source)


def test_every_notebook_has_a_script_and_every_script_a_notebook():
    assert SCRIPTS and [path.stem for path in sorted(FOLDER.glob("*.ipynb"))] == [path.stem for path in SCRIPTS]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_notebook(script):
    file, again = script.with_suffix(".ipynb"), AGAIN.format(script.stem)
    notebook = json.loads(file.read_text(encoding="utf-8"))
    found = [(cell["cell_type"], text(cell["source"])) for cell in notebook["cells"]]
    assert found == cells(script.read_text(encoding="utf-8")), f"stale; {again}"
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)], f"not one run; {again}"
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [text(output["text"]) for output in outputs if output.get("name") == "stderr"]
    assert any(kind.startswith("image/") for output in outputs for kind in output.get("data", {})), "no figure"
    words = [text(output.get("text", "")) + text(output.get("data", {}).get("text/plain", "")) for output in outputs]
    places = [match[0] for part in [*words, *(source for _, source in found)] for match in PLACE.finditer(part)]
    assert not places, f"places on somebody's machine: {places}"
    assert [cell["id"] for cell in notebook["cells"]] == [f"cell-{number}" for number in range(len(found))]
    assert file.stat().st_size < 500_000


def assigned_names(statement: ast.stmt) -> set[str]:
    return {node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def is_parameters(source: str) -> bool:
    """Whether a cell does nothing but give numbers, texts and tables of them names in capitals."""
    return all(
        isinstance(statement, ast.Assign)
        and not [node for node in ast.walk(statement.value) if isinstance(node, ast.Call)]
        and all(name.isupper() for name in assigned_names(statement))
        for statement in ast.parse(source).body
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_parameters_and_asserts(script):
    """One cell holds what a reader may change, all of it is read, and every assert says what a change broke."""
    code = [source for kind, source in cells(script.read_text(encoding="utf-8")) if kind == "code"]
    places = [place for place, source in enumerate(code) if is_parameters(source)]
    assert len(places) == 1, f"{len(places)} cells of parameters; keep one, of names in capitals and plain values"
    names = set().union(*map(assigned_names, ast.parse(code[places[0]]).body))
    rest = [node for place, source in enumerate(code) if place not in places for node in ast.walk(ast.parse(source))]
    read, assigned = (
        {node.id for node in rest if isinstance(node, ast.Name) and isinstance(node.ctx, context)}
        for context in (ast.Load, ast.Store)
    )
    assert not names - read, f"parameters that nothing reads: {sorted(names - read)}"
    assert not names & assigned, f"parameters that another cell overwrites: {sorted(names & assigned)}"
    asserts = [node for node in rest if isinstance(node, ast.Assert)]
    assert asserts, "no assert: say in code what the text says in numbers"
    assert not [ast.unparse(node.test) for node in asserts if node.msg is None], "asserts without a message"


def test_the_reader_of_scripts():
    script = '# %% [markdown]\n# # Title\n#\n# Text.\n\n# %%\nx = 1\n\n\n# %%\nprint("# %% no cell")\n'
    assert cells(script) == [("markdown", "# Title\n\nText."), ("code", "x = 1"), ("code", 'print("# %% no cell")')]
    assert PLACE.search("saved to /home/me/x.png") and not PLACE.search("https://arxiv.org/abs/2511.21056, a/b, 1 / 2")
