"""How far a sparse model is from the dense one: what calibration and evaluation share."""
