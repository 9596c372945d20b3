"""One thread, fixed seeds and few examples: on small tensors more threads wait longer than they work."""

import pytest
import torch
from hypothesis import settings

# the same examples every time: whoever lands a change is not stopped by a number that nobody drew before;
# `pytest --hypothesis-profile default` draws new ones
settings.register_profile("suite", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("suite")


def pytest_configure():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeds():
    torch.manual_seed(0)
