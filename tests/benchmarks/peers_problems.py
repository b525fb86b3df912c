"""The problems of `peers`, as plain numpy: what JAX and PyTorch contestants both read."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Adam(NamedTuple):
    """params -= rate * m^ / (sqrt(v^ + eps_root) + eps), with the moments m^, v^ corrected for their start at 0.

    `eps_root` makes the derivative finite where a gradient is 0, as in unused rows of an embedding.
    """

    rate: float = 1e-3
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    eps_root: float = 1e-8


class Training(NamedTuple):
    """d (loss of `held_out` after training) / d (weight of every row), training being one Adam step per row of `order`.

    A step's loss is the mean over its rows of weight * loss; a row's loss is a cross-entropy (over the tokens: its
    mean), nats.
    """

    rows: dict[str, np.ndarray]
    """The MLP's: `x` float32[rows, features], `y` int64[rows]; the transformer's: `tokens` int64[rows, length + 1]."""
    held_out: dict[str, np.ndarray]
    order: Int[np.ndarray, "steps batch"]
    weights: Float[np.ndarray, "rows"]
    start: Any
    """The MLP's matrices and biases, (float32[in, out], float32[out]) each; or the folder of a Hugging Face model."""
    adam: Adam = Adam()


class Regression(NamedTuple):
    """Softmax regression at its minimum: mean of weights * cross-entropy + delta / 2 |matrix|^2."""

    x: Float[np.ndarray, "rows features"]
    y: Int[np.ndarray, "rows"]
    held_out_x: Float[np.ndarray, "held_out features"]
    held_out_y: Int[np.ndarray, "held_out"]
    weights: Float[np.ndarray, "rows"]
    delta: float
    solution: Float[np.ndarray, "features classes"]
    exact: Float[np.ndarray, "rows"]
    """The hypergradient, float64: the Hessian in closed form, solved directly."""
    products: int
    """What CG needs for |A v - b| <= tolerance |b| in float64; for contestants that count instead of measuring."""
    tolerance: float = 1e-6


ORDER_SEED = 0
"""Of the MLP's batches, as the solvers on arrays draw them."""


def mlp(*, steps: int = 100, batch: int = 128, rows: int = 1024, widths=(784, 200, 200, 10)) -> Training:
    """An MLP of 199,210 parameters, tanh; a tenth of its labels are drawn at random."""
    import jax  # here, so that reading this module starts no framework

    import bilevel_jax as bj

    order = np.asarray(bj.batch_order(rows, batch, steps, jax.random.key(ORDER_SEED)))
    rng = np.random.default_rng(0)
    teacher = rng.normal(size=(widths[0], widths[-1]))

    def sample(count: int) -> dict[str, np.ndarray]:
        x = rng.normal(size=(count, widths[0])).astype(np.float32)
        wrong = rng.random(count) < 0.1
        return {"x": x, "y": np.where(wrong, rng.integers(widths[-1], size=count), np.argmax(x @ teacher, axis=1))}

    start = [
        (rng.normal(size=shape).astype(np.float32) / np.float32(np.sqrt(shape[0])), np.zeros(shape[1], np.float32))
        for shape in zip(widths[:-1], widths[1:], strict=True)
    ]
    return Training(sample(rows), sample(batch), order, _weights(rng, rows), start)


def transformer(folder: Path, *, steps: int = 16, batch: int = 16, rows: int = 256, length: int = 64) -> Training:
    """A Llama of 1.89 million parameters that learns a random Markov chain; its start is drawn into `folder`."""
    import jax  # here, so that reading this module starts no framework

    from bilevel_jax.lm import models

    config = models.DecoderConfig(
        vocab_size=512, width=192, mlp_width=480, layers=4, heads=6, kv_heads=6, head_dim=32, max_length=length
    )
    models.save_model(folder, config, models.init_params(config, jax.random.key(0)))
    rng = np.random.default_rng(1)
    successors = rng.integers(config.vocab_size, size=(config.vocab_size, 4))

    def sample(count: int) -> dict[str, np.ndarray]:
        tokens = rng.integers(config.vocab_size, size=(count, length + 1))
        for place in range(length):
            tokens[:, place + 1] = successors[tokens[:, place], rng.integers(4, size=count)]
        return {"tokens": tokens}

    return Training(sample(rows), sample(batch), _epochs(rng, rows, steps, batch), _weights(rng, rows), folder)


def regression(*, rows: int = 2000, features: int = 64, classes: int = 10, delta: float = 1e-3) -> Regression:
    """640 parameters on features of very different sizes, so that CG takes more than a hundred products."""
    rng = np.random.default_rng(2)
    teacher = rng.normal(size=(features, classes))

    def sample(count: int) -> tuple[np.ndarray, np.ndarray]:
        x = rng.normal(size=(count, features))
        return x * np.logspace(0.5, -1, features), np.argmax(
            x @ teacher + 4 * rng.normal(size=(count, classes)), axis=1
        )

    (x, y), (held_out_x, held_out_y), weights = sample(rows), sample(500), _weights(rng, rows).astype(float)
    theta, step = np.zeros((features, classes)), np.ones((features, classes))
    while np.linalg.norm(step) > 1e-10:  # Newton
        gradient = x.T @ (weights[:, None] * _errors(theta, x, y)) / rows + delta * theta
        step = np.linalg.solve(_hessian(theta, x, weights, delta), gradient.ravel()).reshape(theta.shape)
        theta = theta - step
    hessian = _hessian(theta, x, weights, delta)
    slope = held_out_x.T @ _errors(theta, held_out_x, held_out_y) / len(held_out_y)
    v = np.linalg.solve(hessian, slope.ravel()).reshape(theta.shape)
    exact = -np.sum(_errors(theta, x, y) * (x @ v), axis=1) / rows
    found = Regression(x, y, held_out_x, held_out_y, weights, delta, theta, exact, 0)
    return found._replace(products=_products(hessian, slope.ravel(), found.tolerance))


def _hessian(theta: np.ndarray, x: np.ndarray, weights: np.ndarray, delta: float) -> np.ndarray:
    p, (features, classes) = _softmax(x @ theta), theta.shape
    blocks = np.zeros((features, classes, features, classes))
    for c, d in np.ndindex(classes, classes):
        curved = weights * p[:, c] * ((c == d) - p[:, d])
        blocks[:, c, :, d] = x.T @ (curved[:, None] * x) / len(x)
    return blocks.reshape(theta.size, theta.size) + delta * np.eye(theta.size)


def _errors(theta: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _softmax(x @ theta) - np.eye(theta.shape[1])[y]


def _softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def _products(matrix: np.ndarray, b: np.ndarray, tolerance: float) -> int:
    x, r, p, count = np.zeros_like(b), b, b, 0
    while np.linalg.norm(r) > tolerance * np.linalg.norm(b):
        product, rr, count = matrix @ p, r @ r, count + 1
        x, r = x + rr / (p @ product) * p, r - rr / (p @ product) * product
        p = r + (r @ r) / rr * p
    return count


def _epochs(rng: np.random.Generator, rows: int, steps: int, batch: int) -> np.ndarray:
    epochs = -(-steps * batch // rows)
    return np.concatenate([rng.permutation(rows) for _ in range(epochs)])[: steps * batch].reshape(steps, batch)


def _weights(rng: np.random.Generator, rows: int) -> np.ndarray:
    return rng.uniform(0.5, 1.5, rows).astype(np.float32)
