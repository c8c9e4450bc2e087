"""Operators as the checker knows them: signatures and their types. The functions are in the runtime."""
