"""The house rules: who imports what, how long things may get, what is shipped and how."""

import ast
import json
import re
import shutil
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("configs", "data", "model", "scripts")
SOURCES = sorted([*ROOT.glob("*.py"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*.py"))])
LOCK = ROOT / "requirements.lock"
DEMO = ROOT / "data" / "demo"
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60  # beyond, they no longer fit in a reader's head


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports_of(tree: ast.Module) -> set[str]:
    """Dotted names of all modules that a file imports, at its top or within functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{a.name}" for a in node.names)}
    return found


def importers_of(package: str) -> set[str]:
    def uses(path: Path) -> bool:
        return any(name.split(".")[0] == package for name in imports_of(tree_of(path)))

    return {name_of(path) for path in SOURCES if uses(path)}


def calls_of(tree: ast.Module, name: str) -> list[ast.Call]:
    """Calls of a dotted name such as "torch.load"."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call for call in calls if ast.unparse(call.func) == name]


def keyword(call: ast.Call, name: str) -> object:
    values = {k.arg: k.value for k in call.keywords}
    return values[name].value if isinstance(values.get(name), ast.Constant) else None


def test_the_rules_see_code():
    assert {"data/audio.py", "model/attend.py", "scripts/report.py"} <= set(map(name_of, SOURCES))
    assert imports_of(ast.parse("def f():\n    from a.b import c")) == {"a.b", "a.b.c"}


@pytest.mark.parametrize(
    ("folder", "others"),
    [
        ("data", {"model", "scripts", "train"}),
        ("model", {"data", "scripts", "train"}),
        ("configs", {"data", "model", "scripts", "train"}),
    ],
)
def test_layers_do_not_import_upwards(folder: str, others: set[str]):
    for other in others:
        wrong = {name for name in importers_of(other) if name.startswith(f"{folder}/")}
        assert not wrong, f"{wrong} import {other}"


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("encodec", "model/codec.py"),
        ("soundfile", "data/audio.py"),
        ("accelerate", r"train.py|scripts/.*"),
        ("pickle|cPickle|dill|joblib|shelve|marshal", "nowhere"),
    ],
)
def test_single_importers(package: str, allowed: str):
    importers = set().union(*(importers_of(name) for name in package.split("|")))
    wrong = {name for name in importers if not re.fullmatch(allowed, name)}
    assert not wrong, f"{package} belongs in {allowed}, not in {wrong}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_are_read_without_running_them(path: Path):
    tree = tree_of(path)
    for call in calls_of(tree, "torch.load"):
        assert keyword(call, "weights_only") is True, f"line {call.lineno}: weights_only=True"
    for name in ("np.load", "numpy.load"):
        for call in calls_of(tree, name):
            assert keyword(call, "allow_pickle") in (None, False), f"line {call.lineno}"
    for name in ("eval", "exec", "yaml.load", "yaml.unsafe_load"):
        assert not calls_of(tree, name), f"{name} runs what it reads"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_stay_short(path: Path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines < MAX_FILE_LINES, f"{lines} lines"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length < MAX_FUNCTION_LINES, f"{node.name}: {length} lines"


# ---- what is shipped -----------------------------------------------------------------------------


def manifest() -> list[dict]:
    return [json.loads(line) for line in (DEMO / "manifest.jsonl").read_text().splitlines()]


def test_bundled_speech_is_whole_and_small():
    clips = manifest()
    assert len({clip["path"] for clip in clips}) == len(clips)
    for clip in clips:
        assert re.fullmatch(r"audio/[a-z0-9_-]+\.opus", clip["path"])
        assert (DEMO / clip["path"]).read_bytes()[:4] == b"OggS"
        assert re.search("[a-z]{2}", clip["text"]), f"{clip['path']} has no transcript"
        assert clip["speaker"]
    listed = {DEMO / clip["path"] for clip in clips}
    assert set((DEMO / "audio").iterdir()) == listed, "shipped, but not in the manifest"
    assert sum(p.stat().st_size for p in DEMO.rglob("*") if p.is_file()) <= 3_000_000


def test_bundled_speech_has_splits_that_share_no_sentence():
    clips = manifest()
    splits = Counter(clip["split"] for clip in clips)
    assert splits["train"] > 150
    assert splits["valid"] >= 10
    assert sorted(c["duration"] for c in clips if c["split"] == "test")[0] >= 4
    sentences = Counter(re.sub("[^a-z0-9]+", " ", c["text"].lower()).strip() for c in clips)
    assert sentences.most_common(1)[0][1] == 1


def test_bundled_speech_carries_its_licence():
    assert "CREATIVE COMMONS PUBLIC LICENSE" in (DEMO / "LICENSE").read_text()
    readme = (DEMO / "README.md").read_text()
    assert "Allison Smith" in readme
    assert "Attribution-ShareAlike 3.0" in readme
    assert "has been modified" in readme


def test_git_ignores_nothing_that_is_shipped():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    shipped = [*DEMO.rglob("*"), *(ROOT / "pretrained").rglob("*"), *SOURCES, LOCK]
    names = "\n".join(name_of(path) for path in shipped if path.is_file())
    command = ["git", "check-ignore", "--no-index", "--stdin"]
    ignored = subprocess.run(command, cwd=ROOT, input=names, capture_output=True, text=True)
    assert ignored.stdout.split() == []


def test_shipped_weights_are_small_and_safe():
    files = [path for path in (ROOT / "pretrained").rglob("*") if path.is_file()]
    folders = {"codec_16khz", "semantic_hubert", "semantic_mfcc"}
    assert {path.parent.name for path in files} == folders | {"pretrained"}
    for path in files:
        assert path.stat().st_size < 14 * 2**20, name_of(path)
        assert path.suffix in {".safetensors", ".json", ".md", ".png"}, name_of(path)


def test_lock_pins_everything_with_hashes_and_names_no_host():
    lock = LOCK.read_text()
    entries = re.findall(r"^(\S.*?)((?: \\\n    --hash=sha256:[0-9a-f]{64})*)$", lock, re.MULTILINE)
    pins = [(line, hashes) for line, hashes in entries if not line.startswith("#")]
    for line, hashes in pins:
        assert re.match(r"[a-z0-9-]+==[^ ;]+( ; .+)?$", line), line
        assert hashes, f"{line}: no hash"
    versions = dict(line.split(" ;")[0].split("==") for line, _ in pins)
    assert len(versions) == len(pins), "one version of each package on every Python and platform"
    assert versions["torch"] == versions["torchaudio"]
    assert not re.search(r"://|^--|^-i|@ ", lock, re.MULTILINE)


def test_lock_holds_what_pyproject_asks_for():
    project = (ROOT / "pyproject.toml").read_text()
    locked_part = project.split("dependencies = [", 1)[1].split("\nevaluate = [")[0]
    wanted = re.findall(r'"([a-z0-9-]+)(==|>=)([0-9.]+)', locked_part)
    versions = dict(re.findall(r"^([a-z0-9-]+)==([^ ;]+)", LOCK.read_text(), re.MULTILINE))
    assert len(wanted) > 10
    for name, relation, version in wanted:
        locked = [int(n) for n in versions[name].split(".")]
        asked = [int(n) for n in version.split(".")]
        assert locked == asked if relation == "==" else locked >= asked, f"{name}: make lock"
