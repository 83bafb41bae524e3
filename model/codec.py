"""The neural codec: wav <-> codes. EnCodec of any size, or the pretrained EnCodec 24 kHz.

The only file that touches the `encodec` package, from which it takes the modules: SEANet encoder
and decoder, the residual codebooks, the multi-scale STFT discriminator. How codebooks learn is in
model/codec_training.py.
"""

import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from urllib.error import URLError

import safetensors.torch
import torch
from encodec.model import ROOT_URL, LMModel
from encodec.modules import SLSTM, SEANetDecoder, SEANetEncoder
from encodec.modules import SConv1d as SConv1d  # for model/codec_stream.py
from encodec.modules import SConvTranspose1d as SConvTranspose1d
from encodec.modules.seanet import SEANetResnetBlock
from encodec.msstftd import MultiScaleSTFTDiscriminator
from encodec.quantization import ResidualVectorQuantizer
from omegaconf import MISSING
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from configs.codec_schema import CodecConfig
from configs.files import atomic_write, write_json
from configs.load import load_config

# encodec uses torch's older weight_norm, and its weight files have the names of that
warnings.filterwarnings("ignore", ".*weight_norm.* is deprecated", FutureWarning)

ENCODEC_24KHZ = "encodec_24khz"
ENCODEC_24KHZ_FILE = "encodec_24khz-d7cc33bc.th"
ENCODEC_LM_FILE = "encodec_lm_24khz-1608e3c0.th"
ENCODEC_24KHZ_CONFIG = CodecConfig(
    24_000, encoder_filters=32, decoder_filters=32, num_lstm=2, normalize_latent=False
)
SPEECH_LEVEL = 0.05  # root mean square of typical recordings
WEIGHTS_FILE, CONFIG_FILE = "codec.safetensors", "config.json"
FORMAT_VERSION = 1
SCALE = "_scale"  # after the name of a weight that is stored as int8
RunLayers = Callable[[nn.Module, Tensor], Tensor]
LEARNING_BUFFERS = ("cluster_size", "embed_avg", "inited")  # of a codebook; unused when it is fixed


@dataclass(frozen=True)
class CodecFile:
    """What config.json says; without a default, for the file has to."""

    version: int = MISSING
    model: CodecConfig = MISSING


