"""The examples of the methods run, with the small model and its rows; everything public is documented."""

import doctest
import inspect
import tempfile

import jax
import jax.numpy as jnp
import optax
import pytest

import bilevel_jax as bj
from bilevel_jax.language_model import model
from bilevel_jax.language_model.finetuning import FineTuned

FUNCTIONS = {
    f"{owner.__name__}.{name}": value
    for owner in (bj.lm.LanguageModel, FineTuned)
    for name, value in vars(owner).items()
    if inspect.isfunction(value) and not name.startswith("_")
} | {"load": model.load, "builtin_rows": model.builtin_rows, "read_examples": bj.lm.read_examples}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_is_documented_with_an_example_that_runs(name, lm, rows, held_out):
    doc = inspect.getdoc(FUNCTIONS[name])
    described = doc.partition("\nArgs:\n")[2].partition("\n\n")[0]
    parameters = [parameter for parameter in inspect.signature(FUNCTIONS[name]).parameters if parameter != "self"]
    missing = [parameter for parameter in parameters if f"    {parameter}: " not in described + "\n"]
    assert missing == [] and "\nRaises:\n" in doc and ("\nReturns:\n" in doc or name.endswith("save"))
    names = {"bj": bj, "jax": jax, "jnp": jnp, "optax": optax, "tempfile": tempfile}
    names |= {"lm": lm, "rows": rows, "held_out": held_out, "read_examples": bj.lm.read_examples}
    examples = doctest.DocTestParser().get_doctest(doc, names, name, None, None)
    assert examples.examples
    report: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(examples, out=report.append)
    assert not report, "".join(report)
