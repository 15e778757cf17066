"""What several test files share."""

import sys

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """Models this small are slower on more threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def forgets_what_was_compiled():
    """Torch compiles a function a few times and no more, however many models it belongs to."""
    yield
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()
