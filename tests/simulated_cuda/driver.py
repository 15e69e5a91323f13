"""torch's C++ side, told that there is a GPU without a driver behind it.

A CUDA build of torch asks in every backward pass whether device 0 has a context; without a driver that ends the process's work with an error. The
object that it asks cannot be exchanged from Python, so a small library gives it the virtual functions of one that knows a GPU and no context. That
holds for the rest of the process.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import torch

LIBRARY = "SSLD_TEST_CUDA_LIBRARY"
"""environment variable that names a library which is compiled already"""
_SOURCE = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <cstring>

namespace {
struct NoContext : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(at::DeviceIndex) const override { return false; }
  long versionCuDNN() const { return 0; }  // these two, as torch's release has them, are asked by attention
  long versionRuntimeCuDNN() const { return 0; }
};
}

extern "C" void replace_hooks() {
  static const NoContext replacement;
  auto* hooks = const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks());
  std::memcpy(static_cast<void*>(hooks), static_cast<const void*>(&replacement), sizeof(void*));  // the virtual table
}
"""


def missing() -> str | None:
    """Why the device cannot be simulated here; None: it can."""
    if torch.cuda.is_available():
        return "there is a real GPU here, which the tests marked for it use"
    if torch.version.cuda is not None and shutil.which("g++") is None:
        return "a CUDA build of torch needs g++ for the simulation; install it, or a CPU build of torch"
    return None


def build(folder: Path) -> Path | None:
    """Compile the library into `folder`, in about 15 s; None: this build of torch does not need it."""
    if torch.version.cuda is None:
        return None
    if given := os.environ.get(LIBRARY):
        return Path(given)
    source, library, package = folder / "no_context.cpp", folder / "no_context.so", Path(torch.__file__).parent
    source.write_text(_SOURCE, encoding="utf-8")
    line = ["g++", "-shared", "-fPIC", "-O0", "-std=c++20", f"-I{package / 'include'}", str(source), "-o", str(library)]
    subprocess.run([*line, f"-L{package / 'lib'}", "-ltorch_cpu", "-lc10"], check=True)
    return library


def install(library: Path | None) -> None:
    """Replace the hooks of this process for good."""
    if library is not None:
        ctypes.CDLL(str(library)).replace_hooks()
