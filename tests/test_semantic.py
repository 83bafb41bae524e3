"""model/semantic.py and scripts/fit_kmeans.py."""

import json
import re
import urllib.error
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
import torchaudio
from safetensors.torch import load_file, save_file

from configs.semantic_schema import SmallHubertConfig
from model.hubert import MaskedPrediction
from model.semantic import (
    HubertConfig,
    HubertKMeans,
    MfccConfig,
    MfccKMeans,
    SmallHubertFeatures,
    SmallHubertKMeans,
    load_semantic,
    nearest_centroid,
)
from scripts import fit_kmeans
from scripts.fit_kmeans import kmeans

TINY_HUBERT = {
    "extractor_mode": "group_norm",
    "extractor_conv_layer_config": [[8, 10, 5]] + [[8, 3, 2]] * 4 + [[8, 2, 2]] * 2,
    "extractor_conv_bias": False,
    "encoder_embed_dim": 16,
    "encoder_projection_dropout": 0.1,
    "encoder_pos_conv_kernel": 8,
    "encoder_pos_conv_groups": 2,
    "encoder_num_layers": 3,
    "encoder_num_heads": 2,
    "encoder_attention_dropout": 0.1,
    "encoder_ff_interm_features": 32,
    "encoder_ff_interm_dropout": 0.1,
    "encoder_dropout": 0.1,
    "encoder_layer_norm_first": False,
    "encoder_layer_drop": 0.05,
    "aux_num_out": None,
}


def make_tiny_hubert(**changed):
    return torchaudio.models.wav2vec2_model(**(TINY_HUBERT | changed))


@pytest.fixture(autouse=True)
def _hubert_is_tiny(monkeypatch):
    for name in ("hubert_base", "hubert_large"):
        monkeypatch.setattr(torchaudio.models, name, make_tiny_hubert)


def noise(length, seed=0):
    return 0.1 * torch.randn(1, 1, length, generator=torch.Generator().manual_seed(seed))


def with_codebook(tokenizer, num_tokens=20):
    features = tokenizer.features(noise(32_000))[0]
    fit_kmeans.fit(tokenizer, features, num_tokens, seed=0)
    return tokenizer


def tiny_hubert(folder, layer=2, seed=0):
    """A random HuBERT in torchaudio's file format, and the config that finds it."""
    torch.manual_seed(seed)
    model = make_tiny_hubert().eval()
    torch.save(model.state_dict(), folder / "hubert.pth")
    return model, HubertConfig(layer=layer, weights="hubert.pth")


@pytest.fixture(scope="module")
def mfcc():
    return with_codebook(MfccKMeans())


