"""Ranges of Google's and Azure's objects through obstore, where it is installed."""

from __future__ import annotations

import importlib.util
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from ckptengine.storage.ranges import NEVER, RangeReads, made_store, refuse_unlike

__all__ = ["AzureRanges", "GoogleRanges", "ranges_of"]

_AZURE_SCOPE = "https://storage.azure.com/.default"  # Microsoft, "Authorize access to blobs using Microsoft Entra ID"


def ranges_of(protocol: str, bucket: str) -> RangeReads | None:
    """Return what reads a bucket through obstore, None where nothing does."""
    if importlib.util.find_spec("obstore") is None:
        return None
    if protocol in ("gs", "gcs"):
        return GoogleRanges(bucket, protocol)
    if protocol in ("abfs", "abfss", "az"):
        return AzureRanges(bucket, protocol)
    return None


class GoogleRanges(RangeReads):
    """Reads with the token that gcsfs has at that moment, through the XML API, where gcsfs uses the JSON one."""

    client = "gcsfs"

    async def _held(self, fs: Any) -> tuple[Any, Any]:
        if getattr(fs, "credentials", None) is None:
            return fs, None
        fs.credentials.maybe_refresh()
        headers: dict[str, str] = {}
        fs.credentials.apply(headers)
        return fs, tuple(sorted((name.lower(), value) for name, value in headers.items()))

    async def _like(self, fs: Any, client: Any, credentials: Any) -> Any:
        from gcsfs import GCSFileSystem
        from obstore.store import GCSStore

        headers = dict(credentials or ())
        token = headers.pop("authorization", "")
        endpoint = str(getattr(fs, "base", "")).partition("/storage/v1")[0]
        unlike = {
            "a file system of another class": not isinstance(fs, GCSFileSystem),
            "requester_pays": getattr(fs, "requester_pays", False),
            "session_kwargs": getattr(fs, "session_kwargs", None),
            "headers": headers,
            "credentials that are no token": bool(token) and not token.startswith("Bearer "),
            "client certificates": getattr(fs, "_use_client_cert", False),
            "an address of this form": urlsplit(endpoint).scheme not in ("http", "https"),
            "a proxy": _has_proxy(endpoint),
        }
        refuse_unlike(unlike)
        options: dict[str, Any] = {"base_url": endpoint, "skip_signature": not token}
        if token:
            bearer = {"token": token.removeprefix("Bearer "), "expires_at": None}
            options["credential_provider"] = lambda: bearer
        return _made(GCSStore, self._bucket, endpoint, options)


class AzureRanges(RangeReads):
    """Reads with the key, signature or token that adlfs' client has at that moment."""

    client = "adlfs"

    async def _held(self, fs: Any) -> tuple[Any, Any]:
        client = getattr(fs, "service_client", None)
        credential: Any = getattr(client, "credential", None)
        if hasattr(credential, "get_token"):
            return client, ("token", (await credential.get_token(_AZURE_SCOPE)).token)
        if hasattr(credential, "account_key"):
            return client, ("key", credential.account_name, credential.account_key)
        return client, None if credential is None else ("unknown", type(credential).__name__)

    async def _like(self, fs: Any, client: Any, credentials: Any) -> Any:
        from adlfs import AzureBlobFileSystem
        from obstore.store import AzureStore

        url = urlsplit(str(getattr(client, "url", "")))
        kind = "" if credentials is None else credentials[0]
        endpoint = f"{url.scheme}://{url.netloc}{url.path}".rstrip("/")
        unlike = {
            "a file system of another class": type(fs) is not AzureBlobFileSystem,
            "credentials of another kind": kind == "unknown",
            "a session": getattr(fs, "request_session", None) is not None,
            "a second location": getattr(fs, "location_mode", "primary") != "primary",
            "a signature in the address": bool(url.query),
            "an address of this form": url.scheme not in ("http", "https"),
            "a proxy": _has_proxy(endpoint),
        }
        refuse_unlike(unlike)
        account = str(getattr(fs, "account_name", "") or url.netloc.partition(".")[0])
        options: dict[str, Any] = {"account_name": account, "endpoint": endpoint, "use_emulator": False}
        # Never an option: what the environment says would come before it.
        if kind == "key":
            options["account_name"] = credentials[1]
            key = {"access_key": credentials[2], "expires_at": None}
            options["credential_provider"] = lambda: key
        elif kind == "token":
            bearer = {"token": credentials[1], "expires_at": None}
            options["credential_provider"] = lambda: bearer
        else:
            options["skip_signature"] = True
        return _made(AzureStore, self._bucket, endpoint, options)


def _has_proxy(endpoint: str) -> bool:
    """Return whether the environment names a proxy, which obstore would take, and aiohttp does not."""
    proxies, url = getproxies_environment(), urlsplit(endpoint)
    named = proxies.get(url.scheme) or proxies.get("all")
    return bool(named) and not proxy_bypass(url.netloc)


def _made(store: Any, bucket: str, endpoint: str, options: dict[str, Any]) -> Any:
    client_options = {"allow_http": endpoint.startswith("http:"), "timeout": NEVER, "connect_timeout": "60s"}
    return made_store(store, bucket, {"client_options": client_options, "retry_config": {"max_retries": 0}, **options})
