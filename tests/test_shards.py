"""data/shards.py: what is written comes back, and what is broken is named."""

import json
import math
import pickle

import numpy as np
import pytest
import torch
from tokens import write_tokens

from data.baselines import baselines, token_rates
from data.shards import (
    EncodedClip,
    TokenFolder,
    shard_file,
    unigram_counts,
    write_header,
    write_shard,
)

CODEC = {
    "name": "codec",
    "sample_rate": 16_000,
    "hop_length": 320,
    "frame_rate": 50.0,
    "num_codebooks": 3,
    "codebook_size": 1000,
    "fingerprint": "0123456789abcdef",
}
SEMANTIC = {
    "name": "semantic",
    "sample_rate": 16_000,
    "frame_rate": 25.0,
    "num_tokens": 70,
    "fingerprint": "fedcba9876543210",
}


def make_clip(i, frames, split="train"):
    rng = np.random.default_rng(i)
    return EncodedClip(
        name=f"clip{i}",
        split=split,
        speaker=None if i % 2 else f"s{i}",
        text="zwölf \u2028 zeilen",
        duration=frames / 50,
        semantic_tokens=rng.integers(0, 70, -(-frames // 2)),
        codes=rng.integers(0, 1000, (3, frames)),
    )


@pytest.fixture
def clips():
    frames = [10, 7, 1, 30, 12]
    splits = ["train", "valid", "train", "train", "test"]
    return [make_clip(i, n, s) for i, (n, s) in enumerate(zip(frames, splits, strict=True))]


@pytest.fixture
def folder(tmp_path, clips):
    write_shard(tmp_path, 0, clips[:3], [{"name": "bad", "reason": "empty"}])
    write_shard(tmp_path, 1, [], [{"name": "worse", "reason": "silent"}])
    write_shard(tmp_path, 2, clips[3:], [])
    write_header(tmp_path, CODEC, SEMANTIC, 3, [{"name": "twice", "reason": "listed twice"}])
    return tmp_path


def test_clips_come_back_exactly(folder, clips):
    tokens = TokenFolder(folder)
    assert [clip.name for clip in tokens.all_clips] == [clip.name for clip in clips]
    for found, clip in zip(tokens.all_clips, clips, strict=True):
        semantic_tokens, codes = tokens.read(found)
        assert np.array_equal(semantic_tokens, clip.semantic_tokens)
        assert np.array_equal(codes, clip.codes)
        for key in ("split", "speaker", "text", "duration"):
            assert getattr(found, key) == getattr(clip, key)
    assert [clip.name for clip in tokens.clips("train")] == ["clip0", "clip2", "clip3"]
    assert (tokens.codec, tokens.semantic) == (CODEC, SEMANTIC)


def test_the_format_is_the_documented_one(folder, clips):
    flat = np.fromfile(folder / "shard-00000.bin", dtype="<u2")
    assert np.array_equal(flat[:5], clips[0].semantic_tokens)
    assert np.array_equal(flat[5:35].reshape(3, 10), clips[0].codes)
    header = json.loads((folder / "header.json").read_text())
    assert header["version"] == 1
    assert [s["num_clips"] for s in header["shards"]] == [3, 0, 2]
    assert header["shards"][0]["num_bytes"] == flat.nbytes
    totals = header["totals"]
    assert totals["num_frames"] == 60
    assert totals["num_semantic"] == 5 + 4 + 1 + 15 + 6
    assert (totals["num_clips"], totals["num_speakers"], totals["num_unknown_speaker"]) == (5, 3, 2)
    assert totals["splits"]["valid"] == {"num_clips": 1, "seconds": 0.14}
    lines = (folder / "skipped.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["name"] for line in lines if line] == ["twice", "bad", "worse"]
    assert totals["num_skipped"] == 3
    assert not list(folder.glob(".*"))  # skip lists of single shards are gathered and gone


def test_a_shard_is_finished_only_when_its_jsonl_is_there(tmp_path, clips):
    def broken():
        yield clips[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path, 0, broken(), [])
    assert list(tmp_path.iterdir()) == []
    write_shard(tmp_path, 0, clips, [])
    assert shard_file(tmp_path, 0).is_file()


@pytest.mark.parametrize("bad", [-1, 65_536])
def test_tokens_outside_uint16_are_refused(tmp_path, clips, bad):
    clips[1].codes[2, 3] = bad
    with pytest.raises(ValueError, match=r"clip1: codes from .* do not fit uint16"):
        write_shard(tmp_path, 0, clips, [])
    clips[1].codes[2, 3] = 65_535
    write_shard(tmp_path, 0, clips, [])
    write_header(tmp_path, CODEC, SEMANTIC, 1)
    tokens = TokenFolder(tmp_path)
    assert tokens.read(tokens.all_clips[1])[1][2, 3] == 65_535


def test_a_folder_travels_to_workers_without_its_maps(folder, clips):
    tokens = TokenFolder(folder)
    tokens.read(tokens.all_clips[3])
    copy = pickle.loads(pickle.dumps(tokens))
    assert copy._maps == {}
    assert np.array_equal(copy.read(copy.all_clips[3])[1], clips[3].codes)


def test_a_truncated_shard_is_named(folder):
    path = folder / "shard-00002.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"shard-00002\.bin: \d+ bytes, .* describes \d+.*rerun"):
        TokenFolder(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"shard-00002\.bin: 0 bytes"):
        TokenFolder(folder)


def test_a_jsonl_that_does_not_fit_its_bin_is_named(folder):
    path = folder / "shard-00000.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")
    path.write_text("\n".join(lines[1:]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"shard-00000\.bin: \d+ bytes, its \.jsonl describes"):
        TokenFolder(folder)
    path.write_text("{oops\n")
    with pytest.raises(ValueError, match=r"shard-00000\.jsonl: damaged"):
        TokenFolder(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"shard-00000\.jsonl: missing"):
        TokenFolder(folder)


def test_unfinished_damaged_and_foreign_headers_are_named(folder):
    header = folder / "header.json"
    text = header.read_text()
    header.write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(ValueError, match="format 2, this code reads 1"):
        TokenFolder(folder)
    header.write_text(text[:20])
    with pytest.raises(ValueError, match=r"header\.json: damaged"):
        TokenFolder(folder)
    header.unlink()
    with pytest.raises(ValueError, match=r"no header\.json.*scripts\.prepare"):
        TokenFolder(folder)


def test_a_split_without_clips_names_those_there_are(folder):
    with pytest.raises(ValueError, match="no clips of split 'dev', it has test, train, valid"):
        TokenFolder(folder).clips("dev")


def test_no_clip_at_all_is_an_error_that_leaves_the_reasons(tmp_path):
    write_shard(tmp_path, 0, [], [{"name": "bad", "reason": "empty"}])
    for _ in range(2):  # asking again says the same
        with pytest.raises(ValueError, match=r"none of the 1 recordings could be used"):
            write_header(tmp_path, CODEC, SEMANTIC, 1)
        assert json.loads((tmp_path / "skipped.jsonl").read_text())["reason"] == "empty"
    assert not (tmp_path / "header.json").exists()


def test_unigram_counts_are_of_the_split_alone(folder, clips):
    semantic, codes = unigram_counts(TokenFolder(folder), "train")
    train = [clip for clip in clips if clip.split == "train"]
    assert semantic.shape == (70,)
    assert codes.shape == (3, 1000)
    everything = np.concatenate([clip.semantic_tokens for clip in train])
    assert np.array_equal(semantic, np.bincount(everything, minlength=70))
    assert codes.sum(1).tolist() == [41, 41, 41]
    assert codes[2][train[2].codes[2, 5]] >= 1
    assert np.array_equal(
        codes[1], np.bincount(np.concatenate([clip.codes[1] for clip in train]), minlength=1000)
    )


def test_baselines_of_collapsed_tokens_count_what_is_left(tmp_path):
    folder = TokenFolder(write_tokens(tmp_path))
    kept = {
        split: [
            torch.unique_consecutive(torch.tensor(folder.read(clip)[0].astype(int)))
            for clip in folder.clips(split)
        ]
        for split in ("train", "valid")
    }
    seen = torch.cat(kept["train"]).bincount(minlength=12).double() + 1
    nats = -(seen / seen.sum())[torch.cat(kept["valid"])].log().mean()
    rate = 50 * sum(map(len, kept["valid"])) / sum(c.num_semantic for c in folder.clips("valid"))
    assert 20 < rate < 30  # each token twice, but for the ends of a clip
    assert token_rates(folder, ["semantic"], True) == pytest.approx([rate])
    assert token_rates(folder, ["c0"], True) == token_rates(folder, ["semantic"]) == [50.0]
    unigram = baselines(folder, ["semantic"], True)["unigram"]
    assert unigram.nats == pytest.approx([float(nats)])
    assert unigram.bits_per_second == pytest.approx(float(nats) * rate / math.log(2))
