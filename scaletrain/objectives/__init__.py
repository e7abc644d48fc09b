"""Model families: one module for each, found by its name. See `scaletrain.objectives.base`."""
