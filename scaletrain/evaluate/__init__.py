"""Metrics and judges of samples."""
