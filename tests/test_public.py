"""The public names: light to import, documented, with examples that run, and all of them in the reference."""

import doctest
import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import optax
import pytest

import bilevel_jax as bj
from tests import reference

DOCUMENTED_MODULES = ("certify", "checkpointing", "curvature", "single_loop", "solvers", "weightings")
HEAVY = ("datasets", "flax", "jinja2", "matplotlib", "orbax", "pyarrow", "scipy.stats", "transformers", "tyro", "yaml")


def is_function(value: object) -> bool:
    """Also of compiled ones, which wrap theirs."""
    return inspect.isfunction(value) or inspect.isfunction(getattr(value, "__wrapped__", None))


def public_functions() -> dict[str, object]:
    """Functions of the package's own names and of the modules of core among them, by the name that a user writes."""
    functions = {name: getattr(bj, name) for name in bj.__all__ if is_function(getattr(bj, name))}
    for name in DOCUMENTED_MODULES:
        module = getattr(bj, name)
        for member in getattr(module, "__all__", [m for m in vars(module) if not m.startswith("_")]):
            value = getattr(module, member)
            if is_function(value) and value.__module__.startswith("bilevel_jax.core"):
                functions[f"{name}.{member}"] = value
    commands = [name for name in bj.commands.__all__ if is_function(getattr(bj.commands, name))]
    return functions | {f"commands.{name}": getattr(bj.commands, name) for name in commands}


FUNCTIONS = public_functions()


def test_the_example_of_the_readme_prints_what_it_says(capsys):
    text = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
    code = text.partition("```python\n")[2].partition("```")[0]
    options = jnp.get_printoptions()
    try:
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    finally:
        jnp.set_printoptions(**options)
    promised = [line.partition("  # ")[2] for line in code.splitlines() if line.startswith("print(")]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(promised) >= 3
    for line, words in zip(printed, promised, strict=True):
        assert words == line or words.startswith(f"{line}: "), (line, words)


def test_importing_the_package_pulls_nothing_heavy():
    code = f"import sys, bilevel_jax; print([name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_name_is_there():
    assert sorted(bj.__all__) == bj.__all__
    assert set(bj.__all__) <= set(dir(bj))
    for name in bj.__all__:
        assert getattr(bj, name).__doc__, name
    for module in (bj.lm, bj.scores):
        assert set(module.__all__) <= set(dir(module))
        for name in module.__all__:
            assert getattr(module, name).__doc__, name
    for module in (bj, bj.lm, bj.scores):
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            _ = module.nothing


@pytest.mark.parametrize("name", bj.commands.COMMAND_NAMES)
def test_a_command_is_a_function_also_after_its_folder_is_imported(name):
    command = getattr(bj.commands, name)
    package = importlib.import_module(f"bilevel_jax.commands.{name}")
    assert isinstance(package, ModuleType)
    assert callable(importlib.import_module(f"bilevel_jax.commands.{name}.run").__dict__[name])
    assert getattr(bj.commands, name) is command is sys.modules["bilevel_jax.commands.functions"].__dict__[name]
    assert name in dir(bj.commands)


def test_every_name_of_commands_is_there():
    assert set(bj.commands.__all__) <= set(dir(bj.commands))
    for name in bj.commands.__all__:
        assert getattr(bj.commands, name).__doc__, name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_is_documented(name):
    doc = inspect.getdoc(FUNCTIONS[name])
    parameters = inspect.signature(FUNCTIONS[name]).parameters
    assert doc.partition("\n\n")[0].endswith("."), "the first paragraph is a sentence"
    for section in ("Returns:", "Example:", *(["Args:"] if parameters else [])):
        assert f"\n{section}\n" in doc, f"{name} has no section {section}"
    described = doc.partition("\nArgs:\n")[2].partition("\n\n")[0]
    names = [f"**{name}" if parameter.kind is parameter.VAR_KEYWORD else name for name, parameter in parameters.items()]
    missing = [name for name in names if f"    {name}: " not in described + "\n"]
    assert missing == [], f"{name} does not describe {missing}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_example_runs(name):
    names = {"bj": bj, "jax": jax, "jnp": jnp, "optax": optax}
    examples = doctest.DocTestParser().get_doctest(inspect.getdoc(FUNCTIONS[name]), names, name, None, None)
    assert examples.examples
    report: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(examples, out=report.append)
    assert not report, "".join(report)


def test_the_check_of_links_bites(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "index.html").write_text(
        '<p id="top"><a href="a/b.html#f">f</a><a href="#top">up</a><a href="https://example.org">out</a></p>'
    )
    page = '<p id="f"><a href="../index.html">up</a><a href="../index.html#g">g</a></p>'
    (tmp_path / "a" / "b.html").write_text(page)
    assert reference.broken_links(tmp_path) == ["a/b.html: ../index.html#g"]
    (tmp_path / "index.html").unlink()
    assert reference.broken_links(tmp_path) == ["a/b.html: ../index.html", "a/b.html: ../index.html#g"]
