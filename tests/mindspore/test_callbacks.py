"""MindSpore's own calls and callbacks over this engine, as scripts use them."""

import os
import re
import threading

import mindspore as ms
import ml_dtypes
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn
from mindspore.train import Callback, Model

import ckptengine as ce
from ckptengine.errors import (
    CheckpointDamagedError,
    CheckpointNotFoundError,
    SaveFailedError,
    StateError,
    StorageError,
)
from ckptengine.mindspore import (
    CheckpointConfig,
    ModelCheckpoint,
    Resume,
    load_checkpoint,
    load_param_into_net,
    save_checkpoint,
)
from ckptengine.mindspore.tensor import as_tensor
from ckptengine.storage.local import LocalStorage
from tests.mindspore import training
from tests.mindspore.training import as_array


def a_model(kind="Momentum", seed=1):
    net = training.network(seed)
    return Model(net, training.loss(), training.optimizer(kind, net))


def names(folder):
    return sorted(name for name in os.listdir(folder))


def train(model, epochs, callbacks, batches=2):
    model.train(epochs, training.dataset(batches=batches), callbacks, dataset_sink_mode=False)


def test_of_42_saves_the_newest_35_by_step_stay_and_the_last_by_name_is_the_newest(tmp_path):
    config = CheckpointConfig(save_checkpoint_steps=1, keep_checkpoint_max=35, append_info=["epoch_num", "step_num"])
    model = a_model()
    train(model, 42, [ModelCheckpoint("digits", str(tmp_path), config)], batches=1)
    assert names(tmp_path) == [f"digits-{epoch:06d}_000001.ckpt" for epoch in range(8, 43)]
    for name in names(tmp_path)[::11]:
        os.utime(tmp_path / name)  # what a copy or a backup does to times is nothing to go by
    newest = load_checkpoint(str(tmp_path / names(tmp_path)[-1]))
    assert int(newest["epoch_num"].asnumpy()) == int(newest["step_num"].asnumpy()) == 42
    assert {name: as_array(newest[name]).tobytes() for name in newest if not name.endswith("_num")} == (
        training.contents(model.train_network)
    )
    old = load_checkpoint(str(tmp_path / "digits-9_1.ckpt"))
    assert int(old["epoch_num"].asnumpy()) == 9


def test_a_restarted_script_counts_on_and_its_retention_reaches_back(tmp_path):
    config = CheckpointConfig(save_checkpoint_steps=2, keep_checkpoint_max=3, append_info=["epoch_num"])
    train(a_model(), 4, [ModelCheckpoint("net", str(tmp_path), config)])
    assert names(tmp_path) == [f"net-{epoch:06d}_000002.ckpt" for epoch in (2, 3, 4)]
    model = a_model(seed=9)
    parameters = load_checkpoint(str(tmp_path / names(tmp_path)[-1]))
    assert load_param_into_net(model.train_network, parameters) == ([], ["epoch_num"])
    train(model, 2, [ModelCheckpoint("net", str(tmp_path), config)])
    assert names(tmp_path) == [f"net-{epoch:06d}_000002.ckpt" for epoch in (4, 5, 6)]
    assert int(load_checkpoint(str(tmp_path / names(tmp_path)[-1]))["epoch_num"].asnumpy()) == 6


def test_a_training_from_the_start_leaves_those_before_it_alone(tmp_path, caplog):
    config = CheckpointConfig(save_checkpoint_steps=1, keep_checkpoint_max=1)
    train(a_model(), 2, [ModelCheckpoint("net", str(tmp_path), config)])
    before = names(tmp_path)
    train(a_model(), 1, [ModelCheckpoint("net", str(tmp_path), config)])
    assert names(tmp_path) == [*before, "net_1-000001_000002.ckpt"]
    assert "its own are called 'net_1'" in caplog.text


