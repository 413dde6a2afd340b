"""What the training loop uses: checkpoints, the record of a run, speed, several ranks, and departures.
Imports only utils, models, drawing, data and evaluation.
"""
