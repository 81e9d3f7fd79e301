"""What was distinct stays distinct; classes, order and memory layout come back; what does not fit is told in short."""

import copy
import logging
from collections import OrderedDict

import numpy as np
import pytest
import torch
from holders import Holder

import ckptengine as ce
from ckptengine.errors import LoadMismatchError


class Tied(torch.nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(50, 8)
        self.head = torch.nn.Linear(8, 50, bias=False)
        if tied:
            self.head.weight = self.embed.weight


class EarlyStopping:
    """Keeps the best weights; at first they are the model's own tensors."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.best = model.state_dict()

    def keep(self, model: torch.nn.Module) -> None:
        self.best = copy.deepcopy(model.state_dict())

    def state_dict(self):
        return {"best": self.best}

    def load_state_dict(self, state):
        self.best = state["best"]


def test_an_untied_checkpoint_does_not_load_into_a_tied_model(tmp_path):
    ce.save(tmp_path / "point", {"model": Tied(False)})
    tied = Tied(True)
    before = tied.embed.weight.detach().clone()
    with pytest.raises(LoadMismatchError, match=r"model.head.weight: the same memory as model.embed.weight here"):
        ce.load(tmp_path / "point", into={"model": tied})
    assert torch.equal(tied.embed.weight, before), "nothing is read before the mismatch is told"


def test_warm_start_too_refuses_an_untied_checkpoint_for_a_tied_model(tmp_path):
    ce.save(tmp_path / "point", {"model": Tied(False)})
    with ce.Checkpointer(tmp_path / "run") as ckpt:
        with pytest.raises(LoadMismatchError, match=r"model.head.weight: the same memory as model.embed.weight"):
            ckpt.warm_start(tmp_path / "point", {"model": Tied(True)}, strict=True)
        report = ckpt.warm_start(tmp_path / "point", {"model": Tied(True)})
    assert [line.partition(":")[0] for line in report.mismatched] == ["model.head.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["same", "cast"])
def test_equal_weights_of_two_names_load_into_a_tied_model(tmp_path, dtype):
    untied = Tied(False)
    with torch.no_grad():
        untied.head.weight.copy_(untied.embed.weight)
    ce.save(tmp_path / "point", {"model": untied})
    tied = Tied(True).to(dtype)
    assert tied.head.weight is tied.embed.weight
    report = ce.load(tmp_path / "point", into={"model": tied}, cast=True)
    assert report.complete
    assert torch.equal(tied.embed.weight, untied.embed.weight.to(dtype))


def test_an_object_that_holds_the_models_tensors_gets_memory_of_its_own(tmp_path):
    model = Tied(False)
    stopping = EarlyStopping(model)
    stopping.keep(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    saved = copy.deepcopy(model.state_dict())
    best = copy.deepcopy(stopping.best)
    for names in (("model", "stopping"), ("stopping", "model")):
        state = {"model": model, "stopping": stopping}
        ce.save(tmp_path / "point", {name: state[name] for name in names})
        fresh = Tied(False)
        here = {"model": fresh, "stopping": EarlyStopping(fresh)}
        ce.load(tmp_path / "point", into={name: here[name] for name in names})
        for key, tensor in fresh.state_dict().items():
            assert torch.equal(tensor, saved[key])
            assert torch.equal(here["stopping"].best[key], best[key])
            assert here["stopping"].best[key].data_ptr() != tensor.data_ptr()


def test_an_object_that_was_tied_to_the_model_stays_tied(tmp_path):
    model = Tied(False)
    ce.save(tmp_path / "point", {"model": model, "stopping": EarlyStopping(model)})
    fresh = Tied(False)
    stopping = EarlyStopping(fresh)
    ce.load(tmp_path / "point", into={"model": fresh, "stopping": stopping})
    assert torch.equal(stopping.best["embed.weight"], model.embed.weight)
    assert stopping.best["embed.weight"].data_ptr() == fresh.embed.weight.data_ptr()


def grouped(shared: bool):
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(2)])
    first = torch.tensor(0.5)
    rates = (first, first if shared else torch.tensor(0.25))
    groups = [{"params": part.parameters(), "lr": rate} for part, rate in zip(model, rates, strict=True)]
    return {"model": model, "optimizer": torch.optim.AdamW(groups, foreach=False)}


def test_a_rate_that_groups_share_here_and_not_in_the_checkpoint_is_a_mismatch(tmp_path):
    ce.save(tmp_path / "point", grouped(shared=False))
    with pytest.raises(LoadMismatchError, match=r"optimizer.param_groups.1.lr: the same memory as .*param_groups.0.lr"):
        ce.load(tmp_path / "point", into=grouped(shared=True))
    ce.save(tmp_path / "tied", grouped(shared=True))
    assert ce.load(tmp_path / "tied", into=grouped(shared=True)).complete


def test_views_of_one_tensor_load_where_their_contents_agree(tmp_path):
    base = torch.arange(20.0)
    state = {"flat": base, "first": base[:12], "last": base[8:], "even": base.view(10, 2)[:, 0]}
    ce.save(tmp_path / "point", state)
    fresh = torch.zeros(20)
    ce.load(
        tmp_path / "point", {"flat": fresh, "first": fresh[:12], "last": fresh[8:], "even": fresh.view(10, 2)[:, 0]}
    )
    assert torch.equal(fresh, base)
    ce.save(tmp_path / "other", {**state, "last": torch.full((12,), -1.0)})
    with pytest.raises(LoadMismatchError, match="the same memory as"):
        ce.load(tmp_path / "other", {"flat": fresh, "first": fresh[:12], "last": fresh[8:], "even": fresh[:10]})


def test_columns_of_one_matrix_are_no_shared_memory(tmp_path):
    fused = torch.randn(6, 9)
    ce.save(tmp_path / "point", {"q": fused[:, :3], "k": fused[:, 3:6], "v": fused[:, 6:]})
    fresh = torch.zeros(6, 9)
    ce.load(tmp_path / "point", {"q": fresh[:, :3], "k": fresh[:, 3:6], "v": fresh[:, 6:]})
    assert torch.equal(fresh, fused)


def test_the_order_of_keys_comes_back_without_a_state(tmp_path):
    state = {"z": 1, "model": torch.nn.Linear(2, 2), "a": {"y": torch.ones(1), "x": 2, "b": torch.zeros(1)}, 7: 3, 1: 4}
    ce.save(tmp_path / "point", state)
    loaded = ce.load(tmp_path / "point")
    assert list(loaded) == ["z", "model", "a", 7, 1]
    assert list(loaded["model"]) == ["weight", "bias"]
    assert list(loaded["a"]) == ["y", "x", "b"]
    renamed = ce.load(tmp_path / "point", rename={"a": "c"}, only=["c", "z"])
    assert list(renamed) == ["z", "c"]
    assert list(renamed["c"]) == ["y", "x", "b"]


@pytest.mark.parametrize("into", [{"w": torch.zeros(2)}, None], ids=["state", "no state"])
def test_a_name_that_nothing_has_is_told_with_the_checkpoint(tmp_path, into):
    ce.save(tmp_path / "point", {"w": torch.ones(2)})
    with pytest.raises(LoadMismatchError, match=r"point: only=\['v'\]: the state has nothing with that name"):
        ce.load(tmp_path / "point", into=into, only=["v"])


def trained(optimizer, model):
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()


def test_the_order_of_an_optimizers_and_an_objects_state_comes_back(tmp_path):
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    trained(optimizer, model)
    held = Holder(z=torch.ones(2), inner=OrderedDict([("q", torch.ones(1)), ("b", 1), ("a", torch.zeros(1))]), m=2)
    ce.save(tmp_path / "point", {"model": model, "optimizer": optimizer, "held": held})
    fresh = torch.nn.Linear(4, 2)
    state = {"model": fresh, "optimizer": torch.optim.AdamW(fresh.parameters()), "held": Holder()}
    ce.load(tmp_path / "point", into=state)
    saved, loaded = optimizer.state_dict(), state["optimizer"].state_dict()
    assert [list(item) for item in loaded["state"].values()] == [list(item) for item in saved["state"].values()]
    assert list(loaded["param_groups"][0]) == list(saved["param_groups"][0])
    assert list(state["held"].state) == ["z", "inner", "m"]
    assert type(state["held"].state["inner"]) is OrderedDict
    assert list(state["held"].state["inner"]) == ["q", "b", "a"]


class Shampoo(torch.optim.SGD):
    """Keeps eigenvectors as `torch.linalg.eigh` returns them: column-major."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                matrix = parameter.detach() @ parameter.detach().T
                self.state[parameter]["basis"] = torch.linalg.eigh(matrix).eigenvectors


def test_memory_layout_comes_back_where_the_engine_makes_the_tensor(tmp_path):
    model = torch.nn.Linear(4, 4, bias=False)
    optimizer = Shampoo(model.parameters(), lr=0.1, momentum=0.9)
    trained(optimizer, model)
    images = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    held = Holder(images=images, array=np.asfortranarray(np.arange(6.0).reshape(2, 3)))
    ce.save(tmp_path / "point", {"model": model, "optimizer": optimizer, "held": held})
    for holder in (Holder(), Holder(images=torch.zeros(2, 3, 4, 5), array=np.zeros((2, 3)))):
        fresh = torch.nn.Linear(4, 4, bias=False)
        other = Shampoo(fresh.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):  # the second time into state that is there
            ce.load(tmp_path / "point", into={"model": fresh, "optimizer": other, "held": holder})
            basis, saved = other.state[fresh.weight]["basis"], optimizer.state[model.weight]["basis"]
            assert saved.stride() == basis.stride() == (1, 4)
            assert torch.equal(saved, basis)
            assert holder.state["images"].stride() == images.stride()
            assert torch.equal(holder.state["images"], images)
            assert holder.state["array"].flags.f_contiguous
            assert holder.state["array"].tolist() == held.state["array"].tolist()
            other.state[fresh.weight]["basis"] = basis.contiguous()


def test_a_memory_layout_that_changes_between_saves_is_saved(tmp_path):
    held = Holder(images=torch.randn(2, 3, 4, 5))
    ce.save(tmp_path / "point", {"held": held})
    held.state["images"] = held.state["images"].to(memory_format=torch.channels_last)
    ce.save(tmp_path / "point", {"held": held})
    fresh = Holder()
    ce.load(tmp_path / "point", into={"held": fresh})
    assert fresh.state["images"].stride() == held.state["images"].stride()


def scheduled(optimizer_class, scheduler_class, **options):
    model = torch.nn.Linear(4, 2)
    optimizer = optimizer_class(model.parameters(), lr=0.01)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler_class(optimizer, **options)}


