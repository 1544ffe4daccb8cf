"""The memory that something takes, for a process that does little else: what is allocated, not what the allocator keeps."""

import gc
from collections.abc import Callable
from pathlib import Path

RESET = Path("/proc/self/clear_refs")  # Linux's

# glibc gives an allocation pages of its own from 128 KiB on, and raises that to the largest it has seen freed, be it by an
# import. Tensors below it then fill holes, which were resident before, or leave holes, which stay resident: the peak of one
# load of 32.0 MB was anything from 25 to 55 MB. A threshold that is set stays: 31.9 to 32.3 MB.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def peak_bytes(work: Callable[[], object]) -> int:
    """The largest number of resident bytes during some work, less those before it; run under ``ENVIRONMENT``.

    It is the kernel's own high-water mark, reset before the work: no sampling, mapped pages counted too.
    """
    gc.collect()
    RESET.write_text("5")
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))
