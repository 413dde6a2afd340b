"""What stands beside the training loop: checkpoints, the record of a run, speed, and several ranks.
Imports only utils, models, drawing, data and evaluation.
"""
