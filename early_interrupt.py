"""A command imports this before torch: Ctrl-C during the slow imports then ends it without a traceback."""

import signal  # fmt: skip

signal.signal(signal.SIGINT, signal.SIG_DFL)  # fmt: skip
