"""data/audio.py: every format in and out, and a clear sentence for every broken file."""

import json

import numpy as np
import pytest
import soundfile
import torch

from data.audio import audio_seconds, find_recordings, load_audio, read_audio, save_audio

RATE = 48_000
FORMATS = {
    "a.wav": ("WAV", "PCM_16"),
    "a.flac": ("FLAC", "PCM_16"),
    "a.ogg": ("OGG", "VORBIS"),
    "a.opus": ("OGG", "OPUS"),
    "a.mp3": ("MP3", "MPEG_LAYER_III"),
}


def tone(seconds=1.0, hertz=440.0, rate=RATE):
    return 0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


def write(path, samples, rate=RATE):
    kind, subtype = FORMATS.get(path.name, ("WAV", "FLOAT"))
    soundfile.write(path, samples, rate, format=kind, subtype=subtype)
    return path


def peak_hertz(wav, rate):
    spectrum = torch.fft.rfft(wav[0] * torch.hann_window(wav.shape[1])).abs()
    return spectrum.argmax().item() * rate / wav.shape[1]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_comes_back_mono_resampled_and_whole(tmp_path, name):
    path = write(tmp_path / name, np.stack([tone(), 0 * tone()], axis=1))
    wav = load_audio(path, 16_000)
    assert wav.shape[0] == 1
    assert wav.dtype == torch.float32
    assert wav.shape[1] == pytest.approx(16_000, abs=200)
    assert peak_hertz(wav, 16_000) == pytest.approx(440, abs=2)
    assert wav[0, 4000:12000].abs().max() == pytest.approx(0.15, abs=0.02)  # mean of two channels
    assert audio_seconds(path) == pytest.approx(1.0, abs=0.02)


def test_resampling_removes_what_the_new_rate_cannot_hold(tmp_path):
    path = write(tmp_path / "x.wav", tone(hertz=440) + tone(hertz=11_000))
    wav = load_audio(path, 16_000)
    spectrum = torch.fft.rfft(wav[0]).abs()
    assert peak_hertz(wav, 16_000) == pytest.approx(440, abs=2)
    assert spectrum[4_800:5_200].max() < 0.01 * spectrum.max()  # 11 kHz would alias to 5 kHz


def test_the_file_s_own_rate_is_left_alone(tmp_path):
    samples = tone(rate=16_000).astype(np.float32)
    wav, rate = read_audio(write(tmp_path / "x.wav", samples, 16_000))
    assert rate == 16_000
    assert torch.equal(wav, torch.from_numpy(samples)[None])


def damage(path, keep):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    return path


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: folder / "gone.wav", "no such file"),
        (lambda folder: write(folder / "x.wav", np.zeros(0)), "empty"),
        (lambda folder: write(folder / "x.wav", np.array([0.0, np.nan])), "NaN"),
        (lambda folder: write(folder / "x.wav", np.array([0.0, np.inf])), "infinite"),
        (lambda folder: damage(write(folder / "a.flac", tone()), 0.6), "damaged"),
        (lambda folder: damage(write(folder / "a.mp3", tone(3)), 0.5), "damaged"),
        (lambda folder: damage(write(folder / "a.opus", tone()), 0.01), "cannot be decoded"),
    ],
    ids=["missing", "empty", "nan", "infinite", "flac", "mp3", "opus"],
)
def test_broken_files_are_named_with_what_is_wrong(tmp_path, make, says):
    path = make(tmp_path)
    with pytest.raises(ValueError, match=says) as caught:
        read_audio(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("name", "says"),
    [("x.mp3", "no audio in it"), ("x.m4a", r"convert \.m4a first: ffmpeg -i x\.m4a x\.flac")],
)
def test_what_is_no_audio_here_says_what_to_do(name, says, tmp_path):
    (tmp_path / name).write_bytes(np.random.default_rng(0).bytes(3000))
    assert [r.name for r in find_recordings(tmp_path)] == [name]
    with pytest.raises(ValueError, match=rf"{name}: cannot be decoded \({says}"):
        read_audio(tmp_path / name)


def test_text_called_wav_cannot_be_decoded(tmp_path):
    (tmp_path / "x.wav").write_text("not audio")
    with pytest.raises(ValueError, match=r"x\.wav: cannot be decoded"):
        audio_seconds(tmp_path / "x.wav")


def test_saving_clips_instead_of_wrapping(tmp_path):
    save_audio(tmp_path / "x.wav", torch.tensor([[0.5, 2.0, -2.0]]), 16_000)
    wav, rate = read_audio(tmp_path / "x.wav")
    assert rate == 16_000
    assert torch.allclose(wav, torch.tensor([[0.5, 1.0, -1.0]]), atol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["x.wav"]


def test_a_folder_is_searched_recursively_by_name_without_hidden_files(tmp_path):
    for name in ("b.wav", "a/z.FLAC", "a/notes.txt", ".cache/x.wav", "a/._z.flac"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [r.name for r in find_recordings(tmp_path)] == ["a/z.FLAC", "b.wav"]


def test_a_manifest_gives_text_speaker_and_split(tmp_path):
    lines = [
        {"path": "b.wav"},
        {"path": "a.wav", "text": "two\u2028lines", "speaker": "s", "split": "valid", "extra": 1},
    ]
    text = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "m.jsonl").write_text(text, encoding="utf-8")
    first, second = find_recordings(tmp_path / "m.jsonl")
    assert (first.name, first.path) == ("a.wav", tmp_path / "a.wav")
    assert (first.text, first.speaker, first.split) == ("two\u2028lines", "s", "valid")
    assert (second.text, second.speaker, second.split) == (None, None, None)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{oops", "line 2: not JSON"),
        ('["a.wav"]', 'line 2: expected an object with a "path"'),
        ('{"path": 3}', 'line 2: expected an object with a "path"'),
        ('{"path": "a.wav", "speaker": 3}', 'line 2: "speaker" must be a string'),
        ('{"path": "a.wav", "split": "dev"}', 'line 2: split "dev" is none of train, valid, test'),
    ],
)
def test_a_bad_manifest_line_is_named(tmp_path, line, says):
    (tmp_path / "m.jsonl").write_text('{"path": "a.wav"}\n' + line + "\n")
    with pytest.raises(ValueError, match=says):
        find_recordings(tmp_path / "m.jsonl")


def test_nothing_to_find_says_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match="no such folder or manifest"):
        find_recordings(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"no recordings found \(looked for .*\.flac"):
        find_recordings(tmp_path)
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a text file"):
        find_recordings(tmp_path / "x.jsonl")


def test_one_recording_is_no_manifest(tmp_path):
    soundfile.write(tmp_path / "a.mp3", tone(), RATE, format="MP3")
    with pytest.raises(ValueError, match=r"a\.mp3: a recording; pass the folder it is in"):
        find_recordings(tmp_path / "a.mp3")
