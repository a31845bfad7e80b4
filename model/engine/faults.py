"""The cause of an error in a rank: its memory, its device, or the clip.

torch says most of it in words alone: the CUDA runtime's, cuBLAS', cuDNN's and NCCL's errors are RuntimeErrors (since
torch 2.8 some are AcceleratorErrors, since 2.2 NCCL's are DistBackendErrors; both derive from RuntimeError).
"""

from __future__ import annotations

import errno
import re
from collections.abc import Generator
from typing import Literal, TypeAlias

Cause: TypeAlias = Literal["memory", "device", "other"]

# Fewer clips at once could have helped. CUDA's runtime, driver and NVRTC; cuBLAS, cuDNN, cuSOLVER, cuFFT; NCCL; torch's
# allocator for CPUs; mmap; oneDNN's, which says no more than that.
MEMORY = re.compile(
    r"out[ _]of[ _]memory|_ALLOC(ATION)?_FAILED|failed to cuda \w*alloc|can(no|')t allocate memory|not enough memory"
    r"|could not create a primitive",
    re.IGNORECASE,
)
# A process that has seen one of these computes nothing on its device any more (sticky errors of CUDA), or has lost its
# peers. Of cuBLAS and cuDNN only what is not about the arguments of a call.
DEVICE = re.compile(
    r"\bCUDA (driver )?error\b(?!: (?:CUBLAS|CUSOLVER|CUSPARSE|CUFFT|CUDNN)_)|\bCuda failure\b"
    r"|_STATUS_(INTERNAL_ERROR|EXECUTION_FAILED|NOT_INITIALIZED|ARCH_MISMATCH|MAPPING_ERROR)"
    r"|\bNCCL error\b|\bnccl(Unhandled\w*|Remote|System|Internal)Error\b|\bNCCL communicator was aborted\b"
    r"|device-side assert|unspecified launch failure|illegal memory access|uncorrectable (NVLink|ECC)|\bXid\b"
    r"|\bNo CUDA GPUs are available\b|\bFound no NVIDIA driver\b|\bGPU is lost\b|fallen off the bus",
    re.IGNORECASE,
)


def cause_of(problem: BaseException) -> Cause:
    """The cause of an error: of the first in its chain that is known to be memory's or the device's, else "other"."""
    for each in _chain(problem):
        if isinstance(each, MemoryError) or (isinstance(each, OSError) and each.errno == errno.ENOMEM):
            return "memory"
        if not isinstance(each, RuntimeError):
            continue  # whatever it says may be a clip's own words
        if type(each).__name__ == "OutOfMemoryError" or MEMORY.search(str(each)):
            return "memory"
        if type(each).__name__ == "AcceleratorError" or DEVICE.search(str(each)):
            return "device"
    return "other"


def _chain(problem: BaseException | None) -> Generator[BaseException]:
    """An error, and those that it was raised from or during."""
    seen: set[int] = set()
    while problem is not None and id(problem) not in seen:
        seen.add(id(problem))
        yield problem
        problem = problem.__cause__ or problem.__context__
