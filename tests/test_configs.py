"""Every recipe in configs/ runs a step; a typo is an error with a suggestion; --help is true."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import soundfile
import torch
from tokens import CODEC, SEMANTIC, write_tokens

from configs.codec_schema import CodecTrainConfig
from configs.load import load_config, save_config
from configs.schema import RunConfig
from configs.semantic_schema import SemanticTrainConfig
from model.codec import load_codec
from model.stages import STAGES
from scripts import (
    bench,
    demo,
    evaluate,
    fetch_librispeech,
    fit_kmeans,
    prepare,
    sample_options,
    train_codec,
    train_semantic,
)
from scripts.train_codec import main as train_codec_main
from train import EXAMPLES, train

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
STAGE_RECIPES = [path for path in RECIPES if not path.name.startswith(("codec", "hubert"))]
LARGE = ("coarse_270m", "coarse_1b", "librispeech")
CODEC_RECIPES = [path for path in RECIPES if path.name.startswith("codec")]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """Tokens of the shipped tokenizers' sizes."""
    folder = tmp_path_factory.mktemp("tokens")
    codec = {**CODEC, "num_codebooks": 8, "codebook_size": 1024}
    return write_tokens(folder, 8, codec, {**SEMANTIC, "num_tokens": 500})


@pytest.mark.parametrize("recipe", STAGE_RECIPES, ids=lambda path: path.stem)
def test_every_stage_recipe_runs_a_step(recipe, tokens, tmp_path):
    overrides = [
        f"out={tmp_path / 'run'}",
        f"data.tokens={tokens}",
        "data.num_workers=0",
        "train.steps=1",
        "train.batch_size=1",
        "train.kernels=plain",
        # of their gigabytes of checkpoints a few megabytes
        *["model.num_layers=2", "model.dim=256"] * recipe.stem.startswith(LARGE),
    ]
    run = train(load_config(RunConfig, recipe, overrides))
    assert run.step == 1
    assert (tmp_path / "run/checkpoints/step-00000001/model.safetensors").is_file()


@pytest.mark.parametrize("recipe", CODEC_RECIPES, ids=lambda path: path.stem)
def test_every_codec_recipe_runs_a_step(recipe, tmp_path):
    wav = torch.rand(16_000).numpy() * 0.1
    for n in range(2):
        soundfile.write(tmp_path / f"{n}.wav", wav, 16_000)
    lines = [f'{{"path": "{n}.wav", "split": "{s}"}}\n' for n, s in enumerate(("train", "valid"))]
    (tmp_path / "m.jsonl").write_text("".join(lines))
    small = ["train.steps=1", "train.batch_size=1"]
    audio = [f"data.audio={tmp_path / 'm.jsonl'}", f"out={tmp_path / 'run'}"]
    train_codec_main(["--config", str(recipe), *small, *audio])
    assert (tmp_path / "run/codec/codec.safetensors").is_file()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_opens_with_what_it_costs_and_gives(recipe):
    head = recipe.read_text().split("\n\n")[0].splitlines()
    comments = "\n".join(line for line in head if line.startswith("#"))
    assert f"configs/{recipe.name}" in comments
    assert re.search(r"^# Time: .*\d", comments, re.M), "the header says how long it takes"
    assert re.search(r"^# Expected .*\d", comments, re.M), "the header says what to expect"


def test_overrides_win_and_the_resolved_config_comes_back(tmp_path):
    recipe = ROOT / "configs/coarse_small.yaml"
    config = load_config(RunConfig, recipe, ["optim.lr=1e-5", "model={dim: 64, num_layers: 1}"])
    assert (config.optim.lr, config.model.dim, config.stage) == (1e-5, 64, "coarse")
    save_config(config, tmp_path / "config.yaml")
    assert load_config(RunConfig, tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", r"command line: optim.lrr=1: .*lr.*key: optim.lrr"),
        ("modle.dim=3", r"model"),
        ("model.dim=wide", r"model.dim"),
        ("attention.backend=fast", r"einsum"),
        ("stage", r"section.key=value"),
        ("train.log_every=0", r"train.log_every=0: at least 1"),
        ("model.num_heads=0", r"model.num_heads=0: at least 1"),
    ],
)
def test_a_typo_is_an_error_that_helps(override, message):
    with pytest.raises(ValueError, match=message):
        load_config(RunConfig, None, ["stage=fine", "out=x", "data.tokens=x", override])


def test_a_codec_recipe_checks_its_numbers():
    with pytest.raises(ValueError, match="log_every=0: at least 1"):
        load_config(CodecTrainConfig, None, ["out=x", "data.audio=x", "train.log_every=0"])


def test_a_missing_or_broken_file_is_an_error_that_helps(tmp_path):
    with pytest.raises(ValueError, match=r"coarse_smal\.yaml: no such config file; .*coarse_small"):
        load_config(RunConfig, ROOT / "configs/coarse_smal.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match=r"bad.yaml: not valid YAML"):
        load_config(CodecTrainConfig, tmp_path / "bad.yaml")
    with pytest.raises(ValueError, match=r"stage"):
        load_config(RunConfig, None, ["out=x"]).stage.upper()


def test_exit_code_2_and_one_line():
    command = [sys.executable, "train.py", "--config", "configs/demo_fine.yaml", "optim.lrr=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("error: command line: optim.lrr=1")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["scripts.prepare", "--audoi", "x"], "--audoi: no such flag; did you mean --audio?"),
        (["scripts.prepare", "--out", "x"], "required: --audio"),
        (
            ["scripts.evaluate", "codec", "--codek=x"],
            "--codek: no such flag; did you mean --codec?",
        ),
        (
            ["scripts.bench", "attend", "--heads=2", "--btch=2"],
            "--btch: no such flag; did you mean",
        ),
        (["train", "--config", "x", "--resum"], "--resum: no such flag; did you mean --resume?"),
    ],
)
def test_a_mistyped_flag_is_one_line_and_no_abbreviation(arguments, said):
    module, *rest = arguments
    command = [sys.executable, "-m", module, *rest]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert said in done.stderr


