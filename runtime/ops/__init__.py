"""The functions of the operators."""
