"""Optimizers of pipeline stages: state and groups follow their parameters to any number of stages."""

from pathlib import Path

import pytest
import second_reader
import torch
from stages import Stage, StageJob, all_tensors, same, stages, states
from torch import nn

import ckptengine as ce
from ckptengine.errors import LoadMismatchError, ReplicaMismatchError


def save(run: Path, ranks: int, steps: int = 3, **options) -> dict[str, torch.Tensor]:
    """Train and save on some ranks; return what they had at the end."""
    of = stages(ranks, **options)
    with StageJob(run, ranks) as job:
        for _ in range(steps):
            job.each(lambda rank: of[rank].train())
            job.save(states(of))
    return all_tensors(of)


def load(run: Path, ranks: int, **options) -> list[Stage]:
    of = stages(ranks, seed=9, **options)
    with StageJob(run, ranks) as job:
        assert all(report.complete for report in job.load(states(of)))
    return of


@pytest.mark.parametrize("before", [1, 2, 4])
@pytest.mark.parametrize("after", [1, 2, 4])
def test_weights_moments_groups_and_schedules_go_from_any_number_of_stages_to_any(tmp_path, before, after):
    expected = save(tmp_path / "run", before)
    found = load(tmp_path / "run", after)
    assert same(all_tensors(found), expected)
    for stage in found:
        assert [(group["lr"], group["weight_decay"]) for group in stage.optimizer.param_groups] == [
            (pytest.approx(0.01), 0.01), (pytest.approx(0.01), 0.0)
        ]  # fmt: skip
        assert stage.scheduler.last_epoch == 3


def test_stages_whose_hyperparameters_are_equal_are_stored_as_the_groups_of_one_optimizer(tmp_path):
    save(tmp_path / "run", 4)
    groups = ce.load(tmp_path / "run")["optimizer"]["param_groups"]
    assert [group["params"] for group in groups] == [
        [f"model.layer{number}.{name}" for number in range(4)] for name in ("weight", "bias")
    ]


def test_a_training_goes_on_in_another_number_of_stages_as_if_nothing_had_changed(tmp_path):
    undisturbed = stages(1)[0]
    for _ in range(5):
        undisturbed.train()
    save(tmp_path / "run", 2)
    found = load(tmp_path / "run", 4)
    for _ in range(2):
        for stage in found:
            stage.train()
    assert same(all_tensors(found), undisturbed.tensors())


def test_stages_with_other_hyperparameters_keep_their_own_and_do_not_become_one_group(tmp_path):
    of = stages(2)
    for group in of[1].optimizer.param_groups:
        group["lr"] = 0.5
    for stage in of:
        stage.state.pop("scheduler")
    with StageJob(tmp_path / "run", 2) as job:
        job.save(states(of))
    assert [group["lr"] for group in ce.load(tmp_path / "run")["optimizer"]["param_groups"]] == [0.1, 0.1, 0.5, 0.5]
    four = stages(4, seed=9)
    for stage in four:
        stage.state.pop("scheduler")
    with StageJob(tmp_path / "run", 4) as job:
        job.load(states(four))
    assert [stage.optimizer.param_groups[0]["lr"] for stage in four] == [0.1, 0.1, 0.5, 0.5]
    one = Stage(0, 1, seed=9)
    one.state.pop("scheduler")
    with pytest.raises(LoadMismatchError, match=r"group 0 can't have one 'lr': in the checkpoint it is 0.1 for .* 0.5"):
        ce.load(tmp_path / "run", into=one.state)


def test_ranks_of_one_stage_must_have_the_same_hyperparameters(tmp_path):
    of = [Stage(0, 2), Stage(0, 2), Stage(1, 2), Stage(1, 2)]
    of[3].optimizer.param_groups[1]["lr"] = 0.7
    with StageJob(tmp_path / "run", 4) as job:
        with pytest.raises(ReplicaMismatchError, match=r"param_groups \(the group of .*layer2.bias\): not rank 2's on"):
            job.save(states(of))
        of[3].optimizer.param_groups[1]["lr"] = 0.1
        job.save(states(of))
        of[1].optimizer.param_groups[0]["lr"] = 0.7
        with pytest.raises(
            ReplicaMismatchError, match=r"param_groups \(the group of .*layer0.weight\): not rank 0's on"
        ):
            job.save(states(of))
        of[1].optimizer.param_groups[0]["lr"] = 0.1
        job.save(states(of))


