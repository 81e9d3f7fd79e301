"""A server that dies, or stops to answer, in the middle of a job: the job ends in its time, with an error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stores

HERE = Path(__file__).parent
TIMEOUT = 3.0


# The connections of these two live as long as the job; the others' are those of HTTP libraries: see tests/remote.
@pytest.mark.parametrize("protocol", ["sftp", "ssh"])
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_a_job_whose_server_dies_or_hangs_ends_in_its_time_with_an_error(tmp_path, protocol, sent):
    with stores.ssh(tmp_path) as port:
        place = stores.ssh_place(port, protocol)
        command = [sys.executable, str(HERE / "ending_job.py"), place.url, json.dumps(dict(place.options)), protocol]
        log = tmp_path / "job"
        with log.open("w") as output:
            job = subprocess.Popen(
                [*command, str(TIMEOUT)],
                stdout=output,
                stderr=output,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        try:
            deadline = time.monotonic() + 60
            while "step 2" not in log.read_text():
                assert job.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            os.kill(port.pid, sent)
            # A save and what closes the job wait for so long each; a wait without a bound has no end at all.
            assert job.wait(20 * TIMEOUT) == 1
        finally:
            job.kill()
            job.wait()
    assert "SaveFailedError" in log.read_text()
    assert "runs/gpt/step-" in log.read_text()
