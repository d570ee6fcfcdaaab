"""Tuning: a study searches the settings of a recipe with Optuna. The only place that knows Optuna.

A trial is a point of the search space and trains one run per seed through the launcher. The training processes never talk
to Optuna: they write results into their run folders, and the study's worker reads them there.
"""
