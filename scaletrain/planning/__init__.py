"""What a run will need, found out without a GPU and without weights: see `plan.py`."""