def test_the_state_of_another_class_is_a_mismatch(tmp_path):
    schedulers = torch.optim.lr_scheduler
    saved = scheduled(torch.optim.AdamW, schedulers.CosineAnnealingLR, T_max=10)
    trained(saved["optimizer"], saved["model"])
    ce.save(tmp_path / "point", saved)
    other = scheduled(torch.optim.SGD, schedulers.StepLR, step_size=3)
    with pytest.raises(LoadMismatchError) as caught:
        ce.load(tmp_path / "point", into=other)
    message = str(caught.value)
    assert "optimizer: torch.optim.adamw.AdamW in the checkpoint, torch.optim.sgd.SGD here" in message
    assert "scheduler: torch.optim.lr_scheduler.CosineAnnealingLR in the checkpoint" in message
    assert ce.load(
        tmp_path / "point", into=scheduled(torch.optim.AdamW, schedulers.CosineAnnealingLR, T_max=1)
    ).complete


def test_with_strict_off_the_state_of_another_class_is_taken_and_told(tmp_path, caplog):
    ce.save(tmp_path / "point", scheduled(torch.optim.AdamW, torch.optim.lr_scheduler.StepLR, step_size=7))
    other = scheduled(torch.optim.AdamW, torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    with caplog.at_level(logging.WARNING, "ckptengine"):
        report = ce.load(tmp_path / "point", into=other, strict=False)
    assert len(report.other_class) == 1
    assert "scheduler: torch.optim.lr_scheduler.StepLR in the checkpoint" in report.other_class[0]
    assert "StepLR in the checkpoint, torch.optim.lr_scheduler.ExponentialLR here; taken over" in caplog.text


class Moved(Holder):
    pass


def test_a_class_made_from_the_saved_one_or_moved_in_its_package_is_the_same(tmp_path):
    ce.save(tmp_path / "point", {"held": Holder(a=1)})
    ce.load(tmp_path / "point", into={"held": Moved(a=2)})
    methods = {"state_dict": lambda self: {"a": 2}, "load_state_dict": lambda self, state: self.got.update(state)}
    run_as_program = type("Holder", (), {"__module__": "__main__", "got": {}, **methods})
    ce.load(tmp_path / "point", into={"held": run_as_program()}, verify=False)
    assert run_as_program.got == {"a": 1}
    ce.save(tmp_path / "point", {"held": Moved(a=1)})
    with pytest.raises(LoadMismatchError, match="Moved in the checkpoint"):
        ce.load(tmp_path / "point", into={"held": Holder(a=2)})


def test_what_is_left_out_is_told_as_a_table(tmp_path, caplog):
    with ce.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(40, {"model": torch.nn.Linear(4, 4), "step": 40}).durable.result()
    with ce.Checkpointer(tmp_path / "run") as ckpt, caplog.at_level(logging.WARNING, "ckptengine"):
        wide = torch.nn.Linear(8, 4)
        assert ckpt.restore({"model": wide, "step": 0}, strict=False) == 40
    assert "not all of it was loaded" in caplog.text
    assert "model.weight" in caplog.text
    assert "shape (4, 8) here, (4, 4) in the checkpoint" in caplog.text


@pytest.mark.parametrize("call", ["restore", "load"])
def test_that_nothing_was_loaded_is_an_error_whatever_strict_says(tmp_path, call):
    with ce.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(40, {"model": torch.nn.Linear(4, 4), "step": 40}).durable.result()
    other = {"model": torch.nn.ModuleDict({"deep": torch.nn.Linear(4, 4)}), "step": 0}
    refused = pytest.raises(LoadMismatchError, match="nothing in the checkpoint matches the state")
    with ce.Checkpointer(tmp_path / "run") as ckpt, refused:
        if call == "restore":
            ckpt.restore(other, strict=False)
        else:
            ce.load(tmp_path / "run", into=other, strict=False)
    assert other["step"] == 0


def test_a_mismatch_of_thousands_of_leaves_is_told_in_a_few_lines(tmp_path):
    names = [f"block{number % 3}.layer{number}" for number in range(3000)]
    ce.save(tmp_path / "point", {"model": {name: torch.ones(1) for name in names}, "step": 1})
    state = {"model": {f"new.{name}": torch.ones(1) for name in names}, "step": 1}
    with pytest.raises(LoadMismatchError) as caught:
        ce.load(tmp_path / "point", into=state)
    message = str(caught.value)
    assert len(message.splitlines()) < 30
    assert len(message) < 4000
    assert "missing in the checkpoint (3,000 leaves)" in message
    assert "2,994 leaves more in model" in message
    assert len(caught.value.report.missing) == len(caught.value.report.unexpected) == 3000
    assert len(str(caught.value.report).splitlines()) < 30
    assert len(caught.value.report.table(every=True).splitlines()) > 6000
