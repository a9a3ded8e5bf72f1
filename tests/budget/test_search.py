"""The control laws against models whose cost and size are known functions of the levels."""

import math
import random

import pytest

from lightning_compress.budget.search import (
    QualitySearch,
    Reading,
    Rules,
    SizeSearch,
    estimated_spread,
    recent,
    within_limit,
)


class Plant:
    """A model: each lever saves bytes and costs quality, from which it recovers in part."""

    def __init__(self, rates, noise=0.0, recovery=0.5, seed=0):
        self.rates, self.noise, self.recovery = rates, noise, recovery
        self.random = random.Random(seed)
        self.levels = self.kept = (0.0,) * len(rates)
        self.shock = 0.0

    def cost_of(self, levels):
        return 1.0 + sum(rate * level**4 for rate, level in zip(self.rates, levels, strict=True))

    def size(self):
        return 1000 * math.exp(-3 * sum(self.levels))

    def measure(self):
        self.shock *= self.recovery
        return self.cost_of(self.levels) + self.shock + self.random.gauss(0, self.noise)

    def follow(self, decision):
        if decision.keep:
            self.kept = self.levels
        if decision.restore:
            self.levels, self.shock = self.kept, 0.0
        if decision.levels is not None:
            self.shock += 0.3 * (sum(decision.levels) - sum(self.levels))
            self.levels = decision.levels


def drive(plant, search, count=200, over=0.9):
    for index in range(count):
        plant.follow(
            search.read(Reading(plant.measure(), plant.size(), over=index >= over * count))
        )
    plant.follow(search.finish())
    return plant


def test_it_ends_at_the_highest_level_that_meets_the_limit():
    search = QualitySearch(Rules(limit=1.1, patience=6, least=0.01), steps=(0.0,))
    plant = drive(Plant([1.0]), search)
    best = 0.1**0.25  # where the cost is the limit
    assert best - 0.03 < plant.levels[0] <= best
    assert plant.cost_of(plant.levels) <= 1.1
    assert {trial.verdict for trial in search.history} >= {"good", "too costly"}


def test_a_lever_that_moves_in_leaps_counts_from_where_it_came_to():
    search = QualitySearch(Rules(limit=1.0, patience=1), steps=(0.0,))
    assert search.read(Reading(cost=0.5, size=100.0, levels=(0.0,))).levels == (0.2,)
    further = search.read(Reading(cost=0.6, size=70.0, levels=(0.3,)))
    assert (further.keep, further.levels) == (True, (0.5,))
    assert search.good.levels == (0.3,)
    back = search.read(Reading(cost=2.0, size=30.0, levels=(0.7,)))
    assert back.restore
    assert back.levels == pytest.approx((0.3 + 0.1,))
    assert search.history[-1].levels == (0.7,)


def test_the_lever_that_costs_less_goes_further():
    search = QualitySearch(Rules(limit=1.1, patience=6, least=0.01), steps=(0.0, 0.0))
    plant = drive(Plant([4.0, 0.2]), search, count=400)
    assert plant.cost_of(plant.levels) <= 1.1
    assert plant.levels[1] > plant.levels[0] + 0.1
    # Better than either lever alone could do.
    assert sum(plant.levels) > (0.1 / 0.2) ** 0.25


def test_steps_of_a_lever_are_whole():
    search = QualitySearch(Rules(limit=1.1, stride=0.05), steps=(1 / 6,))
    plant = drive(Plant([1.0]), search)
    assert plant.levels[0] * 6 == pytest.approx(round(plant.levels[0] * 6))
    assert plant.levels[0] == pytest.approx(3 / 6)  # 4/6 would cost 0.2


def test_a_lever_that_saves_nothing_is_left_alone():
    class Stuck(Plant):
        def size(self):
            return 1000.0

    search = QualitySearch(Rules(limit=1.1), steps=(0.0,))
    drive(Stuck([0.0]), search, count=20)
    assert [trial.verdict for trial in search.history[:2]] == ["good", "good"]
    assert search.levels[0] < 1


