"""Models that a stage does not train: in memory, elsewhere, or stored."""
