"""Runs that are killed at random moments lose nothing. The schedule, and a longer one as a command: tests/kills.py."""

import pytest

from tests.kills import Schedule


@pytest.mark.slow
def test_killed_at_random_moments_nothing_is_lost_or_doubled(tmp_path):
    schedule = Schedule(tmp_path, seed=1)
    schedule.run(3)
    assert schedule.killed >= 3
