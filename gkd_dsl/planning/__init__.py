"""Memory, traffic and time of a spec on a machine, by arithmetic over its plan: no weights, no torch."""
