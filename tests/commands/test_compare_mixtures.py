"""Mixtures of sources in `compare`: the regression over proxy runs, and the command from end to end."""

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest

from bilevel_jax.cli import main
from bilevel_jax.commands.compare import proxies, report
from bilevel_jax.commands.compare.proxies import choose_mixture, draw_mixtures, fit_mixing_law
from bilevel_jax.commands.compare.run import compare
from bilevel_jax.runs.config.load import CompareConfig, load_config
from bilevel_jax.runs.engine.trainer import Trainer
from bilevel_jax.runs.infra import session
from bilevel_jax.runs.tasks.sources import MAX_USAGE
from tests.runs import blobs

NATURAL = np.array([0.4, 0.3, 0.2, 0.09, 0.01])


def test_drawn_mixtures_lie_around_the_natural_one():
    drawn = draw_mixtures(NATURAL, 4000, (0,))
    assert np.all(drawn >= 0) and np.allclose(drawn.sum(1), 1, atol=1e-12)
    assert np.all(drawn <= MAX_USAGE * NATURAL + 1e-12) and drawn[:, 4].max() == pytest.approx(0.15)
    tempered = NATURAL**0.5 / np.sum(NATURAL**0.5)
    free = NATURAL >= 0.09  # the mean of a Dirichlet distribution; the bound changes it by what it takes of the last
    assert np.abs(drawn.mean(0) - tempered)[free].max() < 0.04
    assert np.array_equal(drawn, draw_mixtures(NATURAL, 4000, (0,))) and not np.array_equal(
        drawn, draw_mixtures(NATURAL, 4000, (1,))
    )
    absent = draw_mixtures(np.array([0.999, 0.0, 0.001]), 500, (0,))  # its parameters underflow as gamma variables
    assert np.isfinite(absent).all() and not absent[:, 1].any() and absent[:, 2].max() <= MAX_USAGE * 0.001 + 1e-12


@pytest.mark.parametrize("offset", [np.nan, 0.0, 0.02])
@pytest.mark.parametrize("is_quadratic", [False, True])
def test_leave_one_out_errors_are_those_of_fits_without_the_point(is_quadratic, offset):
    random = np.random.default_rng(0)
    mixtures = draw_mixtures(NATURAL, 12, (0,))
    losses = 2 + mixtures @ random.normal(size=5) + 0.1 * random.normal(size=12)
    laws = list(proxies._fit_ridges(mixtures, losses, is_quadratic, [offset]))
    features = proxies._make_features(mixtures - mixtures.mean(0), is_quadratic)
    for law, ridge in zip(laws, proxies.RIDGES, strict=True):
        errors = []
        for out in range(12):  # ridge regression with a free intercept, solved as a system of equations
            kept = np.arange(12) != out
            floor = losses[kept].min() - offset * np.ptp(losses[kept]) if offset > 0 else offset  # of the others alone
            rows = np.column_stack([np.ones(11), features[kept]])
            penalty = ridge * np.eye(rows.shape[1])
            penalty[0, 0] = 0
            values = losses[kept] if np.isnan(floor) else np.log(losses[kept] - floor)
            solution = np.linalg.solve(rows.T @ rows + penalty, rows.T @ values)
            value = solution @ [1, *features[out]]
            predicted = value if np.isnan(floor) else floor + np.exp(value)
            errors.append(np.log(losses[out]) - np.log(max(predicted, 1e-3 * losses.min())))
        assert law.error == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=1e-4)
    best = min(laws, key=lambda law: law.error)
    assert np.mean((best.predict(mixtures) - losses) ** 2) < np.var(losses)


def test_a_floor_that_has_seen_the_loss_that_is_left_out_would_predict_noise(monkeypatch):
    """The leak changes the verdict: with the floor of all proxies a law of noise is better than their mean."""
    mixtures = draw_mixtures(np.full(5, 0.2), 8, (135,))
    losses = 1 + np.exp(np.random.default_rng(135).normal(size=8))
    law, find_floor = fit_mixing_law(mixtures, losses), proxies._find_floor
    honest = proxies._fit_best(mixtures, losses).error
    monkeypatch.setattr(proxies, "_find_floor", lambda others, offset: find_floor(losses, offset))
    leaking = proxies._fit_best(mixtures, losses).error
    assert leaking < law.constant_error < honest and not law.predicts


