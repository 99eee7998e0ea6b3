"""Measurements: each module is a command, `python -m bench.NAME` from the root of the checkout."""
