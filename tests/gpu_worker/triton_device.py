"""Where the tests of Triton kernels run: on the GPU, else in Triton's interpreter."""

import torch

from tests.gpu_worker import interpreter  # noqa: F401

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
