import random

import numpy as np
import pytest
import torch
from state_memory import load, save
from streams import draw, everything, numbers, ranks, resumed

import ckptengine as ce
from ckptengine.errors import LoadMismatchError
from ckptengine.frameworks.numpy_random import NumpyStream
from ckptengine.frameworks.random_stream import PythonStream
from ckptengine.save.reading import StateReader
from ckptengine.state.random_record import Record, new_seed
from ckptengine.torch.random import GeneratorStream

pytestmark = pytest.mark.usefixtures("streams_as_they_were")

# The same world size.


def test_every_stream_goes_on_bit_for_bit_in_the_middle_of_a_pair_of_normals(tmp_path):
    given = everything(1)
    ce.save(tmp_path / "point", {"rng": ce.RNG(given)})
    expected = draw(given)
    others = everything(2)
    assert draw(others) != expected
    assert ce.load(tmp_path / "point", into={"rng": ce.RNG(others)}).complete
    assert draw(others) == expected


SPAWNING = {
    "seeded": lambda: np.random.default_rng(3),
    "not seeded": np.random.default_rng,
    "of several numbers": lambda: np.random.Generator(np.random.Philox([1, 1 << 80])),
    "a child": lambda: np.random.default_rng(3).spawn(2)[1],
    "a bit generator": lambda: np.random.SFC64(5),
}


@pytest.mark.skipif(int(np.__version__.partition(".")[0]) < 2, reason="numpy 1 sets no seed sequence")
@pytest.mark.parametrize("make", SPAWNING.values(), ids=SPAWNING)
def test_the_next_children_of_a_generator_are_those_of_the_uninterrupted_run(make, tmp_path):
    def children():
        spawned = (child if hasattr(child, "random_raw") else child.bit_generator for child in generator.spawn(2))
        return [child.random_raw() for child in spawned]

    generator = make()
    generator.spawn(3)
    ce.save(tmp_path / "point", {"rng": ce.RNG({"own": generator})})
    expected = children(), children()
    generator = make()
    assert children() != expected[0]
    assert ce.load(tmp_path / "point", into={"rng": ce.RNG({"own": generator})}).complete
    assert (children(), children()) == expected


def test_a_generator_whose_state_an_earlier_version_saved_goes_on_with_its_numbers(tmp_path, monkeypatch):
    generator = np.random.default_rng(3)
    with monkeypatch.context() as earlier:
        earlier.setattr(NumpyStream, "_sequence", lambda self: None)
        ce.save(tmp_path / "point", {"rng": ce.RNG({"own": generator})})
    expected = generator.random(3).tolist()
    other = np.random.default_rng(4)
    assert ce.load(tmp_path / "point", into={"rng": ce.RNG({"own": other})}).complete
    assert other.random(3).tolist() == expected


def test_bytes_that_are_no_seed_sequence_are_refused():
    stream = NumpyStream(np.random.default_rng(3))
    data = stream.get()
    for wrong in (data[:-1], np.concatenate([data, data[-1:]]), data[:-3]):
        with pytest.raises(ValueError, match="no seed sequence"):
            stream.check(wrong)


def test_a_global_stream_of_another_bit_generator_goes_on(tmp_path):
    usual = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(3))
        np.random.randn()
        ce.save(tmp_path / "point", {"rng": ce.RNG()})
        expected = np.random.randn(5).tolist()
        np.random.set_bit_generator(np.random.PCG64(4))
        ce.load(tmp_path / "point", into={"rng": ce.RNG()})
        assert np.random.randn(5).tolist() == expected
    finally:
        np.random.set_bit_generator(usual)


def test_shuffling_and_dropout_after_a_restore_are_those_of_the_uninterrupted_run(tmp_path):
    def epoch():
        model = torch.nn.Dropout(0.5)
        batches = torch.utils.data.DataLoader(torch.arange(20.0), batch_size=4, shuffle=True)
        return [model(batch).tolist() for batch in batches], torch.empty((), dtype=torch.int64).random_().item()

    torch.manual_seed(3)
    epoch()
    with ce.Checkpointer(tmp_path / "run") as run:
        run.save(1, {"rng": ce.RNG()})
    expected = epoch(), epoch()
    with ce.Checkpointer(tmp_path / "run") as run:
        assert run.restore({"rng": ce.RNG()}) == 1
        assert (epoch(), epoch()) == expected


