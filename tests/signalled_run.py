"""One of several processes that train and are told to stop, again and again.

    python tests/signalled_run.py CONFIG RECORD before:2 middle:4 valid:6

Started once per process by test_train_processes.py, with RANK and the like in the environment. For
each WHERE:STEP it continues the run of CONFIG; at run.step == STEP, before an update, in the middle
of it or at the validation, SIGTERM comes to process 1 alone. RECORD gets what this process did.
"""

import json
import os
import signal
import sys

import torch

import train
from configs.files import atomic_write
from configs.load import load_config
from configs.schema import RunConfig

config, record, *stops = sys.argv[1:]
saved, seeds, codes = [], {}, []  # steps; the seed of each step's update; exit codes
came = set()


def watch(owner: object, name: str, where: str, step_of) -> None:
    """Let SIGTERM come to process 1 when `owner.name` is called at the step that is next."""
    original = getattr(owner, name)

    def watched(*arguments):
        place = f"{where}:{step_of(*arguments)}"
        if where == "middle":
            seeds[arguments[0]] = torch.initial_seed()
        if place == stops[0] and place not in came and os.environ["RANK"] == "1":
            came.add(place)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    setattr(owner, name, watched)


def save(run: train.Training, original=train.Training.save) -> None:
    original(run)
    saved.append(run.step)


watch(train.Training, "update", "before", lambda run, _: run.step)
watch(train, "learning_rate", "middle", lambda step, *_: step)  # after the sums over processes
watch(train.Training, "validate", "valid", lambda run, _: run.step)
train.Training.save = save
train.Accelerator.end_training = lambda _: None  # it would end the group, which goes on
while stops:
    try:
        train.train(load_config(RunConfig, config, []), resume=True)
    except SystemExit as stopped:
        codes.append(stopped.code)
    stops.pop(0)
with atomic_write(record) as file:
    json.dump({"saved": saved, "seeds": seeds, "codes": codes}, file)