@pytest.mark.parametrize("seed", range(5))
def test_noise_alone_neither_stops_it_nor_lures_it_beyond_the_limit(seed):
    # The noise of one reading is half the budget.
    rules = Rules(limit=1.1, spread=0.05, patience=8, least=0.02)
    plant = drive(Plant([1.0], noise=0.05, seed=seed), QualitySearch(rules, steps=(0.0,)), 400)
    assert 0.45 < plant.levels[0] < 0.66  # 0.56 is exact; 0.66 costs 0.19
    naive = Rules(limit=1.1, patience=1)
    chased = drive(Plant([1.0], noise=0.05, seed=seed), QualitySearch(naive, steps=(0.0,)), 400)
    assert chased.levels[0] > plant.levels[0] - 0.02  # any lucky reading takes it further


def test_nothing_moves_before_the_model_is_good_enough():
    search = QualitySearch(Rules(limit=1.0, patience=2), steps=(0.0,))
    for cost in (9.0, 8.0, 7.0, 2.0):
        assert search.read(Reading(cost, 100.0)).levels is None
    assert search.finish().restore is False
    assert search.good is None
    search.read(Reading(0.5, 100.0))
    assert search.read(Reading(0.5, 100.0)).levels == (0.2,)


def test_a_soft_undo_goes_on_from_where_it_is_if_that_is_good():
    def failed():
        search = QualitySearch(Rules(limit=1.0, patience=2), steps=(0.0,), soft=True)
        search.read(Reading(0.9, 100.0))
        search.read(Reading(2.0, 60.0))
        decision = search.read(Reading(2.0, 60.0))
        assert (decision.restore, decision.soft, decision.levels) == (True, True, (0.0,))
        return search

    search = failed()
    decision = search.read(Reading(0.95, 100.0))
    assert (decision.keep, decision.restore, decision.levels) == (True, False, (0.1,))

    search = failed()
    assert not search.read(Reading(1.2, 100.0)).restore  # it may recover yet
    decision = search.read(Reading(1.2, 100.0))
    assert (decision.restore, decision.soft, decision.levels) == (True, False, (0.1,))

    search = failed()
    assert search.finish().restore  # not measured since: what was kept is safe
    search.read(Reading(0.9, 100.0, over=True))
    assert not search.finish().restore


def test_an_open_trial_is_undone_when_time_is_over():
    search = QualitySearch(Rules(limit=1.0, patience=5), steps=(0.0,))
    search.read(Reading(0.9, 100.0))
    assert search.levels == (0.2,)
    decision = search.read(Reading(1.5, 50.0, over=True))
    assert decision.restore
    assert decision.levels == (0.0,)


def test_the_end_goes_back_only_from_a_model_that_is_off():
    search = QualitySearch(Rules(limit=1.0, patience=2), steps=(0.0,))
    search.read(Reading(0.9, 100.0))
    search.read(Reading(0.9, 50.0))
    search.read(Reading(0.8, 30.0, over=True))
    assert not search.finish().restore
    search.read(Reading(2.0, 30.0, over=True))
    assert search.finish().restore


def test_a_diverged_reading_is_no_good():
    search = QualitySearch(Rules(limit=1.0, patience=3), steps=(0.0,))
    search.read(Reading(0.9, 100.0))
    assert search.read(Reading(math.inf, 50.0)).restore
    assert search.history[-1].verdict == "too costly"


def test_a_state_goes_on_as_if_nothing_had_happened():
    def run(stop):
        plant = Plant([4.0, 0.2], noise=0.02, seed=3)
        rules = Rules(limit=1.1, spread=0.02)
        search = QualitySearch(rules, steps=(0.0, 1 / 6))
        for index in range(60):
            if index == stop:
                state = search.state_dict()
                search = QualitySearch(Rules(limit=0.0), steps=(0.0, 1 / 6))
                search.load_state_dict(state)
            plant.follow(search.read(Reading(plant.measure(), plant.size())))
        return search.history

    assert run(17) == run(None)
    assert run(18) == run(None)


