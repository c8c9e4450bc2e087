"""The grammar of the language, the one source of its syntax."""
