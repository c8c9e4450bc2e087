"""The language as a person writes it: parser, tree, printer."""

from gkd_dsl.syntax.parser import parse, parse_expression, parse_signature
from gkd_dsl.syntax.printer import print_expression, print_file, print_signature

__all__ = ["parse", "parse_expression", "parse_signature", "print_expression", "print_file", "print_signature"]
