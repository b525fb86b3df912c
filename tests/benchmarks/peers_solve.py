"""The PyTorch contestants of `peers` on one linear system: implicit differentiation of softmax regression."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from tests.benchmarks.peers_problems import Regression

Hypergradient = Callable[[], np.ndarray]


class Losses:
    """The inner and the outer loss of a regression, float32."""

    def __init__(self, problem: Regression):
        self.x, self.held_out_x = (torch.tensor(x, dtype=torch.float32) for x in (problem.x, problem.held_out_x))
        self.y, self.held_out_y = torch.from_numpy(problem.y), torch.from_numpy(problem.held_out_y)
        self.weights = torch.tensor(problem.weights, dtype=torch.float32, requires_grad=True)
        self.solution = torch.tensor(problem.solution, dtype=torch.float32, requires_grad=True)
        self.delta = problem.delta

    def inner(self, theta: Tensor, weights: Tensor) -> Tensor:
        losses = nn.functional.cross_entropy(self.x @ theta, self.y, reduction="none")
        return (weights * losses).mean() + self.delta / 2 * (theta * theta).sum()

    def outer(self, theta: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.held_out_x @ theta, self.held_out_y)


def torchopt(problem: Regression) -> Hypergradient:
    """TorchOpt's custom_root with its solve_cg."""
    import torchopt
    from torchopt.diff.implicit import custom_root

    losses = Losses(problem)
    slope = torch.func.grad(losses.inner, argnums=0)
    solve = torchopt.linear_solve.solve_cg(rtol=problem.tolerance, maxiter=1000)

    @custom_root(slope, argnums=1, solve=solve)
    def minimum(theta: Tensor, weights: Tensor) -> Tensor:
        return losses.solution.detach().clone()

    def run() -> np.ndarray:
        theta = minimum(losses.solution, losses.weights)
        return torch.autograd.grad(losses.outer(theta), losses.weights)[0].numpy()

    return run


def hypertorch(problem: Regression) -> Hypergradient:
    """hypertorch's CG, for a gradient step as the fixed-point map; its tolerance is absolute."""
    import hypergrad

    losses = Losses(problem)

    def step(params: list[Tensor], hyper: list[Tensor]) -> list[Tensor]:
        slope = torch.autograd.grad(losses.inner(params[0], hyper[0]), params, create_graph=True)
        return [params[0] - slope[0]]

    def outer(params: list[Tensor], hyper: list[Tensor]) -> Tensor:
        return losses.outer(params[0])

    size = torch.autograd.grad(losses.outer(losses.solution), losses.solution)[0].norm()
    tolerance = problem.tolerance * float(size)

    def run() -> np.ndarray:
        found = hypergrad.CG([losses.solution], [losses.weights], 1000, step, outer, tol=tolerance, set_grad=False)
        return found[0].numpy()

    return run


def betty(problem: Regression) -> Hypergradient:
    """Betty's cg, called as its engine would; it takes a number of products and no tolerance.

    In 0.1.1 a new direction is made of the residual before the step, not after it, so that it does not converge.
    """
    from betty.hypergradient.cg import cg

    losses = Losses(problem)
    inner = SimpleNamespace(
        paths=[],
        config=SimpleNamespace(cg_iterations=problem.products, cg_alpha=1.0),
        cur_batch=None,
        training_step_exec=lambda batch: losses.inner(losses.solution, losses.weights),
        parameters=lambda: [losses.solution],
        trainable_parameters=lambda: [losses.solution],
    )
    outer = SimpleNamespace(trainable_parameters=lambda: [losses.weights])

    def run() -> np.ndarray:
        slope = torch.autograd.grad(losses.outer(losses.solution), [losses.solution])
        return cg(slope, inner, outer)[0].numpy()

    return run
