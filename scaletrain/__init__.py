"""scaletrain: one trainer for every model family, at any scale.

Importing this package imports neither torch nor any other heavy library; see `scaletrain.trainer` for the loop.
"""

__version__ = "0.1.0"
