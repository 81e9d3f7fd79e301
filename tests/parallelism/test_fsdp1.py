"""FSDP1's moments: gathered parameters, replaced ones, optimizers alone."""

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

pytest.importorskip("torch")

JOB = Path(__file__).parent / "fsdp1_job.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("fsdp1")
    job = run_ranks(4, JOB, folder)
    assert job.returncode == 0, job.stdout[-6000:]
    told: dict[str, Any] = json.loads((folder / "rank-0.json").read_text())
    return told


@pytest.mark.parametrize("kind", ["flat", "original", "mixed", "grad-op", "whole", "hybrid"])
def test_a_model_that_has_evaluated_computes_with_what_was_restored(kind: str, found: dict[str, Any]) -> None:
    """After a forward pass alone FSDP1 keeps the root's gathered weights, and would go on with them."""
    assert found[kind]["found"] == found[kind]["expected"]


def test_an_optimizer_without_its_module_is_refused(found: dict[str, Any]) -> None:
    assert "put that module into the same state" in found["without the module"]


def test_several_optimizers_in_a_dict_or_list_come_back(found: dict[str, Any]) -> None:
    assert found["several"] == [[True, True]] * 6


def test_an_optimizer_that_has_others_inside_and_saves_itself_is_refused_by_name(found: dict[str, Any]) -> None:
    assert "optimizer: Container has a `state_dict` of its own" in found["container"]


@pytest.mark.parametrize("kind", ["flat", "original"])
def test_a_module_inside_of_the_wrapper_is_refused_and_not_saved_without_its_weights(
    kind: str, found: dict[str, Any]
) -> None:
    *parts, unit = found[f"inside {kind}"]
    assert all("put the" in one and "FullyShardedDataParallel module itself into the state" in one for one in parts)
    assert unit == "saved"  # a unit of its own has all of its parameters


@pytest.mark.parametrize("how", ["evaluated", "not sharded", "saved before"])
def test_a_module_inside_of_the_wrapper_is_refused_too_where_its_weights_are_gathered(
    how: str, found: dict[str, Any]
) -> None:
    assert "put the outermost FullyShardedDataParallel module itself into the state" in found["gathered"][how]


def test_a_save_inside_of_summon_full_params_is_refused(found: dict[str, Any]) -> None:
    assert "save and restore between two steps" in found["summoned"]


@pytest.mark.parametrize("kind", ["original", "whole"])
def test_data_that_was_put_in_the_place_of_parameters_is_saved(kind: str, found: dict[str, Any]) -> None:
    assert found["replaced"][kind]


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2", "alone"])
def test_experts_of_several_groups_of_ranks_under_one_name_are_refused(kind: str, found: dict[str, Any]) -> None:
    """Each group says that the whole is its own; one group's expert would have come back to all."""
    assert "expert.bias" in found["experts"][kind]
    assert "differ from that of rank" in found["experts"][kind]
    assert "give each a name of its own" in found["experts"][kind]


def test_replicas_of_hybrid_shard_that_differ_are_refused(found: dict[str, Any]) -> None:
    assert "differ from that of rank" in found["hybrid apart"]


def test_flat_parameters_take_the_state_of_an_optimizer_that_was_given_names(found: dict[str, Any]) -> None:
    assert found["names"] == []
