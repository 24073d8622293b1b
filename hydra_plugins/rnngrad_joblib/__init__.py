"""Runs of a sweep in joblib's processes."""
