"""Training: it learns, it repeats itself to the bit, it resumes as if nothing had happened."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import assert_same_run, config, log_lines, losses, train_until, weights
from tokens import CODEC, write_tokens

import train as train_module
from configs.load import save_config
from configs.schema import OptimConfig
from model.checkpoint import (
    damage,
    list_checkpoints,
    load_stage,
    read_state,
    read_tensors,
    rotate_checkpoints,
)
from model.optim import EMA, evaluating, learning_rate, make_optimizer
from model.stages import STAGES, stage_spec
from train import Training, train

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden_losses.json"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_learns_and_logs(stage, tokens, tmp_path):
    train(config(tokens, tmp_path / "run", "train.steps=60", "train.valid_every=20", stage=stage))
    first, last = log_lines(tmp_path / "run", "start", "valid")[::3]
    assert last["bits_per_second"] < 0.75 * first["unigram"]["bits_per_second"]
    assert first["unigram"]["bits_per_second"] <= first["uniform"]["bits_per_second"] + 1
    assert len(last["per_codebook"]) == len(first["codebooks"])
    line = log_lines(tmp_path / "run", "train")[-1]
    for key in ("tokens_per_second", "mfu", "data_wait", "peak_memory_gib", "lr", "grad_norm"):
        assert key in line
    mean = sum(last["per_codebook"]) / len(last["per_codebook"])
    assert last["loss"] == pytest.approx(mean, rel=0.2)


@pytest.mark.parametrize("stage", ["coarse", "fine", "acoustic"])
def test_a_pattern_is_trained_saved_and_loaded(stage, tokens, tmp_path):
    pattern = "flatten" if stage == "acoustic" else "delay"
    run = train(config(tokens, tmp_path, "train.steps=4", f"pattern={pattern}", stage=stage))
    assert run.spec.layout.pattern == pattern
    loaded, state = load_stage(tmp_path)
    assert loaded.layout == run.spec.layout
    assert [head.out_features for head in loaded.heads] == list(loaded.layout.head_sizes)
    del state["spec"]["pattern"]  # as in checkpoints from before there was a choice
    assert stage_spec(**state["spec"]).layout.pattern != pattern


def test_golden_losses(tokens, tmp_path):
    """A refactor must reproduce these. UPDATE_GOLDEN=1 rewrites them: say why in the commit."""
    found = {}
    for stage in STAGES:
        train(config(tokens, tmp_path / stage, stage=stage))
        found[stage] = {f"{k} {s}": round(v, 6) for (k, s), v in losses(tmp_path / stage).items()}
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert found.keys() == golden.keys()
    for stage, expected in golden.items():
        assert found[stage] == pytest.approx(expected, abs=2e-5), stage


def test_interrupted_equals_uninterrupted(tokens, tmp_path, capsys):
    """SIGTERM in the middle of a step, between two log lines; and once more."""
    train(config(tokens, tmp_path / "whole"))
    for at in (5, 9):
        train_until(at, config(tokens, tmp_path / "parts"), resume=True)
    train(config(tokens, tmp_path / "parts"), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    said = capsys.readouterr().out
    for words in ("begins at step 0", "resuming at step 5", "resuming at step 9"):
        assert f"{tmp_path / 'parts'}: {words}\n" in said


def test_crashed_equals_uninterrupted(tokens, tmp_path, monkeypatch):
    """A crash between checkpoints: the steps since the last one are made again, alike."""
    dropout = "model.dropout=0.2"
    train(config(tokens, tmp_path / "whole", dropout))
    update = Training.update

    def crash(run, batches):
        if run.step == 7:
            raise RuntimeError("out of luck")
        return update(run, batches)

    monkeypatch.setattr(Training, "update", crash)
    with pytest.raises(RuntimeError, match="out of luck"):
        train(config(tokens, tmp_path / "parts", dropout))
    monkeypatch.setattr(Training, "update", update)
    train(config(tokens, tmp_path / "parts", dropout), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_micro_batches_equal_one_big_batch(tokens, tmp_path):
    """Clips of many lengths: only a normalisation by tokens gives the same gradient."""
    for k in (1, 4):
        changes = ("train.steps=4", f"train.num_micro_batches={k}", "data.crop_seconds=1.0")
        train(config(tokens, tmp_path / str(k), *changes))
    one, four = weights(tmp_path / "1"), weights(tmp_path / "4")
    for name in one:
        torch.testing.assert_close(one[name], four[name], atol=2e-5, rtol=1e-3)


def test_two_processes_equal_one(tokens, tmp_path):
    """The same global batch, cut in two by a launcher: the same losses, one writer."""
    train(config(tokens, tmp_path / "one"))
    save_config(config(tokens, tmp_path / "two"), tmp_path / "two.yaml")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, "train.py", "--config", str(tmp_path / "two.yaml")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    assert [x["step"] for x in log_lines(tmp_path / "two", "valid")] == [6, 12]


def test_validation_is_whole_and_leaves_the_mode_alone(tokens, tmp_path):
    cfg = config(tokens, tmp_path / "run", "train.batch_size=4", "model.dropout=0.3")
    run = Training(cfg, train_module.Accelerator(), resume=False)
    run.stage.transformer.blocks[0].eval()  # a mode somebody chose
    modes = [module.training for module in run.stage.modules()]
    before = {name: p.clone() for name, p in run.stage.named_parameters()}
    _, loader = run.loaders()
    whole = run.validate(loader)
    assert [module.training for module in run.stage.modules()] == modes
    assert all(torch.equal(p, before[n]) for n, p in run.stage.named_parameters())
    counted = sum(batch.num_targets for batch in loader)
    clips = run.folder.clips("valid")
    assert counted == sum(2 * clip.num_frames + 1 for clip in clips)  # 2 codebooks, an EOS a clip
    assert run.validate(loader) == whole


def test_evaluating_restores_modes_after_an_error():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout().eval())
    with contextlib.suppress(ValueError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise ValueError
    assert [m.training for m in model.modules()] == [True, True, False]


def test_a_run_is_never_overwritten(tokens, tmp_path):
    out = tmp_path / "run"
    train(config(tokens, out, "train.steps=4"))
    before = (out / "log.jsonl").read_text()
    with pytest.raises(ValueError, match="not empty: continue it with --resume"):
        train(config(tokens, out, "train.steps=4"))
    run = train(config(tokens, out, "train.steps=4"), resume=True)
    assert run.step == 4
    assert (out / "log.jsonl").read_text() == before


def test_rotation_keeps_the_best_and_the_newest(tokens, tmp_path):
    out = tmp_path / "run"
    train(config(tokens, out, "train.steps=6", "train.save_every=1", "train.num_kept=6"))
    rotate_checkpoints(out, num_kept=2, best_step=3)
    assert [int(folder.name[5:]) for folder in list_checkpoints(out)] == [3, 5, 6]


def test_what_is_sampled_is_the_best_checkpoint_and_its_averaged_weights(tokens, tmp_path):
    out = tmp_path / "run"
    train(config(tokens, out, "train.steps=4", "train.save_every=1", "train.num_kept=4"))
    newest, best = list_checkpoints(out)[-1], list_checkpoints(out)[1]
    state = read_state(newest) | {"best_step": 2}
    (newest / "state.json").write_text(json.dumps(state))
    stage, loaded = load_stage(out)
    assert loaded["path"] == str(best)
    average, latest = read_tensors(best, "ema"), read_tensors(best, "model")
    parameters = dict(stage.named_parameters())
    assert all(torch.equal(parameters[name], t) for name, t in average.items())
    assert not all(torch.equal(parameters[name], t) for name, t in latest.items())


def test_a_model_of_another_version_is_refused(tokens, tmp_path, monkeypatch):
    train(config(tokens, tmp_path / "run", "train.steps=2"))
    older = {"transformer.norm.weight": torch.ones(8)}
    monkeypatch.setattr("model.checkpoint.read_tensors", lambda *args: read_tensors(*args) | older)
    with pytest.raises(ValueError, match=r"another version .* no transformer.norm.weight\)"):
        load_stage(tmp_path / "run")


def test_a_run_of_another_version_is_not_resumed(tokens, tmp_path):
    train(config(tokens, tmp_path / "run", "train.steps=2"))
    saved = tmp_path / "run/config.yaml"
    saved.write_text(saved.read_text().replace("  kernels:", "  compile:"))
    with pytest.raises(ValueError, match=r"config.yaml: .*compile.* another version of the code"):
        train(config(tokens, tmp_path / "run", "train.steps=4"), resume=True)


def test_a_damaged_checkpoint_names_the_last_whole_one(tokens, tmp_path):
    out = tmp_path / "run"
    train(config(tokens, out))
    newest = list_checkpoints(out)[-1]
    assert damage(newest) is None
    file = newest / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model.safetensors has .* last whole one is .*step-0"):
        load_stage(newest)


def test_tokens_of_another_codec_are_refused(tokens, tmp_path):
    out = tmp_path / "run"
    train(config(tokens, out, "train.steps=2"))
    (tmp_path / "other").mkdir()
    other = write_tokens(
        tmp_path / "other", codec={**CODEC, "fingerprint": "0ther", "codebook_size": 32}
    )
    with pytest.raises(ValueError, match=r"c0dec.*0ther"):
        train(config(other, out, "train.steps=4"), resume=True)


@pytest.mark.parametrize(
    "change", ["model.dim=16", "model.rotary_base=77", "optim.lr=0.5", "train.seed=9"]
)
def test_a_run_is_resumed_as_it_was_begun(tokens, tmp_path, change):
    train(config(tokens, tmp_path / "run", "train.steps=2"))
    key = change.partition("=")[0]
    with pytest.raises(ValueError, match=rf"must be configured as it was begun \({key}: "):
        train(config(tokens, tmp_path / "run", change, "train.steps=4"), resume=True)
    train(config(tokens, tmp_path / "run", "train.steps=4", "train.save_every=1"), resume=True)


def test_other_recordings_are_refused(tokens, tmp_path):
    train(config(tokens, tmp_path / "run", "train.steps=2"))
    (tmp_path / "other").mkdir()
    other = write_tokens(tmp_path / "other", num_train=5)
    with pytest.raises(ValueError, match="was trained on other recordings"):
        train(config(other, tmp_path / "run", "train.steps=4"), resume=True)


def test_a_mistake_leaves_no_run_folder(tokens, tmp_path):
    with pytest.raises(ValueError, match="does not divide"):
        train(config(tokens, tmp_path / "run", "train.batch_size=7", "train.num_micro_batches=2"))
    assert not (tmp_path / "run").exists()


def test_learning_rates():
    cosine = OptimConfig(lr=1.0, warmup_steps=10, min_lr_share=0.1)
    rates = [learning_rate(step, 100, cosine) for step in range(100)]
    assert rates[:2] == [0.1, 0.2]
    assert max(rates) == rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    wsd = OptimConfig(lr=1.0, warmup_steps=10, schedule="wsd", decay_share=0.2, min_lr_share=0.0)
    rates = [learning_rate(step, 100, wsd) for step in range(100)]
    assert rates[10] == rates[79] == 1.0
    assert rates[89] == pytest.approx(0.5)
    assert rates[-1] == 0.0


def test_decay_spares_norms_and_embeddings():
    model = torch.nn.Sequential(
        torch.nn.Embedding(3, 4), torch.nn.RMSNorm(4), torch.nn.Linear(4, 2)
    )
    decayed, others = make_optimizer(model, OptimConfig()).param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(2, 4)]
    assert decayed["weight_decay"] == 0.1
    assert others["weight_decay"] == 0.0
    assert len(others["params"]) == 3


def test_ema_averages_and_gives_the_weights_back():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    ema = EMA(model, decay=0.5)
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema.update(model)  # decay 2/11
    with ema.applied_to(model):
        assert model.weight.item() == pytest.approx(9 / 11)
    assert model.weight.item() == 1.0


def test_samples_are_written_during_training(tokens, tmp_path):
    train(config(tokens, tmp_path / "run", "train.sample_every=6", stage="semantic"))
    files = sorted(path.name for path in (tmp_path / "run/samples/step-00000012").iterdir())
    assert [name.split(".")[1] for name in files] == ["continued", "made"] * 2
    made = json.loads((tmp_path / "run/samples/step-00000012" / files[1]).read_text())
    assert len(made["tokens"][0]) > 0
