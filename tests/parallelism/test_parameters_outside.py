"""Parameters that are in no module of the state: fp32 copies by hand, and what ranks share out among them."""

import pytest
import torch
from stages import StageJob, same
from torch import nn

import ckptengine as ce
from ckptengine.errors import ReplicaMismatchError


def masters(rank: int, ranks: int, seed: int = 0) -> dict:
    """The state of a stage that trains plain tensors in a dict, such as fp32 copies of its weights."""
    torch.manual_seed(seed)
    weights = {f"layer{number}": torch.randn(3, 3) for number in range(4)}
    mine = {name: weights[name].requires_grad_() for name in list(weights)[rank::ranks]}
    return {"masters": mine, "optimizer": torch.optim.AdamW(list(mine.values()), lr=0.1)}


def train_masters(states: list[dict]) -> None:
    for state in states:
        for weight in state["masters"].values():
            weight.grad = weight.detach() * 2
        state["optimizer"].step()


def held_of(states: list[dict]) -> dict[str, torch.Tensor]:
    return {
        f"{name} {key}": value.clone()
        for state in states
        for name, weight in state["masters"].items()
        for key, value in {**state["optimizer"].state[weight], "itself": weight.detach()}.items()
    }


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 4), (4, 2)])
def test_parameters_outside_of_modules_have_the_names_that_they_have_in_the_state(tmp_path, before, after):
    """By number alone the first of each stage would be one, whose moments nobody compares before the third save."""
    saved = [masters(rank, before) for rank in range(before)]
    with StageJob(tmp_path / "run", before) as job:
        job.save(saved)
        for _ in range(2):
            train_masters(saved)
            job.save(saved)
    found = [masters(rank, after, seed=1) for rank in range(after)]
    with StageJob(tmp_path / "run", after) as job:
        assert all(report.complete for report in job.load(found))
    assert same(held_of(found), held_of(saved))
    assert list(ce.load(tmp_path / "run")["optimizer"]["state"]) == [f"masters.layer{number}" for number in range(4)]


@pytest.mark.parametrize("own", [False, True])
def test_parameters_that_older_checkpoints_have_by_number_get_what_was_theirs(tmp_path, own):
    class Own(torch.optim.AdamW):
        def state_dict(self) -> dict:
            return {**super().state_dict(), "more": 1}

        def load_state_dict(self, state: dict) -> None:
            super().load_state_dict({key: value for key, value in state.items() if key != "more"})

    def made(seed: int) -> dict:
        state = masters(0, 1, seed)
        if own:
            state["optimizer"] = Own(list(state["masters"].values()), lr=0.1)
        return state

    saved, found = made(0), made(1)
    train_masters([saved])
    ce.save(tmp_path / "old", {"optimizer": saved["optimizer"]})  # its parameters are nowhere in this state
    assert list(ce.load(tmp_path / "old")["optimizer"]["state"]) == [f"0.{number}" for number in range(4)]
    ce.load(tmp_path / "old", into=found, only=["optimizer"])
    for one, other in zip(found["masters"].values(), saved["masters"].values(), strict=True):
        assert torch.equal(found["optimizer"].state[one]["exp_avg"], saved["optimizer"].state[other]["exp_avg"])


def test_what_several_stages_have_saved_by_number_beside_names_gets_what_was_theirs(tmp_path):
    """Older versions saved so what a stage trains beside its layers; the stages had groups of several lengths."""

    def made(rank: int, seed: int) -> dict:
        torch.manual_seed(seed + rank)
        model = nn.ModuleDict({f"layer{rank}{n}": nn.Linear(2, 2, bias=False) for n in range(rank + 1)})
        scales = {f"scale{rank}": nn.Parameter(torch.randn(3))}
        optimizer = torch.optim.AdamW([*model.parameters(), *scales.values()])
        return {"model": model, "masters": scales, "optimizer": optimizer}

    saved = [made(rank, 0) for rank in range(2)]
    for state in saved:
        for weight in (*state["model"].parameters(), *state["masters"].values()):
            weight.grad = weight.detach() * 2
        state["optimizer"].step()
    found = [made(rank, 10) for rank in range(2)]
    with StageJob(tmp_path / "run", 2) as job:
        job.save([{key: state[key] for key in ("model", "optimizer")} for state in saved])
        job.load(found, only=["model", "optimizer"])
    for state, then in zip(found, saved, strict=True):
        for one, other in zip(
            state["optimizer"].param_groups[0]["params"], then["optimizer"].param_groups[0]["params"], strict=True
        ):
            assert torch.equal(state["optimizer"].state[one]["exp_avg"], then["optimizer"].state[other]["exp_avg"])


def shared_out(seed: int) -> dict:
    """The state of a rank that steps some of the parameters only, and is sent the others, as Muon by hand is."""
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(5)))
    return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)}


def step_shared_out(states: list[dict]) -> None:
    for number in range(5):
        owner, *others = (*states[number % len(states) :], *states[: number % len(states)])
        mine = owner["model"][number].weight
        mine.grad = mine.detach() + 1
        owner["optimizer"].step()
        mine.grad = None
        for other in others:
            other["model"][number].weight.data.copy_(mine.data)


@pytest.mark.parametrize("after", [3, 2, 1])
def test_ranks_that_step_some_of_the_parameters_each_go_on_when_they_drop_the_states_of_others(tmp_path, after):
    saved = [shared_out(0) for _ in range(3)]
    step_shared_out(saved)
    with StageJob(tmp_path / "run", 3) as job:
        job.save(saved)
    found = [shared_out(1) for _ in range(after)]
    with StageJob(tmp_path / "run", after) as job:
        job.restore(found)
        assert [len(state["optimizer"].state) for state in found] == [5] * after
        for states in (saved, found):
            step_shared_out(states)
        if after > 1:
            with pytest.raises(ReplicaMismatchError, match=r"optimizer\.state\.model.* differ"):
                job.save(found)
        for rank, state in enumerate(found):
            for number, weight in enumerate(state["model"].parameters()):
                if number % after != rank:
                    state["optimizer"].state.pop(weight, None)
        job.save(found)
    stored = ce.load(tmp_path / "run")
    for number in range(5):
        owner, name = saved[number % 3], f"{number}.weight"
        weight = owner["model"][number].weight
        momentum = stored["optimizer"]["state"][f"model.{name}"]["momentum_buffer"]
        assert torch.equal(torch.as_tensor(stored["model"][name]), weight.detach())
        assert torch.equal(torch.as_tensor(momentum), owner["optimizer"].state[weight]["momentum_buffer"])