def test_the_engine_itself_draws_no_random_number(tmp_path):
    def now():
        return random.getstate(), str(np.random.get_state(legacy=False)), torch.get_rng_state().tolist()

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    before = now()
    for overlap in (False, True):
        state = {"model": model, "optimizer": optimizer, "rng": ce.RNG(), "own": ce.PerRank(1)}
        with ce.Checkpointer(tmp_path / f"run-{overlap}", every=2, keep_last=1, overlap=overlap) as run:
            assert run.restore(state) is None
            for step in range(1, 7):
                run.step(step, state)
            run.save(7, state).durable.result()
        assert now() == before
    ce.save(tmp_path / "point", state)
    ce.load(tmp_path / "point")
    ce.async_save(tmp_path / "point", state).durable.result()
    assert now() == before
    fresh = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    target = {"model": fresh, "optimizer": torch.optim.AdamW(fresh.parameters()), "own": ce.PerRank(0)}
    before = now()
    with ce.Checkpointer(tmp_path / "run-True") as run:
        assert run.restore(target, strict=False) == 7
    assert now() == before


def test_later_saves_find_the_states_where_they_were():
    state, reader = {"rng": ce.RNG()}, StateReader()
    first = reader.read(state)
    structure, values = first.structure, first.plain.rank_values
    del first  # as a save does when it has its snapshot
    random.gauss(0, 1)
    again = reader.read(state)
    assert again.moved == {}
    assert again.structure is structure
    assert again.plain.rank_values != values


def test_a_state_that_is_kept_stays_what_it_was():
    rng = ce.RNG()
    kept = rng.state_dict()
    expected = random.random(), np.random.random()
    rng.state_dict()
    rng.load_state_dict(kept)
    assert (random.random(), np.random.random()) == expected


# Another world size.


def test_own_streams_begin_anew_and_shared_ones_go_on():
    saving = ranks(3)
    stored = save(*saving)
    before = [numbers(state) for state in saving]
    for count in (1, 2, 5):
        after = [numbers(state) for state in resumed(stored, count)]
        assert after == [numbers(state) for state in resumed(stored, count)]
        assert {one["alike"] for one in after} == {before[0]["alike"]}
        assert len({one["own"] for one in before + after}) == 3 + count


def test_what_was_shared_stays_shared_through_a_job_of_one_rank_that_is_itself_resumed():
    one = resumed(save(*ranks(4)), 1)
    one = resumed(save(*one), 1)
    stored = save(*one)
    expected = numbers(one[0])
    two = [numbers(state) for state in resumed(stored, 2)]
    assert [rank["alike"] for rank in two] == [expected["alike"]] * 2
    assert len({expected["own"], *(rank["own"] for rank in two)}) == 3


def test_streams_that_have_gone_apart_are_no_longer_shared():
    two = resumed(save(*ranks(4)), 2)
    numbers(two[1])
    after = [numbers(state) for state in resumed(save(*two), 3)]
    assert len({rank["alike"] for rank in after}) == 3


def test_ranks_of_one_key_share_nothing_by_drawing_the_same():
    stored = save(*ranks(2, key=0))
    after = [numbers(state) for state in resumed(stored, 3)]
    assert len({rank["alike"] for rank in after}) == 3
    keyed = ranks(4, key=5)
    for rank, state in enumerate(keyed):
        load(stored, state, rank=rank, world_size=4)
    assert len({numbers(state)["own"] for state in keyed}) == 1


def test_a_declared_stream_is_shared_whoever_saved_it():
    state = ranks(1, shared=["alike"])
    stored = save(*state)
    expected = numbers(state[0])["alike"]
    assert [numbers(rank)["alike"] for rank in resumed(stored, 3)] == [expected] * 3
    late = [numbers(rank) for rank in resumed(save(*ranks(2)), 3, shared=["own"])]
    assert len({rank["own"] for rank in late}) == 1, "declared when it is loaded: begun anew alike"


