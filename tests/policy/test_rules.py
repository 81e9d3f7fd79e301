"""Rules of when to save and what to keep, which add up."""

from pathlib import Path

import pytest
from committed_steps import state_of, steps_in

import ckptengine as ce
from ckptengine.comm.single import SingleProcess
from ckptengine.policy.schedule import Schedule


def train(run: Path, until: int, policy: ce.Policy, **options: object) -> list[int]:
    with ce.Checkpointer(run, policy=policy, preemption=None, **options) as ckpt:  # type: ignore[arg-type]
        for step in range(1, until + 1):
            if ckpt.step(step, state_of(step), metrics={"loss": abs(step - 7)}) is not None:
                ckpt.flush()  # none is overtaken on its way
        return [stats.step for stats in ckpt.history if stats.step is not None]


def test_a_save_is_due_where_any_rule_says_so(tmp_path: Path) -> None:
    assert train(tmp_path, 12, ce.Policy(save=[ce.Every(5), ce.AtSteps([2, 5, 11])])) == [2, 5, 10, 11]


def test_steps_and_a_time_add_up_and_the_time_counts_from_the_last_save_of_either() -> None:
    now = [0.0]
    rules = ce.Policy(save=[ce.Every(10), ce.Every("4s"), ce.Every("1h")]).save_rules
    schedule, saved = Schedule(rules, SingleProcess(), 1.0, clock=lambda: now[0]), []
    for step in range(1, 26):
        now[0] += 1
        if schedule.due(step):
            saved.append(step)
            schedule.started()
    assert saved == [4, 8, 10, 14, 18, 20, 24]


def test_what_any_rule_keeps_stays_and_the_newest_in_any_case(tmp_path: Path) -> None:
    save = ce.Every(1)
    train(
        tmp_path / "a", 13, ce.Policy(save, keep=[ce.KeepLast(2), ce.KeepEvery(5), ce.KeepSteps([3]), ce.Best("loss")])
    )
    assert steps_in(tmp_path / "a") == [3, 5, 7, 10, 12, 13]
    train(tmp_path / "b", 13, ce.Policy(save, keep=ce.KeepEvery(5)))
    assert steps_in(tmp_path / "b") == [5, 10, 13]
    train(tmp_path / "c", 3, ce.Policy(save))
    assert steps_in(tmp_path / "c") == [1, 2, 3]


def test_each_tier_has_rules_of_its_own_and_one_without_keeps_all(tmp_path: Path) -> None:
    policy = ce.Policy(ce.Every(1), keep={"local": ce.KeepLast(1)})
    train(tmp_path / "run", 4, policy, local=tmp_path / "local")
    assert steps_in(tmp_path / "run") == [1, 2, 3, 4]
    assert steps_in(tmp_path / "local") == [4]
    with pytest.raises(ValueError, match="keep names disk: this run has run"):
        ce.Checkpointer(tmp_path / "run", policy=ce.Policy(keep={"disk": ce.KeepLast(1)}))


def test_a_rule_of_ones_own_is_a_rule(tmp_path: Path) -> None:
    class KeepOldest:
        def kept(self, line):
            return [entry for entry, _ in line[-1:]]

    train(tmp_path, 5, ce.Policy(ce.Every(1), keep=[KeepOldest(), ce.KeepLast(2)]))
    assert steps_in(tmp_path) == [1, 4, 5]


def test_the_short_arguments_stand_for_rules() -> None:
    best = ce.Best("loss")
    assert ce.Policy.of("10min", 3, 100, [best]) == ce.Policy(
        ce.Every("10min"), [ce.KeepLast(3), ce.KeepEvery(100), best]
    )
    assert ce.Policy.of("auto", {"local": 2}) == ce.Policy(ce.Auto(), {"local": ce.KeepLast(2)})
    assert ce.Policy.of(keep_every=100) == ce.Policy()


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: ce.Every(0), "every=0: give a number of steps, a time"),
        (lambda: ce.Every(True), "every=True: give a number of steps, a time"),
        (lambda: ce.Every("soon"), "every='soon': give a number of steps, a time"),
        (lambda: ce.AtSteps("12"), "steps='12': give a list of steps"),
        (lambda: ce.AtSteps([1.5]), "steps has 1.5: give whole numbers"),
        (lambda: ce.KeepSteps([-1]), "steps has -1: steps count from 0 on"),
        (lambda: ce.KeepEvery(0), "steps=0: give a number of steps"),
        (lambda: ce.KeepLast("3"), "count='3': give how many"),  # type: ignore[arg-type]
        (lambda: ce.Policy(save=[ce.KeepLast(1)]), "save=.*: give an Every"),  # type: ignore[list-item]
        (lambda: ce.Policy(keep=[ce.Every(1)]), "keep=.*: give a KeepLast"),  # type: ignore[list-item]
        (lambda: ce.Policy(keep=ce.KeepLast), "keep=.*: give a KeepLast"),  # type: ignore[arg-type]
        (lambda: ce.Policy(keep="last"), "keep='last': give a KeepLast"),  # type: ignore[arg-type]
        (lambda: ce.Policy(save=[ce.Auto(), ce.Auto("6h")]), "give one Auto"),
    ],
)
def test_what_is_no_rule_is_named(make, error) -> None:
    with pytest.raises((TypeError, ValueError), match=error):
        make()


def test_a_policy_and_a_short_argument_are_not_taken_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep_last=3 beside policy="):
        ce.Checkpointer(tmp_path, keep_last=3, policy=ce.Policy())
    with pytest.raises(TypeError, match=r"policy='auto': give a ckptengine\.Policy"):
        ce.Checkpointer(tmp_path, policy="auto")  # type: ignore[arg-type]
