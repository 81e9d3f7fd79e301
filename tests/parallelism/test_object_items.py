"""Objects of which ranks have different items: each gets again what it had, or what it has now."""

from collections import deque
from pathlib import Path

import pytest
import torch
from stages import StageJob, stages

import ckptengine as ce


class Averages:
    """Averages of a stage's weights by name, which takes whatever it is handed."""

    def __init__(self, *names: str) -> None:
        self.names, self.shadow = names, {name: torch.zeros(2) for name in names}

    def update(self) -> None:
        for number, name in enumerate(self.names):
            self.shadow[name] = self.shadow.get(name, torch.zeros(2)) + 1 + number

    def state_dict(self) -> dict:
        return {"decay": 0.9, "shadow": dict(self.shadow)}

    def load_state_dict(self, state: dict) -> None:
        self.shadow = dict(state["shadow"])


def averages(ranks: int) -> list[Averages]:
    names = [f"layer{number}" for number in range(4)]
    return [Averages(*names[rank::ranks]) for rank in range(ranks)]


@pytest.mark.parametrize("before", [1, 2, 4])
@pytest.mark.parametrize("after", [1, 2, 4])
def test_an_object_is_handed_what_it_has_and_not_what_other_ranks_objects_have(tmp_path, before, after):
    of = averages(before)
    for one in of:
        one.update()
    expected = {name: value.tolist() for one in of for name, value in one.shadow.items()}
    with StageJob(tmp_path / "run", before) as job:
        job.save([{"ema": one} for one in of])
    found = averages(after)
    with StageJob(tmp_path / "run", after) as job:
        assert all(report.complete for report in job.load([{"ema": one} for one in found]))
        for one in found:
            assert {name: value.tolist() for name, value in one.shadow.items()} == {n: expected[n] for n in one.names}
            one.update()
        job.save([{"ema": one} for one in found])  # nothing of another rank is left in it, to differ now


def of_all(shared: str, *own: str) -> Averages:
    """A stage's averages after an update; the first name may be one that other stages have, too."""
    one = Averages(shared, *own)
    one.update()
    return one


def names_of(objects: list[Averages]) -> list[list[str]]:
    return [sorted(one.shadow) for one in objects]


@pytest.mark.parametrize("filled", [True, False])
def test_each_rank_gets_the_items_that_it_saved_where_one_stage_has_only_less(tmp_path, filled):
    """Also where they fill themselves later, and can't tell before the load what they will have."""
    of = [of_all("all", "a", "b"), of_all("all"), of_all("all", "c")]
    with StageJob(tmp_path / "run", 3) as job:
        job.save([{"ema": one} for one in of])
        job.save([{"ema": one} for one in of])
        fresh = [Averages(*(one.names if filled else ())) for one in of]
        job.load([{"ema": one} for one in fresh])
        job.save([{"ema": one} for one in fresh])
    assert names_of(fresh) == [["a", "all", "b"], ["all"], ["all", "c"]]
    assert [one.shadow["all"].tolist() for one in fresh] == [[1.0, 1.0]] * 3
    assert ce.load(tmp_path / "run")["ema"]["shadow"].keys() == {"all", "a", "b", "c"}


def test_beside_a_model_and_its_optimizer_a_stage_gets_again_the_items_that_it_had(tmp_path):
    saved = stages(2)
    for stage in saved:
        stage.train()
    of = [of_all("all", "a"), of_all("all")]
    with StageJob(tmp_path / "run", 2) as job:
        job.save([stage.state | {"ema": one} for stage, one in zip(saved, of, strict=True)])
        fresh = [Averages(), Averages()]
        job.load([stage.state | {"ema": one} for stage, one in zip(stages(2, seed=1), fresh, strict=True)])
        assert names_of(fresh) == [["a", "all"], ["all"]]
        fresh = [Averages(), Averages()]
        job.load([stage.state | {"ema": one} for stage, one in zip(stages(2, seed=1)[::-1], fresh, strict=True)])
        assert names_of(fresh) == [["a", "all"]] * 2


@pytest.mark.parametrize("name", ["weight", "renamed"])
def test_beside_what_each_rank_has_of_its_own_and_under_other_names_a_rank_gets_what_it_had(tmp_path, name):
    def state(rank: int, one: Averages, weight: str) -> dict:
        own = {"noise": torch.full((2,), float(rank)), "seed": rank}
        return {"ema": one, weight: torch.ones(2), "own": ce.PerRank(own)}

    of = [of_all("all", "a"), of_all("all")]
    with StageJob(tmp_path / "run", 2) as job:
        job.save([state(rank, one, "weight") for rank, one in enumerate(of)])
        fresh = [Averages(), Averages()]
        job.load([state(rank, one, name) for rank, one in enumerate(fresh)], rename={"weight": name})
    assert names_of(fresh) == [["a", "all"], ["all"]]


