"""Models as their configs describe them: sizes, taps, vocabularies. No weights, no torch."""
