"""What can be run, each as `python -m scripts.NAME`."""

import os
import signal
import sys

if sys.argv[0] == "-m":  # which it is until NAME is found: then Ctrl-C during seconds of imports
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends without a traceback; `run_cli` sets it back
    # How often PyTorch's threads look before they sleep while they wait: at libgomp's 300,000 two
    # commands on two cores all but stop each other (4 s of audio: over 60 s each, now 18; alone 9)
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
