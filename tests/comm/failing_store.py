"""A key-value store whose calls fail on demand."""

from ckptengine.comm.keyvalue import MemoryStore
from ckptengine.errors import CheckpointError


class FailingStore(MemoryStore):
    """A store that fails calls of some names for some keys, once each, before or after they are carried out."""

    def __init__(self):
        super().__init__()
        self.fails = {}

    def _maybe(self, name, key, call):
        for (operation, part), done in list(self.fails.items()):
            if operation == name and part in key:
                del self.fails[operation, part]
                if done:
                    call()
                raise CheckpointError(f"the store failed ({name} {key})")
        return call()

    def set(self, key, value):
        return self._maybe("set", key, lambda: MemoryStore.set(self, key, value))

    def get(self, key, timeout):
        return self._maybe("get", key, lambda: MemoryStore.get(self, key, timeout))

    def delete(self, key):
        return self._maybe("delete", key, lambda: MemoryStore.delete(self, key))
