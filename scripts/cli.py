"""What every command line here shares: help that shows examples, and errors in one clear line."""

import argparse
import ctypes
import os
import signal
import sys
from collections.abc import Callable

import torch

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def make_parser(description: str, examples: str) -> argparse.ArgumentParser:
    """An ArgumentParser whose --help ends with `examples`, printed as typed."""
    return argparse.ArgumentParser(
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def find_device(name: str | None) -> torch.device:
    """The device asked for, or the GPU where there is one. ValueError: unknown or not here."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
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
