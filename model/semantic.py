"""Semantic tokenizers: wav -> one coarse "what is said" token per 20 ms.

All kinds cluster frame features with k-means and name each frame by its nearest centroid:
`MfccKMeans`, `SmallHubertKMeans` (a layer of a HuBERT trained here; Hsu et al. 2021, used as
AudioLM uses w2v-BERT) and `HubertKMeans` (of a published one). A tokenizer lives in a folder:
`config.json` says how features are made, `semantic.safetensors` holds mean, std [F], centroids
[num_tokens, F] and, under `hubert.`, the small HuBERT's weights up to that layer.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
import torch.nn.functional as F
import torchaudio
from safetensors import SafetensorError
from torch import Tensor, nn

from configs.files import atomic_write, write_json
from configs.semantic_schema import SmallHubertConfig
from model.hubert import (
    HOP_LENGTH,
    SAMPLE_RATE,
    WINDOW_LENGTH,
    build_hubert,
    exact,
    level,
    pad_to_frames,
)

CONFIG_FILE = "config.json"
TENSOR_FILE = "semantic.safetensors"
HUBERT = "hubert."  # before the names of a small HuBERT's weights
SMALLEST_DEVIATION = 1e-2  # of a feature over a clip: in silence there is none
HUBERT_NAMES = ("hubert_base", "hubert_large", "hubert_xlarge")


@dataclass(frozen=True)
class MfccConfig:
    """Features of `MfccKMeans`: `num_mfcc` coefficients of a frame and of those around it."""

    kind: Literal["mfcc"] = "mfcc"
    sample_rate: int = 16_000
    hop_length: int = 320
    window_length: int = 400
    num_mels: int = 40
    num_mfcc: int = 13
    context: int = 3
    """Frames before and as many after: they tell phones better than deltas do, and change less
    often."""


@dataclass(frozen=True)
class HubertConfig:
    """Features of `HubertKMeans`: the output of transformer layer `layer`, counted from 1."""

    kind: Literal["hubert"] = "hubert"
    sample_rate: int = 16_000
    hop_length: int = 320
    window_length: int = 400
    """Both of HuBERT's stack of convolutions, the same for all its sizes."""
    model: str = "hubert_base"
    """A torchaudio pipeline by name, one of HUBERT_NAMES."""
    layer: int = 7
    weights: str | None = None
    """A state-dict file in torchaudio's format, relative to the folder; None: by name (network)."""
    weights_sha256: str | None = None
    """Of the tensors in use: the centroids mean nothing on top of other weights."""


@dataclass(frozen=True)
class SmallHubertFeatures:
    """Features of `SmallHubertKMeans`: the output of layer `layer` of a HuBERT trained here."""

    kind: Literal["small_hubert"] = "small_hubert"
    sample_rate: int = SAMPLE_RATE
    hop_length: int = HOP_LENGTH
    window_length: int = WINDOW_LENGTH
    layer: int = 6
    architecture: SmallHubertConfig = field(default_factory=SmallHubertConfig)


FeatureConfig = MfccConfig | HubertConfig | SmallHubertFeatures


