"""The PyTorch contestants of `peers`: each takes a problem and returns the function that is timed."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.benchmarks.peers_problems import Adam, Training

Hypergradient = Callable[[], np.ndarray]
State = tuple[list[Tensor], list[Tensor], list[Tensor]]
"""Parameters and both moments of Adam."""


class Weighted(nn.Module):
    """A network with its loss: forward(weights, rows) is the mean of weights * loss over rows."""

    def __init__(self, problem: Training):
        super().__init__()
        self.is_mlp = isinstance(problem.start, list)
        self.network = _mlp(problem.start) if self.is_mlp else _llama(problem.start)

    def forward(self, example_weight: Tensor, **rows: Tensor) -> Tensor:
        if self.is_mlp:
            losses = nn.functional.cross_entropy(self.network(rows["x"]), rows["y"], reduction="none")
        else:
            tokens = rows["tokens"]
            logits = self.network(input_ids=tokens[:, :-1], use_cache=False).logits
            losses = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
            losses = losses.view(len(tokens), -1).mean(1)
        return (example_weight * losses).mean()


class Layers(nn.ModuleList):
    """Sliced into a plain list: transformers slices its layers, which higher's copies cannot."""

    def __getitem__(self, at: int | slice) -> Any:
        return list(self)[at] if isinstance(at, slice) else super().__getitem__(at)


class Streams:
    """A problem's tensors: the rows of every step, the held-out rows, the weights of all rows."""

    def __init__(self, problem: Training):
        rows = {name: torch.from_numpy(leaf) for name, leaf in problem.rows.items()}
        self.order = [torch.from_numpy(at) for at in problem.order]
        self.batches = [{name: leaf[at] for name, leaf in rows.items()} for at in self.order]
        self.held_out = {name: torch.from_numpy(leaf) for name, leaf in problem.held_out.items()}
        self.ones = torch.ones(len(next(iter(self.held_out.values()))))
        self.weights = torch.from_numpy(problem.weights).requires_grad_()


def plain(problem: Training) -> Callable[[], None]:
    """Training alone: backward and the fused torch.optim.Adam, whose eps stands outside the root only."""
    module, streams, adam = Weighted(problem), Streams(problem), problem.adam
    start = {name: leaf.clone() for name, leaf in module.state_dict().items()}
    weights = streams.weights.detach()

    def run() -> None:
        module.load_state_dict(start)
        optimizer = torch.optim.Adam(module.parameters(), adam.rate, (adam.b1, adam.b2), adam.eps, fused=True)
        for at, rows in zip(streams.order, streams.batches, strict=True):
            optimizer.zero_grad()
            module(weights[at], **rows).backward()
            optimizer.step()

    return run


def autograd(problem: Training) -> Hypergradient:
    """torch.autograd through all steps."""
    module, streams, maps = _maps(problem)

    def run() -> np.ndarray:
        state = _start(module)
        for step in maps:
            state = step(state, [streams.weights])
        loss = _outer(module, streams, state)
        return torch.autograd.grad(loss, streams.weights)[0].numpy()

    return run


def torchopt(problem: Training) -> Hypergradient:
    """TorchOpt's MetaAdam."""
    import torchopt

    module, streams, adam = Weighted(problem), Streams(problem), problem.adam
    start = torchopt.extract_state_dict(module, by="copy")

    def run() -> np.ndarray:
        torchopt.recover_state_dict(module, start)
        meta = torchopt.MetaAdam(
            module, adam.rate, (adam.b1, adam.b2), adam.eps, eps_root=adam.eps_root, moment_requires_grad=False
        )
        for at, rows in zip(streams.order, streams.batches, strict=True):
            meta.step(module(streams.weights[at], **rows))
        loss = module(streams.ones, **streams.held_out)
        return torch.autograd.grad(loss, streams.weights)[0].numpy()

    return run


def higher(problem: Training, *, own: bool) -> Hypergradient:
    """higher's inner loop; its own Adam has no eps inside the root, `own` = False registers one that has."""
    import higher

    module, streams, adam = Weighted(problem), Streams(problem), problem.adam

    class RootedAdam(higher.optim.DifferentiableOptimizer):
        """`Adam` by higher's rules."""

        def _update(self, grouped_grads, **kwargs):
            params, grads = self.param_groups[0]["params"], grouped_grads[0]
            moments = self.state[0].get("moments") or [[torch.zeros_like(leaf) for leaf in params]] * 2
            self.state[0]["count"] = count = self.state[0].get("count", 0) + 1
            self.param_groups[0]["params"], *moments = _adam_step(adam, count, (params, *moments), grads)
            self.state[0]["moments"] = moments

    if not own:
        higher.register_optim(torch.optim.Adam, RootedAdam)

    def run() -> np.ndarray:
        optimizer = torch.optim.Adam(module.parameters(), adam.rate, (adam.b1, adam.b2), adam.eps)
        with higher.innerloop_ctx(module, optimizer) as (patched, steps):
            for at, rows in zip(streams.order, streams.batches, strict=True):
                steps.step(patched(streams.weights[at], **rows))
            loss = patched(streams.ones, **streams.held_out)
            return torch.autograd.grad(loss, streams.weights)[0].numpy()

    return run


