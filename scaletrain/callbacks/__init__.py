"""Observers of a run: they write and show, they never steer."""