class SemanticTokenizer(nn.Module):
    """Frame features [F], normalised, named by the nearest of `num_tokens` centroids.

    Attributes: `name` (what `load_semantic` was given; `fingerprint` identifies), `sample_rate`,
    `hop_length`, `frame_rate`, `num_tokens` (0 before `set_codebook`), `fingerprint`.
    """

    mean: Tensor  # [F]
    std: Tensor  # [F]
    centroids: Tensor  # [num_tokens, F]

    def __init__(self, config: FeatureConfig, num_features: int):
        super().__init__()
        self.config, self.name, self.num_features = config, "", num_features
        self.sample_rate, self.hop_length = config.sample_rate, config.hop_length
        self.frame_rate = config.sample_rate / config.hop_length
        for name in ("mean", "std", "centroids"):
            self.register_buffer(name, torch.empty(0), persistent=False)

    @property
    def num_tokens(self) -> int:
        return self.centroids.shape[0]

    @property
    def fingerprint(self) -> str:
        """16 hex digits of sha256 over the config (less where weights lie) and the tensors."""
        config = {key: value for key, value in asdict(self.config).items() if key != "weights"}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        digest.update(_hash_tensors(self._tensors()).encode())
        return digest.hexdigest()[:16]

    def features(self, wav: Tensor, lengths: Tensor | None = None) -> Tensor:
        """wav [B, 1, L] at `sample_rate` -> features [B, T, F], T = ceil(L / hop_length).

        `mean` and `std` are not yet applied.
        """
        raise NotImplementedError

    @torch.no_grad()
    def encode(self, wav: Tensor, lengths: Tensor | None = None) -> Tensor:
        """wav [B, 1, L] -> semantic_tokens [B, T] int64, T = ceil(L / hop_length).

        `lengths` [B], in samples, is for clips padded with zeros on the right: the first
        ceil(lengths[b] / hop_length) tokens are those of clip b alone, and 0 follows.
        """
        lengths = None if lengths is None else lengths.to(wav.device)
        features = (self.features(wav, lengths) - self.mean) / self.std
        tokens = nearest_centroid(features.flatten(0, 1), self.centroids).view(features.shape[:2])
        if lengths is None:
            return tokens
        position = torch.arange(tokens.shape[1], device=wav.device)  # [T]
        return tokens.masked_fill(position >= self.num_frames(lengths)[:, None], 0)

    def num_frames(self, lengths: Tensor) -> Tensor:
        """Samples -> frames: ceil(length / hop_length), at least 1."""
        return (lengths + self.hop_length - 1).div(self.hop_length, rounding_mode="floor").clamp(1)

    def set_codebook(self, mean: Tensor, std: Tensor, centroids: Tensor) -> None:
        """mean, std [F] of `features`; centroids [num_tokens, F] of the normalised ones."""
        for name, tensor in (("mean", mean), ("std", std), ("centroids", centroids)):
            if tensor.shape[-1:] != (self.num_features,) or not tensor.isfinite().all():
                shape = list(tensor.shape)
                raise ValueError(f"{name} {shape}: not finite, or not {self.num_features} wide")
            setattr(self, name, tensor.float().to(self.mean.device))

    def save(self, folder: str | Path) -> None:
        """Write `semantic.safetensors`, then `config.json`, each atomically, into `folder`."""
        folder, config = Path(folder), asdict(self.config)
        if config.get("weights"):  # relative to the folder, so that the two can move together
            config["weights"] = Path(os.path.relpath(config["weights"], folder)).as_posix()
        with atomic_write(folder / TENSOR_FILE, "wb") as file:
            file.write(safetensors.torch.save(self._tensors()))
        write_json(folder / CONFIG_FILE, config)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"centroids": self.centroids, "mean": self.mean, "std": self.std}
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    def _per_clip(self, features: Tensor, lengths: Tensor | None) -> Tensor:
        """features [B, T, F] at mean 0 and deviation 1 over each clip: what stays the same
        throughout tells voice and microphone (the mean: van Niekerk et al. 2021)."""
        # in float64, so that padding does not change a mean's last bit, and with it a token
        x, frames, inside = exact(features), features.shape[1], 1.0  # [B, T, F], T
        if lengths is not None:
            frames = self.num_frames(lengths)[:, None, None]  # [B, 1, 1]
            position = torch.arange(features.shape[1], device=features.device)[None, :, None]
            inside = position < frames  # [B, T, 1]
        x = x - (x * inside).sum(1, keepdim=True) / frames
        variance = (x.square() * inside).sum(1, keepdim=True) / frames  # [B, 1, F]
        return (x * variance.clamp(min=SMALLEST_DEVIATION**2).rsqrt()).float()

    def _pad(self, wav: Tensor) -> Tensor:
        """wav [B, 1, L] -> [B, T * hop + window - hop], T = ceil(L / hop)."""
        return pad_to_frames(wav.squeeze(1), self.config.window_length, self.hop_length)