@pytest.mark.parametrize("budget", [500.0, 40.0, 3.0])
def test_a_given_size_is_met_closely_and_never_missed(budget):
    search = SizeSearch(budget, Rules(limit=0.0, spread=0.01, patience=3), count=2)
    plant = Plant([1.0, 1.0])
    for index in range(60):
        progress = index / 40
        reading = Reading(plant.measure(), plant.size(), over=progress >= 1)
        plant.follow(search.read(reading, progress))
    plant.follow(search.finish())
    assert 0.9 * budget < plant.size() <= budget
    assert search.good is not None
    sizes = [trial.size for trial in search.history if trial.verdict == "too large"]
    assert sizes == sorted(sizes, reverse=True)


def test_a_reversible_lever_goes_down_where_bytes_are_left():
    """Of a model that needs half the bytes from some point on, at any level."""

    def ends(*, reversible):
        search = SizeSearch(100.0, Rules(limit=0.0, patience=2), 1, reversible)
        for index in range(60):
            size = (1000 if index < 45 else 500) * math.exp(-4 * search.levels[0])
            search.read(Reading(100 / size, size), index / 50)
        assert search.good is not None
        return search.good.size

    assert 94 <= ends(reversible=True) <= 100
    assert ends(reversible=False) < 70


def test_noise_of_the_bytes_teaches_no_slope():
    search = SizeSearch(100.0, Rules(limit=0.0, stride=0.01), 1)
    slope = search.slope
    search.read(Reading(1.0, 1000.0))
    search.read(Reading(1.0, 999.0))
    assert search.slope == slope
    search.read(Reading(1.0, 900.0))
    assert search.slope == pytest.approx(math.log(1000 / 900) / 0.02)  # over both moves
    before = search.slope
    for _ in range(3):
        search.read(Reading(1.0, 900.0))
    assert search.slope < before  # it foresaw bytes that did not come


def test_of_the_models_that_fit_the_best_is_kept():
    search = SizeSearch(100.0, Rules(limit=0.0, patience=1), count=1)
    assert search.read(Reading(1.0, 90.0)).keep
    assert not search.read(Reading(2.0, 90.0)).keep
    assert search.read(Reading(0.5, 90.0)).keep
    assert not search.finish().restore
    search.rules = Rules(limit=0.0, patience=3)
    search.read(Reading(3.0, 90.0))
    assert search.finish().restore


def test_what_has_grown_since_it_fitted_goes_back():
    search = SizeSearch(100.0, Rules(limit=0.0, patience=1), count=1)
    search.read(Reading(1.0, 99.0))
    assert search.read(Reading(0.5, 101.0)).levels is not None
    assert search.finish().restore


def test_the_spread_is_that_of_the_noise_and_not_of_the_trend():
    rng = random.Random(1)
    noisy = [10 - 0.1 * i + rng.gauss(0, 0.3) for i in range(400)]
    assert estimated_spread(noisy) == pytest.approx(0.3, rel=0.15)
    assert estimated_spread([1.0, 2.0]) == 0.0


@pytest.mark.parametrize(
    ("readings", "verdict"),
    [
        ([0.5], True),
        ([0.95], None),  # within the noise of the limit
        ([0.95, 0.95, 0.95, 0.95], True),
        ([1.05, 1.05, 1.05, 1.05], False),
        ([3.0, 2.0], None),  # on its way
        ([9.0, 8.9], False),  # not in time
        ([2.0, 1.7, 1.5, 1.4], None),  # still falling fast enough
        ([0.5, 0.5, 0.5, 1.2], None),  # its mean is fine, and it is not
        ([2.0, 1.95, 1.92, 1.9], False),  # and not any more
        ([2.0] + [1.12] * 3 + [1.11] * 12, False),  # nor for ever
    ],
)
def test_verdicts(readings, verdict):
    assert within_limit(readings, 1.0, spread=0.1, patience=4) is verdict
    assert recent([5.0, 1.0, 2.0]) == 1.5
