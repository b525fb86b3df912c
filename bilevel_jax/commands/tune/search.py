"""Search for the setting with the least loss among those whose certificates hold."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from bilevel_jax.commands.tune.settings import LEARNING_RATE, Setting, drop_rate, find_rate, name_setting
from bilevel_jax.core.certify import Verdict
from bilevel_jax.runs.budget.work import TuneCosts
from bilevel_jax.runs.config.load import TuneConfig

PROMISING = 0.6
"""The cosine of one draw from which on a setting gets all of its certificates: of the settings of
tests/benchmarks/calibration.py none was BELIEVEd whose mean over draws of that share was below .79."""
BELIEVE = "BELIEVE"


class Trained(NamedTuple):
    """What one training of a setting reached."""

    losses: Mapping[str, float | None]
    """Of validation, dev and test; None for a part without examples."""
    loss: float
    """The one that settings are chosen by; infinite where training failed."""
    failure: str = ""
    """Why there is none."""


@dataclass
class Trial:
    """A setting, and what is known of it."""

    setting: Setting
    trained: Trained
    smoothness: float | None = None
    """The cosine of one draw."""
    verdict: Verdict | None = None
    """None where not all certificates were computed."""
    failure: str = ""
    """Why there is no hypergradient."""

    @property
    def name(self) -> str:
        """The setting in words."""
        return name_setting(self.setting)

    @property
    def holds(self) -> bool:
        """Whether its certificates hold."""
        return self.verdict is not None and self.verdict.level == BELIEVE

    @property
    def is_rough(self) -> bool:
        """Whether it was measured, and does not hold."""
        was_measured = self.smoothness is not None or self.verdict is not None or bool(self.failure)
        return was_measured and not self.holds


class Judge(Protocol):
    """What trains and certifies settings."""

    def train(self, setting: Setting) -> Trained:
        """One training."""

    def draw(self, setting: Setting) -> tuple[float | None, str]:
        """(the cosine of one draw of metasmoothness, or why there is none)."""

    def compare(self, setting: Setting) -> Verdict | None:
        """The verdict by finite differences and one draw, where no more draws could make it BELIEVE."""

    def certify(self, setting: Setting) -> Verdict:
        """All certificates."""

    def cost_factor(self, setting: Setting) -> float:
        """What a setting costs, relative to the config's own."""


class Outcome(NamedTuple):
    """What a search has found."""

    trials: list[Trial]
    """In the order in which they were trained; the first is the config's own."""
    proposed: Trial | None
    beyond: Trial | None
    """Where nothing is proposed: one that holds with a loss above the limit."""
    limit: float
    """The highest loss that may be proposed."""
    spent: float
    """Trainings."""
    stopped_by_budget: bool


def search(config: TuneConfig, changes: Mapping[str, Sequence[Setting]], judge: Judge, costs: TuneCosts) -> Outcome:
    """A setting that holds, with a loss that is low among those that were tried, within tune.budget.

    Rounds of candidates: of the first one the learning rates; of later ones each change of a setting, the learning rate
    among them, around the best that holds, or else around the smoothest within the limit, while there is a better one.
    It ends with a setting that holds at a loss not above the config's own: a lower one may be there.
    In a round each candidate is trained once. Those within the limit go on in the order of their loss, larger batches
    last: a draw of metasmoothness; where it is promising finite differences; where these allow BELIEVE all other
    certificates; until one holds: the others would have a higher loss, or cost more.
    A candidate is passed over where it has a higher learning rate than one that is rough and differs in nothing else.
    """
    state = _Search(config, judge, costs)
    own = state.try_own()
    if own.holds:
        return state.finish(own)
    center: Trial = own
    if LEARNING_RATE in changes:
        best = state.take_round([dict(change) for change in changes[LEARNING_RATE]])
        center = best or state.find_smoothest()
    else:
        best = None
    while not state.stopped_by_budget and not (best and best.trained.loss <= own.trained.loss):
        bases = [center.setting] if best is None else [center.setting, *state.list_higher_rates(center)]
        candidates = [{**base, **change} for base in bases for some in changes.values() for change in some]
        if not state.list_untried(candidates):
            break
        improved = state.take_round(candidates)
        if best is not None and improved is None:
            break
        last, best = center, improved or best
        center = best or state.find_smoothest()
        if best is None and center is last:
            break
    return state.finish(best)


