"""Kill a run at a random moment, resume it, and compare it with one that nobody touched.

    PYTHONPATH=. python tests/kill_tries.py --tries 50

Each try is a process that gets SIGKILL, SIGTERM or SIGINT at a random time, up to three times
before it may go to its end: wherever it is then, in a step, a validation or in the middle of
writing a checkpoint. Logged losses, weights, averages and moments must be those of the whole run.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

import torch
from runs import assert_same_run, config
from tokens import write_tokens
from tqdm import tqdm

from train import train

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
CHANGES = ("model.dropout=0.2", "train.save_every=1", "train.log_every=1", "train.num_kept=2")


def in_a_child(settings: object, log: Path) -> int:
    """Train in a fork of this process, which has everything imported; returns its id."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS[1:])  # until the child can say so
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        return child
    code = 99
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        # tqdm's own is that of all processes, and a killed one does not give it back
        tqdm.set_lock(threading.RLock())
        train(settings, resume=True)
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    except KeyboardInterrupt:  # before the run listens: what `run_cli` makes of it
        code = 128 + signal.SIGINT
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def attempt(tokens: Path, folder: Path, seconds: float, draw: random.Random) -> list[str]:
    """One run with its kills; what ended each of its processes."""
    settings, ended = config(tokens, folder / "run", *CHANGES), []
    for last in (False, False, False, True):
        child = in_a_child(settings, folder / "output.txt")
        number = draw.choice(SIGNALS)
        if not last:
            time.sleep(draw.uniform(0, 0.6 * seconds))
            os.kill(child, number)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            return [*ended, "end"]
        # before its handlers are set, and after they are taken back, a run just dies
        expected = () if last else (-number, 128 + number)
        assert code in expected, f"{code}\n{(folder / 'output.txt').read_text()}"
        ended.append(number.name)
    raise AssertionError("not reached")


def tries(folder: Path, count: int, seed: int) -> Counter:
    """How often what ended a process; AssertionError at the first run that differs."""
    torch.set_num_threads(1)
    tokens, draw, ends = write_tokens(folder), random.Random(seed), Counter()
    started = time.perf_counter()
    train(config(tokens, folder / "whole", *CHANGES))
    seconds = time.perf_counter() - started
    for n in range(count):
        (folder / str(n)).mkdir()
        ended = attempt(tokens, folder / str(n), seconds, draw)
        assert_same_run(folder / "whole", folder / str(n) / "run")
        ends.update(ended)
    return ends


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tries", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = tries(Path(scratch), options.tries, options.seed)
    print(f"{options.tries} runs equal the whole one; their processes ended by {dict(found)}")
