"""Which steps count, when a run gives up, and that being stopped in between changes neither."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.config import UserError
from moejax.faults import Faults, resolve
from moejax.train.health import LAG, Health, Outcome, Watch

OUTCOMES = st.lists(st.builds(Outcome, st.floats(0, 10), st.booleans()), max_size=30)
SPIKES = Faults(spike=3.0, spike_window=4, max_skipped=3)


def watched(options, outcomes, watch=None):
    """The watch after these steps, and the limit before each of them."""
    watch, limits = watch or Watch(options), []
    for outcome in outcomes:
        limits += [float(limit) for limit in watch.limit()]
        watch.add({"loss": jnp.float32(outcome.loss), "skipped": jnp.float32(outcome.skipped)})
    return watch, limits


@given(OUTCOMES)
def test_a_skipped_step_counts_for_nothing_but_the_number_of_them(outcomes):
    health = Health().after(SPIKES, outcomes)
    sound = [outcome for outcome in outcomes if not outcome.skipped]
    assert health.recent == tuple(outcome.loss for outcome in sound[-4:]) == Health().after(SPIKES, sound).recent
    assert health.skipped == len(outcomes) - len(sound)
    before = [outcome.skipped for outcome in outcomes]
    assert health.in_row == (before[::-1].index(False) if False in before else len(before))


@given(st.lists(st.floats(-5, 5), min_size=4, max_size=4), st.floats(-100, 100), st.floats(0.1, 10))
def test_the_limit_moves_with_the_losses(recent, shift, scale):
    limit = Health(tuple(recent)).limit(SPIKES)
    assert limit >= np.median(recent)
    moved = Health(tuple(scale * loss + shift for loss in recent)).limit(SPIKES)
    assert moved == pytest.approx(scale * limit + shift, abs=1e-6)


def test_the_limit_is_that_many_robust_deviations():
    recent = (1.0, 2.0, 4.0, 9.0)  # median 3; distances 2, 1, 1, 6, their median 1.5
    assert Health(recent).limit(SPIKES) == pytest.approx(3 + 3 * 1.4826 * 1.5)
    assert Health(recent[:3]).limit(SPIKES) == Health(recent).limit(Faults()) == math.inf


@settings(deadline=None)
@given(OUTCOMES, st.integers(0, 30))
def test_limits_are_the_same_if_a_run_is_stopped_in_between(outcomes, at):
    whole, limits = watched(SPIKES, outcomes)
    first, one = watched(SPIKES, outcomes[:at])
    if first.exhausted():
        return  # there the run ends
    second, other = watched(SPIKES, outcomes[at:], Watch(SPIKES, first.saved()))
    assert one + other == limits and second.saved() == whole.saved()


def test_a_run_gives_up_after_that_many_in_a_row_and_then_has_as_many_more():
    bad, good = Outcome(math.nan, True), Outcome(1.0, False)
    options = Faults(max_skipped=3)
    for outcomes, ends in (([bad] * 3, True), ([bad] * 2, False), ([bad, bad, good, bad], False), ([good] * 9, False)):
        watch, _ = watched(options, outcomes + [good] * LAG)
        assert watch.exhausted() == ends
    watch, _ = watched(options, [bad] * (3 + LAG))
    assert watch.health.skipped == 3 and watch.exhausted() and watch.since_skipped() == 0
    assert not Watch(options, watch.saved()).exhausted()
    assert not watched(Faults(max_skipped=None), [bad] * 40)[0].exhausted()


def test_after_a_rise_that_lasts_a_run_that_is_begun_again_goes_on():
    watch, _ = watched(SPIKES, [Outcome(2.0, False)] * 6)
    for _ in range(9):
        watch, _ = watched(SPIKES, [Outcome(2.5, 2.5 > watch.health.limit(SPIKES))], watch)
        if watch.exhausted():
            watch = Watch(SPIKES, watch.saved())
    assert watch.health.recent[-1] == 2.5


def test_what_has_no_effect_is_refused():
    with pytest.raises(UserError, match="has no effect without config.train.faults.spike"):
        resolve({"spike_window": 7})
    with pytest.raises(UserError, match="did you mean max_skipped"):
        resolve({"max_skip": 7})
