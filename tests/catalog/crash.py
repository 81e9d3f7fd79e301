"""A recording of what a program does to a disk, and the states that a crash may leave of it."""

import ctypes
import os
import random
import shutil

from ckptengine.storage.disk import Disk


class RecordingDisk(Disk):
    """Does everything for real, and writes down what it does; `operations` grows."""

    def __init__(self):
        self.operations = []
        self._paths = {}

    def make_directory(self, path):
        if made := super().make_directory(path):
            self.operations.append(("mkdir", path))
        return made

    def create(self, path):
        fd = super().create(path)
        self._paths[fd] = path
        self.operations.append(("create", path))
        return fd

    def write(self, fd, data):
        self.operations.append(("write", self._paths[fd], bytes(data)))
        super().write(fd, data)

    def write_memory(self, fd, address, nbytes, position):
        self.operations.append(("write", self._paths[fd], ctypes.string_at(address, nbytes)))
        super().write_memory(fd, address, nbytes, position)

    def sync(self, fd):
        super().sync(fd)
        self.operations.append(("sync", self._paths[fd]))

    def sync_directory(self, path):
        super().sync_directory(path)
        self.operations.append(("sync_directory", path))

    def rename(self, source, target):
        super().rename(source, target)
        self.operations.append(("rename", source, target))

    def publish(self, source, target):
        won = super().publish(source, target)
        if won:
            self.operations.append(("link", source, target))
        self.operations.append(("unlink", source))
        return won

    def unlink(self, path):
        super().unlink(path)
        self.operations.append(("unlink", path))

    def remove_tree(self, path):
        for directory, _, files in os.walk(path, topdown=False):
            for name in files:
                self.unlink(f"{directory}/{name}")
            self.remove_directory(directory)

    def remove_directory(self, path):
        super().remove_directory(path)
        self.operations.append(("unlink", path))


class QuickDisk(Disk):
    """Syncs nothing: for looking at thousands of states."""

    def sync(self, fd):
        pass

    def sync_directory(self, path):
        pass


class File:
    def __init__(self, data=b""):
        self.data = self.synced = data


class Directory:
    """`entries` as the kernel shows them, `synced` as the disk has them for certain, `pending` between them."""

    def __init__(self):
        self.entries, self.synced, self.pending = {}, {}, []

    def change(self, changes):
        """Apply changes that reach the disk together: name to entry, or to None where it goes."""
        self.pending.append(changes)
        apply(self.entries, changes)


def apply(entries, changes):
    for name, entry in changes.items():
        if entry is None:
            entries.pop(name, None)
        else:
            entries[name] = entry


class ModelDisk:
    """A file system that keeps only what was synced, and of the rest what chance will have it keep."""

    def __init__(self, root):
        self._root = str(root)
        self._top = self._copy(self._root)

    def _copy(self, path):
        directory = Directory()
        for item in os.scandir(path):
            if item.is_dir():
                entry = self._copy(item.path)
            else:
                with open(item.path, "rb") as file:
                    entry = File(file.read())
            directory.entries[item.name] = directory.synced[item.name] = entry
        return directory

    def _find(self, path):
        entry = self._top
        for part in os.path.relpath(path, self._root).split("/"):
            entry = entry.entries[part] if part != "." else entry
        return entry

    def replay(self, operation):
        kind, path, *rest = operation
        if kind == "sync_directory":
            if not path.startswith(self._root):
                return
            directory = self._find(path)
            directory.synced, directory.pending = dict(directory.entries), []
            return
        parent, name = self._find(os.path.dirname(path)), os.path.basename(path)
        if kind == "mkdir":
            parent.change({name: Directory()})
        elif kind == "create":
            parent.change({name: File()})
        elif kind == "write":
            parent.entries[name].data += rest[0]
        elif kind == "sync":
            parent.entries[name].synced = parent.entries[name].data
        elif kind == "unlink":
            parent.change({name: None})
        else:
            assert os.path.dirname(rest[0]) == os.path.dirname(path)
            target = {os.path.basename(rest[0]): parent.entries[name]}
            parent.change(target if kind == "link" else {**target, name: None})

    def write_out(self, root, keep):
        """Write the state after a crash: `keep()` decides of each unsynced change whether the disk has it.

        Changes of one directory come in order; the bytes of a file come whole or not at all.
        """
        shutil.rmtree(root, ignore_errors=True)
        self._write_directory(self._top, str(root), keep)

    def _write_directory(self, directory, path, keep):
        os.mkdir(path)
        entries = dict(directory.synced)
        for changes in directory.pending:
            if not keep():
                break
            apply(entries, changes)
        for name, entry in entries.items():
            if isinstance(entry, Directory):
                self._write_directory(entry, f"{path}/{name}", keep)
            else:
                with open(f"{path}/{name}", "wb") as file:
                    file.write(entry.data if entry.data == entry.synced or keep() else entry.synced)


def crash_states(operations, model, root, seed=0):
    """Yield after how many operations the crash was, its state written to `root`; several for each number."""
    chance = random.Random(seed)
    keeps = [lambda: True, lambda: False, *[lambda: chance.random() < 0.6] * 4]
    for count in range(len(operations) + 1):
        for keep in keeps:
            model.write_out(root, keep)
            yield count
        if count < len(operations):
            model.replay(operations[count])
