"""What helps where an optimizer's update has no usable derivative, by the name of the transformation at fault."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from bilevel_jax.core.types import PyTree

EPS_ROOT = "1e-12"
ADAM_KIN = {
    "ScaleByAdamState": "mu",
    "ScaleByAdanState": "m",
    "ScaleByAmsgradState": "mu",
    "ScaleByAdemamixState": "m1",
    "ScaleBySimplifiedAdEMAMixState": "m",
}
"""The states of transformations that divide by sqrt(second moment + eps_root) + eps, and the field of their first
moment: its derivative is finite wherever theirs is not."""
NOT_FINITE = {
    "MuonState": "optax.contrib.muon divides by the norm of a matrix and moves all else with Adam, and neither has a "
    f'derivative at 0: give it adam_eps_root={EPS_ROOT} and preconditioning="aol".',
    "FactoredState": "optax.adafactor divides by the root of squares + eps, and its eps of 1e-30 vanishes in float32: "
    "give it eps=1e-16, and clipping_threshold=None where a parameter's whole gradient may be 0.",
    "GaLoreState": "optax.contrib.galore projects on singular vectors, which have no derivative where the gradient of "
    "a matrix has not full rank: no setting helps; use adamw with eps_root=1e-12. Where it has, "
    f"base_optimizer=optax.scale_by_adam(eps_root={EPS_ROOT}) is enough.",
    "ScheduleFreeState": "optax.contrib.schedule_free_adamw has no eps inside its root: write "
    f"optax.contrib.schedule_free(optax.adamw(rate, b1=0.0, eps_root={EPS_ROOT}), rate).",
    "MechanicState": "optax.contrib.mechanize divides by square roots that start at 0: no setting helps; use "
    "optax.contrib.dowg or cocob, which need no learning rate either.",
    "ProdigyState": "optax.contrib.prodigy has no eps inside its root: no setting helps; use optax.contrib.dowg or "
    "cocob, which need no learning rate either.",
    "DAdaptAdamWState": "optax.contrib.dadapt_adamw has no eps inside its root: no setting helps; use "
    "optax.contrib.dowg or cocob, which need no learning rate either.",
    "DoGState": "optax.contrib.dog reads the distance to the start, which has no derivative at the start: no setting "
    "helps; use optax.contrib.dowg.",
    "MadgradState": "optax.contrib.madgrad takes a cube root, which has no derivative at 0: no setting helps; use "
    "optax.adagrad.",
    "ScaleByRmsState": "optax.rmsprop and scale_by_rms need eps_in_sqrt=True.",
    "ScaleByRmsWithCountState": "optax.rmsprop and scale_by_rms need eps_in_sqrt=True.",
    "ScaleByRStdDevState": "optax.rmsprop and scale_by_stddev need eps_in_sqrt=True.",
    "ScaleByRStdDevWithCountState": "optax.rmsprop and scale_by_stddev need eps_in_sqrt=True.",
}
"""By the type of the state whose derivative is not finite; tests/optax_table.py measures that each remedy is one."""
OF_GRADIENT_ALONE = {
    "GaLoreState": NOT_FINITE["GaLoreState"],
    "ScaleByNovogradState": "optax.novograd takes the norm of a parameter's gradient, which has no derivative at 0: no "
    f"setting helps; use adamw with eps_root={EPS_ROOT}.",
}
"""Those of which no state, but the derivative by the gradient itself, is not finite."""
ADAM_REMEDY = (
    f"Adam and its kin need eps_root > 0 ({EPS_ROOT} is enough); radam and adopt have no derivative even so: use adamw."
)
RADAM_REMEDY = (
    "radam has none before it rectifies, and no setting helps: use adamw with a warm-up and "
    f"eps_root={EPS_ROOT}. Else a transformation after Adam divides by 0."
)
NORM_REMEDY = (
    "a transformation without a state, such as a clip or a scale by a norm, has no derivative where that norm is 0. "
    "In place of adaptive_grad_clip use clip_by_global_norm or clip; lars needs eps > 0, scale_by_trust_ratio "
    "min_norm > 0 (1e-6 is enough)."
)
SIGN_LIKE = {
    "ScaleByLionState": 'optax.lion takes a sign: use optax.scale_by_lion(mode="smooth") and '
    f"scale_by_learning_rate, or adamw with eps_root={EPS_ROOT}.",
    "ScaleByRpropState": f"optax.rprop reads signs alone: use sgd, or adamw with eps_root={EPS_ROOT}.",
}
SIGN_REMEDY = (
    f"signSGD, signum and clips of every entry do so: use sgd, with momentum, or adamw with eps_root={EPS_ROOT}."
)


def remedy_for_not_finite(is_grad_finite: PyTree, opt_state: PyTree, is_finite: list[bool]) -> str:
    """What has no finite derivative in an optimizer, and what helps.

    `is_grad_finite` says of each leaf of a vector that was pulled back to the gradient whether it is finite;
    `is_finite` of each inexact leaf of the optimizer's state, in leaf order, whether its part of the vector is.
    """
    leaves = [
        path for path, leaf in _leaves_with_states(opt_state) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    ]
    faults = [path for path, finite in zip(leaves, is_finite, strict=True) if not finite]
    remedies = {_remedy_of_leaf(path, faults) for path in faults} - {""}
    if not faults:
        states = {state for path in leaves for state, _ in path}
        remedies = {remedy for state, remedy in OF_GRADIENT_ALONE.items() if state in states}
    text = " ".join(sorted(remedies)) or NORM_REMEDY
    places = [
        jax.tree_util.keystr(path)
        for path, is_leaf_finite in jax.tree_util.tree_leaves_with_path(is_grad_finite)
        if not bool(is_leaf_finite)
    ]
    of = f" for the parameters{', '.join(places[:3])}{' and others' if len(places) > 3 else ''}" if any(places) else ""
    return f"{of}: {text}"


def remedy_for_sign(opt_state: PyTree) -> str:
    """What in an optimizer reads signs alone, and what helps."""
    states = {state for path, _ in _leaves_with_states(opt_state) for state, _ in path}
    return " ".join(remedy for state, remedy in SIGN_LIKE.items() if state in states) or SIGN_REMEDY


_StatePath = tuple[tuple[str, str], ...]
"""(the type of a NamedTuple, its field) for each that a leaf lies in, outermost first."""


def _remedy_of_leaf(path: _StatePath, faults: list[_StatePath]) -> str:
    for state, _ in path:
        if state in NOT_FINITE:
            return NOT_FINITE[state]
        if state in ADAM_KIN:
            numerators = {(state, ADAM_KIN[state])}
            return RADAM_REMEDY if any(numerators & set(other) for other in faults) else ADAM_REMEDY
    return ""


def _leaves_with_states(node: PyTree, above: _StatePath = ()) -> Iterator[tuple[_StatePath, PyTree]]:
    """Each leaf, in leaf order, with the states that it lies in. What muon gives to its Adam lies in muon's state."""
    flat = jax.tree_util.default_registry.flatten_one_level(node)
    if flat is None:
        yield above, node
        return
    name = type(node).__name__
    fields = getattr(node, "_fields", None)
    if name == "PartitionState" and set(node.inner_states) == {"adam", "muon"}:
        name, fields = "MuonState", ("inner_states",)
    for place, child in enumerate(flat[0]):
        yield from _leaves_with_states(child, (*above, (name, fields[place])) if fields else above)
