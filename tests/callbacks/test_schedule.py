"""The clock that holds watching to a budget."""

import pytest

from llm_dynamics.callbacks import schedule
from llm_dynamics.callbacks.schedule import Clock


class Time:
    """A clock that moves when told to."""

    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def time(monkeypatch):
    time = Time()
    monkeypatch.setattr(schedule, "time", time)
    return time


def observe(clock, time, seconds):
    time.now += seconds
    return clock.record(seconds)


def test_wall_time_is_split_into_watching_and_training(time):
    clock = Clock()
    assert observe(clock, time, 2.0) == 0.0
    time.now += 10.0
    assert observe(clock, time, 3.0) == pytest.approx(10.0)
    time.now += 5.0
    assert observe(clock, time, 1.0) == pytest.approx(5.0)
    assert clock.watching == pytest.approx(6.0)
    assert clock.training == pytest.approx(15.0)
    assert clock.last_observation == pytest.approx(1.0)


def test_an_observation_fits_when_it_and_those_before_stay_within_the_share_of_training(time):
    clock = Clock()
    observe(clock, time, 1.0)
    time.now += 19.0
    assert not clock.fits(0.1)  # 1 s watched and 1 s to come: 2 s in 19 s
    time.now += 1.0
    assert clock.fits(0.1)  # 2 s in 20 s
    observe(clock, time, 1.0)
    assert not clock.fits(0.1)


def test_a_longer_last_observation_needs_more_training_before_the_next(time):
    clock = Clock()
    observe(clock, time, 1.0)
    time.now += 30.0
    assert clock.fits(0.1)
    observe(clock, time, 3.0)  # 4 s watched; the next would make it 7 s
    time.now += 39.0
    assert not clock.fits(0.1)
    time.now += 1.0
    assert clock.fits(0.1)


def test_without_a_limit_every_observation_fits(time):
    clock = Clock()
    observe(clock, time, 1e6)
    assert clock.fits(None)