class _Search:
    """The trials so far, and what they cost."""

    def __init__(self, config: TuneConfig, judge: Judge, costs: TuneCosts):
        self.config, self.judge, self.costs = config, judge, costs
        self.trials: list[Trial] = []
        self.spent = 0.0
        self.stopped_by_budget = False

    @property
    def limit(self) -> float:
        """The highest loss that may be proposed: from the config's own, or the least one where that has none."""
        losses = [trial.trained.loss for trial in self.trials]
        reference = losses[0] if math.isfinite(losses[0]) else min(losses)
        if not math.isfinite(reference):
            return reference
        return reference + self.config.tune.max_loss_increase * abs(reference)

    def try_own(self) -> Trial:
        """Train the config's own setting and certify it, whatever the budget."""
        own = Trial({}, self.judge.train({}))
        self.trials.append(own)
        self.spent += self.costs.training
        if not own.trained.failure:
            self._certify(own, needs_promise=False)
        return own

    def take_round(self, settings: Iterable[Setting]) -> Trial | None:
        """Train candidates; the first, by loss, that holds."""
        candidates = []
        for setting in self.list_untried(settings):
            if not self._spend(self.costs.training, setting):
                break
            candidates.append(Trial(setting, self.judge.train(setting)))
            self.trials.append(candidates[-1])
        bound = min([self.limit, *(trial.trained.loss for trial in self.trials if trial.holds)])
        return self._certify_first([trial for trial in candidates if trial.trained.loss <= bound])

    def list_untried(self, settings: Iterable[Setting]) -> list[Setting]:
        """The settings that were not trained yet, each once."""
        names = {trial.name for trial in self.trials}
        return list({name: one for one in settings if (name := name_setting(one)) not in names}.values())

    def find_smoothest(self) -> Trial:
        """The trial within the limit of the largest cosine of its draw; the config's own where there is none."""
        measured = [trial for trial in self.trials if trial.smoothness is not None and trial.trained.loss <= self.limit]
        return max(measured, key=lambda trial: trial.smoothness or -1.0, default=self.trials[0])

    def list_higher_rates(self, center: Trial) -> list[Setting]:
        """The center with the next higher learning rate that was trained, and lower loss by it."""
        rates = {
            find_rate(self.config, trial.setting): trial.setting
            for trial in self.trials
            if trial.trained.loss < center.trained.loss and drop_rate(trial.setting) == drop_rate(center.setting)
        }
        higher = [rate for rate in sorted(rates) if rate > find_rate(self.config, center.setting)]
        return [rates[rate] for rate in higher[:1]]

    def finish(self, proposed: Trial | None) -> Outcome:
        """The outcome; where nothing is proposed, look among the settings of a higher loss, too."""
        beyond = None
        if proposed is None:
            beyond = self._certify_first([
                trial for trial in self.trials
                if self.limit < trial.trained.loss < math.inf and trial.verdict is None and not trial.is_rough
            ])  # fmt: skip
        return Outcome(self.trials, proposed, beyond, self.limit, self.spent, self.stopped_by_budget)

    def _certify_first(self, trials: Sequence[Trial]) -> Trial | None:
        """The first of them, by the cost of a training and then by loss, that holds."""

        def cost_and_loss(trial: Trial) -> tuple[float, float]:
            return self.judge.cost_factor(trial.setting), trial.trained.loss

        for trial in sorted(trials, key=cost_and_loss):
            if self._is_hopeless(trial):
                continue
            if not self._certify(trial):
                return None
            if trial.holds:
                return trial
        return None

    def _is_hopeless(self, trial: Trial) -> bool:
        """Whether a lower learning rate was rough, all else equal."""
        rate = find_rate(self.config, trial.setting)
        return any(
            other.is_rough
            and drop_rate(other.setting) == drop_rate(trial.setting)
            and find_rate(self.config, other.setting) <= rate
            for other in self.trials
        )

    def _certify(self, trial: Trial, *, needs_promise: bool = True) -> bool:
        """Draw and, where that is promising, certify; False where the budget ends it."""
        if needs_promise and not self._spend(self.costs.draw, trial.setting):
            return False
        trial.smoothness, trial.failure = self.judge.draw(trial.setting)
        if trial.failure or (needs_promise and (trial.smoothness is None or trial.smoothness < PROMISING)):
            return True
        if not needs_promise:
            self.spent += self.costs.draw + self.costs.ratios + self.costs.certificates
        elif not self._spend(self.costs.ratios, trial.setting):
            return False
        elif (verdict := self.judge.compare(trial.setting)) is not None:
            trial.verdict = verdict
            return True
        elif not self._spend(self.costs.certificates, trial.setting):
            return False
        trial.verdict = self.judge.certify(trial.setting)
        return True

    def _spend(self, cost: float, setting: Setting) -> bool:
        cost *= self.judge.cost_factor(setting)
        if self.spent + cost > self.config.tune.budget:
            self.stopped_by_budget = True
            return False
        self.spent += cost
        return True
