"""Samples during training, from one stage alone: what it would write, given real conditions."""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.codec import Codec, load_codec
from model.drawing import Sampling
from model.sampling import generate
from model.stages import Stage


@dataclass(frozen=True)
class Preview:
    """codes [K,T] as the codec takes them, and as wav [1,L]; None of both for semantic tokens,
    which nothing here turns into sound."""

    tokens: Tensor
    wav: Tensor | None


def preview_codec(expected: dict, device: torch.device) -> Codec:
    """The codec that tokens were made with. ValueError: by its name another one is found."""
    codec = load_codec(expected["name"], device)
    if codec.fingerprint != expected["fingerprint"]:
        raise ValueError(
            f"{expected['name']} ({codec.fingerprint}) is not the codec of data.tokens "
            f"({expected['fingerprint']}); put that one there, or set train.sample_every=0"
        )
    return codec


def preview(stage: Stage, clips: list[tuple[Tensor, Tensor]], codec: Codec | None) -> list[Preview]:
    """Sample a clip as long as each (semantic [T_s], codes [K,T]) of `clips`, at seeds 0, 1, ...

    The stage reads the clip's own condition; the fine stage's coarse codes are the clip's too, the
    coarse stage's output is decoded alone, with the codebooks it has.
    """
    streams = [stage.spec.streams(*clip) for clip in clips]
    empty = torch.empty(stage.layout.num_codebooks, 0, dtype=torch.long)
    tokens = generate(
        stage,
        [condition for condition, _ in streams],
        [empty] * len(clips),
        [target.shape[1] for _, target in streams],
        list(range(len(clips))),
        Sampling(temperature=0.9, top_k=100),
    )
    if stage.spec.name == "semantic" or codec is None:
        return [Preview(t, None) for t in tokens]
    previews, device = [], stage.embed.weight.device
    for t, (_, codes) in zip(tokens, clips, strict=True):
        if stage.spec.name == "fine":
            t = torch.cat([codes[: stage.spec.codebooks[0], : t.shape[1]], t])
        wav = codec.decode(t[None].to(device))[0]  # [1,K,T] -> [1,L]
        previews.append(Preview(t, wav))
    return previews
