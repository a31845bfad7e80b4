"""The cause of an error in a rank, by messages that CUDA, cuBLAS, cuDNN, NCCL and torch really give."""

from __future__ import annotations

import errno
import os
import queue
from typing import Any, cast

import pytest
import torch
from torch.distributed import DistBackendError

from model.engine.clip import DeviceFailed, OutOfMemory, RenderFailed
from model.engine.faults import cause_of
from model.engine.job import RankJob
from model.engine.loader import Networks
from model.engine.messages import ClipFailed, RankFailed, RankSettings
from model.engine.process import PeakMemory
from model.engine.ranks import Ranks
from model.engine.stages import Stages
from tests.tiny import CLIP

HINT = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to enable "
    "device-side assertions.\n"
)
NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, "
OUT_OF_MEMORY = [
    torch.AcceleratorError(f"CUDA error: out of memory{HINT}"),
    RuntimeError(f"CUDA error: out of memory{HINT}"),
    torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 3.25 GiB is "
        "free. Process 4021 has 75.85 GiB memory in use."
    ),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    DistBackendError(
        f"{NCCL}unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.3\n"
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'"
    ),
    DistBackendError(
        f"{NCCL}unhandled cuda error, NCCL version 2.21.5\nncclUnhandledCudaError: Call to CUDA function failed.\n"
        "Last error:\nFailed to CUDA calloc async 608 bytes"
    ),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: not enough memory: you tried to ..."),
    RuntimeError("unable to mmap 4096 bytes from file </models/a.safetensors>: Cannot allocate memory (12)"),
    RuntimeError("could not create a primitive"),
    MemoryError(),
    OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
]
OF_THE_DEVICE = [
    *(
        torch.AcceleratorError(f"CUDA error: {said}{HINT}")
        for said in (
            "uncorrectable ECC error encountered",
            "an illegal memory access was encountered",
            "device-side assert triggered",
            "unspecified launch failure",
            "uncorrectable NVLink error detected during the execution",
            "misaligned address",
            "the launch timed out and was terminated",
            "an error nobody has heard of",
        )
    ),
    RuntimeError(f"CUDA error: unspecified launch failure{HINT}"),
    RuntimeError("CUDA driver error: device kernel image is invalid"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( handle, opa, opb, m, n, k)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_INTERNAL_ERROR when calling `cublasLtMatmul( ltHandle, ...)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED_CUDART"),
    DistBackendError(
        f"{NCCL}unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.3\n"
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
        "Cuda failure 719 'unspecified launch failure'"
    ),
    DistBackendError(
        f"{NCCL}remote process exited or there was a network error, NCCL version 2.27.3\n"
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely."
    ),
    DistBackendError(f"{NCCL}unhandled system error\nncclSystemError: System call (e.g. socket, malloc) failed."),
    RuntimeError("No CUDA GPUs are available"),
]
OF_THE_CLIP = [
    ValueError("frames=8 must be 4n+1"),
    ValueError("the prompt 'CUDA error: out of memory, neon letters' has no words of the model"),
    RuntimeError("The size of tensor a (8) must match the size of tensor b (9) at non-singleton dimension 3"),
    RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm( handle, opa, opb, m, n, k)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear with a non-contiguous input"),
    RuntimeError("Connection closed by peer [127.0.0.1]:40211"),
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    KeyError("a"),
]


@pytest.mark.parametrize(
    ("cause", "problem"),
    [
        *(("memory", each) for each in OUT_OF_MEMORY),
        *(("device", each) for each in OF_THE_DEVICE),
        *(("other", each) for each in OF_THE_CLIP),
    ],
    ids=lambda each: each if isinstance(each, str) else repr(each)[:70],
)
def test_the_cause_of_an_error_is_known_by_its_words(cause: str, problem: Exception) -> None:
    assert cause_of(problem) == cause
    try:
        try:
            raise problem
        except Exception as first:
            raise ValueError("while a clip was decoded") from first
    except ValueError as wrapped:
        assert cause_of(wrapped) == cause, "what it was raised from counts"


class Heard:
    """A wire and an inbox that keep what they are given."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.posted: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def send(self, message: Any) -> None:
        self.messages.append(message)


class Encoder:
    def __init__(self, problem: Exception) -> None:
        self.problem = problem

    def encode(self, prompts: list[str]) -> torch.Tensor:
        raise self.problem


class Parts:
    def __init__(self, problem: Exception) -> None:
        self.vae, self.text = None, Encoder(problem)


SETTINGS = RankSettings(
    path="/models/tiny",
    partition="tp=1",
    device="cpu",
    dtype="float32",
    threads=1,
    micro_batch=1,
    compile=False,
    frame_step=4,
    boundary=None,
)


def stages(problem: Exception, heard: Heard) -> Stages:
    parts, wire = cast(Networks, Parts(problem)), cast(Any, heard)
    return Stages(parts, SETTINGS, wire, heard.posted.put, PeakMemory("cpu", 1))


@pytest.mark.parametrize("problem", [OUT_OF_MEMORY[0], OF_THE_DEVICE[0], OF_THE_DEVICE[-1]], ids=repr)
def test_a_machine_s_error_in_prompt_encoding_ends_the_rank(problem: Exception) -> None:
    heard = Heard()
    with pytest.raises(type(problem)):
        stages(problem, heard).prepare(RankJob(1, CLIP, 0))
    assert heard.messages == []


def test_a_clip_s_own_error_in_prompt_encoding_is_that_clip_s() -> None:
    heard = Heard()
    stages(OF_THE_CLIP[0], heard).prepare(RankJob(1, CLIP, 0))
    assert heard.messages == [ClipFailed(job=1, reason="ValueError: frames=8 must be 4n+1")]


@pytest.mark.parametrize(
    ("cause", "kind"), [("memory", OutOfMemory), ("device", DeviceFailed), ("other", RenderFailed)]
)
def test_the_first_rank_s_report_says_what_became_of_all(cause: Any, kind: type[Exception]) -> None:
    """Its peers report broken collectives after it. A clip is named where a rank was at it alone, and is not blamed."""
    ranks = Ranks(2, SETTINGS, {}, None, 2)
    ranks.ready = cast(Any, ("both",))
    reports = [
        RankFailed(reason="NCCL error: ncclRemoteError", clips=("a", "b"), cause="device", time=2.0),
        RankFailed(reason="it", clips=("a",), cause=cause, time=1.0),
    ]
    assert type(ranks._error(reports)) is kind  # pyright: ignore[reportPrivateUsage]
