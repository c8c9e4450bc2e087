"""Diagnostics: the data, their catalogue, and how they are shown."""

from gkd_dsl.diagnostics.model import Diagnostic, Diagnostics, Edit, Fix, Label, Note, SpecError

__all__ = ["Diagnostic", "Diagnostics", "Edit", "Fix", "Label", "Note", "SpecError"]
