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


def preview(
    stage: Stage, clips: list[tuple[Tensor, Tensor]], codec: Codec | None
) -> list[dict[str, Preview]]:
    """Of each clip (semantic [T_s], codes [K,T]), at seeds 0, 1, ...: `made`, as long as it, from
    its condition alone; `continued`, after its own first half; `real`, its own codes.

    The fine stage's coarse codes are the clip's too, the coarse stage's output is decoded alone,
    with the codebooks it has. A clip's own semantic tokens are not repeated: nothing here turns
    them into sound.
    """
    streams = [stage.spec.streams(*clip) for clip in clips] * 2
    targets, N = [target for _, target in streams], len(clips)
    prompts = [t[:, :0] if n < N else t[:, : t.shape[1] // 2] for n, t in enumerate(targets)]
    tokens = generate(
        stage,
        [condition for condition, _ in streams],
        prompts,
        [target.shape[1] for target in targets],
        [*range(N)] * 2,
        Sampling(temperature=0.9, top_k=100),
    )
    versions = {"made": tokens[:N], "continued": tokens[N:]}
    if stage.spec.name == "semantic" or codec is None:
        versions = {name: [Preview(t, None) for t in made] for name, made in versions.items()}
    else:
        versions["real"] = targets[:N]
        versions = {
            name: [_heard(stage, codec, *pair) for pair in zip(made, clips, strict=True)]
            for name, made in versions.items()
        }
    return [{name: made[n] for name, made in versions.items()} for n in range(N)]


def _heard(stage: Stage, codec: Codec, tokens: Tensor, clip: tuple[Tensor, Tensor]) -> Preview:
    """The stage's own codebooks [K_s,T], of the fine stage with the clip's coarse ones."""
    if stage.spec.name == "fine":
        coarse = clip[1][: stage.spec.codebooks[0], : tokens.shape[1]]
        tokens = torch.cat([coarse, tokens])
    wav = codec.decode(tokens[None].to(stage.embed.weight.device))[0]  # [1,K,T] -> [1,L]
    return Preview(tokens, wav)
