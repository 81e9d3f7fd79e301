import random

import numpy as np
import pytest
import torch


@pytest.fixture
def streams_as_they_were():
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])