def test_another_key_at_the_same_world_size_is_told(caplog):
    stored = save(*ranks(2, key=1))
    states = ranks(2, seed=50, key=0)
    load(stored, states[1], rank=1)
    assert numbers(states[1]) == numbers(ranks(2)[1])
    assert "RNG, rank 1: the key was 1 and is 0" in caplog.text


def test_the_rule_leads_to_the_same_numbers_on_every_machine_and_in_every_version():
    records = [Record(None, 2, frozenset(), {"x": ("kind", digit * 64)}) for digit in "0a"]
    seed = new_seed("x", records, {"rank": 1}, 3)
    assert seed.hex() == "eb6b7dcdaccd6bc65a69485883f695bf39283df0125dced82d415118db01d40b"
    generators = random.Random(), np.random.RandomState(), np.random.default_rng(), torch.Generator()
    streams = PythonStream(generators[0]), *map(NumpyStream, generators[1:3]), GeneratorStream(generators[3])
    for stream in streams:
        stream.seed(seed)
    assert generators[0].random() == 0.9109369378606176
    assert generators[1].random() == 0.3336380382336219
    assert generators[2].random() == 0.9345507191193926
    assert torch.rand((), generator=generators[3], dtype=torch.float64).item() == 0.9977403371140984
    others = {
        new_seed("y", records, {"rank": 1}, 3),
        new_seed("x", records[::-1], {"rank": 1}, 3),
        new_seed("x", records, {"rank": 2}, 3),
        new_seed("x", records, {"key": 1}, 3),
        new_seed("x", records, {}, 3),
        new_seed("x", records, {"rank": 1}, 4),
    }
    assert len({seed, *others}) == 7


def test_a_begun_stream_of_torch_has_more_than_the_32_bits_of_its_seeds():
    generator = torch.Generator()
    GeneratorStream(generator).seed(bytes(32))
    first = generator.get_state()[24 : 24 + 4992].numpy().view("<u8")
    assert first.max() < 2**32
    assert len(set(first.tolist())) > 600
    assert 0.45 < torch.rand(10000, generator=generator).mean() < 0.55


# Going back.


def test_rewind_goes_back_to_the_restore_once(tmp_path):
    given = everything(1)
    ce.save(tmp_path / "point", {"rng": ce.RNG(given)})
    expected = draw(given)
    others = everything(2)
    rng = ce.RNG(others)
    ce.load(tmp_path / "point", into={"rng": rng})
    draw(others)  # as a framework does that makes its loader after the restore
    assert rng.rewind()
    assert draw(others) == expected
    assert not rng.rewind(), "a second call must not repeat the numbers that training has used"
    assert draw(others) != expected
    assert not ce.RNG().rewind(), "without a restore there is nothing to go back to"


def test_streams_go_back_to_any_place_that_was_noted():
    given = everything(1)
    rng = ce.RNG(given)
    place = rng.get_streams()
    first = draw(given)
    assert draw(given) != first
    rng.set_streams(place)
    assert draw(given) == first
    rng.set_streams({})
    assert draw(given) != first, "streams that are not named stay where they are"


def test_a_place_that_is_none_leaves_all_streams_where_they_are():
    given = everything(1)
    rng = ce.RNG(given)
    place = rng.get_streams()
    wrong = place | {"torch.cpu": place["torch.cpu"][:-1]}
    with pytest.raises(LoadMismatchError, match=r"torch\.cpu"):
        rng.set_streams(wrong)
    now = rng.get_streams()
    assert all(np.array_equal(now[name], place[name]) for name in place)


def test_rewind_goes_back_to_streams_that_began_anew_at_another_world_size():
    for state in resumed(save(*ranks(2)), 3):
        first = numbers(state)
        numbers(state)
        assert state["rng"].rewind()
        assert numbers(state) == first
