"""Three ranks, then two: plans, replicas, waits and lives of a run, in real processes."""

import pytest
from launch import launch

pytest.importorskip("torch")
from scenario_tools import all_scenarios


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return launch("scenarios_job.py", 3, tmp_path_factory.mktemp("scenarios"))


@pytest.mark.parametrize("name", all_scenarios()[0])
def test_that(name, ranks):
    problems = [f"rank {rank}: {found[name]}" for rank, found in enumerate(ranks) if name in found]
    assert not problems, "\n".join(problems)
