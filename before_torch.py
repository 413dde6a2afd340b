"""A command imports this before torch: what must be set before the slow imports, or before OpenMP's threads start."""

import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the command without a traceback
# a thread of GNU's OpenMP (PyTorch's on Linux) looks this often for the others, then sleeps; 300,000 is the default.
# If another program holds a core, looking takes the time that they need.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# PyTorch keeps what it traced of a compiled G, too, though parts of that have gradients of their own: starts in half
# the time
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD", "1")

if find_spec("torch") is None:  # another Python than that of the environment
    mend = "type .venv/bin/python, or install requirements.txt for this one"
    print(f"{Path(sys.argv[0]).name}: error: {sys.executable} has no PyTorch: {mend}", file=sys.stderr)
    sys.exit(2)
