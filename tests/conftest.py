"""Before any test is collected: without a GPU, Triton's kernels run in its interpreter.

Triton reads this when it is first imported, which PEFT and transformers do as well.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
