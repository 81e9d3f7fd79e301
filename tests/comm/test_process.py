from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from ckptengine.comm.process import Process

CHILD = """
import json
from ckptengine.comm.process import Process
print(json.dumps(Process.this().to_json()), flush=True)
input()
"""


def test_a_process_is_seen_to_live_until_it_has_ended() -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    told = Process.of_json(json.loads(child.stdout.readline()))
    assert told is not None
    assert told.pid == child.pid
    assert told != Process.this()
    assert told.is_alive() is True
    child.stdin.close()
    child.wait(60)
    child.stdout.close()
    assert told.is_alive() is False


def test_another_process_that_got_the_same_number_is_not_taken_for_it() -> None:
    assert replace(Process.this(), started="1").is_alive() is False


@pytest.mark.parametrize("where", ["host", "boot", "namespace"])
def test_what_lives_elsewhere_can_not_be_told(where: str) -> None:
    assert replace(Process.this(), **{where: "elsewhere"}).is_alive() is None


@pytest.mark.parametrize("value", [None, [], {}, {"pid": 1}, {**Process.this().to_json(), "pid": "7"}])
def test_what_describes_no_process_is_none(value: object) -> None:
    assert Process.of_json(value) is None


def test_what_lies_beside_a_process_does_not_count() -> None:
    assert Process.of_json({**Process.this().to_json(), "id": "x"}) == Process.this()
