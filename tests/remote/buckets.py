"""A bucket as the tests see it, and storages in it with short waits and small parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from servers import KEY, SECRET

from ckptengine.storage.budget import Budget
from ckptengine.storage.remote import RemoteStorage
from ckptengine.storage.retry import Patience

QUICK = Patience(seconds=15, first=0.01, longest=0.05, request=3.0, slowest=1 << 40)
SMALL = Budget(part_nbytes=5 << 20, requests=3, read_nbytes=1 << 20)


def s3_options(port: int) -> dict[str, Any]:
    client = {"region_name": "us-east-1"}
    return {"endpoint_url": f"http://127.0.0.1:{port}", "key": KEY, "secret": SECRET, "client_kwargs": client}


@dataclass
class Bucket:
    url: str
    options: dict[str, Any]
    fs: Any

    def storage(self, path: str = "run", **more: Any) -> RemoteStorage:
        return RemoteStorage(f"{self.url}/{path}", self.options, **{"budget": SMALL, "patience": QUICK, **more})

    def names(self) -> list[str]:
        self.fs.invalidate_cache()
        return sorted(key.partition("/")[2] for key in self.fs.find(self.url))

    def uploads(self) -> list[dict[str, Any]]:
        return self.fs.call_s3("list_multipart_uploads", Bucket=self.url.removeprefix("s3://")).get("Uploads", [])
