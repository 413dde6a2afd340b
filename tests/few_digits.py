"""acgan.py on the first N digits only, so that epochs end within a test's patience: few_digits.py N FLAGS..."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import acgan  # noqa: E402 (needs the path above)

if __name__ == "__main__":
    n, flags = int(sys.argv[1]), sys.argv[2:]
    load_mnist = acgan.load_mnist
    acgan.load_mnist = lambda *args: tuple(tensor[:n] for tensor in load_mnist(*args))
    sys.exit(acgan.main(flags))
