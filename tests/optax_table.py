"""The table of optax's transformations and what holds for each, measured.

    python -m tests.optax_table            # writes bilevel_jax/core/OPTAX.md
    python -m tests.optax_table --check    # says what in the file is not what this command makes

Minutes on two CPU cores. A row is what one line of Python makes; each name that `optax` and `optax.contrib` export has
at least one, and where its defaults are refused, another with the remedy that the refusal names.
"""

import argparse
import functools
import inspect
import os
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # each row is another program that runs for milliseconds: compile it in a hurry
    fast = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {fast}"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

import bilevel_jax as bj
from bilevel_jax.core import tree
from bilevel_jax.core.training import init_train_state, optimizer_vjp
from bilevel_jax.core.types import Adjoint, TrainState

TABLE = Path(__file__).resolve().parent.parent / "bilevel_jax" / "core" / "OPTAX.md"
STEPS, BATCH, EXAMPLES = 6, 3, 5  # two steps an epoch, the second with an empty slot
TOLERANCE = 1e-10  # float64: rounding, and what muon's and lbfgs's matrix products make of it
NO_TRANSFORMATIONS = {  # exported without an annotation of what they return
    "bias_correction",
    "matrix_inverse_pth_root",
    "schedule_free_eval_params",
    "sigmoid_binary_cross_entropy",
    "update_infinity_moment",
    "update_moment",
    "update_moment_per_elem_norm",
}
ROOT = "eps_root=1e-12"
LION = 'optax.chain(optax.scale_by_lion(mode="smooth"), optax.scale_by_learning_rate(rate))'

