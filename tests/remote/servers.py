"""moto's S3 server as a real process, and a proxy in front of it that disturbs chosen requests."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from ports import free_port

KEY, SECRET = "AKIAEXAMPLEEXAMPLE00", "xyzzySecretXyzzy0123456789"


@contextlib.contextmanager
def moto_server() -> Iterator[int]:
    """Run the server; yield its port."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            assert server.poll() is None, "moto_server has ended"
            assert time.monotonic() < deadline, "moto_server does not answer"
            time.sleep(0.05)
        yield port
    finally:
        server.kill()
        server.wait()


@dataclass
class Fault:
    """What is done to the next `times` requests whose `METHOD PATH` a pattern finds.

    `kind`: a status with a code, such as "503 SlowDown"; "reset before" or "reset after" the server has done its work;
    "silence": no reply; "truncated": half of the body and the end of the connection; "wrong length": half of the body
    as if it were all. Requests are spared that have a header `unless`, as "name: beginning of its value".
    """

    kind: str
    pattern: str
    times: int = 1
    unless: str = ""
    done: int = 0


class Proxy:
    """Forwards requests one by one, disturbed as `faults` say. `seen` are `METHOD PATH` of all.

    Conditional writes pass one at a time: moto looks and writes in two steps, which S3 does in one.
    """

    def __init__(self, upstream: int) -> None:
        self.upstream, self.faults, self.seen = upstream, [], []
        self.lock, self.conditional = threading.Lock(), threading.Lock()
        self.closing = threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _handle(self) -> None:
                proxy.handle(self)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *_: object) -> None:
                pass  # a client that was cut off, or has cut us off

        self.server = Server(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def fault(self, kind: str, pattern: str, times: int = 1, unless: str = "") -> Fault:
        fault = Fault(kind, pattern, times, unless)
        with self.lock:
            self.faults.append(fault)
        return fault

    def _next(self, line: str, headers: Message) -> str:
        def spared(fault: Fault) -> bool:
            name, _, value = fault.unless.partition(": ")
            return bool(name) and name in headers and str(headers[name]).startswith(value)

        with self.lock:
            self.seen.append(line)
            for fault in self.faults:
                if fault.done < fault.times and re.search(fault.pattern, line) and not spared(fault):
                    fault.done += 1
                    return fault.kind
        return ""

    def handle(self, client: BaseHTTPRequestHandler) -> None:
        body = client.rfile.read(int(client.headers.get("Content-Length", 0)))
        kind = self._next(f"{client.command} {client.path}", client.headers)
        if kind == "reset before":
            return self._reset(client)
        if kind == "silence":
            self.closing.wait(10)
            return self._reset(client)
        if re.match(r"\d", kind):
            status, _, code = kind.partition(" ")
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{SECRET}</Message></Error>".encode()
            return self._answer(client, int(status), {"Content-Type": "application/xml"}, text, len(text))
        with self.conditional if client.headers.get("If-None-Match") else contextlib.nullcontext():
            upstream = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=60)
            headers = {name: value for name, value in client.headers.items() if name.lower() != "expect"}
            upstream.request(client.command, client.path, body, headers)
            reply = upstream.getresponse()
            data, status, found = reply.read(), reply.status, dict(reply.getheaders())
            upstream.close()
        if kind == "reset after":
            return self._reset(client)
        length = int(reply.headers.get("Content-Length", len(data))) if client.command == "HEAD" else len(data)
        if kind == "truncated":
            self._answer(client, status, found, data[: len(data) // 2], length)
            return self._reset(client)
        if kind == "wrong length":
            data = data[: len(data) // 2]
            length = len(data)
        self._answer(client, status, found, data, length)

    @staticmethod
    def _answer(client: BaseHTTPRequestHandler, status: int, headers: dict[str, str], data: bytes, length: int) -> None:
        client.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                client.send_header(name, value)
        client.send_header("Content-Length", str(length))
        client.end_headers()
        if client.command != "HEAD":
            client.wfile.write(data)

    @staticmethod
    def _reset(client: BaseHTTPRequestHandler) -> None:
        client.close_connection = True
        client.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(client.connection.detach())
