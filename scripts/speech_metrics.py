"""What a listener would say of a clip: PESQ, the speaker, the words. Packages of `evaluate` in
pyproject.toml, each of which may lack: its figure is then left out, and said to be."""

import importlib
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from scripts.codec_losses import MelDistance
from scripts.codec_metrics import mel_distance, si_sdr, stoi

SAMPLE_RATE = 16_000
"""Every figure is taken at this rate, the one of PESQ-WB, so that codecs of any rate compare."""
WINDOW_SECONDS = 30  # that Whisper hears at once
SHORTEST_VOICE = SAMPLE_RATE // 4  # samples
PACKAGES = {  # figure -> its name, its modules, how to get them
    "pesq": ("PESQ", ("pesq",), "pesq==0.0.4"),
    "speaker_similarity": (
        "speaker similarity",
        ("resemblyzer",),
        "librosa==0.11.0 webrtcvad-wheels==2.0.14.post1; pip install --no-deps resemblyzer==0.1.4",
    ),
    "wer": (
        "WER",
        ("faster_whisper", "jiwer", "whisper_normalizer.english"),
        "faster-whisper==1.2.1 jiwer==4.0.0 whisper-normalizer==0.1.15",
    ),
    "mos": ("DNSMOS", ("speechmos.dnsmos",), "speechmos==0.0.1.1"),
    "picture": ("picture", ("matplotlib",), "matplotlib==3.10.9"),
}


def not_measured(figures: Iterable[str]) -> dict[str, str]:
    """Those of `figures` (keys of PACKAGES) whose packages lack -> a line: how to get them."""
    lines = {}
    for figure in figures:
        title, modules, packages = PACKAGES[figure]
        try:
            for module in modules:
                importlib.import_module(module)
        except ImportError as error:
            lines[figure] = f"{title}: not measured ({error}); pip install {packages}"
    return lines


def versions_of_packages() -> dict[str, str]:
    """Those of the packages that figures come from, as far as they are installed."""
    names = ("pystoi", "pesq", "resemblyzer", "faster-whisper", "jiwer", "whisper-normalizer")
    names += ("speechmos",)
    found = {}
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def pesq_wb(estimate: np.ndarray, target: np.ndarray) -> float | None:
    """Wide-band PESQ (ITU-T P.862.2) of wav [L] at 16 kHz: 1.0 to 4.64.

    None where it is not defined: silence, or less than a quarter of a second.
    """
    import pesq

    if not (target.any() and estimate.any()):  # it would divide by the largest sample
        return None
    try:
        return float(pesq.pesq(SAMPLE_RATE, target, estimate, "wb"))
    except pesq.PesqError:
        return None


def mos(wav: np.ndarray) -> float | None:
    """The overall opinion, 1 to 5, that DNSMOS P.835 (Reddy et al. 2022) expects of listeners to
    wav [L] at 16 kHz. None: there is nothing to hear. Less than 9 s are heard several times."""
    from speechmos import dnsmos

    if not wav.any():
        return None
    return float(dnsmos.run(wav.clip(-1, 1), sr=SAMPLE_RATE)["ovrl_mos"])


class SpeakerSimilarity:
    """Cosine between resemblyzer's embeddings (Wan et al. 2018) of two clips.

    About 0.9 for one LibriSpeech speaker in two recordings, 0.5 for two speakers.
    """

    def __init__(self) -> None:
        import resemblyzer

        self.encoder = resemblyzer.VoiceEncoder("cpu", verbose=False)
        self.trim = resemblyzer.preprocess_wav

    def embed(self, wav: np.ndarray) -> np.ndarray | None:
        """wav [L] at 16 kHz -> a unit vector [256]; None where its detector hears no voice."""
        voice = self.trim(wav) if wav.any() else wav[:0]
        return self.encoder.embed_utterance(voice) if len(voice) >= SHORTEST_VOICE else None

    def __call__(self, estimate: np.ndarray, of_target: np.ndarray | None) -> float | None:
        """None without a voice in the target; 0 where the reconstruction alone has none."""
        if of_target is None:
            return None
        embedding = self.embed(estimate)
        return 0.0 if embedding is None else float(embedding @ of_target)


