"""The codec: exact lengths, save and load, fingerprints, the pretrained EnCodec's file format."""

import json
import warnings
from dataclasses import replace
from urllib.error import URLError

import pytest
import torch
from encodec import EncodecModel
from torch.nn import functional as F

from configs.codec_schema import CodecConfig
from model.codec import (
    ENCODEC_24KHZ_FILE,
    Codec,
    build_discriminator,
    fold_weight_norm,
    load_codec,
    pack,
    unpack,
)
from model.codec_training import CodecTraining

TINY = CodecConfig(
    sample_rate=8000,
    ratios=(4, 2),
    encoder_filters=4,
    decoder_filters=4,
    dimension=8,
    num_codebooks=3,
    codebook_size=16,
)


def make_codec(config: CodecConfig = TINY, seed: int = 0, weight_norm: bool = False) -> Codec:
    """Random weights; codebooks on the scale of the latents, shrinking as residuals do."""
    torch.manual_seed(seed)
    codec = Codec(config, weight_norm=weight_norm).eval()
    for k, layer in enumerate(codec.quantizer.vq.layers):
        layer._codebook.embed.copy_(0.1 * torch.randn_like(layer._codebook.embed) * 0.5**k)
        layer._codebook.inited.fill_(1)
    return codec


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codec")
    make_codec(weight_norm=True).save(folder)
    return folder


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 801])
def test_lengths_are_exact(length, causal):
    codec = make_codec(replace(TINY, causal=causal))
    codes = codec.encode(torch.randn(2, 1, length))
    frames = -(-length // codec.hop_length)
    assert codes.shape == (2, 3, frames)
    assert codes.dtype == torch.int64
    assert codec.decode(codes).shape == (2, 1, frames * codec.hop_length)
    assert codec.decode(codes, length=length).shape == (2, 1, length)


def test_a_batch_equals_its_clips_one_by_one():
    codec, wav = make_codec(), torch.randn(3, 1, 400)
    codes = codec.encode(wav)
    singly = torch.cat([codec.encode(clip[None]) for clip in wav])
    assert codes.unique().numel() > 4
    assert torch.equal(codes, singly)


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_a_frame_hears_lookahead_frames_beyond_its_own(lookahead):
    codec = make_codec(replace(TINY, lookahead=lookahead))
    wav = torch.randn(1, 1, 20 * codec.hop_length)
    codes = codec.encode(wav)  # [1, K, 20]
    assert codes.shape[2] == 20
    heard = set()  # how far before the frame that changes the first code that changes lies
    for frame in range(8, 16):
        other = wav.clone()
        other[..., frame * codec.hop_length :] = torch.randn(1, 1, (20 - frame) * codec.hop_length)
        changed = (codec.encode(other) != codes).any(dim=1)[0]  # [20]
        heard.add(frame - int(changed.nonzero()[0]))
    assert max(heard) == lookahead
    # what follows a clip is silence to it, so clips of a batch do not hear the padding
    assert torch.equal(codec.encode(F.pad(wav, (0, 400)))[..., :20], codes)


def test_fewer_codebooks_decode_the_first_ones():
    codec = make_codec()
    codes = codec.encode(torch.randn(1, 1, 80))
    layers = codec.quantizer.vq.layers
    by_hand = sum(layers[k]._codebook.embed[codes[:, k]] for k in range(2)).transpose(1, 2)
    with torch.no_grad():
        expected = codec.decode_latent(by_hand)
    torch.testing.assert_close(codec.decode(codes[:, :2]), expected)
    assert not torch.allclose(codec.decode(codes), expected)


def test_codes_are_the_nearest_residual_vectors():
    codec, wav = make_codec(), torch.randn(1, 1, 80)
    codes = codec.encode(wav)
    with torch.no_grad():
        residual = codec.encode_latent(wav)[0].T  # [T, D]
    for k, layer in enumerate(codec.quantizer.vq.layers):
        embed = layer._codebook.embed
        assert torch.equal(codes[0, k], torch.cdist(residual, embed).argmin(dim=1))
        residual = residual - embed[codes[0, k]]


def test_latent_frames_keep_quiet_ones_weak_and_loud_ones_bounded():
    codec, wav = make_codec(), torch.randn(1, 1, 80)
    with torch.no_grad():
        plain = make_codec(replace(TINY, normalize_latent=False)).encode_latent(wav)
        powers = [codec.encode_latent(gain * wav).square().mean(dim=1) for gain in (1, 1e4)]
    expected = plain / (1 + plain.square().mean(dim=1, keepdim=True)).sqrt()
    torch.testing.assert_close(codec.encode_latent(wav), expected)
    assert powers[0].max() < powers[1].min()
    assert powers[1].max() <= 1


def test_save_and_load_round_trip(saved):
    original, loaded = make_codec(weight_norm=True), load_codec(str(saved))
    wav = torch.randn(1, 1, 160)
    assert loaded.config == TINY
    assert loaded.name == str(saved)
    assert (loaded.hop_length, loaded.frame_rate, loaded.num_codebooks) == (8, 1000.0, 3)
    with torch.no_grad():  # fp16 storage may flip a code, so compare before and after quantising
        error = (original.encode_latent(wav) - loaded.encode_latent(wav)).abs().max()
    assert error < 5e-3
    codes = loaded.encode(wav)
    torch.testing.assert_close(original.decode(codes), loaded.decode(codes), atol=1e-2, rtol=0)
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in loaded.parameters())


