"""Runs: the only place where record, method, judge and results meet."""