class Transcriber:
    """A Whisper model in faster-whisper, int8 on one CPU thread, English, beam 5, temperature 0."""

    def __init__(self, name: str):
        """name: a CTranslate2 folder, or a model's name (network). ValueError: cannot be loaded."""
        from faster_whisper import WhisperModel
        from whisper_normalizer.english import EnglishTextNormalizer

        self.normalize = EnglishTextNormalizer()
        try:
            self.model = WhisperModel(name, "cpu", compute_type="int8", cpu_threads=1)
        except Exception as error:  # of the hub, of HTTP, of CTranslate2: many types
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            kind = "cannot be loaded" if Path(name).exists() else "no such folder, and not fetched"
            raise ValueError(f"--asr {name}: {kind} ({reason})") from None

    def transcribe(self, wav: np.ndarray) -> str:
        """wav [L] at 16 kHz -> its words; the same ones every time."""
        segments, _ = self.model.transcribe(
            wav,
            language="en",
            beam_size=5,
            temperature=0.0,
            condition_on_previous_text=False,
            without_timestamps=True,
            # out of noise it may say one word for ever; nobody says ten tokens a second
            max_new_tokens=10 + round(10 * min(WINDOW_SECONDS, len(wav) / SAMPLE_RATE)),
        )
        return " ".join(segment.text.strip() for segment in segments)

    def __call__(self, wav: np.ndarray, text: str) -> dict:
        """{"transcript", "word_errors", "num_words", and of characters} against `text`, normalised.

        Errors are substitutions, deletions and insertions; none is counted without words in `text`.
        """
        import jiwer

        transcript = self.transcribe(wav)
        words = self.normalize(text)
        if not words:
            return {}
        result = {"transcript": transcript}
        for unit, compare in (("word", jiwer.process_words), ("char", jiwer.process_characters)):
            found = compare(words, self.normalize(transcript))
            result[f"{unit}_errors"] = found.substitutions + found.deletions + found.insertions
            result[f"num_{unit}s"] = found.hits + found.substitutions + found.deletions
        return result


class Judge:
    """Every figure that `figures` names, of one clip after the other; loads its models once."""

    def __init__(self, figures: frozenset[str], asr: str | None = None):
        self.figures = figures
        self.distance = MelDistance(SAMPLE_RATE)
        self.similarity = SpeakerSimilarity() if "speaker_similarity" in figures else None
        self.transcriber = Transcriber(asr) if "wer" in figures else None

    def __call__(self, target: np.ndarray, estimates: dict[int, np.ndarray], text: str) -> dict:
        """target and estimates [L] at 16 kHz; `estimates` by number of codebooks.

        Returns {"original": figures of the target itself, "figures": {num_codebooks: figures}};
        a figure is None where it is not defined for the clip.
        """
        embedding = self.similarity.embed(target) if self.similarity else None
        original = self._words(target, text)
        figures = {}
        for count, estimate in estimates.items():
            pair = torch.from_numpy(estimate)[None], torch.from_numpy(target)[None]  # [1, L] each
            figures[count] = {
                "pesq": pesq_wb(estimate, target) if "pesq" in self.figures else None,
                "stoi": stoi(*pair, SAMPLE_RATE),
                "si_sdr_db": si_sdr(*pair),
                "mel_distance": mel_distance(self.distance, *pair),
                "speaker_similarity": (
                    self.similarity(estimate, embedding) if self.similarity else None
                ),
                **self._words(estimate, text),
            }
        return {"original": original, "figures": figures}

    def _words(self, wav: np.ndarray, text: str) -> dict:
        return self.transcriber(wav, text) if self.transcriber and text else {}


_judge: Callable[..., dict]


def _start_worker(make_judge: Callable[[], Callable[..., dict]]) -> None:
    global _judge
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    _judge = make_judge()


def _judge_clip(*clip) -> dict:
    return _judge(*clip)


def judge_all(
    clips: Iterable[tuple], make_judge: Callable[[], Callable[..., dict]], num_workers: int
) -> Iterator[dict]:
    """`make_judge()(*clip)` for each clip, in order, in `num_workers` processes of a thread.

    Clips are taken as they are needed, a few per worker ahead. One worker is this process itself.
    """
    judge = make_judge()  # here as well: a model that is not there is one clear error
    if num_workers <= 1:
        yield from (judge(*clip) for clip in clips)
        return
    settings = (num_workers, get_context("spawn"), _start_worker, (make_judge,))
    with ProcessPoolExecutor(*settings) as pool:
        pending: deque = deque()
        for clip in clips:
            pending.append(pool.submit(_judge_clip, *clip))
            if len(pending) > 2 * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
