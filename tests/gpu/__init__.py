"""What needs an NVIDIA GPU: its tests, and `make gpu-check`."""

OUTCOMES_VARIABLE = "OBOWLAB_TEST_OUTCOMES"
"""Names the file to which each test's outcome goes."""
