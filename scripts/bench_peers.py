"""Other projects' models of the same sizes, trained by the same plain step: a ruler for `train`."""

import re
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.load import load_config
from configs.schema import RunConfig
from scripts.bench_tools import CODEC, SEMANTIC, WARM_UP
from scripts.run_log import peak_flops

Loss = Callable[[], Tensor]


def musicgen(config: RunConfig, frames: int, batch: int, device: torch.device) -> tuple:
    """transformers' MusicGen decoder: as many places, at each of which it reads and predicts a code
    of every codebook; multi-head attention, learned nothing of positions, GELU."""
    from transformers import MusicgenDecoderConfig, MusicgenForCausalLM

    c, K, size = config.model, config.num_coarse, CODEC["codebook_size"]
    length = frames * (1 + K)
    made = MusicgenDecoderConfig(
        vocab_size=size,
        hidden_size=c.dim,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        ffn_dim=4 * c.dim,
        num_codebooks=K,
        max_position_embeddings=length,
        dropout=c.dropout,
        pad_token_id=0,
        bos_token_id=0,
    )
    made._attn_implementation = "sdpa"
    model = MusicgenForCausalLM(made).to(device)
    for layer in model.model.decoder.layers:  # there is nothing to attend to across
        layer.encoder_attn = layer.encoder_attn_layer_norm = None
    ids = torch.randint(size, (batch * K, length), device=device)
    labels = torch.randint(size, (batch, length, K), device=device)
    return model, lambda: model(input_ids=ids, labels=labels, use_cache=False).loss


def audiolm(config: RunConfig, frames: int, batch: int, device: torch.device, flash: bool) -> tuple:
    """audiolm-pytorch's coarse transformer: the same tokens in the same order."""
    from audiolm_pytorch import CoarseTransformer
    from audiolm_pytorch.t5 import T5_CONFIGS

    c, K, size = config.model, config.num_coarse, CODEC["codebook_size"]
    # its constructor asks the network for the width of a text encoder, with text or without
    T5_CONFIGS["no text"] = {"config": SimpleNamespace(d_model=c.dim)}
    model = CoarseTransformer(
        codebook_size=size,
        num_coarse_quantizers=K,
        num_semantic_tokens=SEMANTIC["num_tokens"],
        dim=c.dim,
        depth=c.num_layers,
        heads=c.num_heads,
        attn_dropout=c.dropout,
        ff_dropout=c.dropout,
        t5_name="no text",
        flash_attn=flash,
        num_residual_streams=1,  # its default, 4, takes twice the memory and more
    ).to(device)
    semantic = torch.randint(SEMANTIC["num_tokens"], (batch, frames), device=device)
    codes = torch.randint(size, (batch, frames * K), device=device)

    def loss() -> Tensor:
        _, logits = model(semantic_token_ids=semantic, coarse_token_ids=codes)
        return F.cross_entropy(logits[:, : codes.shape[1]].flatten(0, 1).float(), codes.flatten())

    return model, loss


PEERS = {  # name -> (package, what builds its model and loss)
    "transformers' MusicGen decoder": ("transformers", musicgen),
    "audiolm-pytorch, flash attention": ("audiolm_pytorch", partial(audiolm, flash=True)),
    "audiolm-pytorch, relative bias": ("audiolm_pytorch", partial(audiolm, flash=False)),
}


def installed_peers() -> list[str]:
    """ValueError: none is installed."""
    names = [name for name, (package, _) in PEERS.items() if find_spec(package)]
    if not names:
        raise ValueError(
            "--peers: none is installed; pip install transformers, or audiolm-pytorch==2.4.0"
        )
    return names


def time_peer(name: str, recipe: str, overrides: list[str], num_steps: int) -> dict:
    """Figures as `bench_train.time_steps` has them, of a plain step: autocast, fused AdamW,
    clipping. Of the recipe's batch, or the half, the quarter ... that the memory holds."""
    config = load_config(RunConfig, recipe, [*overrides, "out=."])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    frames, batch = round(config.data.crop_seconds * CODEC["frame_rate"]), config.train.batch_size
    while batch:
        try:
            torch.manual_seed(0)
            build = PEERS[name][1]
            figures = time_plain_steps(*build(config, frames, batch, device), device, num_steps)
        except torch.OutOfMemoryError:
            batch //= 2
            continue
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


def time_plain_steps(model: nn.Module, loss_of: Loss, device: torch.device, num: int) -> dict:
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
