"""Codes that mean levels: the nearest one, and the best sixteen."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from squat.quantization.levels import WEIGHT_LEVELS, best_levels, fit_levels, snap_to
from squat.quantization.quantizers import LearnedStepQuantizer

some_levels = st.sets(st.integers(-128, 127), min_size=16, max_size=16).map(
    lambda levels: torch.tensor(sorted(levels))
)
ALL_CODES = torch.arange(-128, 128).float()


@given(some_levels)
def test_every_code_goes_to_the_nearest_level_and_in_a_tie_to_the_lower_one(levels):
    snap = snap_to(levels)
    found = snap(ALL_CODES)
    distance = (ALL_CODES[:, None] - levels).abs()
    assert torch.equal(
        found, levels.float()[distance.argmin(dim=1)]
    )  # argmin: the first, so the lower
    assert torch.equal(snap(found), found)


def squared_error(weight, levels):
    codes = ALL_CODES.numpy()
    return (weight * np.square(codes[:, None] - levels).min(axis=1)).sum()


@given(st.lists(st.floats(0, 100), min_size=256, max_size=256), some_levels)
def test_no_sixteen_levels_are_better_than_the_best(weight, others):
    weight = np.array(weight)
    levels = best_levels(weight)
    assert len(set(levels)) == 16
    assert (np.diff(levels) > 0).all()
    assert -128 <= levels[0] <= levels[-1] <= 127
    assert squared_error(weight, levels) <= squared_error(weight, others.numpy()) + 1e-4


def test_sixteen_values_are_their_own_levels():
    values = torch.tensor([-128, -90, -33, -20, -9, -5, -2, 0, 1, 3, 7, 12, 30, 66, 100, 127])
    levels = fit_levels(values.float().repeat(10), torch.ones(160))
    assert levels.tolist() == values.tolist()


def test_levels_of_a_bell_beat_equal_steps():
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    codes = (x * 30).round().clamp(-128, 127)
    fitted = snap_to(fit_levels(codes, torch.ones_like(codes)))(codes)
    uniform = min(
        ((codes / step).round().clamp(-8, 7) * step - codes).square().mean().item()
        for step in range(4, 20)
    )
    assert (fitted - codes).square().mean().item() == pytest.approx(0.8 * uniform, rel=0.1)


def test_the_levels_of_weights_are_nearly_the_best_for_a_bell():
    weight = torch.randn(40, 2000, generator=torch.Generator().manual_seed(0))
    errors = {}
    for name, levels in WEIGHT_LEVELS.items():
        quantizer = LearnedStepQuantizer(4, shape=(40, 1), levels=levels)
        quantizer.initialize(weight, "mse")
        errors[name] = (quantizer(weight) - weight).square().mean().item()
    assert errors["iq4_nl"] < 0.86 * errors["uniform"]
    assert errors["iq4_nl"] < 1.05 * 0.0095  # Lloyd and Max's 16 levels


def test_what_is_no_number_stays_none():
    snap = snap_to(torch.tensor(WEIGHT_LEVELS["iq4_nl"]))
    assert snap(torch.tensor([torch.nan, 1.0])).isnan().tolist() == [True, False]
