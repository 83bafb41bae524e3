"""scripts/encoding.py: how clips are batched, and by how many threads, changes no token."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from configs.codec_schema import CodecConfig
from data.audio import Recording, find_recordings, load_audio
from data.shards import TokenFolder
from model.codec import Codec, initialise_weights
from model.semantic import MfccConfig, MfccKMeans
from scripts.encoding import CPU, Machine, Tokens, cut_batches, prepare_thread
from scripts.prepare import Encoder, Options, prepare

SMALL = CodecConfig(
    encoder_filters=4,
    decoder_filters=2,
    num_lstm=1,
    dimension=16,
    num_codebooks=4,
    codebook_size=64,
)


@pytest.fixture(autouse=True)
def _threads_stay_as_they_are():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_codec(**changed):
    torch.manual_seed(0)
    codec = Codec(replace(SMALL, **changed), name="small")
    initialise_weights(codec)
    for module in codec.modules():  # a trained codec has biases: what follows a clip is not zero
        if isinstance(module, torch.nn.Conv1d):
            torch.nn.init.normal_(module.bias, std=0.1)
    for layer in codec.quantizer.vq.layers:
        torch.nn.init.normal_(layer._codebook.embed, std=0.3)
    return codec.eval()


@pytest.fixture(scope="module")
def semantic():
    generator = torch.Generator().manual_seed(0)
    tokenizer = MfccKMeans(MfccConfig(num_mels=20, num_mfcc=5))
    centroids = torch.randn(30, 35, generator=generator)
    tokenizer.set_codebook(torch.zeros(35), torch.ones(35), centroids)
    return tokenizer


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    """12 clips from 2 to 90 frames of 20 ms, three of them equally long, at two rates."""
    folder = tmp_path_factory.mktemp("audio")
    frames = [2, 3.5, 6, 7, 8, 20, 41.3, 41.3, 41.3, 70, 80.7, 90]
    for i, length in enumerate(np.random.default_rng(0).permutation(frames)):
        rate = (16_000, 24_000)[i % 2]
        noise = np.random.default_rng(i).standard_normal(int(0.02 * length * rate))
        soundfile.write(folder / f"{i:02d}.wav", 0.05 * noise.astype(np.float32), rate)
    (folder / "damaged.wav").write_text("not audio")
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    "changed", [{}, {"causal": False}, {"lookahead": 1}, {"sample_rate": 24_000}], ids=str
)
def test_batches_and_threads_write_the_bytes_of_one_by_one(audio, semantic, tmp_path, changed):
    codec, options = make_codec(**changed), Options(min_seconds=0.01, shard_clips=9)
    cases = {"alone": (1, 1e-3), "some": (1, 1.7), "threads": (3, 0.9), "together": (2, 1e3)}
    for name, (workers, batch_seconds) in cases.items():
        machine = Machine(CPU, workers, batch_seconds)
        out = tmp_path / name
        prepare(find_recordings(audio), codec, semantic, out, options, machine=machine)
        assert contents(out) == contents(tmp_path / "alone"), name

    tokens = TokenFolder(tmp_path / "together")
    assert len(tokens.all_clips) == 12
    for clip in tokens.all_clips:
        semantic_tokens, codes = tokens.read(clip)
        wav = load_audio(audio / clip.name, codec.sample_rate)[None]
        assert np.array_equal(codes, codec.encode(wav)[0]), clip
        wav = load_audio(audio / clip.name, semantic.sample_rate)[None]
        assert np.array_equal(semantic_tokens, semantic.encode(wav)[0]), clip
    assert len(np.unique(np.concatenate([tokens.read(c)[1][0] for c in tokens.all_clips]))) > 5


def test_batches_are_of_like_length_and_bounded():
    recordings = [Recording(f"{i}", None) for i in range(100)]
    lengths = np.random.default_rng(0).gamma(2, 3, 100)
    seconds = {r.name: float(s) for r, s in zip(recordings, lengths, strict=True)}
    batches = cut_batches(recordings, seconds, limit=20)
    assert sorted(r.name for batch in batches for r in batch) == sorted(seconds)
    padded = [len(batch) * seconds[batch[0].name] for batch in batches]
    assert all(p <= 20 or len(batch) == 1 for p, batch in zip(padded, batches, strict=True))
    assert sum(padded) < 1.25 * lengths.sum()
    assert len(batches) < 2 * lengths.sum() / 20
    assert cut_batches([], {}, 20) == []


def test_decoding_keeps_ahead_but_not_far(audio, semantic):
    """Results come in order; what is under way, decoded audio in memory, stays bounded."""
    begun = []

    def batches():
        for i in range(40):
            begun.append(i)
            yield [Recording(f"{i}", audio / "00.wav")]

    with Encoder(make_codec(), semantic, Machine(CPU, workers=2)) as encoder:
        for i, found in enumerate(encoder.encode(batches())):
            assert [*found] == [f"{i}"]
            assert isinstance(found[f"{i}"], Tokens)
            assert len(begun) <= i + 6
        assert i == 39
        assert set(encoder.spent) == {"decoding", "waiting", "semantic", "codec"}


def test_leaving_early_ends_the_threads(audio, semantic):
    batches = [[Recording(f"{i}", audio / "00.wav")] for i in range(1000)]
    with Encoder(make_codec(), semantic, Machine(CPU, workers=2)) as encoder:
        next(encoder.encode(batches))
    with pytest.raises(RuntimeError, match="shutdown"):
        encoder.pool.submit(print)


def test_an_operator_has_one_core(semantic):
    torch.set_num_threads(2)
    with Encoder(make_codec(), semantic, Machine(CPU, workers=2)) as encoder:
        assert encoder.pool.submit(torch.get_num_threads).result() == 1


def test_a_gpu_without_the_memory_is_one_clear_line(audio, semantic, tmp_path):
    codec = make_codec()

    def encode(wav):
        raise torch.OutOfMemoryError

    codec.encode = encode
    machine = Machine(CPU, batch_seconds=1280)
    with pytest.raises(ValueError, match=r"--batch-seconds 1280: too much .* memory; pass less"):
        prepare(find_recordings(audio), codec, semantic, tmp_path / "out", machine=machine)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"workers": 0}, "--workers 0: expected 1 or more"),
        ({"batch_seconds": 0}, "--batch-seconds 0: expected more than 0"),
        ({"batch_seconds": float("nan")}, "--batch-seconds nan"),
    ],
)
def test_senseless_options_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        Machine(**options)


def test_processes_of_a_host_share_its_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16), raising=False)
    assert Machine.with_defaults(CPU).workers == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    assert Machine.with_defaults(CPU).workers == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "99")
    assert Machine.with_defaults(CPU).workers == 1
    assert Machine.with_defaults(CPU, 7, 3.5) == Machine(CPU, 7, 3.5)


def test_the_report_says_where_the_time_went(audio, semantic, tmp_path, capsys):
    prepare(find_recordings(audio), make_codec(), semantic, tmp_path / "out")
    output = capsys.readouterr().out
    assert "times real time" in output
    steps = output.split("time of all threads (--workers 1): ")[1].splitlines()[0]
    for step in ("looking", "decoding", "waiting", "semantic", "codec", "writing"):
        assert step in steps


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:1"])
def test_threads_go_to_the_gpu_that_has_a_number_each_with_a_stream(name, monkeypatch):
    from torch.cuda._utils import _get_device_index  # private: here it breaks one test at most

    chosen = []

    def set_device(device):
        chosen.append(_get_device_index(device))  # torch's own check: "cuda" alone is refused

    streams = []
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: tuple(chosen))  # of the GPU chosen so far
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    for with_stream in (False, True)[: 1 + (name != "cpu")]:
        chosen.clear()
        arguments = [torch.device(name), with_stream]
        with ThreadPoolExecutor(1, initializer=prepare_thread, initargs=arguments) as pool:
            assert pool.submit(torch.get_num_threads).result() == 1
        assert chosen == [1] * (name == "cuda:1")
        assert streams == [tuple(chosen)] * with_stream
