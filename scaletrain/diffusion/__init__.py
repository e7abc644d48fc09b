"""What several diffusion objectives share: paths, predictions, solvers."""
