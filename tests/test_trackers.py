"""Trackers without a network: what lies in the run's folder is read back."""

import json
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from runs import config, log_lines, train_until

from data.audio import read_audio
from scripts.run_log import RunLog
from scripts.trackers import tracking
from train import train

PREVIEWS = ("train.sample_every=6", "train.sample_seconds=0.3")
VERSIONS = ("made", "continued", "real")


def wandb_records(file):
    """The records of a .wandb file, as dictionaries of what they hold."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    store, records = DataStore(), []
    store.open_for_scan(str(file))
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        records.append(record)
    return records


def history(records):
    """step -> {name: value} of what was logged."""
    found = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {
                (item.key or "/".join(item.nested_key)): json.loads(item.value_json)
                for item in record.history.item
            }
            found.setdefault(items["_step"], {}).update(items)
    return found


def test_wandb_offline_holds_numbers_and_what_was_heard(decodable, tmp_path):
    out = tmp_path / "run"
    train(config(decodable, out, "wandb.mode=offline", *PREVIEWS, stage="acoustic"))
    (folder,) = (out / "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    logged = history(wandb_records(file))
    for line in log_lines(out, "train", "valid"):
        step = logged[line["step"]]
        assert step[f"{line['kind']}/loss"] == pytest.approx(line["loss"])
        assert step[f"{line['kind']}/bits_per_second"] == pytest.approx(line["bits_per_second"])
    assert {"train/grad_norm", "train/lr", "train/tokens_per_second"} <= logged[12].keys()
    assert logged[12].keys() >= {f"train/per_codebook/{k}" for k in range(4)}
    wavs = [*(folder / "files/media/audio").rglob("*.wav")]
    assert len(wavs) == 2 * 2 * len(VERSIONS)
    assert len([*(folder / "files/media/html").rglob("*.html")]) == len(wavs)
    for version in VERSIONS:
        assert logged[12][f"0 {version}/_type"] == "audio-file"
    ours = read_audio(next((out / "samples/step-00000012").glob("0-*.real.wav")))[0]
    played = folder / "files" / logged[12]["0 real/path"]
    theirs, rate = read_audio(played)
    assert rate == 16_000
    assert theirs.shape == ours.shape


def test_a_resumed_run_goes_on_in_the_same_place(tokens, tmp_path):
    settings = config(tokens, tmp_path / "run", "wandb.mode=offline")
    train_until(5, settings)
    train(settings, resume=True)
    files = [*(tmp_path / "run/wandb").glob("offline-run-*/*.wandb")]
    assert len(files) == 2
    runs = [
        record.run.run_id
        for file in files
        for record in wandb_records(file)
        if record.WhichOneof("record_type") == "run"
    ]
    assert len({*runs}) == 1
    assert runs[0] == (tmp_path / "run/wandb-id.txt").read_text()


def test_tensorboard_is_one_word_and_named_where_it_lacks(tokens, tmp_path, monkeypatch):
    settings = config(tokens, tmp_path / "run", "tensorboard=true")
    monkeypatch.setattr("scripts.trackers.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="tensorboard=true needs it: pip install tensorboard=="):
        train(settings)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("scripts.trackers.find_spec", lambda _: object())
    assert tracking(settings)["log_with"] == ["tensorboard"]
    assert tracking(config(tokens, tmp_path / "run"))["log_with"] is None


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs tensorboard")
def test_tensorboard_holds_the_same(decodable, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    train(config(decodable, out, "tensorboard=true", *PREVIEWS, stage="coarse"))
    folders = {path.parent for path in (out / "tensorboard").rglob("events.*")}
    found = {}
    for folder in folders:
        events = EventAccumulator(str(folder))
        events.Reload()
        tags = events.Tags()
        found |= {tag: events.Scalars(tag) for tag in tags["scalars"]}
        found |= {("audio", tag): events.Audio(tag) for tag in tags["audio"]}
        found |= {("image", tag): events.Images(tag) for tag in tags["images"]}
    losses = {event.step: event.value for event in found["valid/loss"]}
    for line in log_lines(out, "valid"):
        assert losses[line["step"]] == pytest.approx(line["loss"], rel=1e-5)
    for version in VERSIONS:
        assert [event.step for event in found["audio", f"1 {version}"]] == [6, 12]
        assert found["image", f"1 {version}"][0].height == 96


def test_nothing_is_tracked_unasked(tokens, tmp_path):
    train(config(tokens, tmp_path / "run", "train.steps=4"))
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"checkpoints", "config.yaml", "log.jsonl"}


@pytest.mark.parametrize("watched", [True, False])
def test_a_terminal_shows_one_line_and_a_file_all_of_them(watched, tokens, tmp_path, capsys):
    """In the line: what the last step logged; above it, validations alone."""
    process = SimpleNamespace(is_main_process=True, log_with=[], end_training=lambda: None)
    log, shown = RunLog(config(tokens, tmp_path / "run"), process, 0), []
    assert log.bar.disable  # no one watches a test
    log.bar = SimpleNamespace(disable=not watched, set_postfix_str=shown.append)
    log.show(3, "loss 1.0")
    said = capsys.readouterr().out
    assert said == ("" if watched else "step      3  loss 1.0\n")
    assert not watched or shown == ["loss 1.0"]
