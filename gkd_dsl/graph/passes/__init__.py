"""Passes over the graph: pure functions, each with a check of its output."""
