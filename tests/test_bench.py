"""The benchmarks measure what they say, beside their baselines, and write it down."""

import json
import re
from functools import partial

import pytest
import torch
from tokens import write_tokens

from scripts import bench, bench_attend, bench_train
from scripts.bench_tools import median_ms

SMALL = (
    "model={dim: 32, num_layers: 1, num_heads: 4, head_dim: 8}",
    "data={crop_seconds: 0.4, num_workers: 0}",
    "train={batch_size: 4, kernels: plain}",
    "num_coarse=2",
)
RECIPE = "configs/coarse_270m.yaml"


class InThisProcess:
    """In place of the process that each variant gets to itself."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        self.result = lambda: function(*arguments)
        return self


def test_a_median_is_of_one_call():
    calls = []
    assert median_ms(lambda: calls.append(torch.ones(10).sum()), seconds=0.01) > 0
    assert len(calls) > 2


def test_attend_prints_every_case_on_every_backend(tmp_path, capsys, monkeypatch):
    sizes = ["--batch", "2", "--heads", "4", "--length", "16", "--head-dim", "8"]
    out = tmp_path / "attend.json"
    chosen = ["--backends", "auto", "einsum", "cudnn", "--device", "cpu"]
    monkeypatch.setattr(bench_attend, "median_ms", partial(median_ms, seconds=0.01))
    bench.main(["attend", *sizes, *chosen, "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["sizes"] == {"batch": 2, "heads": 4, "length": 16, "head_dim": 8}
    assert found["command"].startswith("python -m scripts.")
    for row in found["rows"]:
        assert row["backends"]["auto"]["forward"] > 0
        assert row["backends"]["auto"]["chosen"][0] != "einsum"
        assert row["backends"]["einsum"]["chosen"] == ["einsum"]
        assert "needs CUDA" in row["backends"]["cudnn"]["objection"]
        assert ("both" in row["backends"]["auto"]) == ("1 query" not in row["case"])
    said = capsys.readouterr().out
    assert re.search(
        r"learnt bias +\d+\.\d\d / \d+\.\d\d +\d+\.\d\d / \d+\.\d\d +- +\d+\.\d x", said
    )
    assert "cudnn: attention.backend=cudnn cannot run here: it needs CUDA" in said


def test_train_times_the_step_beside_its_baselines(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_train, "ProcessPoolExecutor", InThisProcess)
    out = tmp_path / "train.json"
    also = ["--compare", "two halves: train.num_micro_batches=2"]
    command = ["train", "--config", RECIPE, *SMALL, "--steps", "2", *also]
    bench.main([*command, "--out", str(out)])
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert [*rows] == [
        "as configured",
        "plain kernels",
        "plain kernels, padded",
        "plain kernels, einsum, one clip at a time",
        "two halves",
    ]
    whole = rows["as configured"]
    assert whole["filled"] > 0.98  # made-up clips are longer than a crop; some end with an EOS
    assert whole["tokens_per_second"] > 0
    for row in rows.values():  # the same tokens, weights and steps, whatever the speed
        assert row["loss"] == pytest.approx(whole["loss"], abs=1e-4)
    assert "einsum" in rows["plain kernels, einsum, one clip at a time"]["attention"]
    assert re.search(r"two halves +\d", capsys.readouterr().out)


@pytest.mark.parametrize("words", ["fast", "fast: now", "typo: train.kernel=plain"])
def test_a_comparison_that_is_none_is_an_error(words, monkeypatch):
    monkeypatch.setattr(bench_train, "time_steps", lambda *_: pytest.fail("timed"))
    with pytest.raises(ValueError, match=r"--compare|Did you mean"):
        bench.main(["train", "--config", RECIPE, *SMALL, "--compare", words])


def test_data_times_the_loader(tmp_path, capsys):
    tokens, out = write_tokens(tmp_path), tmp_path / "data.json"
    command = ["data", "--config", RECIPE, *SMALL, f"data.tokens={tokens}", "--workers", "0", "1"]
    bench.main([*command, "--batches", "4", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [(row["num_workers"], row["packed"]) for row in rows] == [
        (workers, packed) for workers in (0, 1) for packed in (False, True)
    ]
    for row in rows:
        assert row["batches_per_second"] > 0
        assert row["packed"] == (row["filled"] == 1)
        assert row["filled"] > 0.3  # clips of 8 to 40 frames, in crops of 20
    assert re.search(r"1 +no +\d[\d.,]* +\d[\d,]* +\d\d%", capsys.readouterr().out)
