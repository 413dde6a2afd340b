"""A command imports this before torch: what must be set by then.

Ctrl-C during the slow imports ends the command without a traceback.

OpenMP's threads wait for each other in a busy loop. If another program takes a core meanwhile, the loop burns the time
that the awaited thread needs. So they go to sleep after a short while (docs/speed.md has the figures).
"""

import os
import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # GNU's, in PyTorch's wheels for Linux: turns of the loop
os.environ.setdefault("KMP_BLOCKTIME", "1")  # LLVM's and Intel's: milliseconds
