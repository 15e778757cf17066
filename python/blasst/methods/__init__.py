"""Sparse methods beside the calibrated thresholds, and their calibration or training."""
