"""The language as a person writes it: parser, tree, printer."""

from gkd_dsl.syntax.parser import parse, parse_expression, parse_signature

__all__ = ["parse", "parse_expression", "parse_signature"]
