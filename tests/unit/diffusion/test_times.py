"""Times of training: strata, and distributions against scipy's."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from scipy import stats

from scaletrain.diffusion.path import EDM, Cosine, Flow, Path
from scaletrain.diffusion.times import LogitNormal, LogNormal, Times, Uniform, stratified

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def independent(times: Uniform | LogitNormal | LogNormal, path: Path, count: int = 3000) -> np.ndarray:
    """Return draws that know nothing of each other: the first of each batch."""
    return np.array([float(times.draw(4, path, CPU)[0]) for _ in range(count)])


def test_stratified_shares_fill_every_stratum_and_each_is_uniform() -> None:
    shares = stratified(16, CPU)
    assert sorted((shares * 16).long().tolist()) == list(range(16))
    first = [float(stratified(16, CPU)[3]) for _ in range(3000)]
    assert stats.kstest(first, "uniform").pvalue > 0.01


def test_uniform_times_go_from_first_to_last() -> None:
    assert stats.kstest(independent(Uniform(), EDM()), stats.uniform(0.002, 79.998).cdf).pvalue > 0.01


def test_logit_normal_times() -> None:
    drawn = independent(LogitNormal(mean=0.5, std=1.5), Flow())
    assert stats.kstest(np.log(drawn / (1 - drawn)), stats.norm(0.5, 1.5).cdf).pvalue > 0.01


@pytest.mark.parametrize("path", [EDM(), Cosine()])
def test_log_normal_times_are_of_sigma_over_alpha(path: Path) -> None:
    drawn = torch.tensor(independent(LogNormal(mean=-1.0, std=0.8), path), dtype=torch.float64)
    alpha, sigma = path.alpha_sigma(drawn)
    assert stats.kstest(torch.log(sigma / alpha).numpy(), stats.norm(-1.0, 0.8).cdf).pvalue > 0.01


def test_a_batch_is_spread_over_the_quantiles_and_stays_on_the_path() -> None:
    drawn = LogNormal(mean=0.0, std=4.0).draw(2000, EDM(), CPU)
    assert drawn.min() >= 0.002
    assert drawn.max() <= 80
    logs = LogNormal(mean=0.0, std=1.0).draw(2000, EDM(), CPU).log().sort().values.numpy()
    np.testing.assert_allclose(logs[20:-20], stats.norm.ppf((np.arange(2000) + 0.5) / 2000)[20:-20], atol=0.03)


def test_they_are_a_part_of_a_recipe() -> None:
    adapter = TypeAdapter(Times)
    kinds = get_args(get_args(Times)[0])
    assert len(kinds) == 3
    assert {adapter.validate_python(k.model_fields["type"].default) for k in kinds} == {k() for k in kinds}
