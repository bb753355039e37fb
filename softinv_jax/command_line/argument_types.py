"""What options take, as argparse reads it."""

import argparse

__all__ = ["batch_size"]


def batch_size(text: str) -> int | str:
    """A positive integer, or `auto`."""
    if text == "auto":
        return text
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a positive integer nor auto")
    return value