def test_groups_that_hold_tensors_follow_their_parameters(tmp_path):
    options = {"kind": torch.optim.Adam}

    def with_tensors(of):
        for stage in of:
            for group in stage.optimizer.param_groups:
                group["lr"] = torch.tensor(0.1, dtype=torch.float64)
            stage.state.pop("scheduler")
        return of

    two = with_tensors(stages(2, **options))
    with StageJob(tmp_path / "run", 2) as job:
        for stage in two:
            for group in stage.optimizer.param_groups:
                group["lr"].fill_(0.25)
        job.save(states(two))
    for ranks in (1, 2, 4):
        found = with_tensors(stages(ranks, seed=9, **options))
        with StageJob(tmp_path / "run", ranks) as job:
            job.load(states(found))
        assert all(float(group["lr"]) == 0.25 for stage in found for group in stage.optimizer.param_groups)
        assert all(isinstance(group["lr"], torch.Tensor) for stage in found for group in stage.optimizer.param_groups)


def test_a_stage_without_a_parameter_for_a_group_has_an_empty_one(tmp_path):
    def stage(rank, seed):
        torch.manual_seed(seed)
        model = nn.ModuleDict({f"layer{rank}": nn.Linear(2, 2, bias=rank == 1)})
        biases = [layer.bias for layer in model.values() if layer.bias is not None]
        weights = {"params": [layer.weight for layer in model.values()]}
        optimizer = torch.optim.AdamW([weights, {"params": biases, "weight_decay": 0.0}], lr=0.1 + seed)
        return {"model": model, "optimizer": optimizer}

    before, after = ([stage(rank, seed) for rank in range(2)] for seed in range(2))
    with StageJob(tmp_path / "run", 2) as job:
        job.save(before)
        before[0]["optimizer"].param_groups[1]["lr"] = before[1]["optimizer"].param_groups[1]["lr"] = 0.3
        job.save(before)
        job.load(after)
    for one in after:
        groups = one["optimizer"].param_groups
        assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.1, 0.01), (0.3, 0.0)]


def test_an_optimizer_that_saves_itself_goes_to_another_number_of_stages(tmp_path):
    class Named(torch.optim.AdamW):
        def state_dict(self):
            return {**super().state_dict(), "note": "own"}

        def load_state_dict(self, state):
            super().load_state_dict({key: value for key, value in state.items() if key != "note"})

    expected = save(tmp_path / "run", 2, kind=Named)
    assert same(all_tensors(load(tmp_path / "run", 4, kind=Named)), expected)
    assert same(all_tensors(load(tmp_path / "run", 1, kind=Named)), expected)


def test_a_stage_whose_optimizer_has_no_state_yet_gets_that_of_its_parameters(tmp_path):
    of = stages(2)
    of[0].train()
    with StageJob(tmp_path / "run", 2) as job:
        for stage in of:
            stage.state.pop("scheduler")
        job.save(states(of))
    (one,) = stages(1, seed=9)
    one.state.pop("scheduler")
    ce.load(tmp_path / "run", into=one.state)
    held = [name for name, p in one.model.named_parameters() if p in one.optimizer.state]
    assert held == [f"layer{n}.{kind}" for n in (0, 1) for kind in ("weight", "bias")]


def test_parameters_that_are_in_no_group_of_the_checkpoint_are_named(tmp_path):
    save(tmp_path / "run", 2)
    of = stages(2, seed=9)
    for stage in of:
        stage.model["new"] = nn.Linear(2, 2)
        stage.optimizer.add_param_group({"params": list(stage.model["new"].parameters())})
    with (
        StageJob(tmp_path / "run", 2) as job,
        pytest.raises(LoadMismatchError, match=r"group 2 has parameters.*model.new"),
    ):
        job.load(states(of))