@pytest.mark.parametrize("length", [1, 319, 320, 321, 400, 3200, 16_001])
def test_frames_are_ceil_of_length_over_hop(mfcc, tmp_path, length):
    hubert = HubertKMeans(tiny_hubert(tmp_path)[1], tmp_path)
    for tokenizer in (mfcc, hubert):
        features = tokenizer.features(noise(length))
        assert features.shape == (1, -(-length // 320), tokenizer.num_features)
        assert (tokenizer.hop_length, tokenizer.frame_rate) == (320, 50.0)
    assert mfcc.encode(noise(length)).shape == (1, -(-length // 320))


def test_tokens_are_the_nearest_centroids_of_normalised_features(mfcc):
    wav = noise(8000, seed=1)
    tokens = mfcc.encode(wav)
    features = (mfcc.features(wav)[0] - mfcc.mean) / mfcc.std  # [T, F]
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens[0], torch.cdist(features, mfcc.centroids).argmin(1))
    assert mfcc.num_tokens == 20
    assert tokens.unique().numel() > 5


def test_a_click_shows_in_the_frame_that_is_centred_on_it():
    wav = 1e-4 * noise(9600)
    wav[0, 0, 10 * 320 + 160] = 1.0  # the centre of codec frame 10
    energy = MfccKMeans(MfccConfig(context=0)).features(wav)[0, :, 0]
    assert energy.argmax() == 10


def test_saved_and_loaded_is_the_same_tokenizer(mfcc, tmp_path):
    mfcc.save(tmp_path / "s")
    loaded = load_semantic(str(tmp_path / "s"))
    wav = noise(8000)
    assert torch.equal(loaded.encode(wav), mfcc.encode(wav))
    assert loaded.fingerprint == mfcc.fingerprint
    assert loaded.name == str(tmp_path / "s")
    assert len(loaded.fingerprint) == 16
    assert int(loaded.fingerprint, 16) >= 0


def test_fingerprint_follows_numbers_and_config(mfcc):
    other = with_codebook(MfccKMeans())
    assert other.fingerprint == mfcc.fingerprint  # the same numbers, made anew
    other.set_codebook(mfcc.mean, mfcc.std, mfcc.centroids + 1e-3)
    assert other.fingerprint != mfcc.fingerprint
    configured = MfccKMeans(MfccConfig(num_mels=30))
    configured.set_codebook(mfcc.mean, mfcc.std, mfcc.centroids)
    assert configured.fingerprint != mfcc.fingerprint


def test_hubert_takes_the_layer_and_aligns_with_torchaudio(tmp_path):
    model, config = tiny_hubert(tmp_path, layer=2)
    tokenizer = HubertKMeans(config, tmp_path)
    wav = noise(3200)
    padded = torch.nn.functional.pad(wav[0], (40, 40))
    with torch.no_grad():
        expected = model.extract_features(padded)[0][1]
    assert torch.allclose(tokenizer.features(wav), expected, atol=1e-5)
    assert torch.equal(tokenizer.features(wav), tokenizer.features(wav))  # no dropout


def test_hubert_folder_moves_with_its_weights_and_keeps_its_fingerprint(tmp_path):
    _, config = tiny_hubert(tmp_path)
    tokenizer = with_codebook(HubertKMeans(config, tmp_path))
    tokenizer.save(tmp_path / "semantic")
    assert json.loads((tmp_path / "semantic/config.json").read_text())["weights"] == "../hubert.pth"
    loaded = load_semantic(str(tmp_path / "semantic"))
    assert loaded.fingerprint == tokenizer.fingerprint
    assert torch.equal(loaded.encode(noise(8000)), tokenizer.encode(noise(8000)))

    (tmp_path / "hubert.pth").rename(tmp_path / "moved.pth")
    with pytest.raises(ValueError, match=r'hubert\.pth: no such file; correct "weights"'):
        load_semantic(str(tmp_path / "semantic"))
    config = tmp_path / "semantic/config.json"
    config.write_text(config.read_text().replace("hubert.pth", "moved.pth"))
    assert load_semantic(str(tmp_path / "semantic")).fingerprint == tokenizer.fingerprint


def test_other_hubert_weights_than_the_centroids_are_refused(tmp_path):
    tokenizer = with_codebook(HubertKMeans(tiny_hubert(tmp_path)[1], tmp_path))
    tokenizer.save(tmp_path / "semantic")
    tiny_hubert(tmp_path, seed=1)
    with pytest.raises(ValueError, match="not the weights these centroids were fitted on"):
        load_semantic(str(tmp_path / "semantic"))


def test_hubert_mistakes_are_named(tmp_path, monkeypatch):
    _, config = tiny_hubert(tmp_path)
    with pytest.raises(ValueError, match="layer 9 asked for, it has 1 to 3"):
        HubertKMeans(replace(config, layer=9), tmp_path)
    with pytest.raises(ValueError, match="'wavlm' is unknown; choose one of hubert_base"):
        HubertKMeans(HubertConfig(model="wavlm"))
    torch.save(make_tiny_hubert(encoder_embed_dim=8).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth: not weights of hubert_base"):
        HubertKMeans(replace(config, weights="other.pth"), tmp_path)
    (tmp_path / "hubert.pth").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"hubert\.pth: not weights of hubert_base"):
        HubertKMeans(config, tmp_path)

    def offline(*_, **__):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("torchaudio.pipelines._wav2vec2.utils.load_state_dict_from_url", offline)
    monkeypatch.setattr(
        "torchaudio.pipelines._wav2vec2.utils._get_model", lambda *_: torch.nn.Identity()
    )
    with pytest.raises(ValueError, match=r"could not be downloaded .*--weights FILE"):
        HubertKMeans()


def test_hubert_normalises_the_wav_before_padding(tmp_path):
    _, config = tiny_hubert(tmp_path)
    tokenizer = HubertKMeans(replace(config, model="hubert_large"), tmp_path)
    wav = noise(3300)
    assert torch.allclose(tokenizer.features(wav), tokenizer.features(5 * wav + 0.1), atol=1e-3)


def small_hubert(layer=2, seed=0, **changed):
    torch.manual_seed(seed)
    sizes = {"conv_channels": (8,) * 7, "dim": 16, "num_layers": 3, "num_heads": 2, "ff_dim": 32}
    config = SmallHubertConfig(**sizes, position_kernel=8, position_groups=4, **changed)
    weights = MaskedPrediction(config, 5).weights()
    return SmallHubertKMeans(SmallHubertFeatures(layer=layer, architecture=config), weights)


def make_tokenizer(kind, folder):
    if kind == "mfcc":
        return with_codebook(MfccKMeans())
    if kind.startswith("hubert"):
        return with_codebook(HubertKMeans(replace(tiny_hubert(folder)[1], model=kind), folder))
    return with_codebook(small_hubert(norm_first=kind == "pre-norm"))


KINDS = ["mfcc", "pre-norm", "post-norm", "hubert_base", "hubert_large"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_has_the_tokens_of_each_clip_alone(kind, tmp_path):
    tokenizer = make_tokenizer(kind, tmp_path)
    lengths = [16_000, 9601, 9600, 3199, 320, 25]
    clips = [noise(length, seed=i) * 3**i for i, length in enumerate(lengths)]
    batch = torch.cat(
        [torch.nn.functional.pad(clip, (0, 16_000 - clip.shape[2])) for clip in clips]
    )
    tokens = tokenizer.encode(batch, torch.tensor(lengths))
    assert tokens.shape == (6, 50)
    for row, clip in zip(tokens, clips, strict=True):
        alone = tokenizer.encode(clip)[0]
        assert torch.equal(row[: len(alone)], alone)
        assert not row[len(alone) :].any()
    unaware = tokenizer.features(batch)[3, :10]  # the test would see padding that leaks
    assert not torch.allclose(unaware, tokenizer.features(clips[3])[0], atol=1e-3)


def test_features_say_nothing_of_a_clips_mean_scale_and_loudness():
    wav, mfcc = noise(9600), MfccKMeans(MfccConfig(context=0))
    for tokenizer in (mfcc, small_hubert()):
        features = tokenizer.features(wav)  # [1, T, F]
        assert features.mean(dim=1).abs().max() < 1e-4
        assert (features.square().mean(dim=1) - 1).abs().max() < 1e-3
        torch.testing.assert_close(tokenizer.features(0.1 * wav), features, atol=1e-3, rtol=1e-3)
    assert mfcc.features(torch.zeros(1, 1, 3200)).abs().max() < 1e-2


def test_context_is_the_frames_around(mfcc):
    wav = noise(3200)
    plain = MfccKMeans(MfccConfig(context=0)).features(wav)[0]  # [10, 13]
    around = mfcc.features(wav)[0].view(10, 7, 13)
    for t, shift in ((5, -3), (5, 0), (5, 3), (0, -2), (9, 3)):
        torch.testing.assert_close(around[t, shift + 3], plain[min(max(t + shift, 0), 9)])


def test_a_small_hubert_is_the_same_when_saved_and_loaded(tmp_path):
    tokenizer = with_codebook(small_hubert())
    tokenizer.save(tmp_path / "s")
    loaded = load_semantic(str(tmp_path / "s"))
    wav = noise(8000)
    assert torch.equal(loaded.encode(wav), tokenizer.encode(wav))
    assert loaded.fingerprint == tokenizer.fingerprint
    assert with_codebook(small_hubert(seed=1)).fingerprint != tokenizer.fingerprint
    assert next(loaded.parameters()).dtype == torch.float32
    stored = load_file(tmp_path / "s/semantic.safetensors")
    kinds = {name.startswith("hubert."): tensor.dtype for name, tensor in stored.items()}
    assert kinds == {True: torch.float16, False: torch.float32}
    assert not any("transformer.layers.2" in name for name in stored)
    for length in (1, 320, 321, 16_001):
        assert loaded.encode(noise(length)).shape == (1, -(-length // 320))


def test_a_small_hubert_without_its_weights_is_named(tmp_path):
    with_codebook(small_hubert()).save(tmp_path)
    tensors = load_file(tmp_path / "semantic.safetensors")
    codebook = {name: tensor for name, tensor in tensors.items() if "hubert" not in name}
    save_file(codebook, tmp_path / "semantic.safetensors")
    with pytest.raises(ValueError, match=r"semantic\.safetensors.*weights of another architecture"):
        load_semantic(str(tmp_path))


def test_folders_that_are_none_are_named(mfcc, tmp_path):
    with pytest.raises(ValueError, match="not a semantic tokenizer"):
        load_semantic(str(tmp_path / "gone"))
    mfcc.save(tmp_path)
    config = tmp_path / "config.json"
    good = config.read_text()
    for bad in ("{", "[]", "{}", '{"kind": "mfcc", "x": 1}'):
        config.write_text(bad)
        with pytest.raises(ValueError, match=r"config\.json: damaged, or not of this version"):
            load_semantic(str(tmp_path))
    config.write_text(good.replace("13", "12"))
    with pytest.raises(ValueError, match=r"semantic\.safetensors.*not 84 wide"):
        load_semantic(str(tmp_path))
    config.write_text(good)
    tensors = tmp_path / "semantic.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"semantic\.safetensors: damaged"):
        load_semantic(str(tmp_path))


def blobs(num_blobs=8, per_blob=50):
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(num_blobs, 4, generator=generator)
    points = centres.repeat_interleave(per_blob, 0)
    return centres, points + 0.01 * torch.randn(points.shape, generator=generator)


def test_kmeans_finds_well_separated_blobs():
    centres, points = blobs()
    centroids, inertia, counts = kmeans(points, 8, seed=3)
    assert torch.cdist(centres, centroids).min(1).values.max() < 0.05
    expected = (points - centroids[nearest_centroid(points, centroids)]).square().sum(1).mean()
    assert inertia == pytest.approx(expected.item(), rel=1e-5)
    assert counts.tolist() == [50] * 8
    assert torch.equal(kmeans(points, 8, seed=3)[0], centroids)


def test_kmeans_leaves_centroids_without_frames_where_they_are(monkeypatch):
    _, points = blobs()
    seeds = torch.cat([points[::100], torch.full((4, 4), 1e4)])
    monkeypatch.setattr(fit_kmeans, "_seed_centroids", lambda *_: seeds)
    centroids, inertia, counts = kmeans(points, 8)
    assert torch.equal(centroids[4:], seeds[4:])
    assert torch.isfinite(centroids).all()
    assert inertia > 0
    assert counts[4:].sum() == 0


def test_kmeans_inertia_falls_with_more_iterations_and_tokens():
    points = torch.randn(2000, 5, generator=torch.Generator().manual_seed(0))
    one, many = kmeans(points, 16, num_iterations=1)[1], kmeans(points, 16, num_iterations=30)[1]
    assert many < one
    assert kmeans(points, 64)[1] < many


def test_kmeans_refuses_more_tokens_than_frames():
    with pytest.raises(ValueError, match="too few"):
        kmeans(torch.randn(5, 3), 10)
    with pytest.raises(ValueError, match="too alike"):
        kmeans(torch.ones(50, 3), 10)


def run_main(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["fit_kmeans", *map(str, args)])
    fit_kmeans.main()


def test_fit_from_a_folder_of_recordings(tmp_path, monkeypatch, capsys):
    (tmp_path / "audio").mkdir()
    for i in range(3):
        path = tmp_path / f"audio/{i}.wav"
        soundfile.write(path, noise(16_000, seed=i)[0, 0].numpy(), 16_000)
    (tmp_path / "audio/bad.wav").write_text("x")
    args = ("--audio", tmp_path / "audio", "--num-tokens", 10, "--out")
    run_main(monkeypatch, *args, tmp_path / "a")
    output = capsys.readouterr()
    assert "left out" in output.err
    assert "10 tokens, fingerprint" in output.out
    assert 1 < float(re.search(r"perplexity .* ([\d.]+) of 10", output.out)[1]) <= 10
    run_main(monkeypatch, *args, tmp_path / "b")
    a, b = (load_semantic(str(tmp_path / name)) for name in "ab")
    assert a.fingerprint == b.fingerprint
    features = a.features(noise(16_000))[0]
    assert ((features - a.mean) / a.std).mean().abs() < 0.1

    with pytest.raises(ValueError, match=r"already exists; .*--force"):
        run_main(monkeypatch, *args, tmp_path / "a")
    run_main(monkeypatch, *args, tmp_path / "a", "--force", "--seed", 1)
    assert load_semantic(str(tmp_path / "a")).fingerprint != b.fingerprint
    with pytest.raises(ValueError, match="no recording has split 'train'"):
        run_main(monkeypatch, *args, tmp_path / "c", "--split", "train")
    with pytest.raises(ValueError, match="--weights is for HuBERT"):
        run_main(monkeypatch, *args, tmp_path / "c", "--weights", "x.pth")


@pytest.mark.parametrize("name", ["semantic_hubert", "semantic_mfcc"])
def test_a_shipped_tokenizer_loads_and_uses_its_tokens(name):
    folder = Path(__file__).parent.parent / "pretrained" / name
    tokenizer = load_semantic(str(folder))
    assert f"`{tokenizer.fingerprint}`" in (folder / "README.md").read_text()
    assert sum(path.stat().st_size for path in folder.iterdir()) < 12 * 2**20
    assert (tokenizer.num_tokens, tokenizer.sample_rate, tokenizer.frame_rate) == (500, 16_000, 50)
    wav = torch.cat([scale * noise(16_000, seed=3) for scale in (1e-3, 0.1, 1.0)], dim=2)
    assert tokenizer.encode(wav).unique().numel() > 5
