"""The benchmarks measure what they say, beside their baselines, and write it down."""

import json
import os
import re
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from tokens import write_tokens

from configs.load import load_config
from configs.schema import RunConfig
from scripts import (
    bench,
    bench_attend,
    bench_learn,
    bench_peers,
    bench_readme,
    bench_scale,
    bench_train,
)
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
        "not captured",
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


def test_what_is_timed_before_a_crash_is_kept(tmp_path, monkeypatch):
    def broken(name, *_):
        raise OSError("the machine is gone")

    out = tmp_path / "train.json"
    monkeypatch.setattr(bench_train, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(bench_train, "variants", lambda *_: {"as configured": []})
    monkeypatch.setattr(bench_train, "installed_peers", lambda: ["a peer"])
    monkeypatch.setattr(bench_train, "time_peer", broken)
    command = ["train", "--config", RECIPE, *SMALL, "--steps", "2", "--peers", "--out", str(out)]
    with pytest.raises(OSError, match="gone"):
        bench.main(command)
    found = json.loads(out.read_text())
    assert [row["name"] for row in found["rows"]] == ["as configured"]
    assert found["table"][1][0] == "as configured"


def test_peers_take_the_largest_batch_that_fits(monkeypatch, capsys):
    tried = []

    class Layer:
        package = "torch"

        def __init__(self, config, frames, device):
            self.model, self.device = torch.nn.Linear(3, 3).to(device), device

        def loss(self, batch):
            tried.append(batch)
            if batch > 1:
                raise torch.OutOfMemoryError
            return lambda: self.model(torch.ones(batch, 3, device=self.device)).square().sum()

    monkeypatch.setattr(bench_train, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(bench_train, "variants", lambda *_: {})
    absent = type("Absent", (), {"package": "absent_"})
    monkeypatch.setattr(bench_peers, "PEERS", {"a layer": Layer, "no": absent})
    bench.main(["train", "--config", RECIPE, *SMALL, "--steps", "2", "--peers"])
    assert tried == [4, 2, 1]
    assert re.search(r"a layer, batch 1 +\d", capsys.readouterr().out)
    monkeypatch.setattr(bench_peers, "PEERS", {"no": absent})
    with pytest.raises(ValueError, match="none is installed; pip install"):
        bench.main(["train", "--config", RECIPE, "--peers"])


def test_some_rows_alone_and_a_peer_that_cannot_be_imported(tmp_path, monkeypatch, capsys):
    class Broken:
        package = "torch"

        def __init__(self, *_):
            raise ImportError("\nno wandb | here\nnor there")

    monkeypatch.setattr(bench_train, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(bench_peers, "PEERS", {"a peer": Broken})
    command = ["train", "--config", RECIPE, *SMALL, "--steps", "1", "--peers", "--only"]
    bench.main([*command, "plain kernels", "a peer", "--out", str(tmp_path / "x.json")])
    found = json.loads((tmp_path / "x.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["plain kernels", "a peer"]
    assert found["table"][2][:3] == ["a peer", "cannot be imported: no wandb / here", "-"]
    assert len({len(cells) for cells in found["table"]}) == 1
    with pytest.raises(ValueError, match="no row is named 'plain kernel'; there are as configured"):
        bench.main([*command, "plain kernels", "plain kernel"])


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


def test_a_group_of_processes_meets_where_no_other_did(monkeypatch):
    monkeypatch.delenv("MASTER_PORT", raising=False)
    bench_train.meet_elsewhere(0)
    assert "MASTER_PORT" not in os.environ
    ports = []
    for index in range(2):
        monkeypatch.setenv("MASTER_PORT", "29500")
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")  # which outlives a group
        bench_train.meet_elsewhere(index)
        ports.append(os.environ["MASTER_PORT"])
        assert os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "False"
    assert ports == ["29501", "29502"]


def test_processes_share_the_clips_that_are_trained_one_by_one(monkeypatch):
    config = load_config(RunConfig, RECIPE, ["out=."])
    for processes, expected in (("1", "16"), ("2", "8")):
        monkeypatch.setenv("WORLD_SIZE", processes)
        (slow,) = (
            words for name, words in bench_train.variants(config, []).items() if "one" in name
        )
        assert slow[-1] == f"train.num_micro_batches={expected}"
    monkeypatch.setattr(bench_train, "installed_peers", lambda: ["x"])
    with pytest.raises(ValueError, match="leave out accelerate launch"):
        bench.main(["train", "--config", RECIPE, "--peers"])


def test_scale_runs_the_same_clips_in_one_process_and_in_two(tokens, tmp_path, monkeypatch):
    """Two real processes: the losses of one, equal ranks, speeds beside one's own."""
    out = tmp_path / "scale.json"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = ["scale", "--config", RECIPE, *SMALL, f"data.tokens={tokens}", "--steps", "12"]
    bench.main([*command, "--strategies", "ddp", "--out", str(out)])
    alone, whole, halved, two = json.loads(out.read_text())["rows"]
    assert [row["num_processes"] for row in (alone, whole, halved, two)] == [1, 1, 1, 2]
    assert (whole["alike"], two["alike"]) == (None, True)
    assert len(whole["losses"]) == 2  # after steps 10 and 12
    assert alone["losses"] != whole["losses"]
    assert "apart" not in alone
    for row in (halved, two):
        assert 0 <= row["apart"] < 1e-4
        assert row["losses"] == pytest.approx(whole["losses"], abs=1e-4)
    ratio = two["tokens_per_second"] / alone["tokens_per_second"]
    assert two["of_linear"] == pytest.approx(ratio / 2)


def test_scale_plans_every_number_that_divides_the_clips():
    rows = bench_scale.plan(16, 1, 4, ["ddp", "fsdp2"])
    assert rows["4 processes, ddp"] == ("ddp", 4, 64, 1)
    assert rows["2 processes, fsdp2"] == ("fsdp2", 2, 64, 2)
    assert [clips // (num * micro) for _, num, clips, micro in rows.values()] == [
        *(16, 16, 8),
        *(16,) * 4,
    ]


def test_scale_says_what_cannot_be_and_why_a_row_failed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="fsdp2: Accelerate shards on GPUs alone"):
        bench.main(["scale", "--config", RECIPE, "--strategies", "fsdp2"])
    lost = ["data.tokens=nowhere", "--processes", "1", "--strategies", "ddp"]
    with pytest.raises(ValueError, match="nowhere: no such folder of tokens"):
        bench.main(["scale", "--config", RECIPE, *SMALL, *lost])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="leave out the launcher"):
        bench.main(["scale", "--config", RECIPE])


def test_processes_that_differ_are_told(monkeypatch):
    others = []
    monkeypatch.setattr(bench_train.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(
        bench_train.distributed,
        "all_gather_object",
        lambda found, mine: found.__setitem__(slice(None), [mine, others[-1] if others else mine]),
    )
    weights = {"a": torch.ones(3), "b": torch.arange(4.0).view(2, 2).mT}
    assert bench_train.alike(weights)
    others.append("another digest")
    assert not bench_train.alike(weights)


def test_a_loss_is_reached_between_validations():
    curve = [(10, 2.0, 5.0), (20, 4.0, 4.0), (30, 8.0, 4.5), (40, 9.0, 3.0)]
    assert bench_learn.reached(curve, 5.5) == (10, 2.0)
    assert bench_learn.reached(curve, 4.25) == (17.5, 3.5)
    assert bench_learn.reached(curve, 3.5) == pytest.approx((36.667, 8.667), abs=1e-3)
    assert bench_learn.reached(curve, 2.9) is None


def test_learn_trains_each_variant_and_seed(tokens, tmp_path, capsys):
    out, picture = tmp_path / "learn.json", tmp_path / "learn.svg"
    few = "train={batch_size: 4, steps: 8, valid_every: 4, kernels: plain}"
    command = ["learn", "--config", RECIPE, *SMALL[:2], few, "num_coarse=2", "optim.warmup_steps=1"]
    faster = ["--compare", "faster: optim.lr=0.01", "--seeds", "0"]
    drawn = ["--plot", str(picture)] if find_spec("matplotlib") else []
    bench.main([*command, f"data.tokens={tokens}", *faster, *drawn, "--out", str(out)])
    found = json.loads(out.read_text())
    slow, fast = found["rows"]
    assert [step for step, *_ in slow["curve"]] == [4, 8]
    assert 0 < slow["curve"][0][1] < slow["curve"][1][1]
    assert fast["best"] < slow["best"] == found["target"]
    assert slow["reached"] == [8, slow["curve"][1][1]]
    assert fast["reached"] == fast["curve"][0][:2]
    assert re.search(r"faster +\d\.\d{3} +[\d.,]+ +\d", capsys.readouterr().out)
    assert not drawn or picture.read_text().startswith("<?xml")


def test_learn_tells_why_a_run_failed(tokens):
    command = ["learn", "--config", RECIPE, *SMALL, f"data.tokens={tokens}/none", "--seeds", "0"]
    with pytest.raises(ValueError, match=r"train.py .* failed: error: .*none"):
        bench.main(command)


def test_the_pages_show_what_the_files_say(monkeypatch):
    root = Path(bench.__file__).parents[1]
    monkeypatch.chdir(root)
    results = Path("docs/RESULTS.md").read_text()
    for page in bench_readme.PAGES:
        text = Path(page).read_text()
        assert bench_readme.TABLE.search(text)
        assert bench_readme.with_tables(text) == text, "run scripts.bench readme"
    shown = {found[1] for found in bench_readme.TABLE.finditer(results) if not found[2]}
    assert shown == {str(path) for path in Path("benchmarks").glob("*.json")}
    for picture in Path("benchmarks").glob("*.svg"):
        assert f"(../{picture})" in results


def test_a_table_stands_where_its_file_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = {
        "command": "python -m scripts.bench x",
        "device": "abacus",
        "versions": {"torch": "2"},
        "commit": "abc",
        "table": [["", "ms"], ["ours", "1.0"], ["ours", "2.0"], ["theirs", "9.0"]],
    }
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "x.json").write_text(json.dumps(found))
    (tmp_path / "docs").mkdir()
    text = "Before\n\n<!-- benchmarks/x.json{} -->\nold\n<!-- end -->\n\nAfter"
    (tmp_path / "README.md").write_text(text.format(": ours"))
    (tmp_path / "docs" / "RESULTS.md").write_text(text.format("") + text.format(": theirs"))
    for _ in range(2):  # the second time changes nothing
        bench.main(["readme"])
        readme, results = (Path(name).read_text() for name in bench_readme.PAGES)
        assert "abacus, torch 2, commit abc" in readme
        assert "|  | ms |\n| --- | ---: |\n| ours | 1.0 |\n| ours | 2.0 |\n\n<!--" in readme
        assert readme.startswith("Before\n\n<!-- benchmarks/x.json: ours -->\n\nabacus")
        assert readme.endswith("<!-- end -->\n\nAfter")
        assert "old" not in readme + results
        assert (results.count("| theirs |"), results.count("| ours |")) == (2, 2)
    assert "docs/RESULTS.md: 2 tables" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"x\.json: no row is named 'mine'"):
        bench_readme.with_tables(text.format(": ours; mine"))
    both = text.format("") + text.format(": ours")
    for lost in (both.replace("<!-- end -->", "", 1), both.replace("json -->", "json->", 1)):
        with pytest.raises(ValueError, match="1 of 2 tables are whole"):
            bench_readme.with_tables(lost)


def test_curve_shows_what_runs_learned(tmp_path, capsys, tokens):
    from train import train

    words = ["train.steps=4", "train.valid_every=1", "train.save_every=4", f"data.tokens={tokens}"]
    config = load_config(RunConfig, RECIPE, [*SMALL, *words, f"out={tmp_path / 'coarse'}"])
    train(config)
    bench.main(["curve", str(tmp_path / "coarse"), "--out", str(tmp_path / "curves.json")])
    found = json.loads((tmp_path / "curves.json").read_text())
    (row,) = found["rows"]
    assert [step for step, *_ in row["curve"]] == [1, 2, 3, 4]
    assert row["uniform"]["nats"] == pytest.approx([np.log(16)] * 2)
    assert row["config"]["train"]["steps"] == 4
    assert found["commit"]
    shown = found["table"][1]
    assert (shown[0], shown[1]) == ("coarse", "2.77 (400)")
    last = row["curve"][-1]
    assert shown[6] == f"{last[2]:.2f} ({row['bits'][-1]:.0f}) at 4"
    assert shown[3].endswith("at 1")
    assert "bits per second" in capsys.readouterr().out
    log = tmp_path / "coarse" / "log.jsonl"
    lines = log.read_text().splitlines()
    resumed = [*lines[:3], *lines, '{"kind": "val']  # killed, resumed from the start, killed
    log.write_text("\n".join(resumed))
    bench.main(["curve", str(tmp_path / "coarse"), "--out", str(tmp_path / "again.json")])
    (again,) = json.loads((tmp_path / "again.json").read_text())["rows"]
    assert [again["curve"], again["bits"]] == [row["curve"], row["bits"]]
    with pytest.raises(ValueError, match="no such file; pass a run folder"):
        bench.main(["curve", str(tmp_path)])
    log.write_text(lines[0] + "\n" + lines[-3])
    with pytest.raises(ValueError, match="no validation yet"):
        bench.main(["curve", str(tmp_path / "coarse")])


def test_sample_times_every_stage_and_all_in_a_row(tmp_path, capsys):
    out = tmp_path / "sample.json"
    recipes = [f"configs/demo_{stage}.yaml" for stage in ("semantic", "coarse", "fine")]
    small = "model={dim: 16, num_layers: 1, num_heads: 2, head_dim: 8}"
    few = ["--batch", "1", "2", "--seconds", "0.3", "--device", "cpu"]
    bench.main(["sample", "--config", *recipes, small, *few, "--out", str(out)])
    rows = {(row["name"], row["batch"]): row for row in json.loads(out.read_text())["rows"]}
    assert len(rows) == 3 * 3 + 2 + 1
    for stage in ("semantic", "coarse", "fine"):
        for batch in (1, 2):
            row = rows[stage, batch]
            rate = row["tokens_per_second"] * row["milliseconds"] / 1e3  # each step, each clip one
            assert rate == pytest.approx(batch)
            assert 0 < row["share_of_memory"] < 1
    whole, streamed = rows["all stages and the codec", 1], rows["the same, streamed", 1]
    assert whole["real_time"] > 0
    assert whole["first_sound"] > 0
    assert streamed["first_sound"] > 0
    assert re.search(r"coarse, no cache, 10 frames +1 +\d", capsys.readouterr().out)


def test_sample_times_other_projects_beside_the_coarse_stage(tmp_path, monkeypatch):
    class Counter:
        package, codes_per_step, steps = "torch", 3, 0

        def __init__(self, config, frames, device):
            self.model, self.frames = torch.nn.Identity(), frames

        def step(self, batch, num_before):
            assert num_before == self.frames * 4 // 2  # a semantic token and three codes a frame

            def step():
                Counter.steps += 1
                return torch.zeros(batch)

            return step

    monkeypatch.setattr(bench_peers, "PEERS", {"a counter": Counter})
    small = "model={dim: 16, num_layers: 1, num_heads: 2, head_dim: 8}"
    few = ["--batch", "1", "2", "--seconds", "0.1", "--device", "cpu", "--peers"]
    out, picture = tmp_path / "sample.json", tmp_path / "sample.svg"
    drawn = ["--plot", str(picture)] if find_spec("matplotlib") else []
    command = ["sample", "--config", "configs/demo_coarse.yaml", small, *few]
    bench.main([*command, "--out", str(out), *drawn])
    rows = [row for row in json.loads(out.read_text())["rows"] if row["name"] == "a counter"]
    assert [row["batch"] for row in rows] == [1, 2]
    assert Counter.steps == 2 * (bench_peers.WARM_UP + 1 + 10)
    for row in rows:
        a_second = 1e3 / row["milliseconds"]
        assert row["tokens_per_second"] == pytest.approx(3 * row["batch"] * a_second)
        assert row["real_time"] == pytest.approx(row["batch"] * a_second / 50)
    assert not drawn or picture.read_text().startswith("<?xml")
    with pytest.raises(ValueError, match="name a coarse recipe"):
        bench.main(["sample", "--config", "configs/demo_semantic.yaml", "--peers"])
    with pytest.raises(ValueError, match="two are of one stage"):
        bench.main(["sample", "--config", "configs/demo_coarse.yaml", "configs/coarse_small.yaml"])
