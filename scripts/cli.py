"""What every command line here shares: help that shows examples, and errors in one clear line."""

import argparse
import ctypes
import difflib
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Parser(argparse.ArgumentParser):
    """No abbreviated flags, and a mistake in one line; `add_subparsers` makes more of its kind."""

    def __init__(self, **options):
        super().__init__(**options, allow_abbrev=False)
        self.words: list[str] = []

    def parse_known_args(self, args=None, namespace=None):
        self.words = sys.argv[1:] if args is None else [*args]
        parsed, unknown = super().parse_known_args(args, namespace)
        if any(word.startswith("--") for word in unknown):  # here, where its neighbours are known
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        """A mistyped flag is named first: argparse would miss the one it stands for."""
        flags = self._option_string_actions
        for word in self.words:
            flag = word.partition("=")[0]
            if flag.startswith("--") and flag not in flags and word != "--":
                near = difflib.get_close_matches(flag, flags, 1)
                message = f"{flag}: no such flag" + (f"; did you mean {near[0]}?" if near else "")
                break
        more = "shows examples" if self.epilog else "says what there is"
        self.exit(2, f"error: {message} ({self.prog} --help {more})\n")


def make_parser(description: str, examples: str) -> Parser:
    """A Parser whose --help ends with `examples`, printed as typed."""
    return Parser(
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_command(commands: Any, examples: str, name: str, help: str) -> Parser:
    """A command among others, with those examples of theirs that are its own."""
    blocks = re.split(r"\n(?=  \S)", examples)
    own = [block for block in blocks if re.search(rf"scripts\.\w+ {name}\b", block)]
    epilog = "\n".join(["examples:", *own]) if own else None
    raw = argparse.RawDescriptionHelpFormatter
    about = f"{help[0].upper()}{help[1:]}."
    return commands.add_parser(
        name, help=help, description=about, epilog=epilog, formatter_class=raw
    )


def command_line() -> str:
    """What was typed, for whoever wants to do it again."""
    return f"python -m scripts.{shlex.join([Path(sys.argv[0]).stem, *sys.argv[1:]])}"


def find_device(name: str | None) -> torch.device:
    """The device asked for, or the GPU where there is one. ValueError: unknown or not here."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # Triton and CUDA graphs ask for no other
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: cannot be used here ({reason})") from None
    # a GPU's convolutions would round to 10 bits unasked: not the tokens that scripts.prepare made
    torch.backends.cudnn.allow_tf32 = False
    return device


def end_with_launcher() -> None:
    """Have SIGTERM sent to this process when accelerate's launcher dies (on Linux).

    With one process, that launcher passes no signal on: its own SIGTERM would leave an orphan
    that goes on training, and save nothing.
    """
    launched = any(name.startswith("ACCELERATE_") for name in os.environ)
    if launched and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def run_cli(main: Callable[[], None]) -> None:
    """Run `main`; a user's mistake (ValueError, OSError) becomes one line on stderr and exit 2.

    Ctrl-C exits with 130. Set MINI_AUDIOLM_TRACE=1 to see the traceback instead.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # see __init__.py
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        if os.environ.get("MINI_AUDIOLM_TRACE"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
