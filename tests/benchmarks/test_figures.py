"""Figures and their intervals, against closed forms and another bootstrap."""

import numpy as np
import pytest

from tests.training_examples.scripts import load_script


SCRIPT = load_script("figures", folder="benchmarks")


def interval(values, groups, **options):
    summary = SCRIPT.Figure("", values, groups, unit="", **options).summary(0)
    return summary["value"], summary["low"], summary["high"]


def test_interval_of_independent_values_is_that_of_the_binomial():
    values = [i % 4 == 0 for i in range(400)]
    mean, low, high = interval(values, list(range(400)))
    assert mean == 0.25
    # 1.96 standard errors of sqrt(0.25 * 0.75 / 400) = 0.0217
    assert low == pytest.approx(0.25 - 0.0424, abs=0.006) and high == pytest.approx(0.25 + 0.0424, abs=0.006)


def test_interval_counts_a_repeated_prompt_as_one():
    values, groups = [i % 4 == 0 for i in range(100)] * 4, list(range(100)) * 4
    mean, low, high = interval(values, groups)
    assert mean == 0.25 and high - low == pytest.approx(2 * 1.96 * (0.25 * 0.75 / 100) ** 0.5, rel=0.15)


def test_interval_is_that_of_another_bootstrap():
    """Groups of different sizes are drawn whole, and every value counts the same."""
    rng = np.random.default_rng(0)
    groups = np.sort(rng.integers(0, 40, 200))
    values = rng.normal(groups % 3, 0.5)
    members = [values[groups == group] for group in np.unique(groups)]
    means = [
        np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))]).mean() for _ in range(4000)
    ]
    mean, low, high = interval(values.tolist(), groups.tolist())
    assert mean == pytest.approx(values.mean(), abs=1e-6)
    assert [low, high] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.04)
    assert high - low > 0.4


def test_weights_count_a_value_several_times():
    rng = np.random.default_rng(0)
    values, weights = rng.normal(size=30).tolist(), rng.integers(1, 5, 30).tolist()
    repeated = [i for i, weight in enumerate(weights) for _ in range(weight)]
    expected = interval([values[i] for i in repeated], repeated)
    assert interval(values, list(range(30)), weights=weights) == pytest.approx(expected, abs=1e-6)
    assert expected[0] == pytest.approx(np.average(values, weights=weights), abs=1e-6)


def test_a_difference_is_taken_group_by_group():
    """What two figures have in common does not widen the interval of their difference."""
    rng = np.random.default_rng(0)
    common = rng.normal(size=200)
    groups, noise = list(range(200)), rng.normal(scale=0.1, size=200)
    baseline = SCRIPT.Figure("", common.tolist(), groups, unit="")
    mean, low, high = interval((common + 0.5 + noise).tolist(), groups, baseline=baseline)
    assert mean == pytest.approx(0.5 + noise.mean(), abs=1e-5)
    assert high - low == pytest.approx(2 * 1.96 * 0.1 / 200**0.5, rel=0.2)


def test_formats():
    figure = SCRIPT.Figure("", [True, False], [0, 1])
    assert SCRIPT.format_figure(figure.summary(0)) == ("50.0 %", "0.0 to 100.0")
    assert SCRIPT.format_figure(SCRIPT.Figure("", [1.25], ["a"], "s").summary(0)) == ("1.2 s", "")
