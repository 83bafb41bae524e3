"""Fit the centroids of a semantic tokenizer: features of many recordings -> k-means -> a folder."""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Categorical
from tqdm import tqdm

from data.audio import Recording, find_recordings, read_sound, resample
from model.hubert import load_hubert
from model.semantic import (
    HUBERT_NAMES,
    HubertConfig,
    HubertKMeans,
    MfccKMeans,
    SemanticTokenizer,
    SmallHubertFeatures,
    SmallHubertKMeans,
    nearest_centroid,
)
from scripts.cli import find_device, make_parser, run_cli

EXAMPLES = """\
  python -m scripts.fit_kmeans --audio recordings --out runs/semantic_mine
  python -m scripts.fit_kmeans --audio ../shared/corpus/manifest.jsonl --split train \\
      --features mfcc --num-tokens 500 --out pretrained/semantic_mfcc --force
  python -m scripts.fit_kmeans --audio ../shared/corpus/manifest.jsonl --split train \\
      --features runs/hubert --layer 6 --device cuda --out runs/semantic2
  python -m scripts.fit_kmeans --audio recordings --features hubert_base --layer 7 \\
      --weights hubert_fairseq_base_ls960.pth --device cuda --out runs/semantic_base"""

CHUNK = 16_384
"""Frames per distance matrix: [16384, 500] floats are 33 MB."""


def collect_features(
    tokenizer: SemanticTokenizer, recordings: list[Recording], max_hours: float, seed: int
) -> Tensor:
    """Raw features [N, F] on the CPU of a seeded random choice of at most `max_hours`.

    Recordings that cannot be decoded are named on stderr and left out.
    """
    order = np.random.default_rng(seed).permutation(len(recordings))
    device, collected, seconds = tokenizer.mean.device, [], 0.0
    for index in tqdm(order, desc="features", unit="file", disable=None):
        if seconds >= max_hours * 3600:
            break
        try:
            wav = resample(*read_sound(recordings[index].path), tokenizer.sample_rate)  # [1, L]
        except ValueError as error:
            print(f"left out {error}", file=sys.stderr)
            continue
        seconds += wav.shape[1] / tokenizer.sample_rate
        collected.append(tokenizer.features(wav[None].to(device))[0].cpu())  # [T, F]
    if not collected:
        raise ValueError("none of the recordings could be decoded; check the files under --audio")
    print(f"features of {len(collected)} recordings, {seconds / 3600:.2f} h", file=sys.stderr)
    return torch.cat(collected)  # [N, F]


def kmeans(
    features: Tensor, num_tokens: int, seed: int = 0, num_iterations: int = 50, tolerance=1e-4
) -> tuple[Tensor, float, Tensor]:
    """features [N, F] -> centroids [num_tokens, F], inertia (mean squared distance to them) and
    counts [num_tokens] of frames.

    k-means++ (Arthur & Vassilvitskii 2007), then Lloyd's iterations over all frames until inertia
    falls by less than `tolerance` of itself. A centroid without frames stays where it is. The same
    seed gives the same centroids on the same kind of device. ValueError: fewer distinct frames
    than tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    centroids = _seed_centroids(features, num_tokens, generator)
    previous = float("inf")
    bar = tqdm(range(num_iterations), desc="k-means", unit="iteration", disable=None)
    for _ in bar:
        sums, counts, distances = _assign(features, centroids)
        inertia = distances.double().mean().item()
        bar.set_postfix(inertia=f"{inertia:.4f}")
        if previous - inertia <= tolerance * inertia:
            break
        previous = inertia
        means = (sums / counts.clamp(min=1)[:, None]).to(features.dtype)
        centroids = torch.where(counts[:, None] > 0, means, centroids)
    _, counts, distances = _assign(features, centroids)
    return centroids, distances.double().mean().item(), counts


def _seed_centroids(features: Tensor, num_tokens: int, generator: torch.Generator) -> Tensor:
    """k-means++ on at most 100 frames a token: each seed is drawn by its squared distance."""
    choice = torch.randperm(features.shape[0], generator=generator)[: 100 * num_tokens]
    frames = features[choice.to(features.device)]
    if torch.unique(frames, dim=0).shape[0] < num_tokens:
        raise ValueError(
            f"{features.shape[0]} frames are too few (or too alike) for {num_tokens} tokens; give "
            "more audio or a smaller --num-tokens"
        )
    seeds = [frames[0]]  # frames are in random order
    distances = torch.full_like(frames[:, 0], float("inf"))
    for _ in tqdm(range(1, num_tokens), desc="seeds", unit="token", disable=None, leave=False):
        distances = torch.minimum(distances, (frames - seeds[-1]).square().sum(1))
        cumulative = distances.double().cumsum(0).cpu()
        point = torch.rand(1, generator=generator, dtype=torch.float64) * cumulative[-1]
        drawn = int(torch.searchsorted(cumulative, point, right=True))
        seeds.append(frames[min(drawn, len(frames) - 1)])
    return torch.stack(seeds)  # [num_tokens, F]


def _assign(features: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums [C, F] (float64) and counts [C] of the frames of each centroid; distances [N].

    float64 sums: on a GPU index_add_ adds in any order, which then shows in no float32 centroid.
    """
    sums = torch.zeros_like(centroids, dtype=torch.float64)
    counts = torch.zeros(len(centroids), dtype=torch.int64, device=centroids.device)
    distances = []
    for frames in features.split(CHUNK):
        nearest = nearest_centroid(frames, centroids)  # [n]
        sums.index_add_(0, nearest, frames.double())
        counts += torch.bincount(nearest, minlength=len(centroids))
        distances.append((frames - centroids[nearest]).square().sum(1))
    return sums, counts, torch.cat(distances)


