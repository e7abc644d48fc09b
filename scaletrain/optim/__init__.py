"""Optimisers, schedules and moving averages."""
