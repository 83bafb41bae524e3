"""What can be run, each as `python -m scripts.NAME`."""

import signal
import sys

if sys.argv[0] == "-m":  # which it is until NAME is found: then Ctrl-C during seconds of imports
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends without a traceback; `run_cli` sets it back
