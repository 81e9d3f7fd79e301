"""File systems of fsspec as users have them, over a directory: with directories to make, hosts, and an account."""

from __future__ import annotations

import shutil
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import infer_storage_options


class Hosted(LocalFileSystem):
    """Files of a host below a directory, which is the root of its absolute paths; directories are not made by it."""

    protocol = "hdfs"
    root = ""
    opened: list[dict[str, Any]] = []  # noqa: RUF012

    def __init__(self, **options: Any) -> None:
        super().__init__(auto_mkdir=False)
        self.opened.append(options)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        path = infer_storage_options(path)["path"] if "://" in path else path
        inside = path.removeprefix(cls.root)
        assert inside.startswith("/"), f"{path!r} has lost its leading slash"
        return (cls.root + inside).rstrip("/")

    @staticmethod
    def _get_kwargs_from_urls(url: str) -> dict[str, Any]:
        found = infer_storage_options(url)
        return {name: found[name] for name in ("host", "username", "port") if found.get(name)}

    def rm_file(self, path: str) -> None:
        super().rm_file(self._strip_protocol(path))

    def mv(self, path1: str, path2: str, **_: Any) -> None:
        shutil.move(self._strip_protocol(path1), self._strip_protocol(path2))
