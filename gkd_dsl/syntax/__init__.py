"""The language as a person writes it: parser, tree, printer."""
