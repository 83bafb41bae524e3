"""Other projects' models of the same sizes, trained by the same plain step: a ruler for `train`."""

import re
import time
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.load import load_config
from configs.schema import RunConfig
from scripts.bench_tools import CODEC, SEMANTIC, WARM_UP
from scripts.run_log import peak_flops

Call = Callable[[], Tensor]


class MusicGen:
    """transformers' MusicGen decoder: at each place it reads and predicts a code of every codebook;
    multi-head attention, learned nothing of positions, GELU."""

    package, name = "transformers", "transformers' MusicGen decoder"

    def __init__(self, config: RunConfig, frames: int, device: torch.device):
        from transformers import MusicgenDecoderConfig, MusicgenForCausalLM

        c, self.K, self.length = config.model, config.num_coarse, frames * (1 + config.num_coarse)
        made = MusicgenDecoderConfig(
            vocab_size=CODEC["codebook_size"],
            hidden_size=c.dim,
            num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads,
            ffn_dim=4 * c.dim,
            num_codebooks=self.K,
            max_position_embeddings=self.length,
            dropout=c.dropout,
            pad_token_id=0,
            bos_token_id=0,
        )
        made._attn_implementation = "sdpa"
        self.model, self.device, self.codes_per_step = MusicgenForCausalLM(made), device, self.K
        self.model.to(device)
        for layer in self.model.model.decoder.layers:  # there is nothing to attend to across
            layer.encoder_attn = layer.encoder_attn_layer_norm = None

    def _codes(self, *shape: int) -> Tensor:
        return torch.randint(CODEC["codebook_size"], shape, device=self.device)

    def loss(self, batch: int) -> Call:
        """As many places as ours has."""
        ids = self._codes(batch * self.K, self.length)
        labels = self._codes(batch, self.length, self.K)
        return lambda: self.model(input_ids=ids, labels=labels, use_cache=False).loss

    def step(self, batch: int, num_before: int) -> Call:
        """Codes of the next place after `num_before`, with a cache."""
        ids = self._codes(batch * self.K, num_before)
        made = self.model(input_ids=ids, use_cache=True)

        def step() -> Tensor:
            nonlocal made
            drawn = drawn_from(made.logits[:, -1])[:, None]  # [B*K,1]
            made = self.model(input_ids=drawn, past_key_values=made.past_key_values, use_cache=True)
            return drawn

        return step


class AudioLM:
    """audiolm-pytorch's coarse transformer: the same tokens in the same order."""

    package, name, flash = "audiolm_pytorch", "audiolm-pytorch, flash attention", True

    def __init__(self, config: RunConfig, frames: int, device: torch.device):
        from audiolm_pytorch import CoarseTransformer
        from audiolm_pytorch.t5 import T5_CONFIGS

        c, self.K, self.frames = config.model, config.num_coarse, frames
        # its constructor asks the network for the width of a text encoder, with text or without
        T5_CONFIGS["no text"] = {"config": SimpleNamespace(d_model=c.dim)}
        self.device, self.codes_per_step = device, 1
        self.model = CoarseTransformer(
            codebook_size=CODEC["codebook_size"],
            num_coarse_quantizers=self.K,
            num_semantic_tokens=SEMANTIC["num_tokens"],
            dim=c.dim,
            depth=c.num_layers,
            heads=c.num_heads,
            attn_dropout=c.dropout,
            ff_dropout=c.dropout,
            t5_name="no text",
            flash_attn=self.flash,
            num_residual_streams=1,  # its default, 4, takes twice the memory and more
        ).to(device)

    def _tokens(self, batch: int, num_codes: int) -> tuple[Tensor, Tensor]:
        sizes = ((SEMANTIC["num_tokens"], self.frames), (CODEC["codebook_size"], num_codes))
        return tuple(torch.randint(size, (batch, n), device=self.device) for size, n in sizes)

    def loss(self, batch: int) -> Call:
        semantic, codes = self._tokens(batch, self.frames * self.K)

        def loss() -> Tensor:
            _, logits = self.model(semantic_token_ids=semantic, coarse_token_ids=codes)
            logits = logits[:, : codes.shape[1]].flatten(0, 1)
            return F.cross_entropy(logits.float(), codes.flatten())

        return loss

    def step(self, batch: int, num_before: int) -> Call:
        """The next code after `num_before` places, with a cache, as its own `generate` does it."""
        semantic, codes = self._tokens(batch, max(1, num_before - self.frames))
        caches: tuple = (None, None)

        def step() -> Tensor:
            nonlocal codes, caches
            (_, logits), caches = self.model.forward_with_cond_scale(
                semantic_token_ids=semantic,
                coarse_token_ids=codes,
                cond_scale=1.0,
                return_kv_cache=True,
                kv_cache=caches[0],
                embed_cache=caches[1],
            )
            drawn = drawn_from(logits[:, -1])[:, None]  # [B,1]
            codes = torch.cat([codes, drawn % CODEC["codebook_size"]], dim=1)
            return drawn

        step()  # reads what is before
        return step


