import pytest
from store_secret import SECRET

from ckptengine.comm.host import StoreHost
from ckptengine.comm.hosted import HostedStore
from ckptengine.comm.interfaces import listen


@pytest.fixture
def host():
    store = StoreHost([listen("127.0.0.1")], SECRET, 60)
    yield store
    store.close()


@pytest.fixture
def client(host):
    store = HostedStore(host.addresses, SECRET, 10)
    yield store
    store.close()
