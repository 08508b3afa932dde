"""Trains LATTE's head-wise thresholds through a whole model: NumPy forward and backward passes, weights frozen.

The paper's own recipe is not known; what is here is our reading, see ``docs/training-thresholds.md``.
"""