class MfccKMeans(SemanticTokenizer):
    """MFCCs, normalised over the clip, with those of the frames around: F = (1 + 2 * context) *
    num_mfcc. A crop's tokens can differ from the whole clip's."""

    def __init__(self, config: MfccConfig | None = None):
        config = config or MfccConfig()
        super().__init__(config, num_features=(1 + 2 * config.context) * config.num_mfcc)
        spectrogram = {"n_fft": config.window_length, "hop_length": config.hop_length}
        self.mfcc = torchaudio.transforms.MFCC(
            sample_rate=config.sample_rate,
            n_mfcc=config.num_mfcc,
            log_mels=True,
            melkwargs={**spectrogram, "n_mels": config.num_mels, "center": False},
        )

    @torch.no_grad()
    def features(self, wav: Tensor, lengths: Tensor | None = None) -> Tensor:
        """wav [B, 1, L] -> features [B, T, F].

        What a frame sees beyond the ends of its clip is the first frame and the last one again.
        """
        mfcc = self.mfcc(self._pad(wav)).transpose(1, 2)  # [B, T, num_mfcc]
        x = self._per_clip(mfcc, lengths)  # [B, T, num_mfcc]
        frame = torch.arange(x.shape[1], device=wav.device)[None, :, None]  # [1, T, 1]
        last = frame[:, -1:] if lengths is None else self.num_frames(lengths)[:, None, None] - 1
        shifts = range(-self.config.context, self.config.context + 1)
        places = [(frame + n).clamp(min=0).minimum(last).expand_as(x) for n in shifts]
        return torch.cat([x.gather(1, place) for place in places], dim=2)  # [B, T, F]


class SmallHubertKMeans(SemanticTokenizer):
    """A layer of a HuBERT trained by scripts.train_semantic; `weights` are as in `build_hubert`.

    Self-attention sees the whole clip: a crop's tokens can differ. ValueError: no such layer, or
    weights of another architecture.
    """

    def __init__(self, config: SmallHubertFeatures, weights: dict[str, Tensor]):
        super().__init__(config, num_features=config.architecture.dim)
        self.hubert = build_hubert(config.architecture, weights, config.layer)

    @torch.no_grad()
    def features(self, wav: Tensor, lengths: Tensor | None = None) -> Tensor:
        """wav [B, 1, L] -> the output of layer `layer`, normalised over the clip [B, T, dim]."""
        samples = torch.tensor([wav.shape[2]], device=wav.device) if lengths is None else lengths
        padded, windows = self._pad(level(wav, samples[:, None, None])), None
        if lengths is not None:  # of the samples under whole windows
            overlap = self.config.window_length - self.hop_length
            windows = self.num_frames(lengths) * self.hop_length + overlap
        layers, _ = self.hubert.extract_features(padded, windows, num_layers=self.config.layer)
        return self._per_clip(layers[-1], lengths)  # [B, T, F]

    def _tensors(self) -> dict[str, Tensor]:
        """fp16 holds these weights exactly: they have been through it."""
        weights = {f"{HUBERT}{k}": v.half().cpu() for k, v in self.hubert.state_dict().items()}
        return {**super()._tensors(), **weights}