def test_packed_weights_are_small_and_close(saved):
    state = fold_weight_norm(make_codec(weight_norm=True).state_dict())
    packed = pack(state)
    assert {value.dtype for value in packed.values()} == {torch.int8, torch.float16, torch.float32}
    for key, value in unpack(packed).items():
        peak = state[key].abs().max()
        assert (value - state[key]).abs().max() <= 0.6 * peak / 127, key  # half a step
        if key.endswith("embed") or value.ndim < 2:
            assert packed[key].dtype == torch.float16, key


def test_saving_a_loaded_codec_changes_nothing(saved, tmp_path):
    load_codec(str(saved)).save(tmp_path)
    for name in ("codec.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()


def test_fingerprint_is_stable_and_sensitive(saved):
    codec = load_codec(str(saved))
    assert codec.fingerprint == load_codec(str(saved)).fingerprint
    assert len(codec.fingerprint) == 16
    before = codec.fingerprint
    codec.quantizer.vq.layers[0]._codebook.cluster_size.add_(1)  # learning state: no part of it
    assert codec.fingerprint == before
    codec.quantizer.vq.layers[2]._codebook.embed[3, 1] += 1e-3
    assert codec.fingerprint != before
    assert make_codec().fingerprint != make_codec(replace(TINY, causal=False)).fingerprint


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(1, 4, 2, dtype=torch.int64), "K from 1 to 3"),
        (torch.zeros(1, 3, 0, dtype=torch.int64), "T >= 1"),
        (torch.full((1, 3, 2), 16), "outside 0..15"),
        (torch.full((1, 3, 2), -1), "outside 0..15"),
    ],
)
def test_bad_codes(codes, message):
    with pytest.raises(ValueError, match=message):
        make_codec().decode(codes)


def test_bad_lengths_and_wavs():
    codec = make_codec()
    with pytest.raises(ValueError, match="length 17"):
        codec.decode(torch.zeros(1, 3, 2, dtype=torch.int64), length=17)
    for shape in ((1, 1, 0), (1, 2, 8), (1, 8)):
        with pytest.raises(ValueError, match="expected"):
            codec.encode(torch.zeros(shape))


