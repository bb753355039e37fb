"""`softinv`: the command line."""

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from softinv_jax.command_line import audit, demo, invert, recover
from softinv_jax.command_line.compilation_cache import keep_compiled_programs
from softinv_jax.command_line.console import InputError

__all__ = ["main"]

INPUT_TROUBLE = 2
INTERRUPTED = 130

_DESCRIPTION = """\
What a client's gradient gives away in federated learning.

The gradient of a model's last dense layer is (softmax(W x + b) - y) x^T. From it and W alone softinv computes the
client's soft label y and last-layer feature x, and says how sure that is: unique, ambiguous (candidates are listed),
unidentifiable (many labels explain the gradient) or no_signal. From the gradient of the whole model it goes on to the
client's images."""

_EPILOG = """\
examples:
  softinv demo                                    attack a small network on real photographs, about a minute
  softinv recover seen.npz --out recovered.npz    what one or many gradients of yours give away
  softinv invert --model lenet --parameters model.npz --gradients seen.npz --out images.npz --figure images.png
  softinv audit --quick                           what a system gives away, and what stops it: a report to read

exit codes: 0 done, 2 the input or an option is at fault (one line on stderr says what), 130 interrupted"""


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(INPUT_TROUBLE, f"{self.prog}: {message}; see {self.prog} --help\n")


def _versions() -> str:
    try:
        own = version("softinv_jax")
    except PackageNotFoundError:
        own = "(not installed, run from a checkout)"
    return f"softinv {own}, jax {version('jax')}, numpy {version('numpy')}, Python {platform.python_version()}"


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog="softinv",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=_versions())
    parser.add_argument(
        "--no-compilation-cache",
        dest="compilation_cache",
        action="store_false",
        help="do not keep compiled programs for the next run (they go to ~/.cache/softinv, or where the variable"
        " JAX_COMPILATION_CACHE_DIR says)",
    )
    commands = parser.add_subparsers(dest="command", metavar="{demo,recover,invert,audit}", required=True)
    demo.add_parser(commands)
    recover.add_parser(commands)
    invert.add_parser(commands)
    audit.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
      argv: arguments without the program's name; by default those of the process.

    Returns:
      The exit code.
    """
    try:
        arguments = _parser().parse_args(argv)
        if arguments.compilation_cache:
            keep_compiled_programs()
        arguments.run(arguments)
        sys.stdout.flush()
    except InputError as error:
        print(f"softinv: {error}", file=sys.stderr)
        return INPUT_TROUBLE
    except KeyboardInterrupt:
        print("softinv: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever reads the output has seen enough; keep Python from complaining when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
