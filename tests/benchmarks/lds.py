"""Linear-datamodelling scores (LDS) of each estimator, by retraining without some examples.

    python -m tests.benchmarks.lds ../shared --learning-rate 3e-4 --lora-rank 0

One setting per call, 9 to 16 minutes on two busy CPU cores; prints one markdown table. `../shared` is the folder of
real data and models that tests/conftest.py describes.

400 training examples, 200 sentences of stories (which the model knows) and 200 of film reviews (which it does not),
cut to 32 tokens; V is 64 + 64 other reviews. 64 AdamW steps of 16 rows under the package's defaults (eps_root =
1e-12, warm-up and cosine, clipped at 1). A random half, or 7.5 %, of the rows leaves the training set; the score is
Spearman's rank correlation of sum_i g_i dw_i, with g the hypergradients on validation, with the change of L_v after
retraining, read on validation and on test. With 40 retrains its standard error is about (1 - score^2) / 6.

Accept .55 for half of the rows and .85 for 7.5 % wherever the verdict on `unrolled` is BELIEVE.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax.core import certify, curvature, solvers
from bilevel_jax.core.checkpointing import store_all_plan
from bilevel_jax.core.implicit import implicit_estimator
from bilevel_jax.core.training import scan, train, train_step
from bilevel_jax.core.unrolled import unrolled_estimator, validation_loss_fn
from bilevel_jax.lm.models import balance_adapters
from tests.runs.problems_lm import adamw, reviews, setting, stacked, stories, summed, tokenized

FRACTIONS = (0.5, 0.075)


def measure(
    shared: Path, *, learning_rate: float, lora_rank: int, eps_root: float, steps: int, batch: int, retrains: int
) -> None:
    """Print the table of one setting."""
    began = time.perf_counter()
    rows = tokenized(
        shared,
        stories(shared, 200) + reviews(shared, 200),
        reviews(shared, 64, skip=1000),
        reviews(shared, 64, skip=2000),
    )
    optimizer = adamw(steps, learning_rate=learning_rate, warmup_steps=10, weight_decay=0.0, eps_root=eps_root)
    plain, with_prior = (
        setting(shared, rows, optimizer, steps=steps, batch=batch, micro=1, lora_rank=lora_rank, prior=prior)
        for prior in (0.0, 1.0)
    )
    fit, report = plain.held_out
    weights = jnp.ones(plain.rows)
    step, value, batches = train_step(plain.problem, optimizer), validation_loss_fn(plain.problem), stacked(plain.train)

    def values(w: jax.Array) -> np.ndarray:
        params = scan(step, plain.start(), w, plain.fixed, batches).params
        return np.array([value(params, plain.fixed, part) for part in (fit, report)])

    def swept(w: jax.Array):
        run = train(step, plain.start(), w, plain.fixed, plain.train, plan=store_all_plan(plain.train.steps))
        return run, unrolled_estimator(plain.problem, step)(run, w, plain.fixed, plain.train, fit)

    run, exact = swept(weights)
    once = summed(rows, batch)
    product = curvature.gauss_newton(with_prior.problem, with_prior.loss)
    params = balance_adapters(run.end.params) if lora_rank else run.end.params
    stationary = run._replace(end=run.end._replace(params=params))
    estimates = {
        "unrolled": exact,
        "implicit Gauss-Newton": implicit_estimator(with_prior.problem, product, solvers.cg(tolerance=1e-3))(
            stationary, weights, with_prior.fixed, once, fit
        ),
        "alignment": implicit_estimator(plain.problem, product, solvers.identity())(
            run, weights, plain.fixed, once, fit
        ),
    }
    ratios = certify.check_finite_differences(lambda w: float(values(w)[0]), weights, exact.grad, (0.1,))
    smooth = certify.metasmoothness(lambda w: swept(w)[1].grad, jax.random.key(1), weights, exact.grad)
    verdict = certify.judge_certificates(certify.Certificates(ratios, smooth, None, exact.checks))

    base, scores = values(weights), {}
    for fraction in FRACTIONS:
        fewer = [
            certify.drop_random_examples(key, weights, fraction)
            for key in jax.random.split(jax.random.key(2), retrains)
        ]
        actual = np.array([values(w) - base for w in fewer])
        for name, estimate in estimates.items():
            predicted = jnp.array([jnp.vdot(estimate.grad, w - weights) for w in fewer])
            scores[name, fraction] = [certify.spearman(predicted, jnp.asarray(column)) for column in actual.T]

    trained = f"lora {lora_rank}" if lora_rank else "full"
    print(f"\n{trained}, learning rate {learning_rate:g}, eps_root {eps_root:g}, {steps} steps of {batch} rows")
    print(f"L_v before training {_before(plain, value)}; after {base.round(3)} nats per token on validation, test")
    cosines = ", ".join(f"{cosine:.2f} without {share:.0%}" for share, cosine in zip(*smooth, strict=True))
    print(f"ratio at .1 {ratios.ratios[0]:.3f}, smooth {cosines}, growth {exact.checks.growth:.3g}")
    print(f"{verdict}\n")
    print("| estimator | half out, validation | 7.5 % out, validation | half out, test | 7.5 % out, test | checks |")
    print("|---|---|---|---|---|---|")
    for name, estimate in estimates.items():
        cells = [f"{scores[name, fraction][part]:.2f}" for part in (0, 1) for fraction in FRACTIONS]
        checks = estimate.checks
        told = "" if np.isnan(checks.residual) else f"residual {checks.residual:.1g}, gap {checks.gap:.2g}"
        print(f"| {name} | {' | '.join(cells)} | {told} |")
    print(f"\n{retrains} retrains a fraction, {time.perf_counter() - began:.0f} s", flush=True)


def _before(plain, value) -> np.ndarray:
    return np.array([value(plain.params, plain.fixed, part) for part in plain.held_out]).round(3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--lora-rank", type=int, default=0)
    parser.add_argument("--eps-root", type=float, default=1e-12)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--retrains", type=int, default=40)
    options = vars(parser.parse_args())
    if options["lora_rank"]:
        print("LoRA: the factors are balanced before the implicit solve")
    measure(**options)
