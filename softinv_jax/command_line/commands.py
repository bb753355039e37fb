"""The commands of `softinv`, and what becomes of whatever goes wrong in one: a line on stderr and an exit code."""

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from softinv_jax.command_line import audit, demo, invert, recover
from softinv_jax.command_line.compilation_cache import keep_compiled_programs
from softinv_jax.command_line.console import InputError
from softinv_jax.command_line.jax_variables import prepare_jax

__all__ = ["run_command"]

INPUT_TROUBLE = 2
OUR_TROUBLE = 1
INTERRUPTED = 130
TRACEBACK_VARIABLE = "SOFTINV_TRACEBACK"
LONGEST_MESSAGE = 300

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

exit codes: 0 done, 1 a defect of softinv, or no memory, 2 the input, an option or the place to write is at fault (one
line on stderr says what), 130 interrupted"""


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


def run_command(argv: Sequence[str] | None) -> int:  # noqa: PLR0911 - one for each kind of trouble
    """Run one command; see `softinv_jax.command_line.main.main`."""
    try:
        try:
            arguments = _parser().parse_args(argv)
            prepare_jax()
            if arguments.compilation_cache:
                keep_compiled_programs()
            arguments.run(arguments)
        finally:
            sys.stdout.flush()
    except InputError as error:
        return _say(str(error), INPUT_TROUBLE)
    except KeyboardInterrupt:
        return _say("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # Whoever reads the output has seen enough.
        _let_go_of_stdout()
        return 0
    except OSError as error:
        _let_go_of_stdout()
        named = error.filename if isinstance(error.filename, str) else "standard output"
        return _say(f"{named}: {error.strerror or error}; make room, or send it elsewhere", INPUT_TROUBLE)
    except MemoryError:
        return _say("out of memory; give fewer gradients at once (recover --chunk), or a smaller model", OUR_TROUBLE)
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        words = " ".join(str(error).split())[:LONGEST_MESSAGE]
        told = (
            f"unexpected {type(error).__name__}: {words}; a defect of softinv: set {TRACEBACK_VARIABLE}=1 to see where"
        )
        return _say(told, OUR_TROUBLE)
    return 0


def _say(message: str, code: int) -> int:
    with suppress(OSError):
        print(f"softinv: {message}", file=sys.stderr, flush=True)
    return code


def _let_go_of_stdout() -> None:
    """Keep Python from complaining when it flushes at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