def test_what_is_saved_when_and_under_which_name_is_as_configured(tmp_path):
    class Stop(Callback):
        def on_train_step_end(self, run_context):
            if run_context.original_args().cur_step_num == 3:
                raise KeyboardInterrupt

    net = nn.Dense(2, 3)
    append = [{"lr": 0.5, "note": "x", "on": True, "n": 7, "t": Tensor(np.arange(3, dtype=np.float32))}]
    config = CheckpointConfig(
        save_checkpoint_steps=0,
        save_checkpoint_seconds=3600,
        keep_checkpoint_max=0,
        keep_checkpoint_per_n_minutes=60,
        saved_network=net,
        append_info=append,
        exception_save=True,
        async_save="process",
        integrated_save=False,
        remove_redundancy=True,
    )
    with pytest.raises(KeyboardInterrupt):
        train(a_model(), 2, [ModelCheckpoint("net", str(tmp_path / "a"), config), Stop()])
    assert names(tmp_path / "a") == ["net-000002_000001_breakpoint.ckpt"]
    loaded = load_checkpoint(str(tmp_path / "a" / "net-2_1_breakpoint.ckpt"))
    assert set(loaded) == {"bias", "weight", "lr", "n", "note", "on", "t"}
    assert (float(loaded["lr"]), int(loaded["n"]), loaded["note"], bool(loaded["on"])) == (0.5, 7, "x", True)
    assert loaded["t"].asnumpy().tolist() == [0, 1, 2]
    checkpoint = ModelCheckpoint(
        lambda parameters: f"at{parameters.cur_step_num}", lambda parameters: str(tmp_path / "b"), CheckpointConfig(3)
    )
    train(a_model(), 2, checkpoint)
    assert names(tmp_path / "b") == ["at3.ckpt", "at4.ckpt"]
    assert checkpoint.latest_ckpt_file_name == str(tmp_path / "b" / "at4.ckpt")
    config = CheckpointConfig(1, keep_checkpoint_max=0, keep_checkpoint_per_n_minutes=60, format="safetensors")
    train(a_model(), 2, [ModelCheckpoint("net", str(tmp_path / "c"), config)])
    assert names(tmp_path / "c") == ["net-000001_000001.safetensors", "net-000002_000002.safetensors"]


class Sets(Callback):
    """Gives the configuration's further values another value before the last step, as a script may."""

    def __init__(self, config, value):
        self.config, self.value = config, value

    def on_train_step_begin(self, run_context):
        if run_context.original_args().cur_step_num == 4:
            self.config.append_dict["best"] = self.value


def test_values_of_append_info_are_saved_as_they_are_at_the_save(tmp_path):
    config = CheckpointConfig(1, append_info=[{"best": 0.5}])
    train(a_model(), 2, [ModelCheckpoint("net", str(tmp_path), config), Sets(config, 0.75)])
    assert float(load_checkpoint(str(tmp_path / "net-2_1.ckpt"))["best"]) == 0.5
    assert float(load_checkpoint(str(tmp_path / "net-2_2.ckpt"))["best"]) == 0.75


@pytest.mark.parametrize("value", [None, [1, 2], {"a": 1}])
def test_values_of_append_info_that_mindspore_does_not_take_are_errors(tmp_path, value):
    with pytest.raises(TypeError, match="append_info"):
        CheckpointConfig(1, append_info=[{"best": value}])
    config = CheckpointConfig(1, append_info=[{"best": 0.5}])
    with pytest.raises(TypeError, match=r"ModelCheckpoint: append_dict\['best'\] is"):
        train(a_model(), 2, [ModelCheckpoint("net", str(tmp_path), config), Sets(config, value)])


def test_a_failed_save_costs_neither_the_training_nor_an_older_checkpoint(tmp_path, monkeypatch, caplog):
    config = CheckpointConfig(save_checkpoint_steps=1, keep_checkpoint_max=1)
    create, calls = LocalStorage.create_archive, []

    def fails_from_the_third_on(*arguments, **options):
        calls.append(1)
        if len(calls) > 2:
            raise OSError(28, "no space left")
        return create(*arguments, **options)

    monkeypatch.setattr(LocalStorage, "create_archive", fails_from_the_third_on)
    model = a_model()
    with pytest.raises(SaveFailedError, match=r"net-000002_000002\.ckpt was not saved: .*no space left"):
        train(model, 2, [ModelCheckpoint("net", str(tmp_path), config)])
    assert len(calls) == 4
    assert "net-000002_000001.ckpt was NOT saved; training continues" in caplog.text
    assert int(model.train_network.optimizer.global_step.asnumpy()[0]) == 4
    assert len(load_checkpoint(str(tmp_path / "net-000001_000002.ckpt"))) > 12


def test_an_error_before_the_first_step_comes_out_as_it_is_and_nothing_is_saved(tmp_path):
    class Fails(Callback):
        def on_train_begin(self, run_context):
            raise KeyError("no such thing")

    config = CheckpointConfig(exception_save=True)
    with pytest.raises(KeyError, match="no such thing"):
        train(a_model(), 1, [ModelCheckpoint("net", str(tmp_path / "a"), config), Fails()])
    assert not (tmp_path / "a").exists()