def test_the_law_that_made_the_losses_is_found_with_its_minimum():
    natural = np.full(5, 0.2)
    mixtures = draw_mixtures(natural, 16, (0,))
    slopes = np.array([-2.0, 0.5, 0.0, 1.0, 0.5])
    for losses in (3 + mixtures @ slopes, np.exp(mixtures @ slopes), mixtures @ slopes):  # the last ones are below 0
        chosen, law = choose_mixture(natural, mixtures, losses, (1,))
        assert not law.is_quadratic and law.predicts and proxies._fit_best(mixtures, losses).error < 0.01
        assert np.isnan(law.floor) == (not np.array_equal(losses, np.exp(mixtures @ slopes)))
        assert chosen.sum() == pytest.approx(1) and chosen[0] > 0.6 > chosen[1:].max()
        assert np.all(chosen <= mixtures.max(0)) and np.all(chosen >= mixtures.min(0))  # nothing beyond the proxies
    goal = np.array([0.5, 0.3, 0.1, 0.05, 0.05])
    more = draw_mixtures(natural, 64, (0,))  # a quadratic law has 15 coefficients
    chosen, law = choose_mixture(natural, more, 1 + np.sum((more - goal) ** 2, axis=1), (1,))
    assert law.is_quadratic and np.abs(chosen - goal).max() < 0.1
    losses = 3 + mixtures @ slopes
    means = np.array([np.delete(np.log(losses), place).mean() for place in range(16)])
    error = np.sqrt(np.mean((means - np.log(losses)) ** 2))
    assert fit_mixing_law(mixtures, losses).constant_error == pytest.approx(error)
    with pytest.raises(ValueError, match="all proxies have the same loss"):
        fit_mixing_law(mixtures, np.ones(16))


def test_a_law_that_predicts_nothing_gives_the_natural_mixture():
    """The best of many laws has a leave-one-out error below that of the mean by chance; few predict what it was not
    chosen by."""
    natural, mixtures = np.full(5, 0.2), draw_mixtures(np.full(5, 0.2), 10, (0,))
    lucky = predicting = 0
    for seed in range(12):
        noise = 1 + np.exp(np.random.default_rng(seed).normal(size=10))
        mixture, law = choose_mixture(natural, mixtures, noise, (seed, 1))
        assert np.array_equal(mixture, natural) == (law.error >= law.constant_error)
        lucky += proxies._fit_best(mixtures, noise).error < law.constant_error
        predicting += law.predicts
    assert predicting <= 2 and lucky >= 6


# ---- the command; the sources of digits and blobs are their given labels


FLAGS = (
    "--outer.weighting", "per_source", "--compare.methods", "proxy_fit", "unrolled", "--compare.baselines", "uniform",
    "stratified", "validation", "--compare.proxy-runs", "5", "--compare.budget", "66",
)  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blobs")
    (folder / "compare.yaml").write_text(blobs.CONFIG.format(path=blobs.write(folder / "blobs.npz")))
    return folder / "compare.yaml"


def run(config, out, *flags, given=FLAGS):
    return compare(load_config(CompareConfig, config, [*given, *flags, "--out", str(out)]))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, run(config, out)


def test_mixtures_of_all_methods_stand_beside_the_natural_one(whole):
    out, result = whole
    rows = {row["name"]: row for row in result["rows"]}
    sources = ["label 0", "label 1", "label 2"]
    table = pq.read_table(out / "weights.parquet").to_pandas()
    for seed in (0, 1):
        mine = table[table["seed"] == seed]
        natural = mine["source"].value_counts(normalize=True)
        assert rows["uniform"]["runs"][seed]["mixture"] == pytest.approx({name: natural[name] for name in sources})
        assert rows["stratified"]["runs"][seed]["mixture"] == pytest.approx(dict.fromkeys(sources, 1 / 3))
        for name in ("proxy_fit", "unrolled"):
            mixture = mine.groupby("source")[f"weight {name}"].sum() / mine[f"weight {name}"].sum()
            assert rows[name]["runs"][seed]["mixture"] == pytest.approx(mixture.to_dict())
            assert mine.groupby("source")[f"weight {name}"].nunique().max() == 1  # one weight for each source
            assert mine[f"weight {name}"].mean() == pytest.approx(1)
            ended = rows[name]["runs"][seed]["ended"]
            assert (mine[f"weight {name}"].std() < 1e-9) == ("so the mixture is the natural one" in ended)
        assert mine["weight unrolled"].std() > 0.01
    assert rows["validation"]["runs"][0]["mixture"] == {}
    assert rows["proxy_fit"]["mean"]["passes"] == 5 * 6
    assert rows["unrolled"]["mean"]["passes"] == 6 + 30 + 30  # two steps, both of which move the weights
    passes = [point["passes"] for point in rows["proxy_fit"]["runs"][0]["trail"]]
    judged = [point["loss"]["validation"] for point in rows["proxy_fit"]["runs"][0]["trail"]]
    assert passes == [6, 12, 18, 24, 30] and judged == sorted(judged, reverse=True)  # the best until then

    page, lines = (out / "report.html").read_text(), (out / "table.md").read_text().splitlines()
    assert "Mixtures of sources" in page and "The mixture of" in page
    assert page.count("ESS") > 1 and "largest weight" in page
    weights = [table[table["seed"] == seed]["weight proxy_fit"] for seed in (0, 1)]
    assert rows["proxy_fit"]["mean"]["max_weight"] == pytest.approx(sum(some.max() for some in weights) / 2)
    head = lines.index("|  | label 0 | label 1 | label 2 |")
    names = [line.split(" |")[0].strip("| *") for line in lines[head + 2 : head + 6]]
    assert names == ["uniform", "stratified", "proxy_fit", "unrolled"]
    assert lines[head + 3].count("| 33.3 ± ") == 3
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    proxy_runs = [record for record in logged if record["event"] == "proxy" and record["part"] == "seed 1 proxy_fit"]
    assert [record["step"] for record in proxy_runs] == [0, 1, 2, 3, 4]


