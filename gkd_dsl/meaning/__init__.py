"""What a spec means: names, taps, sizes, units and the objective, checked."""
