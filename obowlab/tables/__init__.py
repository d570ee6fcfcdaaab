"""The paper's tables as data: planned, executed, measured, rendered."""