def test_a_proxy_run_that_diverges_is_left_out_and_told(config, tmp_path, monkeypatch):
    """And where too few are left for a fit, one sentence ends the run at once."""
    train, trained, broken = Trainer.run, [], {2}

    def run_or_diverge(self, weights, *given, **more):
        trained.append(self)
        if len(trained) - 2 in broken:  # the first is the uniform training, then come those of the proxies
            weights = weights * 1e30
        return train(self, weights, *given, **more)

    monkeypatch.setattr(Trainer, "run", run_or_diverge)
    given = ["--compare.methods", "proxy_fit", "--compare.baselines", "--compare.seeds", "1", *FLAGS[-4:]]
    result = run(config, tmp_path / "run", given=given)
    [cell] = result["rows"][0]["runs"]
    [failure] = cell["failures"]
    assert failure.startswith("proxy run 3 of 5: the training loss is") and "Lower" not in failure
    assert len(cell["trail"]) == 5 and cell["passes"] > 4 * 6
    page = (tmp_path / "run/report.html").read_text()
    assert "proxy_fit, seed 0: 1 training diverged, which its fit leaves out" in page and "proxy run 3 of 5" in page
    logged = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["left_out"] for line in logged if line["event"] == "mixing_law"] == [1]
    trained.clear(), broken.add(3)
    with pytest.raises(FloatingPointError, match="needs 4 proxy runs with a finite loss, and 2 of 5 have diverged"):
        run(config, tmp_path / "few", given=given)
    count = len(trained)
    with pytest.raises(FloatingPointError, match=r"diverged \(proxy run 3 of 5: .*\)\. Lower optimizer\.learning_rate"):
        run(config, tmp_path / "few", "--resume", given=given)
    assert len(trained) == count == 5  # the fifth proxy was not trained, and none again


def test_a_run_without_mixtures_renders_as_before(whole):
    old, environment = (json.loads((whole[0] / name).read_text()) for name in ("result.json", "environment.json"))
    for row in old["rows"]:
        for key in [key for key in row["mean"] if key.startswith("share of ")]:
            del row["mean"][key]
        for cell in row["runs"]:
            cell.pop("failures", None), cell.pop("max_weight")
    assert "Share of each source" not in report.format_markdown(old)
    assert "Mixtures of sources" not in report.render_compare_report("run", old, "", environment)


@pytest.mark.slow
@pytest.mark.parametrize("at", [40, 52])
def test_stopped_among_the_proxies_and_resumed_changes_no_number(config, whole, tmp_path, stop_at, at):
    stop_at(at)
    with pytest.raises(session.Interrupted):
        run(config, tmp_path / "run")
    run(config, tmp_path / "run", "--resume")
    assert pq.read_table(tmp_path / "run/weights.parquet").equals(pq.read_table(whole[0] / "weights.parquet"))


@pytest.mark.slow
def test_text_of_several_sources_has_uniform_and_stratified_in_any_case(tmp_path):
    flags = ["--compare.seeds", "1", "--train.max-steps", "8", "--compare.budget", "64", "--compare.proxy-runs", "6"]
    flags += ["--compare.methods", "proxy_fit", "window", "penalty", "--compare.baselines", "validation"]
    flags += [
        "--outer.window",
        "2",
        "--optimizer.warmup-steps",
        "2",
        "--mesh.data",
        "1",
        "--out",
        str(tmp_path / "run"),
    ]
    result = compare(load_config(CompareConfig, "configs/compare_mixtures.yaml", flags))
    assert [row["name"] for row in result["rows"]] == [
        "validation", "uniform", "stratified", "proxy_fit", "window", "penalty"
    ]  # fmt: skip
    for row in result["rows"][1:]:
        assert len(row["runs"][0]["mixture"]) == 7 and sum(row["runs"][0]["mixture"].values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--compare.budget", "29"], r"29 is too small to move a weight; needed: proxy_fit 30, unrolled 36\. Raise it"),
        (["--compare.proxy-runs", "3"], "compare.proxy_runs = 3: must be 4 or more"),
    ],
)
def test_refused(config, tmp_path, capsys, flags, said):
    assert main(["compare", str(config), *FLAGS, *flags, "--out", str(tmp_path / "run")]) == 1
    assert re.search(said, capsys.readouterr().err)