OPTIMIZERS = {
    "adabelief": ["optax.adabelief(rate)"],
    "adadelta": ["optax.adadelta(1.0)"],
    "adafactor": [
        "optax.adafactor(rate)",
        "optax.adafactor(rate, eps=1e-16)",
        "optax.adafactor(rate, eps=1e-16, clipping_threshold=None, min_dim_size_to_factor=2)",
    ],
    "adagrad": ["optax.adagrad(rate)"],
    "adam": ["optax.adam(rate)", f"optax.adam(rate, {ROOT})"],
    "adamax": ["optax.adamax(rate)"],
    "adamaxw": ["optax.adamaxw(rate)"],
    "adamw": ["optax.adamw(rate)", f"optax.adamw(rate, {ROOT})"],
    "adan": ["optax.adan(rate)"],
    "amsgrad": ["optax.amsgrad(rate)", f"optax.amsgrad(rate, {ROOT})"],
    "fromage": ["optax.fromage(rate)"],
    "lamb": ["optax.lamb(rate)", f"optax.lamb(rate, {ROOT})"],
    "lars": ["optax.lars(rate)", "optax.lars(rate, eps=1e-6)"],
    "lbfgs": ["optax.lbfgs(rate)", "optax.lbfgs(rate, linesearch=None)"],
    "lion": ["optax.lion(rate)", LION],
    "nadam": ["optax.nadam(rate)", f"optax.nadam(rate, {ROOT})"],
    "nadamw": ["optax.nadamw(rate)", f"optax.nadamw(rate, {ROOT})"],
    "noisy_sgd": ["optax.noisy_sgd(rate, seed=0)"],
    "novograd": ["optax.novograd(rate)"],
    "optimistic_adam": ["optax.optimistic_adam(rate)", f"optax.optimistic_adam(rate, {ROOT})"],
    "optimistic_adam_v2": ["optax.optimistic_adam_v2(rate)", f"optax.optimistic_adam_v2(rate, {ROOT})"],
    "optimistic_gradient_descent": ["optax.optimistic_gradient_descent(rate)"],
    "polyak_sgd": ["optax.polyak_sgd(rate)"],
    "radam": ["optax.radam(rate)", f"optax.radam(rate, {ROOT})", f"optax.adamw(warm_up, {ROOT})"],
    "rmsprop": ["optax.rmsprop(rate)", "optax.rmsprop(rate, eps_in_sqrt=False)"],
    "rprop": ["optax.rprop(rate)"],
    "sgd": ["optax.sgd(rate)", "optax.sgd(rate, momentum=0.9, nesterov=True)"],
    "sign_sgd": ["optax.sign_sgd(rate)"],
    "signum": ["optax.signum(rate)"],
    "sm3": ["optax.sm3(rate)"],
    "yogi": ["optax.yogi(rate)"],
}
TRANSFORMATIONS = {
    "adaptive_grad_clip": ["chain(optax.adaptive_grad_clip(0.01))"],
    "add_decayed_weights": ["chain(optax.add_decayed_weights(0.1))"],
    "add_noise": ["chain(optax.add_noise(0.01, 0.55, seed=0))"],
    "apply_every": ["chain(optax.apply_every(2))"],
    "centralize": ["chain(optax.centralize())"],
    "clip": ["chain(optax.clip(0.1))"],
    "clip_by_block_rms": ["chain(optax.clip_by_block_rms(0.1))"],
    "clip_by_global_norm": ["chain(optax.clip_by_global_norm(0.1))"],
    "ema": ["chain(optax.ema(0.9))"],
    "freeze": ['chain(optax.freeze({"w": False, "b": True}))'],
    "identity": ["chain(optax.identity())"],
    "keep_params_nonnegative": ["optax.chain(optax.sgd(rate), optax.keep_params_nonnegative())"],
    "measure_with_ema": ['chain(optax.monitor({"norm": optax.measure_with_ema(optax.tree.norm, 0.9)}))'],
    "monitor": ['chain(optax.monitor({"norm": optax.tree.norm}))'],
    "normalize_by_update_norm": ["chain(optax.normalize_by_update_norm())"],
    "scale": ["optax.scale(-rate)"],
    "scale_by_adadelta": ["chain(optax.scale_by_adadelta())"],
    "scale_by_adam": ["chain(optax.scale_by_adam())", f"chain(optax.scale_by_adam({ROOT}))"],
    "scale_by_adamax": ["chain(optax.scale_by_adamax())"],
    "scale_by_adan": ["chain(optax.scale_by_adan())", "chain(optax.scale_by_adan(eps_root=1e-8))"],
    "scale_by_amsgrad": ["chain(optax.scale_by_amsgrad())", f"chain(optax.scale_by_amsgrad({ROOT}))"],
    "scale_by_backtracking_linesearch": ["optax.chain(optax.sgd(rate), optax.scale_by_backtracking_linesearch(5))"],
    "scale_by_belief": ["chain(optax.scale_by_belief())"],
    "scale_by_distance_over_gradients": ["chain(optax.scale_by_distance_over_gradients())"],
    "scale_by_factored_rms": [
        "chain(optax.scale_by_factored_rms())",
        "chain(optax.scale_by_factored_rms(min_dim_size_to_factor=2, epsilon=1e-16))",
    ],
    "scale_by_lbfgs": ["chain(optax.scale_by_lbfgs())"],
    "scale_by_learning_rate": ["optax.scale_by_learning_rate(rate)"],
    "scale_by_lion": ["chain(optax.scale_by_lion())", 'chain(optax.scale_by_lion(mode="smooth"))'],
    "scale_by_novograd": ["chain(optax.scale_by_novograd())"],
    "scale_by_optimistic_gradient": ["chain(optax.scale_by_optimistic_gradient())"],
    "scale_by_param_block_norm": ["chain(optax.scale_by_param_block_norm())"],
    "scale_by_param_block_rms": ["chain(optax.scale_by_param_block_rms())"],
    "scale_by_polyak": ["chain(optax.scale_by_polyak())"],
    "scale_by_radam": ["chain(optax.scale_by_radam())"],
    "scale_by_rms": ["chain(optax.scale_by_rms())", "chain(optax.scale_by_rms(eps_in_sqrt=False))"],
    "scale_by_rprop": ["optax.scale_by_rprop(rate)"],
    "scale_by_rss": ["chain(optax.scale_by_rss())"],
    "scale_by_schedule": ["optax.scale_by_schedule(lambda count: -warm_up(count))"],
    "scale_by_sign": ["chain(optax.scale_by_sign())"],
    "scale_by_sm3": ["chain(optax.scale_by_sm3())"],
    "scale_by_stddev": ["chain(optax.scale_by_stddev())", "chain(optax.scale_by_stddev(eps=1e-6))"],
    "scale_by_trust_ratio": [
        "chain(optax.scale_by_trust_ratio())",
        "chain(optax.scale_by_trust_ratio(min_norm=1e-6))",
    ],
    "scale_by_yogi": ["chain(optax.scale_by_yogi())"],
    "scale_by_zoom_linesearch": ["optax.chain(optax.sgd(rate), optax.scale_by_zoom_linesearch(5))"],
    "set_to_zero": ["optax.set_to_zero()"],
    "snapshot": ['chain(optax.snapshot("norm", optax.tree.norm))'],
    "stateless": ["chain(optax.stateless(lambda updates, params: jax.tree.map(jnp.tanh, updates)))"],
    "stateless_with_tree_map": ["chain(optax.stateless_with_tree_map(lambda update, param: update * param))"],
    "trace": ["chain(optax.trace(0.9))"],
    "zero_nans": ["chain(optax.zero_nans())"],
}
WRAPPERS = {
    "MultiSteps": [
        "optax.MultiSteps(optax.sgd(rate), 2)",
        f"optax.MultiSteps(optax.adam(rate, {ROOT}), 2)",
        "optax.MultiSteps(optax.sgd(rate), 7)",
    ],
    "apply_if_finite": ["optax.apply_if_finite(optax.sgd(rate), 3)"],
    "chain": [f"optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(warm_up, {ROOT}))"],
    "conditionally_mask": ["optax.conditionally_mask(optax.sgd(rate), lambda step, **_: step % 2 == 0)"],
    "conditionally_transform": ["chain(optax.conditionally_transform(optax.clip(0.1), lambda step, **_: step < 3))"],
    "flatten": [f"optax.flatten(optax.adam(rate, {ROOT}))"],
    "inject_hyperparams": ["optax.inject_hyperparams(optax.sgd)(learning_rate=warm_up)"],
    "inject_stateful_hyperparams": ["optax.inject_stateful_hyperparams(optax.sgd)(learning_rate=warm_up)"],
    "lookahead": ["optax.lookahead(optax.sgd(rate), 3, 0.5)"],
    "masked": ['optax.masked(optax.sgd(rate), {"w": True, "b": False})'],
    "multi_transform": [
        'optax.multi_transform({1: optax.lion(rate), 2: optax.sgd(rate)}, {"w": 1, "b": 2})',
        'optax.multi_transform({1: optax.lion(rate), 2: optax.set_to_zero()}, {"w": 1, "b": 2})',
    ],
    "named_chain": ['optax.named_chain(("clip", optax.clip(0.1)), ("sgd", optax.sgd(rate)))'],
    "partition": [
        f'optax.partition({{1: optax.adam(rate, {ROOT}), 2: optax.set_to_zero()}}, {{"w": 1, "b": 2}})',
    ],
    "selective_transform": ['optax.selective_transform(optax.sgd(rate), freeze_mask={"w": False, "b": True})'],
    "with_extra_args_support": ["optax.with_extra_args_support(optax.sgd(rate))"],
}
CONTRIB = {
    "acprop": ["contrib.acprop(rate)"],
    "ademamix": ["contrib.ademamix(rate)", f"contrib.ademamix(rate, {ROOT})"],
    "adopt": ["contrib.adopt(rate)"],
    "cocob": ["contrib.cocob()"],
    "dadapt_adamw": ["contrib.dadapt_adamw()"],
    "differentially_private_aggregate": ["chain(contrib.differentially_private_aggregate(1.0, 0.1, seed=0))"],
    "dog": ["contrib.dog()"],
    "dowg": ["contrib.dowg()"],
    "dpsgd": ["contrib.dpsgd(rate, 1.0, 0.1, 0)"],
    "galore": [
        "contrib.galore(rate, rank=1)",
        f"contrib.galore(rate, rank=1, base_optimizer=optax.scale_by_adam({ROOT}))",
    ],
    "hutchinson_estimator_diag_hessian": ["chain(contrib.hutchinson_estimator_diag_hessian())"],
    "madgrad": ["contrib.madgrad(rate)"],
    "mechanize": ["contrib.mechanize(optax.sgd(rate))"],
    "momo": ["contrib.momo(rate)"],
    "momo_adam": ["contrib.momo_adam(rate)"],
    "muon": [
        "contrib.muon(rate)",
        "contrib.muon(rate, adam_eps_root=1e-12)",
        'contrib.muon(rate, adam_eps_root=1e-12, preconditioning="aol")',
    ],
    "normalize": ["chain(contrib.normalize())"],
    "prodigy": ["contrib.prodigy()"],
    "reduce_on_plateau": ["optax.chain(optax.sgd(rate), contrib.reduce_on_plateau())"],
    "sam": ["contrib.sam(optax.sgd(rate), optax.chain(contrib.normalize(), optax.sgd(0.01)))"],
    "scale_by_acprop": ["chain(contrib.scale_by_acprop())"],
    "scale_by_ademamix": ["chain(contrib.scale_by_ademamix())", f"chain(contrib.scale_by_ademamix({ROOT}))"],
    "scale_by_adopt": ["chain(contrib.scale_by_adopt())"],
    "scale_by_cocob": ["contrib.scale_by_cocob()"],
    "scale_by_galore": ["chain(contrib.scale_by_galore(rank=1))"],
    "scale_by_madgrad": ["contrib.scale_by_madgrad(rate)"],
    "scale_by_muon": [
        "matrices(contrib.scale_by_muon(weight_dimension_numbers=numbers))",
        'matrices(contrib.scale_by_muon(weight_dimension_numbers=numbers, preconditioning="aol"))',
    ],
    "scale_by_simplified_ademamix": [
        "chain(contrib.scale_by_simplified_ademamix())",
        f"chain(contrib.scale_by_simplified_ademamix({ROOT}))",
    ],
    "schedule_free": [f"contrib.schedule_free(optax.adamw(rate, b1=0.0, {ROOT}), rate)"],
    "schedule_free_adamw": ["contrib.schedule_free_adamw(rate)"],
    "schedule_free_sgd": ["contrib.schedule_free_sgd(rate)"],
    "simplified_ademamix": ["contrib.simplified_ademamix(rate)", f"contrib.simplified_ademamix(rate, {ROOT})"],
    "sophia": ["contrib.sophia(rate)"],
    "split_real_and_imaginary": ["contrib.split_real_and_imaginary(optax.sgd(rate))"],
}
SECTIONS = {
    "Optimizers of optax": OPTIMIZERS,
    "Transformations of optax": TRANSFORMATIONS,
    "Wrappers of optax": WRAPPERS,
    "optax.contrib": CONTRIB,
}
RATE = 0.05
NAMES = {
    "optax": optax,
    "contrib": contrib,
    "jax": jax,
    "jnp": jnp,
    "rate": RATE,
    "warm_up": optax.linear_schedule(0.0, RATE, 3),
    "chain": lambda *transformations: optax.chain(*transformations, optax.sgd(RATE)),
    "numbers": lambda params: jax.tree.map(lambda leaf: contrib.MuonDimensionNumbers(), params),
    "matrices": lambda inner: optax.chain(
        optax.masked(inner, lambda params: jax.tree.map(lambda leaf: leaf.ndim == 2, params)), optax.sgd(RATE)
    ),
}
INTRODUCTION = """# What holds for optax's transformations

Made by `python -m tests.optax_table`, which measures each line (optax {version}). `rate` is a number, `warm_up` a
schedule that starts at 0, `chain(t)` is `optax.chain(t, optax.sgd(rate))`, and `matrices(t)` is that for the matrices
alone, whose dimension `numbers` muon is told.

- **Hypergradient**: `bj.unroll` on arrays, six steps on five examples in float64; half of the entries of the first
  gradient are exactly 0, as those of an embedding are before a token's first use. *exact*: equal to `jax.grad` through
  the same steps to 1e-10. *refused*: `run` raises a ValueError of this kind and with this remedy; `jax.grad` gives nan,
  0 or an error.
- **Zero entries**, **zero parameter**: whether the derivative of an update is finite, in float32 and in float64, where
  half of a gradient's entries are 0, and where the whole gradient of one parameter is (LoRA's A at the start, a layer
  that is switched off). On arrays a run that meets neither needs neither; on streams `bj.check_differentiable` asks
  for the first before the backward pass.
"""