def sources_imported_by(source: str) -> str:
    names = re.findall(r"^from scripts\.(\w+) ", source, re.M)
    return "".join((ROOT / "scripts" / f"{name}.py").read_text() for name in names)


MODULES = [
    bench,
    demo,
    fetch_librispeech,
    prepare,
    fit_kmeans,
    train_codec,
    train_semantic,
    evaluate,
    sample_options,
]


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_help_name_real_files_and_flags(module):
    """Every flag an example uses is the module's, or of one it imports; every config exists."""
    own = Path(module.__file__).read_text()
    source = own.replace(module.EXAMPLES, "") + sources_imported_by(own)
    source += sources_imported_by(source)  # options that several commands share
    others = [f"--{name}" for name in STAGES]  # made in a loop; and the launchers' own
    others += ["--standalone", "--nproc-per-node", "--config_file", "--num_processes"]
    for command in re.split(r"\n(?=  \S)", module.EXAMPLES):
        words = shlex.split(command.replace("\\\n", " "))
        for word in words:
            if word.startswith("--") and word not in others:
                assert f'"{word}"' in source, word
            if word.startswith("configs/"):
                assert (ROOT / word).is_file(), word
        schema = {train_codec: CodecTrainConfig, train_semantic: SemanticTrainConfig}.get(module)
        if schema:
            recipe = ROOT / words[words.index("--config") + 1]
            config = load_config(schema, recipe, [word for word in words if "=" in word])
            start_from = getattr(config.train, "start_from", None)
            if start_from:
                assert load_codec(str(ROOT / start_from)).config == config.model


def test_a_key_is_found_where_it_is():
    with pytest.raises(ValueError, match=r"steps=30: .*; or is it train\.steps\?"):
        load_config(RunConfig, None, ["steps=30"])
    with pytest.raises(ValueError, match="stps") as told:
        load_config(RunConfig, None, ["optim.stps=30"])
    assert "or is it" not in str(told.value)


def test_examples_of_train_load():
    for command in EXAMPLES.splitlines():
        words = shlex.split(command)
        recipe = words[words.index("--config") + 1]
        load_config(RunConfig, ROOT / recipe, [word for word in words if "=" in word])


@pytest.mark.parametrize("page", ["README.md", "docs/TROUBLESHOOTING.md", "docs/RESULTS.md"])
def test_commands_and_links_of_a_page_are_real(page):
    """Commands between backticks and in indented or fenced lines: module, flags, keys, recipes."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"python -m scripts\.(\w+)([^`\n|]*)", text)
    assert len(commands) > 5
    for name, rest in commands:
        file = ROOT / "scripts" / f"{name}.py"
        if name == "NAME":
            continue
        source = file.read_text(encoding="utf-8")
        for _ in range(3):  # options that several commands share
            source += sources_imported_by(source)
        for flag in re.findall(r"(?<!\S)--[a-z][a-z-]*", rest):
            assert f'"{flag}"' in source or flag[2:] in STAGES, f"{name} {flag}"
    for recipe in re.findall(r"configs/[\w/]+\.yaml", text):
        assert (ROOT / recipe).is_file(), recipe
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert ((ROOT / page).parent / link).exists(), link
    keys = re.findall(
        r"(?<![\w.])((?:model|optim|data|train|attention|wandb)\.\w+)=(\S+?)[`\s'\"]", text
    )
    for key, _ in keys:
        section, name = key.split(".")
        schema = {field.name: field.type for field in fields(RunConfig)}
        assert name in {field.name for field in fields(schema[section])}, f"{section}.{name}"


CURVES = {  # recipe -> the file that it names, and what it is called there
    "demo_semantic": ("cpu_demo_curves", "semantic"),
    "demo_coarse": ("cpu_demo_curves", "coarse"),
    "demo_fine": ("cpu_demo_curves", "fine"),
    "coarse_small": ("h200_muon_coarse", "Muon"),
    "fine_small": ("h200_muon_fine", "muon .01"),
    "acoustic_small": ("h200_muon_acoustic", "muon .01"),
}


@pytest.mark.parametrize("recipe", CURVES)
def test_an_expected_loss_is_in_the_file_that_a_recipe_names(recipe):
    """The mean of its seeds, at the steps it says."""
    file, name = CURVES[recipe]
    text = (ROOT / "configs" / f"{recipe}.yaml").read_text(encoding="utf-8").replace("\n#", "")
    losses, steps = re.search(
        r"Expected validation loss, nats per token: ([\d., ]+?) at steps? ([\d, ]*\d)", text
    ).groups()
    assert f"benchmarks/{file}.json" in text
    rows = json.loads((ROOT / "benchmarks" / f"{file}.json").read_text(encoding="utf-8"))["rows"]
    curves = [row["curve"] for row in rows if row["name"] == name]
    for step, loss in zip(steps.split(", "), losses.split(", "), strict=True):
        there = [nats for curve in curves for at, _, nats in curve if at == int(step)]
        assert f"{sum(there) / len(there):.2f}" == loss
