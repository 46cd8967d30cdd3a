"""CUDA C++ compiled at run time by NVRTC, which torch brings along; no CUDA toolkit is needed.

A program is a source file beside this one and a set of macros. What was compiled is kept in
memory and in the cache folder, by the hash of everything that went into it.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from wina.errors import WinaError
from wina.files import cached, replacing

SOURCES = Path(__file__).parent
SHARED = "common.cuh"
PORTABLE = 8  # blocks of a cluster that every device takes


class Kernel:
    """One compiled function on one device, ready to launch.

    Attributes:
        threads: of a block.
        cluster: blocks of a cluster.
    """

    def __init__(self, function: Any, threads: int, cluster: int) -> None:
        from cuda.bindings import driver

        self.threads, self.cluster = threads, cluster
        self._function = function
        self._shared = 0  # bytes that were asked for so far
        self._config = config = driver.CUlaunchConfig()
        config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
        config.blockDimX = threads
        overlap = driver.CUlaunchAttribute()
        # The kernel waits itself for the one before it (see wait_for_inputs in common.cuh).
        overlap.id = (
            driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        )
        overlap.value.programmaticStreamSerializationAllowed = 1
        attributes = [overlap]
        if cluster > 1:
            size = driver.CUlaunchAttribute()
            size.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            size.value.clusterDim.x = cluster
            size.value.clusterDim.y = size.value.clusterDim.z = 1
            attributes.append(size)
        if cluster > PORTABLE:
            more = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
            _check(driver.cuFuncSetAttribute(function, more, 1))
        config.attrs = attributes
        config.numAttrs = len(attributes)

    def launch(self, blocks: int, shared: int, arguments: ctypes.Structure) -> None:
        """Launch on torch's current stream.

        Args:
            blocks: of the grid.
            shared: dynamic shared memory of a block, bytes.
            arguments: the kernel's only parameter.

        Raises:
            WinaError: the driver refuses.
        """
        from cuda.bindings import driver

        if shared > self._shared:
            attribute = driver.CUfunction_attribute
            name = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _check(driver.cuFuncSetAttribute(self._function, name, shared))
            self._shared = shared
        config = self._config
        config.gridDimX, config.sharedMemBytes = blocks, shared
        config.hStream = torch.cuda.current_stream().cuda_stream
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        _check(driver.cuLaunchKernelEx(config, self._function, ctypes.addressof(parameters), 0))


@cache
def kernel(
    source: str, name: str, macros: tuple[tuple[str, int], ...], device: int, threads: int
) -> Kernel:
    """Return a kernel compiled with these macros, loaded on a device.

    Args:
        source: file name of the program.
        name: of the function.
        macros: names and values; ``CLUSTER`` is also the launch's.
        device: index of the CUDA device.
        threads: of a block.

    Raises:
        WinaError: it does not compile, with the compiler's words.
    """
    from cuda.bindings import driver

    binary = compiled(source, macros, torch.cuda.get_device_capability(device))
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes sure that the context exists
        module = _check(driver.cuModuleLoadData(binary))
        function = _check(driver.cuModuleGetFunction(module, name.encode()))
        # Kernels with unlike shares of shared memory could not overlap on a multiprocessor.
        share = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        _check(driver.cuFuncSetAttribute(function, share, 100))
    return Kernel(function, threads, dict(macros).get("CLUSTER", 1))


def compiled(
    source: str, macros: tuple[tuple[str, int], ...], capability: tuple[int, int]
) -> bytes:
    """Return a program's machine code, from the cache folder where it is there.

    Raises:
        WinaError: it does not compile.
    """
    from cuda.bindings import nvrtc

    text = (SOURCES / source).read_bytes()
    shared = (SOURCES / SHARED).read_bytes()
    feature = "a" if capability >= (9, 0) else ""
    options = [
        f"--gpu-architecture=sm_{capability[0]}{capability[1]}{feature}",
        "--std=c++17",
        *(f"-D{name}={value}" for name, value in macros),
    ]
    version = nvrtc.nvrtcVersion()[1:]
    key = hashlib.sha256(repr((text, shared, options, version)).encode()).hexdigest()[:32]
    path = cached("cuda", f"{key}.cubin")
    if path.exists():
        return path.read_bytes()
    header = [SHARED.encode()]
    program = _check(nvrtc.nvrtcCreateProgram(text, source.encode(), 1, [shared], header))
    try:
        flags = [option.encode() for option in options]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
        if int(status):
            size = _check(nvrtc.nvrtcGetProgramLogSize(program))
            log = _fill(nvrtc.nvrtcGetProgramLog, program, size)
            raise WinaError(f"{source} does not compile ({options}): {log.decode()}")
        binary = _fill(nvrtc.nvrtcGetCUBIN, program, _check(nvrtc.nvrtcGetCUBINSize(program)))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    with replacing(path) as temporary:
        temporary.write_bytes(binary)
    return binary


def _fill(read: Any, program: Any, size: int) -> bytes:
    found = bytes(size)
    _check(read(program, found))
    return found


def _check(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if int(status):
        raise WinaError(f"CUDA: {status.name}")
    return values[0] if values else None


def mapping(macros: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """Return macros as ``kernel`` takes them."""
    return tuple(sorted(macros.items()))