def test_a_configuration_that_never_saves_saves_nothing_at_the_end_either(tmp_path):
    config = CheckpointConfig(save_checkpoint_steps=0, save_checkpoint_seconds=0, keep_checkpoint_max=3)
    train(a_model(), 1, [ModelCheckpoint("net", str(tmp_path / "a"), config)])
    assert not (tmp_path / "a").exists()


def test_parameters_that_are_split_over_devices_are_not_taken_for_whole_ones(tmp_path):
    """The layout is made up: compiling a real one needs several accelerators."""
    split = ([2], [0, -1], [16, 12], 0, True, "", [32, 12])
    model = a_model()
    for cell in (model._network, model.train_network):
        cell.parameter_layout_dict = {"0.weight": split, "0.bias": ([2], [-1], [16], 0, True, "", [16])}
    with pytest.raises(StateError, match=r"0.weight is split over devices.*sharded_parameters\(network\)"):
        save_checkpoint(model._network, str(tmp_path / "a.ckpt"))
    with pytest.raises(StateError, match="0.weight is split"):
        train(model, 2, [ModelCheckpoint("net", str(tmp_path), CheckpointConfig())])
    assert int(model.train_network.optimizer.global_step.asnumpy()[0]) == 1
    dataset = training.dataset(batches=2)
    with pytest.raises(StateError, match="Resume: 0.weight is split"):
        model.train(1, dataset, [Resume(tmp_path / "run", model, dataset)], dataset_sink_mode=False)
    save_checkpoint(model._network, str(tmp_path / "a.ckpt"), integrated_save=False)
    assert load_checkpoint(str(tmp_path / "a.ckpt"))["0.weight"].shape == (16, 12)