def test_one_weight_in_two_stages_is_one_leaf_in_one_group(tmp_path):
    def tied(rank):
        torch.manual_seed(0)
        shared = nn.Embedding(3, 2)
        model = nn.ModuleDict({"tok": shared, f"stage{rank}": nn.Linear(2, 2)})
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return {"model": model, "optimizer": optimizer}

    of = [tied(rank) for rank in range(2)]
    with StageJob(tmp_path / "run", 2) as job:
        job.save(of)
        of[1]["optimizer"].param_groups[0]["lr"] = 0.2
        with pytest.raises(ReplicaMismatchError, match="param_groups"):
            job.save(of)
        of[1]["optimizer"].param_groups[0]["lr"] = 0.1
        job.save(of)
    (group,) = ce.load(tmp_path / "run")["optimizer"]["param_groups"]
    assert sorted(group["params"]) == sorted(
        f"model.{name}" for name in ("tok.weight", "stage0.weight", "stage0.bias", "stage1.weight", "stage1.bias")
    )
    again = [tied(rank) for rank in range(2)]
    with StageJob(tmp_path / "run", 2) as job:
        job.load(again)
    assert torch.equal(again[0]["model"]["tok"].weight, of[0]["model"]["tok"].weight)


# Several chunks per rank.


def chunk(*numbers):
    torch.manual_seed(numbers[0])
    return nn.ModuleDict({f"layer{number}": nn.Linear(2, 2) for number in numbers})


def interleaved(ranks, seed):
    found = []
    for rank in range(ranks):
        torch.manual_seed(seed)
        chunks = [chunk(number + seed) for number in range(rank, 4, ranks)]
        for module, number in zip(chunks, range(rank, 4, ranks), strict=True):
            module[f"layer{number}"] = module.pop(f"layer{number + seed}") if seed else module[f"layer{number}"]
        optimizer = torch.optim.AdamW([p for module in chunks for p in module.parameters()], lr=0.1)
        for parameter in (p for module in chunks for p in module.parameters()):
            parameter.grad = torch.full_like(parameter, float(parameter.numel()))
        optimizer.step()
        found.append({"model": ce.Merged(chunks), "optimizer": optimizer})
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_chunks_of_one_model_are_one_module_whoever_has_them(tmp_path, ranks):
    of = interleaved(2, 0)
    with StageJob(tmp_path / "run", 2) as job:
        job.save(of)
        job.save(of)
    whole = {}
    for state in of:
        for module in state["model"].modules:
            whole |= {name: p.detach() for name, p in module.named_parameters()}
    assert sorted(ce.load(tmp_path / "run")["model"]) == sorted(whole)
    again = interleaved(ranks, 7)
    with StageJob(tmp_path / "run", ranks) as job:
        job.load(again)
    for state in again:
        for module in state["model"].modules:
            for name, parameter in module.named_parameters():
                assert torch.equal(parameter, whole[name]), name
    plain = nn.ModuleDict({f"layer{number}": nn.Linear(2, 2) for number in range(4)})
    ce.load(tmp_path / "run", into={"model": plain}, only=["model"])
    assert all(torch.equal(value, whole[name]) for name, value in plain.state_dict().items())


def test_chunks_that_have_something_of_one_name_are_refused(tmp_path):
    state = {"model": ce.Merged([nn.Linear(2, 2), nn.Linear(2, 2)])}
    with pytest.raises(ce.errors.StateError, match="two of the merged modules have bias, weight"):
        ce.save(tmp_path / "one", state)
    with pytest.raises(ce.errors.StateError, match="takes one or more modules, or optimizers, of one framework"):
        ce.Merged([])
    with pytest.raises(ce.errors.StateError, match="not dict"):
        ce.Merged([{"weight": torch.ones(1)}])


def test_extra_state_and_own_loading_code_of_merged_modules_are_taken_care_of(tmp_path):
    class Counted(nn.Linear):
        def get_extra_state(self):
            return {"n": self.n}

        def set_extra_state(self, state):
            self.n = state["n"]

    def modules(n):
        found = [nn.ModuleDict({f"l{number}": Counted(2, 2)}) for number in range(2)]
        for number, module in enumerate(found):
            module[f"l{number}"].n = n * (number + 1)
        return found

    ce.save(tmp_path / "one", {"model": ce.Merged(modules(3))})
    found = modules(0)
    ce.load(tmp_path / "one", into={"model": ce.Merged(found)})
    assert [found[0]["l0"].n, found[1]["l1"].n] == [3, 6]


