"""Errors and their bounds: the only place where the truth is known."""