def test_broken_folders(saved, tmp_path):
    with pytest.raises(ValueError, match="no such file; a codec is a folder"):
        load_codec(str(tmp_path / "absent"))
    (tmp_path / "codec.safetensors").write_bytes((saved / "codec.safetensors").read_bytes())
    config = json.loads((saved / "config.json").read_text())

    def loading_with(**changes) -> str:
        changed = config | {"model": config["model"] | changes}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"config\.json|codec\.safetensors") as error:
            load_codec(str(tmp_path))
        return str(error.value)

    assert "Did you mean: 'dimension'?" in loading_with(dimensions=3)
    assert "model.dimension)" in loading_with(dimension="wide")
    assert "expected [" in loading_with(dimension=16)
    assert "layers.3._codebook.embed is absent, expected [16, 8]" in loading_with(num_codebooks=4)
    assert "layers.2._codebook.embed is [16, 8], expected none" in loading_with(num_codebooks=2)
    (tmp_path / "config.json").write_text(json.dumps(config | {"version": 2}))
    with pytest.raises(ValueError, match="version 2"):
        load_codec(str(tmp_path))
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    (tmp_path / "codec.safetensors").write_bytes((saved / "codec.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged"):
        load_codec(str(tmp_path))


@pytest.fixture(scope="module")
def encodec_file(tmp_path_factory):
    """Random weights in exactly the format of the published file: the package's own state dict."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = EncodecModel.encodec_model_24khz(pretrained=False)
    for layer in model.quantizer.vq.layers:
        layer._codebook.embed.normal_()
    file = tmp_path_factory.mktemp("encodec") / ENCODEC_24KHZ_FILE
    torch.save(model.state_dict(), file)
    return file, model


def test_encodec_24khz_from_a_file_equals_the_package(encodec_file):
    file, model = encodec_file
    codec = load_codec(f"encodec_24khz:{file}")
    assert (codec.sample_rate, codec.hop_length, codec.frame_rate) == (24_000, 320, 75.0)
    assert (codec.num_codebooks, codec.codebook_size) == (8, 1024)
    wav = torch.randn(1, 1, 6400)
    model.set_target_bandwidth(6.0)
    with torch.no_grad():
        frames = model.encode(wav)
        expected = model.decode(frames)
    codes = codec.encode(wav)
    assert torch.equal(codes, frames[0][0])
    torch.testing.assert_close(codec.decode(codes), expected)
    assert codec.encode(wav[..., :6399]).shape == (1, 8, 20)


def test_encodec_24khz_files_that_are_not(encodec_file, tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_codec("encodec_24khz:/nowhere/encodec.th")
    bad = tmp_path / "bad.th"
    bad.write_bytes(b"not a zip")
    with pytest.raises(ValueError, match=r"bad\.th: not a weight file"):
        load_codec(f"encodec_24khz:{bad}")
    torch.save({"x": torch.zeros(1)}, bad)
    with pytest.raises(ValueError, match="is absent, expected"):
        load_codec(f"encodec_24khz:{bad}")
    torch.save(make_codec, bad)  # a pickled function must not be run, nor anything like it
    with pytest.raises(ValueError, match="not a weight file torch can read safely"):
        load_codec(f"encodec_24khz:{bad}")


def test_encodec_24khz_by_name_without_a_network(monkeypatch, tmp_path):
    def unreachable(*_args, **_kwargs):
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    with pytest.raises(ValueError, match=f"encodec_24khz:/path/{ENCODEC_24KHZ_FILE}"):
        load_codec("encodec_24khz")


def train_codebooks(steps: int = 60) -> tuple[CodecTraining, torch.Tensor]:
    """Feed latents from 12 clusters to a learning codec's quantiser; its last relative error."""
    torch.manual_seed(0)
    training = CodecTraining(Codec(TINY), decay=0.9, dead_code_share=0.1)
    centres = 5 * torch.randn(12, TINY.dimension)
    for step in range(steps):
        chosen = torch.randint(12, (4, 25))
        latent = (centres[chosen] + 0.1 * torch.randn(4, 25, TINY.dimension)).transpose(1, 2)
        restarts = torch.randint(2**31, (TINY.num_codebooks, TINY.codebook_size))
        if step == 0:
            training.initialise(latent.transpose(1, 2).flatten(0, 1), restarts)
        _, _, error = training.quantize(latent, torch.full((4,), 3), restarts)
    return training, error


def test_codebooks_learn_the_clusters():
    training, error = train_codebooks()
    assert error < 0.01
    assert (training.usage() > 0.4).all()


def test_dead_codes_come_back():
    training, _ = train_codebooks()
    book = training.codec.quantizer.vq.layers[0]._codebook
    with torch.no_grad():
        book.embed[:8] = 1e4  # far from everything
        book.embed_avg[:8] = 1e4 * book.cluster_size[:8, None]
    for _ in range(40):
        latent = torch.randn(4, TINY.dimension, 25)
        restarts = torch.randint(2**31, (TINY.num_codebooks, TINY.codebook_size))
        training.quantize(latent, torch.full((4,), 3), restarts)
    assert book.embed.abs().max() < 10


def test_dropout_sums_the_first_codebooks_and_every_one_is_committed():
    training, _ = train_codebooks()
    training.eval()
    latent = (3 * torch.randn(2, TINY.dimension, 5)).requires_grad_()
    restarts = torch.zeros(TINY.num_codebooks, TINY.codebook_size, dtype=torch.int64)
    quantized, commitment, _ = training.quantize(latent, torch.tensor([1, 3]), restarts)
    layers = training.codec.quantizer.vq.layers
    codes = training.codec.quantizer.vq.encode(latent.detach())  # [K, B, T]
    first = layers[0]._codebook.embed[codes[0, 0]].T  # [D, T]
    every = sum(layer._codebook.embed[codes[k, 1]] for k, layer in enumerate(layers)).T
    torch.testing.assert_close(quantized[0], first)
    torch.testing.assert_close(quantized[1], every)
    (gradient,) = torch.autograd.grad(quantized.sum(), latent, retain_graph=True)
    assert torch.equal(gradient, torch.ones_like(gradient))  # straight-through
    (pull,) = torch.autograd.grad(commitment, latent)
    residual, total = latent.detach().transpose(1, 2).reshape(-1, TINY.dimension), 0
    for k, layer in enumerate(layers):
        residual = residual - F.embedding(codes[k].flatten(), layer._codebook.embed)
        total = total + 2 * residual / residual.numel()
    torch.testing.assert_close(pull, total.view(2, 5, -1).transpose(1, 2))


def test_discriminator_scales_and_gradients():
    discriminator = build_discriminator((256, 128), filters=4)
    wav = torch.randn(2, 1, 2000, requires_grad=True)
    logits, maps = discriminator(wav)
    assert len(logits) == len(maps) == 2
    sum(scale.mean() for scale in logits).backward()
    assert wav.grad.abs().sum() > 0