def test_a_second_reader_by_the_specification_sees_one_optimizer(tmp_path):
    save(tmp_path / "run", 4)
    arrays, values = second_reader.read(str(tmp_path / "run"))
    groups = values[None, "optimizer", "param_groups"]
    assert [group["params"] for group in groups] == [
        group["params"] for group in ce.load(tmp_path / "run")["optimizer"]["param_groups"]
    ]
    assert {(None, "model", f"layer{number}.weight") for number in range(4)} <= arrays.keys()


# Parameters that no optimizer has, of which there is no state that could tell.


def without_state(ranks: int, left_out: str = "", seed: int = 0) -> list[Stage]:
    """Stages with SGD, which keeps nothing, over all parameters but one."""
    of = stages(ranks, seed, kind=torch.optim.SGD)
    for stage in of:
        stage.state.pop("scheduler")
        names = {id(parameter): name for name, parameter in stage.model.named_parameters()}
        for group in stage.optimizer.param_groups:
            group["params"] = [one for one in group["params"] if names[id(one)] != left_out]
    return of


@pytest.mark.parametrize(("before", "after"), [(2, 2), (1, 2), (2, 1), (4, 2)])
def test_a_parameter_without_state_that_no_rank_s_optimizer_has_is_unexpected(tmp_path, before, after):
    with StageJob(tmp_path / "run", before) as job:
        job.save(states(without_state(before)))
    with StageJob(tmp_path / "run", after) as job:
        assert all(report.complete for report in job.load(states(without_state(after, seed=1))))
        of = without_state(after, "layer3.bias")
        with pytest.raises(LoadMismatchError, match=r"param_groups: model.layer3.bias is in no group of any rank"):
            job.load(states(of))
        for report in job.load(states(of), strict=False):
            assert report.unexpected == ("optimizer.param_groups: model.layer3.bias is in no group of any rank",)
        assert all(report.complete for report in job.load(states(of), only=["model"]))


def test_a_parameter_that_no_rank_s_optimizer_has_is_told_once_where_its_state_tells_it(tmp_path):
    of = stages(2, kind=torch.optim.SGD, momentum=0.9)
    for stage in of:
        stage.train()
        stage.state.pop("scheduler")
    with StageJob(tmp_path / "run", 2) as job:
        job.save(states(of))
        for stage in of:
            stage.optimizer.param_groups[1]["params"].clear()
            stage.optimizer.state.clear()
        (first, *_) = job.load(states(of), strict=False)
    assert set(first.unexpected) == {f"optimizer.state.model.layer{n}.bias.momentum_buffer" for n in range(4)}


def test_a_parameter_that_each_rank_s_own_optimizer_lacks_is_a_mismatch(tmp_path):
    def own(of):
        return [{"optimizer": ce.PerRank(stage.optimizer)} for stage in of]

    with StageJob(tmp_path / "run", 2) as job:
        job.save(own(without_state(2)))
        job.load(own(without_state(2)))
        of = without_state(2)
        for stage in of:
            stage.optimizer.param_groups[1]["params"].pop()
        with pytest.raises(LoadMismatchError, match="group 1 has other parameters in the checkpoint"):
            job.load(own(of))


def test_an_optimizer_that_saves_itself_takes_nothing_of_other_stages(tmp_path):
    class Named(torch.optim.AdamW):
        def state_dict(self):
            return {**super().state_dict(), "note": "own"}

        def load_state_dict(self, state):
            super().load_state_dict({key: value for key, value in state.items() if key != "note"})

    save(tmp_path / "run", 2, kind=Named)
    of = load(tmp_path / "run", 2, kind=Named)
    for stage in of:
        assert all(isinstance(key, nn.Parameter) for key in stage.optimizer.state)
        assert len(stage.optimizer.state) == 4


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
