"""vft: fine-tuning of video language models in plain PyTorch."""

import os

__version__ = "0.1.0"

# Tensors of 2 MiB and more on the CPU lie in pages of 2 MiB instead of 4 KiB, where the system gives such pages: frames
# are written to fresh memory all the time, and to be given it page by page costs as much as copying it several times.
# torch looks at this once, when it first allocates; worker processes inherit it.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