def hypertorch(problem: Training, *, unroll: bool) -> Hypergradient:
    """hypertorch: `reverse_unroll` through the graph of all steps, or `reverse`, which computes each again."""
    import hypergrad

    module, streams, maps = _maps(problem)

    def outer(state: list[Tensor], hyper: list[Tensor]) -> Tensor:
        return _outer(module, streams, state)

    def run() -> np.ndarray:
        states = [_start(module)]
        for step in maps:
            state = step(states[-1], [streams.weights])
            states = [state] if unroll else [*states, [leaf.detach().requires_grad_() for leaf in state]]
        if unroll:
            return hypergrad.reverse_unroll(states[-1], [streams.weights], outer, set_grad=False)[0].numpy()
        return hypergrad.reverse(states, [streams.weights], maps, outer, set_grad=False)[0].numpy()

    return run


def bergson(problem: Training) -> Hypergradient:
    """bergson's MAGIC: checkpoints on disk every sqrt(steps) steps, replay, one step differentiated at a time."""
    import torchopt
    from bergson.magic.trainer import BackwardState, Trainer

    streams, adam = Streams(problem), problem.adam

    class Batches:
        """What bergson reads of a stream of data."""

        device, weights, requires_grad = torch.device("cpu"), streams.weights, True

        def __len__(self) -> int:
            return len(streams.batches)

        def __getitem__(self, step: int) -> dict[str, Tensor]:
            parts = self.weights[streams.order[step]]
            return {"example_weight": parts, "shift_loss_mask": torch.ones(len(parts)), **streams.batches[step]}

    class Module(Weighted):
        """Is given the mask by which bergson would weigh parts of a split batch; none is split here."""

        def forward(self, example_weight: Tensor, shift_loss_mask: Tensor | None = None, **rows: Tensor) -> Tensor:
            return super().forward(example_weight, **rows)

    module = Module(problem)
    start = {name: leaf.detach().clone() for name, leaf in module.named_parameters()}
    optimizer = torchopt.adam(adam.rate, (adam.b1, adam.b2), adam.eps, eps_root=adam.eps_root)
    trainer, begun = Trainer.initialize(module, optimizer)

    def run() -> np.ndarray:
        begun.params = {name: leaf.clone() for name, leaf in start.items()}
        state = replace(begun, opt_state=optimizer.init(begun.params))
        with tempfile.TemporaryDirectory() as folder:
            state = trainer.train(state, Batches(), inplace=True, save_dir=folder, save_mode="sqrt").detach_()
            with state.activate(module) as params:
                slopes = torch.autograd.grad(module(streams.ones, **streams.held_out), list(params.values()))
            moments = state.differentiable_tensors()[len(slopes) :]
            adjoint = BackwardState(
                dict(zip(params, slopes, strict=True)),
                [torch.zeros_like(leaf) for leaf in moments],
                torch.zeros_like(streams.weights),
            )
            return trainer.backward(folder, Batches(), adjoint, state, inplace=True).weight_grads.numpy()

    return run


def _maps(problem: Training) -> tuple[Weighted, Streams, list[Callable[[list[Tensor], list[Tensor]], list[Tensor]]]]:
    """The module, its rows, and each step of training as (flat state, [weights]) -> flat state, with its graph."""
    module, streams, adam = Weighted(problem), Streams(problem), problem.adam

    def step(index: int, flat: list[Tensor], hyper: list[Tensor]) -> list[Tensor]:
        state = _split(flat)
        parts = hyper[0][streams.order[index]]
        loss = functional_call(module, _named(module, state[0]), (parts,), streams.batches[index])
        grads = torch.autograd.grad(loss, state[0], create_graph=True)
        return sum(_adam_step(adam, index + 1, state, grads), start=[])

    return module, streams, [partial(step, index) for index in range(len(streams.batches))]


def _start(module: nn.Module) -> list[Tensor]:
    """The flat state before the first step."""
    params = [leaf.detach().clone().requires_grad_() for leaf in module.parameters()]
    return params + [torch.zeros_like(leaf, requires_grad=True) for leaf in 2 * params]


def _split(flat: list[Tensor]) -> State:
    third = len(flat) // 3
    return flat[:third], flat[third : 2 * third], flat[2 * third :]


def _outer(module: nn.Module, streams: Streams, flat: list[Tensor]) -> Tensor:
    return functional_call(module, _named(module, _split(flat)[0]), (streams.ones,), streams.held_out)


def _named(module: nn.Module, params: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip((name for name, _ in module.named_parameters()), params, strict=True))


def _adam_step(adam: Adam, count: int, state: State, grads: Any) -> State:
    """One step of `Adam`, differentiable."""
    params, first, second = state
    first = [adam.b1 * m + (1 - adam.b1) * g for m, g in zip(first, grads, strict=True)]
    second = [adam.b2 * v + (1 - adam.b2) * g * g for v, g in zip(second, grads, strict=True)]
    c1, c2 = 1 - adam.b1**count, 1 - adam.b2**count
    params = [
        p - adam.rate * (m / c1) / ((v / c2 + adam.eps_root).sqrt() + adam.eps)
        for p, m, v in zip(params, first, second, strict=True)
    ]
    return params, first, second


def _mlp(start: list[tuple[np.ndarray, np.ndarray]]) -> nn.Module:
    layers: list[nn.Module] = []
    for kernel, bias in start:
        linear = nn.Linear(*kernel.shape)
        linear.weight.data, linear.bias.data = torch.from_numpy(kernel.T.copy()), torch.from_numpy(bias.copy())
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def _llama(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    # eager attention: the fused kernels have no second derivative
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").train()
    model.model.layers = Layers(model.model.layers)
    return model