class HubertKMeans(SemanticTokenizer):
    """A published HuBERT's layer. `folder` is what `config.weights` is relative to.

    Self-attention sees the whole clip: a crop's tokens can differ. Clips of a padded batch are
    encoded one by one, for base's group norm and the others' input norm run over time: there
    padding would leak. ValueError: unknown model, no network, unreadable weights, or not those the
    centroids belong to.
    """

    def __init__(self, config: HubertConfig | None = None, folder: str | Path = "."):
        config = config or HubertConfig()
        if config.model not in HUBERT_NAMES:
            known = ", ".join(HUBERT_NAMES)
            raise ValueError(f"HuBERT model {config.model!r} is unknown; choose one of {known}")
        if config.weights is None:
            source, hubert = config.model, _hubert_by_name(config.model)
        else:
            config = replace(config, weights=str(Path(folder, config.weights)))
            source, hubert = config.weights, _hubert_from_file(config.model, config.weights)
        layers = hubert.encoder.transformer.layers
        if not 1 <= config.layer <= len(layers):
            raise ValueError(f"{source}: layer {config.layer} asked for, it has 1 to {len(layers)}")
        del layers[config.layer :]  # never run: neither memory nor fingerprint needs them
        sha256 = _hash_tensors(hubert.state_dict())
        if config.weights_sha256 not in (None, sha256):
            raise ValueError(
                f"{source}: not the weights these centroids were fitted on (sha256 {sha256[:16]}, "
                f"expected {config.weights_sha256[:16]}); pass the right file or fit again"
            )
        width = hubert.encoder.feature_projection.projection.out_features
        super().__init__(replace(config, weights_sha256=sha256), num_features=width)
        self.hubert = hubert.eval().requires_grad_(False)

    @torch.no_grad()
    def features(self, wav: Tensor, lengths: Tensor | None = None) -> Tensor:
        """wav [B, 1, L] -> the output of layer `layer` [B, T, encoder_embed_dim]."""
        if lengths is not None:
            T = -(-wav.shape[2] // self.hop_length)
            pairs = zip(wav, lengths.tolist(), strict=True)
            clips = [self.features(clip[None, :, :n])[0] for clip, n in pairs]  # [T_b, F]
            return torch.stack([F.pad(clip, (0, 0, 0, T - len(clip))) for clip in clips])
        if self.config.model != "hubert_base":  # the larger ones were trained on normalised wavs
            wav = F.layer_norm(wav, wav.shape[-1:])  # before any padding
        layers, _ = self.hubert.extract_features(self._pad(wav), num_layers=self.config.layer)
        return layers[-1]  # [B, T, F]


def load_semantic(name: str, device: str | torch.device = "cpu") -> SemanticTokenizer:
    """Load the tokenizer of the folder `name`.

    ValueError: no such folder, a file of it missing or malformed, or HuBERT's weights (see there).
    """
    folder, tensor_file = Path(name), Path(name, TENSOR_FILE)
    if not (folder / CONFIG_FILE).is_file() or not tensor_file.is_file():
        raise ValueError(
            f"{folder}: not a semantic tokenizer ({CONFIG_FILE} and {TENSOR_FILE} expected); pass "
            "pretrained/semantic_hubert or a folder made by scripts.fit_kmeans"
        )
    try:
        config = _read_config(folder / CONFIG_FILE)
    except (ValueError, TypeError, KeyError) as error:
        reason = f"damaged, or not of this version ({error!r})"
        raise ValueError(f"{folder / CONFIG_FILE}: {reason}; fit it again") from None
    if isinstance(config, HubertConfig):
        tokenizer: SemanticTokenizer = HubertKMeans(config, folder)
    try:
        tensors = safetensors.torch.load_file(tensor_file)
        weights = {k[len(HUBERT) :]: tensors.pop(k) for k in [*tensors] if k.startswith(HUBERT)}
        if isinstance(config, SmallHubertFeatures):
            tokenizer = SmallHubertKMeans(config, weights)
        elif isinstance(config, MfccConfig):
            tokenizer = MfccKMeans(config)
        tokenizer.set_codebook(**tensors)
    except (SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"{tensor_file}: damaged or not ours ({error})") from None
    tokenizer.name = name
    return tokenizer.to(device).eval()


def _read_config(path: Path) -> FeatureConfig:
    entries = json.loads(path.read_text(encoding="utf-8"))
    if entries["kind"] == "small_hubert":
        entries["architecture"] = SmallHubertConfig(**entries["architecture"])
        return SmallHubertFeatures(**entries)
    return {"mfcc": MfccConfig, "hubert": HubertConfig}[entries["kind"]](**entries)


def nearest_centroid(features: Tensor, centroids: Tensor) -> Tensor:
    """features [N, F], centroids [num_tokens, F] -> index of the nearest [N] (the first of ties).

    |x - c|^2 less |x|^2, which no centroid changes: one matrix product instead of [N, C, F].
    """
    half_norm = centroids.square().sum(1) / 2
    return (half_norm - features @ centroids.T).argmin(dim=1)


def _hash_tensors(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _hubert_by_name(name: str) -> nn.Module:
    bundle = getattr(torchaudio.pipelines, name.upper())
    try:  # the one place here that asks the network, and only for a model asked for by name
        model = bundle.get_model(dl_kwargs={"weights_only": True, "map_location": "cpu"})
    except OSError as error:
        raise ValueError(
            f"{name}: its weights are not cached and could not be downloaded ({error}); connect "
            "once, or fit with torchaudio's file of them: --weights FILE"
        ) from None
    return getattr(model, "model", model)  # large models come wrapped with the normalisation


def _hubert_from_file(name: str, path: str) -> nn.Module:
    if not Path(path).is_file():
        raise ValueError(f'{path}: no such file; correct "weights" in the {CONFIG_FILE} naming it')
    model = getattr(torchaudio.models, name)()
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # pickle, zip and key errors alike: the file is not the one
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path}: not weights of {name} ({reason})") from None
    return model
