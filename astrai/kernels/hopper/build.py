"""From CUDA C++ to a kernel: compiled by NVRTC, which comes with PyTorch, and kept beside Triton's.

Wherever NVRTC is, it compiles: no GPU is needed for that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Of a block, on compute capability 9.0.
SHARED_BYTES = 227 * 1024
_OPTIONS = (b"--gpu-architecture=sm_90a", b"--std=c++17")


def available(device: torch.device) -> bool:
    """Is it a Hopper, and is what compiles and launches there, of the CUDA that PyTorch is of?"""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    try:
        major, _, _ = version("cuda-bindings").partition(".")
    except PackageNotFoundError:
        return False
    same = torch.version.cuda.partition(".")[0] == major
    return same and torch.cuda.get_device_capability(device) == (9, 0)


def checked(result: tuple[Any, ...]) -> Any:
    """What a call of the driver or of NVRTC returns. RuntimeError: it failed."""
    error, *values = result
    if int(error):
        raise RuntimeError(f"{type(error).__name__}: {error.name}")
    return values[0] if len(values) == 1 else None


class Source(NamedTuple):
    """A kernel's text, and what is defined before it."""

    file: Path
    name: str
    defined: str

    @property
    def text(self) -> bytes:
        return f"{self.defined}\n{self.file.read_text()}".encode()


def compiled(source: Source, options: Sequence[bytes] = ()) -> tuple[bytes, str]:
    """Machine code, and what the compiler says. RuntimeError: it does not compile."""
    from cuda.bindings import nvrtc

    program = checked(nvrtc.nvrtcCreateProgram(source.text, source.file.name.encode(), 0, [], []))
    try:
        every = [*_OPTIONS, *options]
        (error,) = nvrtc.nvrtcCompileProgram(program, len(every), every)
        log = _room(checked(nvrtc.nvrtcGetProgramLogSize(program)))
        checked(nvrtc.nvrtcGetProgramLog(program, log))
        said = log.rstrip(b"\0\n").decode(errors="replace")
        if int(error):
            raise RuntimeError(f"{source.file.name}: {error.name}: {said}")
        size = checked(nvrtc.nvrtcGetCUBINSize(program))
        code = _room(size)
        checked(nvrtc.nvrtcGetCUBIN(program, code))
    finally:
        checked(nvrtc.nvrtcDestroyProgram(program))
    return code[:size], said


def _room(size: int) -> bytes:
    """For NVRTC to write to, which is given bytes: an object of its own, as one byte would not be.

    Python has one object for all bytes of length 1 that are equal.
    """
    return bytes(size + 2)


@cache
def machine_code(source: Source) -> Future[bytes]:
    """Compiled in a thread, once, and kept on disk where Triton keeps its kernels."""
    return _compilers().submit(_kept_code, source)


@cache
def _compilers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(4, thread_name_prefix="nvrtc")


def _kept_code(source: Source) -> bytes:
    from triton.runtime.cache import get_cache_manager

    release = f"{torch.__version__} {torch.version.cuda}".encode()  # which NVRTC comes with
    key = hashlib.sha256(b"\0".join([release, *_OPTIONS, source.text])).hexdigest()
    keeper, file = get_cache_manager(key), f"{source.name}.cubin"
    if (path := keeper.get_file(file)) is not None:
        return Path(path).read_bytes()
    code, _ = compiled(source)
    with suppress(OSError):  # no room for it: the next process compiles again
        keeper.put(code, file, binary=True)
    return code


@cache
def _loaded(source: Source, shared_bytes: int, device: int) -> Any:
    """A CUfunction; its module stays loaded."""
    from cuda.bindings import driver

    module = checked(driver.cuModuleLoadData(machine_code(source).result()))
    function = checked(driver.cuModuleGetFunction(module, source.name.encode()))
    most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    checked(driver.cuFuncSetAttribute(function, most, shared_bytes))
    return function


@dataclass(frozen=True)
class Kernel:
    """What `astrai.kernels.gpu.launch.launch` takes."""

    source: Source
    threads: int
    shared_bytes: int

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def call(values: Sequence[Any], types: Sequence[Any], pdl: bool) -> None:
            from cuda.bindings import driver

            config = driver.CUlaunchConfig()
            config.gridDimX, config.gridDimY, config.gridDimZ = (*grid, 1, 1)[:3]
            config.blockDimX, config.blockDimY, config.blockDimZ = self.threads, 1, 1
            config.sharedMemBytes = self.shared_bytes
            config.hStream = torch.cuda.current_stream().cuda_stream
            if pdl:
                early = driver.CUlaunchAttribute()
                ids = driver.CUlaunchAttributeID
                early.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
                early.value.programmaticStreamSerializationAllowed = 1
                config.attrs, config.numAttrs = [early], 1
            function = _loaded(self.source, self.shared_bytes, torch.cuda.current_device())
            checked(driver.cuLaunchKernelEx(config, function, (tuple(values), tuple(types)), 0))

        return call

    def warmup(self, *_: Any, **__: Any) -> Kernel:
        """It is being compiled from here on; who launches it waits."""
        machine_code(self.source)
        return self

    @property
    def run(self) -> bytes:
        """Waits until it is compiled."""
        return machine_code(self.source).result()


def tensor_map(
    x: Tensor, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> Any:
    """What the copy engine must know; sizes, strides and box from the innermost on, in numbers.

    What is outside of sizes reads as 0.
    """
    from cuda.bindings import driver

    kinds = driver.CUtensorMapDataType
    kind = (
        kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
        if x.dtype == torch.bfloat16
        else kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16
    )
    return checked(
        driver.cuTensorMapEncodeTiled(
            kind,
            len(sizes),
            x.data_ptr(),
            [driver.cuuint64_t(size) for size in sizes],
            [driver.cuuint64_t(stride * x.itemsize) for stride in strides],
            [driver.cuuint32_t(size) for size in box],
            [driver.cuuint32_t(1) for _ in sizes],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
