"""Rows, their order, and how they become batches."""