class Row(NamedTuple):
    """What was measured of one line."""

    name: str
    code: str
    verdict: str
    zero_entries: str = ""
    zero_parameter: str = ""


def exported_transformations() -> set[str]:
    """The names of optax and optax.contrib that make a gradient transformation, or do not say what they make."""
    names = set()
    for module in (optax, contrib):
        for name, value in vars(module).items():
            if name.startswith("_") or not callable(value) or name in NO_TRANSFORMATIONS:
                continue
            if inspect.isclass(value):
                names |= {name} if hasattr(value, "gradient_transformation") else set()
            elif inspect.isfunction(value) or isinstance(value, functools.partial):
                returns = inspect.signature(value).return_annotation
                if returns is inspect.Signature.empty or "GradientTransformation" in str(returns):
                    names.add(name)
    return names


def make(code: str) -> optax.GradientTransformation:
    """The transformation that a line of the table makes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return eval(code, dict(NAMES))  # noqa: S307 - the lines of this file


def measure(name: str, code: str) -> Row:
    """One row of the table. Needs float64."""
    with jax.numpy_rank_promotion("allow"):  # some of optax's formulas rely on it
        optimizer, start = make(code), _parameters(code)
        try:
            grad = _hypergradient(optimizer, start)
        except ValueError as error:
            kind, remedy = _shorten(" ".join(str(error).split()))
            if kind in ("derivative not finite", "derivative 0"):
                reference = np.asarray(_reference(optimizer, start))
                if np.isfinite(reference).all() and reference.any():
                    kind = f"WRONGLY, {kind}"
            return Row(name, code, f"refused: {kind}. {remedy}")
        reference = _reference(optimizer, start)
        error = float(jnp.linalg.norm(grad - reference) / jnp.linalg.norm(reference))
        return Row(name, code, "exact" if error <= TOLERANCE else f"WRONG by {error:.0e}", *_finite(code))


def render(rows: list[Row]) -> str:
    """The file."""
    lines = [INTRODUCTION.format(version=optax.__version__)]
    for title, section in SECTIONS.items():
        head = f"| name | as measured | hypergradient | zero entries | zero parameter |\n{'|---' * 5}|"
        lines += [f"## {title}\n", head, *(line_of(row) for row in rows if row.name in section), ""]
    return "\n".join(lines)


def line_of(row: Row) -> str:
    """A row in Markdown."""
    cells = (f"`{row.name}`", f"`{row.code}`", row.verdict, row.zero_entries, row.zero_parameter)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _shorten(reason: str) -> tuple[str, str]:
    """(the kind of a refusal, its remedy)."""
    if "is not finite" in reason:
        return "derivative not finite", reason.split(": ", 1)[1]
    if "does not depend on the gradient's size" in reason:
        return "derivative 0", reason.split(": ", 1)[1]
    if "asks for more" in reason:
        return "asks for more than a gradient", reason[reason.index("use lbfgs") :]
    if "changes its structure" in reason:
        return "state changes its structure", reason.split(": ", 1)[1]
    if "no gradient reaches" in reason:
        return "no gradient reaches the parameters", ""
    raise ValueError(reason)


def _draw(*shape: int, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def _parameters(code: str) -> Any:
    params = {"w": _draw(3, 2, seed=0), "b": _draw(2, seed=1)}
    return optax.LookaheadParams.init_synced(params) if "lookahead" in code else params


def _losses(params: Any, data: Any) -> jax.Array:
    params = params.fast if isinstance(params, optax.LookaheadParams) else params
    inputs, targets, is_used = data
    return (is_used * jnp.log1p((inputs @ params["w"] + params["b"][None] - targets) ** 2)).sum(-1)


def _examples() -> tuple[Any, Any, jax.Array]:
    """Training and validation examples, and the batches; those of the first do not use the second output."""
    order = bj.batch_order(EXAMPLES, BATCH, STEPS, jax.random.key(0))
    is_used = jnp.ones((EXAMPLES, 2)).at[order[0], 1].set(0.0)
    training = (_draw(EXAMPLES, 3, seed=2), _draw(EXAMPLES, 2, seed=3), is_used)
    return training, (_draw(4, 3, seed=4), _draw(4, 2, seed=5), jnp.ones((4, 2))), order


def _hypergradient(optimizer: optax.GradientTransformation, start: Any) -> jax.Array:
    problem = bj.weighted(lambda params, frozen, batch: _losses(params, batch["data"]))
    training, validation, _ = _examples()
    solver = bj.unroll(problem, optimizer, steps=STEPS, batch_size=BATCH)
    return solver.run(start, jnp.ones(EXAMPLES), training, validation, key=jax.random.key(0)).grad


def _reference(optimizer: optax.GradientTransformation, start: Any) -> jax.Array:
    """jax.grad of the validation loss after the same steps, written with optax alone."""
    training, validation, order = _examples()

    def step(state, batch, weights):
        params, opt_state = state
        data = jax.tree.map(lambda leaf: leaf[batch], training)
        grad = jax.grad(lambda params: jnp.mean(weights[batch] * _losses(params, data)))(params)
        grad = grad.fast if isinstance(grad, optax.LookaheadParams) else grad
        updates, opt_state = optimizer.update(grad, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    @jax.jit
    @jax.grad
    def slope(weights):
        state = start, optimizer.init(start)
        params, _ = jax.lax.scan(lambda state, batch: (step(state, batch, weights), None), state, order)[0]
        return _losses(params, validation).mean()

    return slope(jnp.ones(EXAMPLES))


def _finite(code: str) -> tuple[str, str]:
    """Whether the derivative of an update is finite where half of the gradient's entries are 0, and where one
    parameter's gradient is, in the first step and in the second."""
    single, double = (_are_finite(code, dtype) for dtype in (jnp.float32, jnp.float64))
    words = {(True, True): "finite", (False, True): "nan in float32", (True, False): "nan in float64"}
    return tuple(words.get(both, "nan") for both in zip(single, double, strict=True))


