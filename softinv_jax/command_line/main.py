"""`softinv`: the command line."""

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
      argv: arguments without the program's name; by default those of the process, whose signals and streams are then
        taken care of.

    Returns:
      The exit code.
    """
    if argv is None:
        from softinv_jax.command_line.own_process import prepare_process  # noqa: PLC0415 - before all else

        prepare_process()
    from softinv_jax.command_line.commands import run_command  # noqa: PLC0415 - takes a while

    return run_command(argv)


if __name__ == "__main__":
    sys.exit(main())