def test_encryption_and_wrong_arguments_are_errors_that_say_so(tmp_path):
    net, path = nn.Dense(2, 2), str(tmp_path / "a.ckpt")
    for call in (
        lambda: save_checkpoint(net, path, enc_key=b"0" * 16),
        lambda: CheckpointConfig(enc_key=b"0" * 16),
        lambda: ModelCheckpoint(config=ms.train.CheckpointConfig(enc_key=b"0" * 16)),
    ):
        with pytest.raises(ValueError, match="not encrypted; encrypt the file system"):
            call()
    save_checkpoint(net, path)
    with pytest.raises(ValueError, match="not encrypted"):
        load_checkpoint(path, dec_key=b"0" * 16)
    for wrong in ({"incremental": True}, {"async_save": "later"}, {"format": "pickle"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            save_checkpoint(net, path, **wrong)
    with pytest.raises(TypeError, match="unknown arguments colour"):
        save_checkpoint(net, path, colour=1)
    with pytest.raises(TypeError, match="not a Cell, list or dict"):
        save_checkpoint(3, path)
    with pytest.raises(CheckpointNotFoundError, match="neither a committed checkpoint nor a file of MindSpore's"):
        load_checkpoint(str(tmp_path / "b.ckpt"))


def test_what_mindspore_refuses_and_urls_are_errors_and_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = nn.Dense(2, 2)
    save_checkpoint(net, "a.ckpt")
    for value in (None, [1, 2], {"a": 1}):
        with pytest.raises(TypeError, match=r"append_dict\['v'\] is"):
            save_checkpoint(net, "b.ckpt", append_dict={"v": value})
    for prefix in ([], "", ["0", ""]):
        with pytest.raises(ValueError, match="names no prefix"):
            load_checkpoint("a.ckpt", specify_prefix=prefix)
    with pytest.raises(ValueError, match="format='pickle'"):
        load_checkpoint("a.ckpt", format="pickle")
    for url in ("s3://bucket/a.ckpt", "obs://bucket/a.ckpt"):
        for call in (lambda url=url: save_checkpoint(net, url), lambda url=url: load_checkpoint(url)):
            with pytest.raises(StorageError, match="a directory, not a URL"):
                call()
    with pytest.raises(StorageError, match="a directory, not a URL"):
        train(a_model(), 1, [ModelCheckpoint("net", "s3://bucket", CheckpointConfig(1))])
    assert names(tmp_path) == ["a.ckpt"]


def test_cells_lists_and_dicts_are_saved_and_chosen_by_name(tmp_path):
    net = nn.SequentialCell(nn.Dense(2, 3), nn.Dense(3, 4))
    save_checkpoint(net, str(tmp_path / "cell"), choice_func=lambda name: name != "1.bias", async_save=True)
    whole = load_checkpoint(str(tmp_path / "cell.ckpt"))
    assert names(tmp_path) == ["cell.ckpt"]
    assert set(whole) == {"0.weight", "0.bias", "1.weight"}
    assert isinstance(whole["0.weight"], Parameter)
    assert whole["0.weight"].name == "0.weight"
    assert set(load_checkpoint(str(tmp_path / "cell.ckpt"), specify_prefix="0.", filter_prefix=["0.b"])) == {"0.weight"}
    assert set(load_checkpoint(str(tmp_path / "cell.ckpt"), choice_func=lambda n: "bias" in n)) == {"0.bias"}
    with pytest.raises(ValueError, match="has nothing that"):
        load_checkpoint(str(tmp_path / "cell.ckpt"), specify_prefix="2")
    save_checkpoint(net.trainable_params(), str(tmp_path / "list.ckpt"))
    save_checkpoint([{"name": "w", "data": net[0].weight}], str(tmp_path / "dicts.ckpt"))
    save_checkpoint(
        {**whole, "note": "x", "b": as_tensor(np.ones(3, ml_dtypes.bfloat16), "bfloat16")}, str(tmp_path / "d")
    )
    other = nn.SequentialCell(nn.Dense(2, 3), nn.Dense(3, 4))
    load_checkpoint(str(tmp_path / "list.ckpt"), other)
    assert training.contents(other) == training.contents(net)
    assert list(load_checkpoint(str(tmp_path / "dicts.ckpt"))) == ["w"]
    again = load_checkpoint(str(tmp_path / "d.ckpt"))
    assert again["note"] == "x"
    assert again["b"].dtype == ms.bfloat16
    assert as_array(again["b"]).tolist() == [1, 1, 1]
    # What `ckptengine.save` and a run hold can be read in the same way.
    ce.save(tmp_path / "plain", {"net": net, "step": 3, "rates": [0.5]})
    plain = load_checkpoint(str(tmp_path / "plain"))
    assert int(plain["step"].asnumpy()) == 3
    assert set(plain) == {*training.contents(net), "step", "0"}


def test_mindspores_own_files_are_read_by_mindspore(tmp_path):
    net = nn.Dense(3, 2)
    ms.save_checkpoint(net, str(tmp_path / "a.ckpt"), append_dict={"epoch_num": 4})
    ms.save_checkpoint(net, str(tmp_path / "a.safetensors"), format="safetensors")
    for options in ({}, {"format": "safetensors"}):
        suffix = options.get("format", "ckpt")
        loaded = load_checkpoint(str(tmp_path / f"a.{suffix}"), **options)
        assert as_array(loaded["weight"]).tobytes() == as_array(net.weight).tobytes()
    assert int(load_checkpoint(str(tmp_path / "a.ckpt"))["epoch_num"].asnumpy()) == 4


def test_a_flipped_byte_is_found_when_a_checkpoint_is_loaded(tmp_path):
    net = nn.Dense(64, 64)
    save_checkpoint(net, str(tmp_path / "a.ckpt"))
    (archive,) = (tmp_path / "a.ckpt").glob("data-*/rank-*.zip")
    content = bytearray(archive.read_bytes())
    at = content.find(as_array(net.weight).tobytes()[:64])
    assert at > 0
    content[at] ^= 1
    archive.write_bytes(content)
    with pytest.raises(CheckpointDamagedError, match=re.escape(archive.name)):
        load_checkpoint(str(tmp_path / "a.ckpt"))


def test_a_save_replaces_the_one_of_the_same_name_only_when_it_is_committed(tmp_path, monkeypatch):
    net, path = nn.Dense(4, 4), str(tmp_path / "a.ckpt")
    save_checkpoint(net, path)
    first = training.contents(net)
    go, create = threading.Event(), LocalStorage.create_archive
    monkeypatch.setattr(LocalStorage, "create_archive", lambda *a, **more: (go.wait(30), create(*a, **more))[1])
    net.weight.set_data(Tensor(np.ones((4, 4), np.float32)))
    save_checkpoint(net, path, async_save="thread")
    assert ce.load(path)["net"]["weight"].tobytes() == first["weight"]
    go.set()
    assert as_array(load_checkpoint(path)["weight"]).tobytes() == np.ones((4, 4), np.float32).tobytes()


def test_a_save_over_a_run_is_refused_and_the_run_stays(tmp_path):
    with ce.Checkpointer(tmp_path / "run.ckpt", every=None) as ckpt:
        ckpt.save(3, {"value": 1})
    with pytest.raises(StorageError, match="holds step 3 of a run"):
        save_checkpoint(nn.Dense(2, 2), str(tmp_path / "run.ckpt"))
    assert ce.load(tmp_path / "run.ckpt") == {"value": 1}
