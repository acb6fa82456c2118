"""The output folder: weights, report, figure, and the checks of a finished result."""
