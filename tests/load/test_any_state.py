"""Whatever a state is made of, it comes back as it was, or is refused by name."""

import tempfile

import pytest
from any_state import built, states
from hypothesis import HealthCheck, given, settings
from hypothesis.internal.conjecture import providers
from in_memory import IN_MEMORY
from oracle import Oracle, PlainOracle

import ckptengine as ce
from ckptengine.errors import LoadMismatchError, StateError

# What is refused, and why: nothing else may be.
AT_SAVE = (
    "two keys of the dict are written",
    "a PerRank inside a PerRank",
    "itself, which would be loaded in its place",
    "where a load can't find it",
)
AT_LOAD = (
    "make it before the load",
    "lies in a tuple",
    "of several leaves here, a plain value",
    "missing in the checkpoint:",  # a dict of values here, of other keys there
    "unexpected in the checkpoint:",
    "each rank has its own in the checkpoint; wrap it in ce.PerRank",
    "the array is read-only, so it can't be filled",
)


def has(plan, *kinds):
    return plan.kind in kinds or any(has(item, *kinds) for item in plan.inner)


def for_a_reason(error, reasons):
    assert any(reason in str(error) for reason in reasons), error


def comes_back(plans):
    saved, fresh = built(plans, fresh=False), built(plans, fresh=True)
    expected = built(plans, fresh=False)
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        try:
            ce.save(folder, saved)
        except StateError as error:
            return for_a_reason(error, AT_SAVE)
        Oracle().same(expected, saved, "what was saved has changed: ")
        if not any(has(plan, "per rank", "trained") for plan in plans.values()):
            PlainOracle().same(saved, ce.load(folder), "load(path) ")
        try:
            ce.load(folder, into=fresh)
        except (LoadMismatchError, StateError) as error:
            return for_a_reason(error, AT_LOAD)
    return Oracle().same(saved, fresh, "")


@pytest.fixture(autouse=True)
def the_same_at_each_run(monkeypatch):
    """Draw no constants from the project's modules: which are imported depends on the tests that ran before."""
    monkeypatch.setattr(providers, "_get_local_constants", providers.Constants)
    providers.CONSTANTS_CACHE.cache.clear()
    yield
    providers.CONSTANTS_CACHE.cache.clear()


relaxed = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@settings(relaxed, max_examples=60)
@given(plans=states)
def test_any_state_comes_back_as_it_was_or_is_refused_by_name(plans):
    comes_back(plans)


@pytest.mark.long
@pytest.mark.timeout(1800)
@settings(relaxed, max_examples=2000)
@given(plans=states)
def test_thousands_of_states_come_back_as_they_were_or_are_refused_by_name(plans):
    comes_back(plans)
