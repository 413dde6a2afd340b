"""The process: its threads, and the memory that it keeps."""

import ctypes
import mmap
import os
import sys

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4  # from glibc's malloc.h


def tune_process(device: torch.device, threads: int | None = None) -> None:
    """Set up the whole process; call this before the first large tensor is made.

    Threads: sums on a CPU are split among them, so a resumed run needs the `threads` that it had. They are set even if
    nothing changes: otherwise MKL may choose fewer by itself, in some starts of the same program: see
    docs/notes/mkl-threads.md.
    CUDA: cuDNN picks its fastest algorithms by trying, and float32 products may use TF32.
    """
    possible = type(threads) is int and 1 <= threads <= (os.cpu_count() or 1)
    torch.set_num_threads(threads if possible else torch.get_num_threads())
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    elif libc := glibc():
        libc.mallopt(M_MMAP_THRESHOLD, 2**17)  # its default, which would grow: large blocks go back when they are freed


def keep_memory(device: torch.device) -> None:
    """From here on, keep what is freed for the next batch, in large pages; for a CPU on Linux.

    glibc returns every large block to the kernel when it is freed, and the next one is mapped again, page by page: up
    to half of a batch's time. Large pages alone are 3 % of it. Call this when the data are loaded and G is compiled:
    what they leave would only be holes that the blocks of a batch do not fit into.
    """
    libc = glibc() if device.type == "cpu" else None
    if not libc:
        return
    libc.malloc_trim(0)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(M_TOP_PAD, 2**28)
    # PyTorch's own way to large pages (THP_MEM_ALLOC_ENABLE) aligns blocks to pages, which leaves more holes
    start = libc.sbrk(0)
    libc.free(libc.malloc(2**26))  # larger than any hole, so the heap grows, by that and the padding
    start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    libc.madvise(start, libc.sbrk(0) - start, mmap.MADV_HUGEPAGE)


def glibc():
    """Return the C library, with the types of what is called here, or None if it is not glibc."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):
        return None
    address, size = ctypes.c_void_p, ctypes.c_size_t
    libc.malloc.restype, libc.malloc.argtypes = address, [size]
    libc.free.argtypes = [address]
    libc.sbrk.restype, libc.sbrk.argtypes = address, [ctypes.c_ssize_t]
    libc.madvise.argtypes = [address, size, ctypes.c_int]
    libc.malloc_trim.argtypes = [size]
    return libc
