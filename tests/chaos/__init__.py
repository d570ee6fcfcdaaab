"""Faults on purpose: `make chaos` kills, starves, tampers and lies, and then judges whether anything was lost.

Every *kind* of fault (`kinds/`) prepares a folder, does its harm at a random (seeded) moment while a run of seconds is going,
types the same command again until it ends, and lets `judge` compare the outcome with an undisturbed run.
"""
