"""The secret of the store that tests of this folder host."""

import secrets

SECRET = secrets.token_bytes(32)