def fit(
    tokenizer: SemanticTokenizer, features: Tensor, num_tokens: int, seed: int
) -> tuple[float, float]:
    """Give `tokenizer` its codebook, fitted on raw features [N, F]; returns the inertia and the
    perplexity of the tokens' histogram."""
    mean, std = features.double().mean(0), features.double().std(0).clamp(min=1e-5)
    if isinstance(tokenizer, HubertKMeans):  # the literature clusters raw features: so do we
        mean, std = torch.zeros_like(mean), torch.ones_like(std)
    normalised = ((features - mean) / std).float().to(tokenizer.mean.device)
    centroids, inertia, counts = kmeans(normalised, num_tokens, seed)
    tokenizer.set_codebook(mean, std, centroids)
    return inertia, Categorical(counts.double()).perplexity().item()


def make_tokenizer(features: str, layer: int, weights: str | None) -> SemanticTokenizer:
    """A tokenizer without codebook. ValueError: `features` is neither a name nor a folder."""
    if features == "mfcc":
        return MfccKMeans()
    if features in HUBERT_NAMES:
        return HubertKMeans(HubertConfig(model=features, layer=layer, weights=weights))
    if not Path(features).is_dir():
        names = ", ".join(("mfcc", *HUBERT_NAMES))
        raise ValueError(f"--features {features}: none of {names}, nor a run of train_semantic")
    architecture, tensors = load_hubert(features)
    try:
        config = SmallHubertFeatures(layer=layer, architecture=architecture)
        return SmallHubertKMeans(config, tensors)
    except ValueError as error:
        raise ValueError(f"{features}: {error}") from None


def main() -> None:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument("--audio", required=True, help="folder of recordings or JSONL manifest")
    parser.add_argument("--out", required=True, help="folder to write the tokenizer to")
    parser.add_argument(
        "--features",
        default="mfcc",
        help=f"mfcc (default), {', '.join(HUBERT_NAMES)} or the folder of a train_semantic run",
    )
    parser.add_argument("--num-tokens", type=int, default=500, help="centroids (default 500)")
    parser.add_argument("--layer", type=int, default=7, help="HuBERT's layer, from 1 (default 7)")
    parser.add_argument("--weights", help="torchaudio's file of HuBERT weights, instead of network")
    parser.add_argument("--split", help="use a manifest's recordings of this split alone")
    parser.add_argument("--max-hours", type=float, default=5.0, help="of audio (default 5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--force", action="store_true", help="overwrite a tokenizer in --out")
    args = parser.parse_args()

    out = Path(args.out)
    if not args.force and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: already exists; choose another --out or pass --force")
    if not 1 < args.num_tokens <= 65_536:
        raise ValueError(f"--num-tokens {args.num_tokens}: choose 2 to 65536 (tokens are uint16)")
    if args.weights and args.features not in HUBERT_NAMES:
        raise ValueError("--weights is for HuBERT by name; drop it or pass --features hubert_base")
    recordings = {recording.path: recording for recording in find_recordings(args.audio)}.values()
    recordings = [r for r in recordings if args.split in (None, r.split)]
    if not recordings:
        raise ValueError(f"{args.audio}: no recording has split {args.split!r}")
    tokenizer = make_tokenizer(args.features, args.layer, args.weights)
    tokenizer = tokenizer.to(find_device(args.device)).eval()
    features = collect_features(tokenizer, recordings, args.max_hours, args.seed)
    inertia, perplexity = fit(tokenizer, features, args.num_tokens, args.seed)
    tokenizer.save(out)
    print(
        f"{len(features)} frames of {features.shape[1]} features: inertia {inertia:.2f}, "
        f"perplexity of the tokens' histogram {perplexity:.1f} of {args.num_tokens}"
    )
    print(f"wrote {out}: {tokenizer.num_tokens} tokens, fingerprint {tokenizer.fingerprint}")


if __name__ == "__main__":
    run_cli(main)
