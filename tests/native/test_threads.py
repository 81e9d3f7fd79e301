import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from native_tables import SANITIZED


@pytest.mark.skipif(SANITIZED is not None, reason="the sanitizers' own threads need what is limited here")
def test_work_is_done_where_no_thread_can_be_made():
    """With no room for stacks every pthread_create fails, and the caller does it all."""
    script = textwrap.dedent("""
        import resource, sys, threading
        import numpy as np
        from native_tables import *
        source = random_bytes(1, 8 << 20)
        op = PackOp(0, source.shape, source)
        image = np.zeros(8 << 20, np.uint8)
        ops, index, crcs = pack_table([op], 65536)
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), used + (1 << 20)))
        try:
            threading.Thread(target=int).start()
            sys.exit("a thread could be made after all")
        except RuntimeError:
            pass
        native.pack(image.ctypes.data, image.nbytes, ops, index, 65536, crcs, 4)
        assert memoryview(image) == memoryview(source)
    """)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=60)
