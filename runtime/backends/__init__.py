"""Where a step runs: placement, precision, backward, optimiser."""
