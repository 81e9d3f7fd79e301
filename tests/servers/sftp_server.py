"""An SFTP server over a directory: `sftp_server.py FOLDER PORT USER PASSWORD`."""

from __future__ import annotations

import asyncio
import sys

import asyncssh


class Server(asyncssh.SSHServer):
    def begin_auth(self, username: str) -> bool:
        return True

    def password_auth_supported(self) -> bool:
        return True

    def validate_password(self, username: str, password: str) -> bool:
        return [username, password] == sys.argv[3:5]


class Files(asyncssh.SFTPServer):
    def __init__(self, channel: asyncssh.SSHServerChannel) -> None:
        super().__init__(channel, chroot=sys.argv[1])


async def serve() -> None:
    key = asyncssh.generate_private_key("ssh-ed25519")
    await asyncssh.listen(
        "127.0.0.1", int(sys.argv[2]), server_factory=Server, server_host_keys=[key], sftp_factory=Files
    )
    await asyncio.Event().wait()


asyncio.run(serve())
