"""Measures of a model: sums over held-out tokens and the references they are read against."""
