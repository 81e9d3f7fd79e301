"""For all folders: a bucket of a real S3 server, directly and through a proxy, and a way to call the command."""

from __future__ import annotations

import gc
import os
import sys
import uuid
from collections.abc import Iterator

import pytest
from buckets import QUICK, SMALL, Bucket, s3_options
from cli_run import Call
from forkserver import start_server
from hypothesis import settings
from servers import KEY, SECRET, Proxy, moto_server

# torch's store asks a name server who the other end of each connection is, and 127.0.0.1 is no exception. Where such a
# question is lost, the job stands still for the resolver's five seconds: see resolv.conf(5).
os.environ.setdefault("RES_OPTIONS", "timeout:1")

# More processes than cores: a thread that spins for torch's next operation takes the core from one that works.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# On a busy machine an example may take long.
settings.register_profile("ckptengine", deadline=None)
settings.load_profile("ckptengine")


def _before_damage(event: str, arguments: tuple[object, ...]) -> None:
    """Make an archive writable that a test is about to damage: archives are read-only files, to all but root."""
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    path = arguments[0] if writes or event == "os.truncate" else None
    if isinstance(path, str | os.PathLike) and str(path).endswith(".zip") and os.path.isfile(path):
        os.chmod(path, 0o644)


if os.geteuid() != 0:
    sys.addaudithook(_before_damage)


MOTO_PORT = "CKPTENGINE_TEST_MOTO"


def pytest_configure(config: pytest.Config) -> None:
    """Start one fork server and one S3 server for all of pytest-xdist's processes."""
    if getattr(config.option, "numprocesses", None) and "PYTEST_XDIST_WORKER" not in os.environ:
        start_server()
        server = moto_server()
        os.environ[MOTO_PORT] = str(server.__enter__())
        config.add_cleanup(lambda: server.__exit__(None, None, None))


# Files that take a while, the longest first: begun last, they would keep one process when the others are done.
LONG = (
    "tests/tiers/test_persistent.py", "tests/parallelism/test_spread.py",
    "tests/parallelism/test_splits_in_training.py", "tests/gpu/test_fence.py",
    "tests/mindspore/test_resume.py", "tests/mindspore/test_schedulers.py",
    "tests/mindspore/test_rules_of_resume.py", "tests/load/test_any_state.py", "tests/mpi/test_mindspore.py",
    "tests/tiers/test_cloud_job.py", "tests/remote/test_faults.py", "tests/remote/test_ranges.py",
    "tests/policy/test_ranks.py", "tests/engine/test_matrix.py", "tests/resume/test_exact.py",
    "tests/tiers/test_copy.py", "tests/zoo/test_zoo.py", "tests/benchmarks/test_command.py",
    "tests/remote/test_jobs.py", "tests/failures/test_ranks.py", "tests/failures/test_kills.py",
    "tests/mpi/test_state.py", "tests/tiers/test_prefetch.py", "tests/failures/test_hung_storage.py",
    "tests/engine/test_across_ranks.py", "tests/engine/test_round_trip.py", "tests/mpi/test_comm.py",
    "tests/dcp/test_across_ranks.py", "tests/mpi/test_failures.py", "tests/comm/test_torch.py",
    "tests/remote/test_waits.py", "tests/torch/test_dtensors.py", "tests/torch/test_wrapped_names.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files first."""
    place = {file: number for number, file in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(LONG)))


@pytest.fixture(autouse=True)
def signals_given_back() -> Iterator[None]:
    """Give back the signals that a test's Checkpointers still hold: another test, much later, would fail for it."""
    yield
    signals = sys.modules.get("ckptengine.policy.signals")
    if signals is not None and signals._hub._subscriptions:
        gc.collect()
        for subscription in list(signals._hub._subscriptions):
            subscription.close()


@pytest.fixture(scope="session")
def moto() -> Iterator[int]:
    if MOTO_PORT in os.environ:
        yield int(os.environ[MOTO_PORT])
        return
    with moto_server() as port:
        yield port


@pytest.fixture
def bucket(moto: int) -> Bucket:
    import s3fs

    name = f"b-{uuid.uuid4().hex[:12]}"
    fs = s3fs.S3FileSystem(**s3_options(moto))
    fs.call_s3("create_bucket", Bucket=name)
    return Bucket(f"s3://{name}", s3_options(moto), fs)


@pytest.fixture
def proxy(moto: int) -> Iterator[Proxy]:
    proxy = Proxy(moto)
    yield proxy
    proxy.close()


@pytest.fixture
def disturbed(bucket: Bucket, proxy: Proxy) -> Bucket:
    """The same bucket, reached through the proxy."""
    return Bucket(bucket.url, s3_options(proxy.port), bucket.fs)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short waits and small parts for the storages that ckptengine opens itself."""
    monkeypatch.setattr("ckptengine.storage.remote.Patience", lambda: QUICK)
    monkeypatch.setattr("ckptengine.storage.remote.Budget", lambda: SMALL)


@pytest.fixture
def in_environment(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """The bucket as processes find it that are given nothing but the environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.options["endpoint_url"])
    return bucket


@pytest.fixture
def call() -> Call:
    """The command, called in this process."""
    from click.testing import CliRunner, Result

    from ckptengine.cli.app import app

    def call(*arguments: object) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return call
