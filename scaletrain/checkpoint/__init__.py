"""The layout of a checkpoint, its atomic writer, verified reader and retention."""