@pytest.mark.parametrize("best", [3, torch.ones(1)], ids=["plain", "tensor"])
def test_what_an_object_gets_later_on_one_rank_is_known_from_the_second_save_that_has_it(tmp_path, best):
    of = [Held(0), Held(0)]
    for one in of:
        one.state = {"seen": 1}
    with StageJob(tmp_path / "run", 2) as job:
        job.save([{"held": one} for one in of])
        of[0].state["best"] = best
        for _ in range(2):
            job.save([{"held": one} for one in of])
        before = job.operations
        of[0].state["seen"] = of[1].state["seen"] = 2
        job.save([{"held": one} for one in of])
        assert job.operations == before  # they know it now
        fresh = [Held(0), Held(0)]
        job.load([{"held": one} for one in fresh])
    assert [list(one.state) for one in fresh] == [["seen", "best"], ["seen"]]


def test_a_rank_that_had_only_less_than_another_gets_that_again(tmp_path):
    of = [of_all("all", "a"), of_all("all")]
    with StageJob(tmp_path / "run", 2) as job:
        job.save([{"ema": one} for one in of])
        fresh = [Averages("all", "a"), Averages("all")]
        job.load([{"ema": one} for one in fresh])
    assert names_of(fresh) == [["a", "all"], ["all"]]


def test_ranks_in_another_order_get_what_their_objects_have(tmp_path):
    of = [of_all("all", "a"), of_all("all"), of_all("all", "c")]
    with StageJob(tmp_path / "run", 3) as job:
        job.save([{"ema": one} for one in of])
        fresh = [Averages("all", "c"), Averages("all", "a"), Averages("all")]
        job.load([{"ema": one} for one in fresh])
    assert names_of(fresh) == [["all", "c"], ["a", "all"], ["all"]]


def test_stages_in_another_order_get_what_is_theirs_where_objects_fill_themselves_later(tmp_path):
    """What a rank saved is another stage's now, which the weights tell."""
    weights = ["layer0", "layer1", "layer2"]
    of = [of_all("all", name) for name in weights]
    with StageJob(tmp_path / "run", 3) as job:
        job.save([{"ema": one, name: torch.ones(2)} for one, name in zip(of, weights, strict=True)])
        order = [2, 0, 1]
        fresh = [Averages() for _ in order]
        job.load([{"ema": one, weights[stage]: torch.ones(2)} for one, stage in zip(fresh, order, strict=True)])
        assert names_of(fresh) == [["all", "layer0", "layer1", "layer2"]] * 3
        fresh = [Averages() for _ in order]
        job.load([{"ema": one, name: torch.ones(2)} for one, name in zip(fresh, weights, strict=True)])
        assert names_of(fresh) == [["all", name] for name in weights]


def test_at_another_number_of_ranks_a_stage_with_only_less_gets_what_its_object_has(tmp_path):
    of = [of_all("all", "a", "b"), of_all("all", "c")]
    with StageJob(tmp_path / "run", 2) as job:
        job.save([{"ema": one} for one in of])
    fresh = [Averages("all", *own) for own in ("a", "b", "c", "")]
    fresh[3] = Averages("all")
    with StageJob(tmp_path / "run", 4) as job:
        job.load([{"ema": one} for one in fresh])
    assert names_of(fresh) == [["a", "all"], ["all", "b"], ["all", "c"], ["all"]]


class Held:
    """Lists, tuples and further names of a tensor, of which each rank has its own number."""

    def __init__(self, count: int) -> None:
        self.count, self.state = count, {}

    def fill(self) -> None:
        items = [torch.full((1,), float(number)) for number in range(self.count)]
        names = {f"name{number}": items[0] for number in range(self.count)}
        self.state = {"list": [*items], "tuple": tuple(items), "queue": deque(items), "names": names}

    def state_dict(self) -> dict:
        return self.state

    def load_state_dict(self, state: dict) -> None:
        self.state = state


def test_items_of_lists_and_further_names_are_those_that_each_rank_saved(tmp_path):
    of = [Held(1), Held(3), Held(2)]
    for one in of:
        one.fill()
    with StageJob(tmp_path / "run", 3) as job:
        job.save([{"held": one} for one in of])
        fresh = [Held(0) for _ in of]
        job.load([{"held": one} for one in fresh])
    for one, other in zip(fresh, of, strict=True):
        assert one.state.keys() == other.state.keys()
        for key, items in other.state.items():
            found = one.state[key]
            assert type(found) is type(items)
            assert found == items


def handed(run: Path, *fresh: Averages) -> list[list[float]]:
    """Return what objects have of the one average that two ranks have saved, after a load into them."""
    of = [Averages("a"), Averages("a")]
    for one in of:
        one.update()
    with StageJob(run, 2) as job:
        job.save([{"ema": one} for one in of])
        job.load([{"ema": one} for one in fresh])
    return [one.shadow["a"].tolist() for one in fresh]


def test_an_object_that_has_only_less_than_another_ranks_is_handed_all(tmp_path):
    """As where one rank has evaluated before the restore: it is no other stage, and must not lose what was saved."""
    assert handed(tmp_path / "run", Averages("a"), Averages()) == [[1.0, 1.0]] * 2


def test_objects_that_fill_themselves_later_are_handed_all_on_all_ranks(tmp_path):
    assert handed(tmp_path / "run", Averages(), Averages()) == [[1.0, 1.0]] * 2
