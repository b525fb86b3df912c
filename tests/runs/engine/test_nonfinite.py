"""A training that diverges says where it began: the step, the tensor, the rows."""

import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax.core.problem import weighted
from bilevel_jax.core.training import init_train_state
from bilevel_jax.runs.engine.nonfinite import find_first_nonfinite


def losses(params, fixed, batch):
    return params["offset"] + (batch["x"] @ params["slope"]) ** 2


def told(x, *, rate=0.1, params=None, function=losses, upto=4):
    """What is said of steps over two rows each; x: float32[steps, 2, 1]."""
    sgd = optax.sgd(rate)
    params = params or {"offset": jnp.zeros(()), "slope": jnp.ones(1)}
    x = np.asarray(x, np.float32).reshape(-1, 2, 1)

    def at(step):
        index = np.array([[2 * step, 2 * step + 1]])
        return jnp.ones(2 * len(x)), {
            "x": jnp.asarray(x[step])[None],
            "index": jnp.asarray(index),
            "num_examples": jnp.full(1, 2.0),
        }

    return find_first_nonfinite(
        weighted(function), sgd, function, init_train_state(sgd, params), upto, None, at, lambda row: f"row {row}"
    )


def test_names_the_row_whose_loss_is_not_finite():
    x = np.ones((5, 2, 1))
    x[3, 1] = np.nan
    assert told(x) == "at step 3 the loss of row 7 is not finite"


def test_names_the_tensor_whose_gradient_is_not_finite():
    def kinked(params, fixed, batch):  # sqrt has no derivative at 0
        return params["offset"] + jnp.sqrt(jnp.abs(batch["x"] @ params["slope"]))

    x = np.ones((5, 2, 1))
    x[2, 0] = 0
    assert told(x, function=kinked) == (
        "at step 2 every loss is finite, and the gradient of slope is not; the step held row 4, row 5"
    )


def test_names_the_tensor_that_an_update_breaks():
    x = np.full((5, 2, 1), 1e15)
    assert told(x, rate=1e30).startswith("the update of step 0 made slope not finite; the step held row 0")


def test_names_parameters_that_were_broken_before_the_first_step():
    params = {"offset": jnp.zeros(()), "slope": jnp.array([jnp.inf])}
    assert told(np.ones((5, 2, 1)), params=params) == "slope of the parameters is not finite before step 0"


def test_says_so_where_nothing_is_found():
    assert "stayed finite" in told(np.ones((5, 2, 1)))
