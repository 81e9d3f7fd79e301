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


@pytest.mark.parametrize("swapped", [False, True])
def test_rates_in_tensors_that_differ_between_stages_only_after_the_first_save_are_refused(tmp_path, swapped):
    """Warmed up from 0 they were equal then; one stage's came back to both."""
    rates = [torch.zeros(()), torch.zeros(())], [torch.zeros(()), torch.zeros(())]
    given = []
    for rank, (weight, bias) in enumerate(rates):
        model = nn.ModuleDict({f"layer{rank}": nn.Linear(2, 2)})
        layer = model[f"layer{rank}"]
        groups = [{"params": [layer.weight], "lr": weight}, {"params": [layer.bias], "lr": bias}]
        optimizer = torch.optim.AdamW(groups[::-1] if swapped and rank else groups, foreach=False)
        given.append({"model": model, "optimizer": optimizer})
    with StageJob(tmp_path / "run", 2) as job:
        job.save(given)
        for rank, (weight, bias) in enumerate(rates):
            weight.fill_(0.1)
            bias.fill_(0.2 if swapped else 0.1 * (rank + 1))
        with pytest.raises(ReplicaMismatchError, match=r"param_groups.1.lr: .*plain numbers"):
            job.save(given)
        for weight, bias in rates:
            weight.fill_(0.1)
            bias.fill_(0.1)
        job.save(given)


def test_equal_rates_in_tensors_are_saved_again_and_again(tmp_path):
    of = stages(2, capturable=False)
    for stage in of:
        for group in stage.optimizer.param_groups:
            group["lr"] = torch.zeros(())
    with StageJob(tmp_path / "run", 2) as job:
        for step in range(3):
            for stage in of:
                for group in stage.optimizer.param_groups:
                    group["lr"].fill_(step / 8)
            job.save(states(of))
    found = load(tmp_path / "run", 1)
    assert [group["lr"] for group in found[0].optimizer.param_groups] == [0.25, 0.25]