class Codec(nn.Module):
    """wav [B, 1, L] <-> codes [B, K, T], T = ceil(L / hop_length).

    Attributes: name, sample_rate (Hz), hop_length (samples), frame_rate (frames/s),
    num_codebooks K, codebook_size, fingerprint. The parameter names are those of the encodec
    package's own model, so its weight files load as they are.
    """

    def __init__(self, config: CodecConfig, name: str = "codec", weight_norm: bool = False):
        super().__init__()
        self.config, self.name = config, name
        self.sample_rate, self.hop_length = config.sample_rate, config.hop_length
        self.frame_rate = config.sample_rate / config.hop_length
        self.num_codebooks, self.codebook_size = config.num_codebooks, config.codebook_size
        shared = {
            "dimension": config.dimension,
            "ratios": list(config.ratios),
            "n_residual_layers": config.num_residual_layers,
            "lstm": config.num_lstm,
            "causal": config.causal,
            "norm": "weight_norm" if weight_norm else "none",
        }
        self.encoder = SEANetEncoder(n_filters=config.encoder_filters, **shared)
        self.decoder = SEANetDecoder(n_filters=config.decoder_filters, **shared)
        self.quantizer = ResidualVectorQuantizer(
            dimension=config.dimension, n_q=config.num_codebooks, bins=config.codebook_size
        )

    @property
    def fingerprint(self) -> str:
        """16 hex digits of a SHA-256 over config and weights; a copy has the same one anywhere.

        It identifies what the codes mean, so the state that only learning needs is left out.
        """
        config = asdict(self.config)
        if not config["lookahead"]:  # younger than the first codecs
            del config["lookahead"]
        digest = sha256(json.dumps(config, sort_keys=True).encode())
        for key, value in sorted(inference_state(self.state_dict()).items()):
            digest.update(f"{key} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().float().contiguous().numpy().astype("<f4").tobytes())
        return digest.hexdigest()[:16]

    def encode_latent(self, wav: Tensor, run: RunLayers | None = None) -> Tensor:
        """wav [B, 1, (T + lookahead) * hop_length] -> latent [B, D, T], not quantised.

        Frame t is what the encoder makes of the wav up to the end of frame t + lookahead. `run` as
        `run_layers`.
        """
        latent = (run or run_layers)(self.encoder, wav)[..., self.config.lookahead :]
        if not self.config.normalize_latent:
            return latent
        power = latent.float().square().mean(dim=1, keepdim=True)  # [B, 1, T]
        return latent * torch.rsqrt(1 + power)

    def decode_latent(self, latent: Tensor, run: RunLayers | None = None) -> Tensor:
        """latent [B, D, T] -> wav [B, 1, T * hop_length]."""
        return (run or run_layers)(self.decoder, latent)

    @torch.no_grad()
    def encode(self, wav: Tensor) -> Tensor:
        """wav [B, 1, L] at `sample_rate` -> codes [B, K, T], int64, T = ceil(L / hop_length).

        ValueError: not mono, or no samples.
        """
        if wav.ndim != 3 or wav.shape[1] != 1 or wav.shape[2] == 0:
            raise ValueError(f"wav {list(wav.shape)}: expected [B, 1, L] with L >= 1")
        with torch.autocast(wav.device.type, enabled=False):
            silence = -wav.shape[-1] % self.hop_length + self.config.lookahead * self.hop_length
            wav = F.pad(wav.float(), (0, silence))  # [B, 1, (T + lookahead) * hop_length]
            latent = self.encode_latent(wav)  # [B, D, T]
            codes = self.quantizer.vq.encode(latent, self.num_codebooks)  # [K, B, T]
        return codes.transpose(0, 1)  # [B, K, T]

    @torch.no_grad()
    def decode(self, codes: Tensor, length: int | None = None) -> Tensor:
        """codes [B, K', T], K' <= K (the first codebooks) -> wav [B, 1, T * hop_length].

        `length` trims the result to that many samples. ValueError: too many codebooks, no frames,
        codes outside 0..codebook_size-1, or a `length` beyond the frames.
        """
        check_codes(self, codes)
        if length is not None and not 0 <= length <= codes.shape[2] * self.hop_length:
            most = codes.shape[2] * self.hop_length
            raise ValueError(f"length {length}: {codes.shape[2]} frames hold 0..{most} samples")
        with torch.autocast(codes.device.type, enabled=False):
            wav = self.decode_latent(self.quantizer.decode(codes.transpose(0, 1)))
        return wav[..., :length]  # [B, 1, length or T * hop_length]

    def save(self, folder: str | Path) -> None:
        """Write codec.safetensors (see `pack`) and config.json for `load_codec`."""
        state = pack(inference_state(fold_weight_norm(self.state_dict())))
        if not all(torch.isfinite(value).all() for value in state.values()):
            raise ValueError(f"{folder}: not saved, some weights are not finite in fp16")
        with atomic_write(Path(folder) / WEIGHTS_FILE, "wb") as file:
            file.write(safetensors.torch.save(state))
        write_json(Path(folder) / CONFIG_FILE, asdict(CodecFile(FORMAT_VERSION, self.config)))


def check_codes(codec: Codec, codes: Tensor) -> None:
    """ValueError unless codes [B, K', T] are ones that `codec` can decode."""
    if codes.ndim != 3 or not 1 <= codes.shape[1] <= codec.num_codebooks or not codes.numel():
        raise ValueError(
            f"codes {list(codes.shape)}: expected [B, K, T] with K from 1 to "
            f"{codec.num_codebooks} and T >= 1"
        )
    if codes.min() < 0 or codes.max() >= codec.codebook_size:
        raise ValueError(
            f"codes from {codes.min()} to {codes.max()}: outside 0..{codec.codebook_size - 1}"
        )


def run_layers(model: nn.Module, x: Tensor) -> Tensor:
    """A SEANet's layers in turn on x [B, C, L], the LSTM always in fp32: in bf16 it drifts."""
    for layer in model.model:
        if isinstance(layer, SLSTM):
            with torch.autocast(x.device.type, enabled=False):
                x = layer(x.float())
        else:
            x = layer(x)
    return x


def initialise_weights(codec: Codec) -> None:
    """Scale every convolution so that a signal keeps its power on the way through; biases 0.

    The first one amplifies speech to a power of about 1, the last one undoes it. torch's default
    shrinks speech about 50 times on its way to the latent, which then is constant: the decoder
    first learns silence and takes hundreds of steps to leave it. And where the latent is small,
    each optimiser step moves it far, relatively: the codebooks cannot follow.
    """
    gains = {
        codec.encoder.model[0].conv.conv: 1 / SPEECH_LEVEL,
        codec.decoder.model[-1].conv.conv: SPEECH_LEVEL,
    }
    for module in codec.modules():
        if isinstance(module, SEANetResnetBlock):  # adds up two paths
            gains[module.shortcut.conv.conv] = gains[module.block[-1].conv.conv] = 0.5**0.5
    for module in codec.modules():
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            _initialise_conv(module, gains.get(module, 1.0))


@torch.no_grad()
def _initialise_conv(conv: nn.Module, gain: float) -> None:
    """Normal weights that multiply the root mean square of white input by `gain`; biases 0."""
    weight = conv.weight_v if hasattr(conv, "weight_v") else conv.weight
    fan_in = conv.in_channels * math.prod(conv.kernel_size)
    if isinstance(conv, nn.ConvTranspose1d):
        fan_in /= conv.stride[0]  # of its inputs, as many meet in one output
    weight.normal_(std=gain / fan_in**0.5)
    if hasattr(conv, "weight_g"):
        norms = weight.flatten(1).norm(dim=1)  # [out]
        conv.weight_g.copy_(norms.view_as(conv.weight_g))  # [out, 1, ...]
    conv.bias.zero_()


def fold_weight_norm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace every weight_g, weight_v pair by the weight g * v / |v|; others pass through."""
    folded = {}
    for key, value in state.items():
        if key.endswith(".weight_v"):
            stem = key.removesuffix("_v")
            folded[stem] = torch._weight_norm(value, state[f"{stem}_g"], 0)
        elif not key.endswith(".weight_g"):
            folded[key] = value
    return folded


def pack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as int8 with a scale per row of their first dimension: half the size of fp16, which
    the codebooks and all vectors stay in. An error of 1/254 of a row's peak is far below what 4
    kbit/s leave."""
    packed = {}
    for key, value in state.items():
        value = value.detach().float().cpu()
        if value.ndim < 2 or key.endswith("embed"):
            packed[key] = value.half().contiguous()
            continue
        rows = value.flatten(1).abs().amax(dim=1).clamp(min=1e-8) / 127  # [rows]
        scale = rows.view(-1, *[1] * (value.ndim - 1))  # [rows, 1, ...]
        packed[key] = (value / scale).round().to(torch.int8).contiguous()
        packed[key + SCALE] = scale
    return packed


def unpack(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `pack`, in fp32; weights without a scale are taken as they are."""
    return {
        key: value.float() * packed.get(key + SCALE, 1.0)
        for key, value in packed.items()
        if not key.endswith(SCALE)
    }


def inference_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that encode and decode; without the codebooks' running averages."""
    return {k: v for k, v in state.items() if k.rsplit(".", 1)[-1] not in LEARNING_BUFFERS}


def load_codec(name: str, device: str | torch.device = "cpu") -> Codec:
    """Load a codec for inference, in fp32 and eval mode.

    name: a folder written by `Codec.save`; "encodec_24khz", pretrained by Meta, fetched from the
    network once and cached by torch.hub; or "encodec_24khz:FILE", the same weights from a file.
    ValueError says what is missing or damaged.
    """
    kind, _, file = name.partition(":")
    if kind == ENCODEC_24KHZ:
        codec = Codec(ENCODEC_24KHZ_CONFIG, name, weight_norm=True)
        state = _read_th(Path(file)) if file else _download(ENCODEC_24KHZ_FILE, ENCODEC_24KHZ)
        # The file holds 32 codebooks (24 kbit/s); the first 8 are 6 kbit/s, the rest are left out.
        surplus = tuple(f"quantizer.vq.layers.{k}." for k in range(codec.num_codebooks, 32))
        state = {key: value for key, value in state.items() if not key.startswith(surplus)}
        _load_state(codec, state, name)
    else:
        codec = _load_folder(Path(name))
    return codec.to(device).eval().requires_grad_(False)


def _load_folder(folder: Path) -> Codec:
    config_file, weights_file = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    for file in (config_file, weights_file):
        if not file.is_file():
            raise ValueError(
                f"{file}: no such file; a codec is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, "
                f"or {ENCODEC_24KHZ}, or {ENCODEC_24KHZ}:FILE"
            )
    config = load_config(CodecFile, config_file)  # JSON is YAML
    if config.version != FORMAT_VERSION:
        raise ValueError(f"{config_file}: version {config.version}, not {FORMAT_VERSION}")
    try:
        state = safetensors.torch.load_file(weights_file)
    except SafetensorError as error:
        raise ValueError(f"{weights_file}: damaged ({error}); copy it again") from None
    codec = Codec(config.model, str(folder))
    _load_state(codec, state, weights_file)
    return codec


def load_encodec_lm(file: str, device: torch.device | str = "cpu") -> nn.Module:
    """The language model that the encodec package compresses encodec_24khz's codes with; file: a
    copy of its weights, "" downloads them. lm(codes [B,K,T] + 1 of the frame before, 0 where there
    is none)[0] are the chances [B,1024,K,T]. ValueError: they cannot be had or read."""
    lm = LMModel(32, 1024, dim=200, num_layers=5, past_context=int(3.5 * 75))
    state = _read_th(Path(file), ENCODEC_LM_FILE) if file else _download(ENCODEC_LM_FILE, "its LM")
    try:
        lm.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{file}: not the weights of {ENCODEC_LM_FILE} ({reason})") from None
    return lm.to(device).eval().requires_grad_(False)


def _read_th(file: Path, expected: str = ENCODEC_24KHZ_FILE) -> Mapping[str, Tensor]:
    if not file.is_file():
        raise ValueError(f"{file}: no such file; expected a copy of {expected}")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and type errors alike
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file}: not a weight file torch can read safely ({reason})") from None
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{file}: not a state dict of tensors like {expected}")
    return state


def _download(file: str, what: str) -> Mapping[str, Tensor]:
    """The encodec package's own address, through torch.hub's cache; its loader would unpickle."""
    try:
        return torch.hub.load_state_dict_from_url(
            ROOT_URL + file, map_location="cpu", check_hash=True, weights_only=True
        )
    except (URLError, OSError, RuntimeError) as error:
        raise ValueError(
            f"{what}: cannot be downloaded ({error}); copy {file} here from a machine with a "
            f"network and pass its path ({ENCODEC_24KHZ}:/path/{ENCODEC_24KHZ_FILE} for the codec)"
        ) from None


def _load_state(codec: Codec, state: Mapping[str, Tensor], where: str | Path) -> None:
    """Copy `state` into `codec`; every inference tensor must be there with the right shape."""
    state = inference_state(unpack(state))
    found = {key: list(value.shape) for key, value in state.items()}
    expected = {k: list(v.shape) for k, v in inference_state(codec.state_dict()).items()}
    for key in sorted(expected | found):
        if expected.get(key) != found.get(key):
            raise ValueError(
                f"{where}: {key} is {found.get(key, 'absent')}, expected "
                f"{expected.get(key, 'none')}; not the weights of this codec"
            )
    codec.load_state_dict(state, strict=False)  # LEARNING_BUFFERS may lack
    for layer in codec.quantizer.vq.layers:
        layer._codebook.inited.fill_(1)


def build_discriminator(windows: tuple[int, ...], filters: int) -> nn.Module:
    """encodec's multi-scale STFT discriminator (section 3.4, figure 2); hops are window / 4.

    forward(wav [B, 1, L]) -> (logits, feature maps), a list per window. Initialised like the
    codec: with torch's default the biases drown the signal, and it starts out blind.
    """
    discriminator = MultiScaleSTFTDiscriminator(
        filters=filters,
        n_ffts=list(windows),
        win_lengths=list(windows),
        hop_lengths=[window // 4 for window in windows],
    )
    for scale in discriminator.discriminators:
        for i, layer in enumerate((*scale.convs, scale.conv_post)):
            _initialise_conv(layer.conv, 1 / SPEECH_LEVEL if i == 0 else 2**0.5)
    return discriminator
