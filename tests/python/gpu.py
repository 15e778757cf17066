"""Which GPU there is for tests, and which of the CUDA backends they run on."""

import os

import pytest
import torch

CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
needs_gpu = pytest.mark.skipif(
    CAPABILITY < (8, 0), reason="needs a GPU of compute capability 8.0 or later"
)
NAMED_BACKEND = os.environ.get("BLASST_CUDA_BACKEND")
ON_SM90 = CAPABILITY == (9, 0) and NAMED_BACKEND != "cuda-sm80"
portable = pytest.mark.skipif(ON_SM90, reason="cuda-sm90 has what is refused")
hopper = pytest.mark.skipif(not ON_SM90, reason="cuda-sm90 alone has it")

HEAD_SIZES = [
    (dim, value_dim)
    for dim, value_dim in [(64, 64), (96, 64), (96, 96), (128, 128), (192, 128), (256, 256)]
    if dim != 96 or NAMED_BACKEND != "cuda-sm90"
]
"""Of keys and values, that the backends have which run here: cuda-sm90 alone has no heads of 96."""
