"""What the training loop uses: checkpoints, the record of a run, speed, and several ranks.
Imports only utils, models, drawing, data and evaluation.
"""