class BiasedAudioLM(AudioLM):
    name, flash = "audiolm-pytorch, relative bias", False


PEERS = {peer.name: peer for peer in (MusicGen, AudioLM, BiasedAudioLM)}


def drawn_from(logits: Tensor) -> Tensor:
    """logits [N,C] -> classes [N], among the 100 likeliest."""
    best, classes = logits.float().topk(100, dim=-1)
    place = torch.multinomial((best / 0.8).softmax(dim=-1), 1)
    return classes.gather(1, place)[:, 0]


def installed_peers() -> list[str]:
    """ValueError: none is installed."""
    names = [name for name, peer in PEERS.items() if find_spec(peer.package)]
    if not names:
        raise ValueError(
            "--peers: none is installed; pip install transformers, or audiolm-pytorch==2.4.0"
        )
    return names


def cannot_be_imported(error: ImportError) -> dict:
    """A row that says so, in a cell of a table."""
    said = next(filter(str.strip, str(error).splitlines()), "no reason given")
    return {"failed": f"cannot be imported: {said.strip().replace('|', '/')}"}


def time_peer(name: str, recipe: str, overrides: list[str], num_steps: int) -> dict:
    """Figures as `bench_train.time_steps` has them, of a plain step: autocast, fused AdamW,
    clipping. Of the recipe's batch, or the half, the quarter ... that the memory holds."""
    config = load_config(RunConfig, recipe, [*overrides, "out=."])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    frames, batch = round(config.data.crop_seconds * CODEC["frame_rate"]), config.train.batch_size
    while batch:
        try:
            torch.manual_seed(0)
            # held by nobody here, lest a model that did not fit stays beside the next
            figures = time_plain_steps(PEERS[name](config, frames, device), batch, num_steps)
        except torch.OutOfMemoryError:
            batch //= 2
            continue
        except ImportError as error:  # it is there, and what it needs is not
            return cannot_be_imported(error)
        length, c = frames * (1 + config.num_coarse), config.model
        speed = batch * length / figures["milliseconds"] * 1e3
        flops = 6 * figures.pop("num_parameters") + 6 * c.num_layers * c.dim * length
        peak = peak_flops(device)
        return figures | {
            "batch_size": batch,
            "tokens_per_second": speed,
            "mfu": None if peak is None else speed * flops / peak,
        }
    return {"failed": "out of memory"}


def time_plain_steps(peer: Any, batch: int, num: int) -> dict:
    model, device, loss_of = peer.model, peer.device, peer.loss(batch)
    counted = [  # as our own MFU: neither embeddings nor heads
        p for name, p in model.named_parameters() if not re.search(r"embed|head|logit", name)
    ]
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, fused=True)
    cuda = device.type == "cuda"

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    began = time.perf_counter()
    for _ in range(WARM_UP):
        loss = step()
    loss.item()  # waits for all that the device still has to do
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for _ in range(num):
        loss = step()
    last = loss.item()
    return {
        "milliseconds": 1e3 * (time.perf_counter() - started) / num,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "first_seconds": started - began,
        "loss": last,
        "num_parameters": sum(p.numel() for p in counted),
    }


@torch.no_grad()
def time_decoding(
    name: str, config: RunConfig, batch: int, num_steps: int, device: torch.device
) -> dict:
    """Figures as those of `bench_sample.time_stage`, of steps half way through the recipe's
    sequence. {"failed"}: why there are none."""
    frames = round(config.data.crop_seconds * CODEC["frame_rate"])
    half = frames * (1 + config.num_coarse) // 2
    try:
        peer = PEERS[name](config, frames, device)
        peer.model.eval()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            step = peer.step(batch, half)
            for _ in range(WARM_UP):
                step()
            step().sum().item()  # waits for all that the device still has to do
            started = time.perf_counter()
            for _ in range(num_steps):
                drawn = step()
            drawn.sum().item()
            seconds = (time.perf_counter() - started) / num_steps
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    except ImportError as error:
        return cannot_be_imported(error)
    codes = batch * peer.codes_per_step
    return {
        "milliseconds": 1e3 * seconds,
        "tokens_per_second": codes / seconds,
        "real_time": codes / config.num_coarse / CODEC["frame_rate"] / seconds,
    }
