"""What keeps a run: its plan, loop, record and folder; checkpoints and how they are resumed; weight files; ranks."""