def _are_finite(code: str, dtype: Any) -> tuple[bool, ...]:
    cast = lambda leaves: jax.tree.map(lambda leaf: leaf.astype(dtype), leaves)  # noqa: E731
    optimizer, params = make(code), cast(_parameters(code))
    full = cast({"w": 0.1 * _draw(3, 2, seed=6), "b": 0.1 * _draw(2, seed=7)})
    halved = jax.tree.map(lambda leaf: leaf * (jnp.arange(leaf.size) % 2).reshape(leaf.shape).astype(dtype), full)
    grads = jax.tree.map(lambda *leaves: jnp.stack(leaves), halved, {**full, "w": 0 * full["w"]})

    def check(start: TrainState, grad: Any) -> jax.Array:
        updates, opt_state = optimizer.update(full, start.opt_state, start.params)
        second = TrainState(optax.apply_updates(start.params, updates), opt_state, start.step + 1)
        states = jax.tree.map(lambda *leaves: jnp.stack(leaves), start, second)
        grad = optax.LookaheadParams(grad, grad) if "lookahead" in code else grad

        def pull(state: TrainState) -> jax.Array:
            zeros = [jnp.zeros_like(leaf) for leaf in tree.inexact_leaves(state.opt_state)]
            adjoint = Adjoint(jax.tree.map(jnp.ones_like, params), zeros)
            grad_bar, params_bar, opt_bar = optimizer_vjp(optimizer, grad, state, adjoint)
            is_first = state.step == 0  # nothing was before the optimizer's state then
            return tree.all_finite((grad_bar, params_bar)) & (tree.all_finite(opt_bar) | is_first)

        return jax.lax.map(pull, states).all()

    finite = jax.jit(lambda state: jax.lax.map(lambda grad: check(state, grad), grads))(
        init_train_state(optimizer, params)
    )
    return tuple(finite.tolist())


def main() -> int:
    """Write the file, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the file differs")
    parser.add_argument("--only", nargs="+", default=[], help="print the rows of these names and write nothing")
    arguments = parser.parse_args()
    rows = []
    with jax.enable_x64(True):
        for section in SECTIONS.values():
            for name, codes in section.items():
                if arguments.only and name not in arguments.only:
                    continue
                for code in codes:
                    rows.append(measure(name, code))
                    print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    text = render(rows)
    if arguments.only:
        return 0
    if arguments.check:
        old = TABLE.read_text(encoding="utf-8").splitlines()
        changed = [line for line in text.splitlines() if line not in old]
        print("\n".join([*changed, f"{TABLE.name}: {len(changed)} lines differ"]))
        return int(text.splitlines() != old)
    TABLE.write_text(text, encoding="utf-8")
    print(f"{TABLE}: {len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
