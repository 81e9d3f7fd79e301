"""Plays a cloud platform whose machines get lost: `python examples/cloud_job/cloud_platform.py`, about 90 seconds.

Jobs (`job.sh`) are issued to machines, which are folders here, and issued again, to another and empty machine, when the
environment check, the machine or the job fails. Every claim of the story is checked: the exit code is 0 only if all
hold. Logs and `report.json` stay in the folder `demo/cloud_job`. The bucket is moto's S3 server, or the one that
`BUCKET=s3://bucket/path` names.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from story import story
from supervisor import Supervisor, say


@contextlib.contextmanager
def given_bucket() -> Iterator[str]:
    """Yield the URL of a place in a bucket: `BUCKET`, or one of moto's server, which runs meanwhile."""
    if "BUCKET" in os.environ:
        yield f"{os.environ['BUCKET'].rstrip('/')}/cloud-job-{uuid.uuid4().hex[:8]}"
        return
    import s3fs

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("moto's server does not start: pip install 'moto[server]'")
            time.sleep(0.05)
        s3fs.S3FileSystem().mkdir("bucket")
        yield "s3://bucket"
    finally:
        server.kill()
        server.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("demo/cloud_job"), help="for disks, logs, report.json")
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args()
    # The commands of the Python that runs this.
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    folder = args.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    with given_bucket() as bucket:
        say(f"the bucket is {bucket}, disks and logs are in {folder}")
        supervisor = Supervisor(folder, bucket)
        checks = list(story(supervisor, args.epochs))
    print()
    for check in checks:
        print(f"{'ok    ' if check.good else 'FAILED'} {check.claim}\n         {check.found}")
    issued = {name: [asdict(issue) for issue in issues] for name, issues in supervisor.issued.items()}
    report = {"issued": issued, "checks": [asdict(check) for check in checks]}
    (folder / "report.json").write_text(json.dumps(report, indent=1))
    say("all is as it should be" if all(check.good for check in checks) else "NOT all is as it should be")
    return 0 if all(check.good for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
