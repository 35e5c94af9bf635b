"""What the C library's allocator has handed out and not got back, in this process."""

from __future__ import annotations

import ctypes

_FIELDS = (
    "arena", "ordblks", "smblks", "hblks", "hblkhd",
    "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
)  # fmt: skip


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS]


def used_mib() -> float:
    """MiB in use, of all arenas and mapped blocks (glibc's mallinfo2); 0.0 without glibc 2.33."""
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        return 0.0
    ask.restype = _Mallinfo2
    found = ask()
    return float(found.uordblks + found.hblkhd) / (1 << 20)
