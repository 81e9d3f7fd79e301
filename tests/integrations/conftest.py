"""Real trainers, killed and resumed. These tests have an environment of their own: `make test-integrations`."""

from __future__ import annotations

import os

# More processes than cores: a thread that spins for torch's next operation takes the core from one that works.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

collect_ignore_glob = [] if os.environ.get("CKPTENGINE_TEST_INTEGRATIONS") else ["test_*.py"]
