"""What holds for all tests and for the processes that they start."""

from __future__ import annotations

import os

# torch's store asks a name server who the other end of each connection is, and 127.0.0.1 is no exception. Where such a
# question is lost, the job stands still for the resolver's five seconds: see resolv.conf(5).
os.environ.setdefault("RES_OPTIONS", "timeout:1")
