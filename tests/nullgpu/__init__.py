"""A null GPU: torch's CUDA code runs on a machine without a GPU, and what it asks for is counted.

Four C files stand in for the CUDA runtime, cuBLAS, NCCL and the driver. They compute nothing; device checks, autograd,
the caching allocator, streams, capture of graphs, DDP and FSDP2 (as one of N alike ranks) are torch's own.

| it tells | it can't tell |
|---|---|
| device mismatches, waits for the device, calls that are illegal under capture | any value |
| launches, copies, collectives; allocated and reserved memory, exactly | kernels' times, overlap, workspaces |

By hand: ``python tests/nullgpu SCRIPT ARGUMENTS``. In the environment, `NULLGPU_BYTES` sets the device's memory;
with `NULLGPU_REAL_READS=1` reads of it give what copies and NCCL left there, as DDP and FSDP2 need, instead of zeros.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = ("runtime.c", "cublas.c", "nccl.c")
#: What is counted, in the order of count.h. In a capture, work becomes `nodes` and is counted as nothing else.
KINDS = "launches gemms memsets h2d d2h d2d pageable collectives syncs mallocs graphs nodes".split()


def missing() -> str:
    """Why there can be no null GPU here; empty where there can."""
    import torch

    if not (torch.version.cuda or "").startswith("13."):
        return f"it speaks for CUDA 13, torch is built for {torch.version.cuda or 'none'}"
    return "" if shutil.which("gcc") and headers() else "no gcc, or no triton, which brings CUDA's headers"


def headers() -> Path | None:
    """CUDA's headers, as triton brings them with torch's CUDA wheels."""
    triton = importlib.util.find_spec("triton")
    folder = Path(triton.origin).parent / "backends" / "nvidia" / "include" if triton else None
    return folder if folder and (folder / "driver_types.h").exists() else None


def build() -> Path:
    """Folder of the two libraries; compiled where the cache has none of these sources."""
    texts = [path.read_bytes() for path in sorted([*HERE.glob("*.c"), *HERE.glob("*.h")])]
    digest = hashlib.sha256(b"".join(texts) + (headers() / "driver_types.h").read_bytes()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mae_et"
    folder = cache / f"nullgpu-{digest}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=cache))
        gcc = ["gcc", "-shared", "-fPIC", "-O1", "-w", f"-I{headers()}"]
        sources = [str(HERE / name) for name in SOURCES]
        subprocess.run([*gcc, "-o", str(made / "libnullgpu.so"), *sources, "-lpthread", "-ldl"], check=True)
        driver = ["-Wl,-soname,libcuda.so.1", "-o", str(made / "libcuda.so.1"), str(HERE / "driver.c")]
        subprocess.run([*gcc, *driver], check=True)
        try:
            made.rename(folder)  # several test processes may build at once; the first one's is kept
        except OSError:
            shutil.rmtree(made)
    return folder


def environment(**more: str) -> dict[str, str]:
    """Of a process that shall see the null GPU, and no cuDNN, which would want a real one."""
    folder = build()
    libraries = {"LD_PRELOAD": str(folder / "libnullgpu.so"), "LD_LIBRARY_PATH": str(folder)}
    libraries["TRITON_LIBCUDA_PATH"] = str(folder)
    paths = [str(HERE.parents[1]), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | libraries | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))} | more
