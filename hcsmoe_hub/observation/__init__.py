"""What is seen of a layer while the calibration set passes it."""
