"""Real trainers, killed and resumed. These tests have an environment of their own: `make test-integrations`."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("CKPTENGINE_TEST_INTEGRATIONS") else ["test_*.py"]
