"""A codec while it learns: residual quantisation with running-average codebooks.

The encodec package (0.1.1) can train its codebooks too, but there (1) a restarted dead code is
overwritten by the running average in the same call, so codes never come back; (2) k-means fills
the running sums with means; (3) the straight-through residual cuts the commitment gradient of
every codebook but the first; (4) nothing is averaged over processes. Hence this file. It uses the
package's buffers, so the weights stay exchangeable.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from model.codec import Codec, RunLayers, run_layers
from model.codec_fast import FastLayers

KMEANS_ITERATIONS = 10
SMOOTHING = 1e-5


class CodecTraining(nn.Module):
    """Forward pass of `codec` with gradients; in train mode the codebooks follow the latents.

    decay: of the codebooks' running averages. dead_code_share: a code used less than this share
    of an average code's use restarts at a latent of the current batch. compile: run the same
    maths through model/codec_fast.py and torch.compile.
    """

    def __init__(self, codec: Codec, decay: float, dead_code_share: float, compile: bool = False):
        super().__init__()
        self.codec, self.decay, self.dead_code_share = codec, decay, dead_code_share
        self.run: RunLayers = FastLayers(compile) if compile else run_layers
        self.search = torch.compile(_search, dynamic=False) if compile else _search
        self.layers = list(codec.quantizer.vq.layers)

    def forward(
        self, wav: Tensor, num_codebooks: Tensor, restarts: Tensor, quantize: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """wav [B, 1, L] -> reconstruction [B, 1, L - lookahead * hop_length]; commitment loss;
        error.

        num_codebooks [B]: clip b is decoded from its first num_codebooks[b] codebooks (quantiser
        dropout). restarts [K, codebook_size], int64 in [0, 2**31): which latents replace dead
        codes, modulo their number. error: energy left after K codebooks, as a share of the
        latent's variance. quantize=False passes the latent on as it is: a start without codebooks
        costs few steps, whereas codebooks fitted to an untrained encoder lag behind it for long.
        """
        latent = self.codec.encode_latent(wav, self.run)  # [B, D, T]
        if not quantize:
            zero = 0 * latent.float().mean()  # with a gradient, for one backward pass either way
            return self.codec.decode_latent(latent, self.run), zero, zero
        with torch.autocast(wav.device.type, enabled=False):
            quantized, commitment, error = self.quantize(latent.float(), num_codebooks, restarts)
        return self.codec.decode_latent(quantized, self.run), commitment, error

    def quantize(
        self, latent: Tensor, num_codebooks: Tensor, restarts: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """latent [B, D, T] -> quantized [B, D, T] (straight-through), commitment [], error [].

        Residual VQ (SoundStream, algorithm 1). The commitment of codebook k is the mean squared
        distance to its vector, summed over k, with gradients to the encoder for every k.
        """
        books = torch.stack([layer._codebook.embed for layer in self.layers])  # [K, size, D]
        quantized, commitment, error, found = self.search(latent, books, num_codebooks, restarts)
        if self.training:
            self._follow(*found)
        return quantized, commitment, error

    def usage(self) -> Tensor:
        """Perplexity of each codebook's recent use over its size [K]: 1 is perfectly even."""
        sizes = torch.stack([x._codebook.cluster_size for x in self.layers])
        share = sizes / sizes.sum(dim=1, keepdim=True).clamp(min=1e-9)  # [K, codebook_size]
        entropy = -(share * share.clamp(min=1e-9).log()).sum(dim=1)
        return entropy.exp() / self.codec.codebook_size

    @torch.no_grad()
    def start_from(self, source: Codec, frames_per_step: int) -> None:
        """Take the weights and codebooks of a saved codec.

        What learning adds is made up: codebooks begin as if all their codes had been used evenly,
        by `frames_per_step` latents. ValueError: another architecture.
        """
        if source.config != self.codec.config:
            raise ValueError(
                f"train.start_from={source.name}: its model differs from this configuration's; "
                "set the same model.*"
            )
        given, state = source.state_dict(), self.codec.state_dict()
        for key, value in state.items():
            if key.endswith(".weight_v"):
                value.copy_(given[key.removesuffix("_v")])
            elif key.endswith(".weight_g"):  # one norm per output channel
                weight = given[key.removesuffix("_g")]
                value.copy_(weight.flatten(1).norm(dim=1).view_as(value))
            else:
                value.copy_(given[key])
        for layer in self.layers:
            book = layer._codebook
            book.cluster_size.fill_(frames_per_step / self.codec.codebook_size)
            book.embed_avg.copy_(book.embed * (book.cluster_size[:, None] + SMOOTHING))

    @torch.no_grad()
    def initialise(self, samples: Tensor, restarts: Tensor) -> None:
        """Fit the codebooks to latents [N, D] by k-means, one after the other on what is left.

        restarts [K, codebook_size]: the initial means, as in `forward`. N should be many times
        the codebook size, or the later codebooks see residuals that are too small. With several
        processes, rank 0's result counts.
        """
        restarts = restarts % len(samples)
        for k, layer in enumerate(self.layers):
            book = layer._codebook
            means = samples[restarts[k]]  # [codebook_size, D]
            for _ in range(KMEANS_ITERATIONS):
                counts, sums = _assign(samples, _nearest(samples, means), self.codec.codebook_size)
                means = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), means)
            counts = counts / counts.mean()  # an average step's worth; only the shares matter
            for buffer, value in (
                (book.embed, means),
                (book.cluster_size, counts),
                (book.embed_avg, means * counts[:, None]),
                (book.inited, torch.ones_like(book.inited)),
            ):
                buffer.copy_(value)
                if _distributed():
                    dist.broadcast(buffer, src=0)
            samples = samples - F.embedding(_nearest(samples, book.embed), book.embed)

    @torch.no_grad()
    def _follow(self, counts: Tensor, sums: Tensor, candidates: Tensor) -> None:
        """Running averages (VQ-VAE, appendix A.1) over all processes, then restarts; no sync."""
        if _distributed():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
            dist.broadcast(candidates, src=0)
        names = ("cluster_size", "embed_avg", "embed")
        buffers = [[getattr(x._codebook, name) for x in self.layers] for name in names]
        sizes, averages = torch.stack(buffers[0]), torch.stack(buffers[1])
        sizes = sizes.lerp(counts, 1 - self.decay)  # [K, size]
        averages = averages.lerp(sums, 1 - self.decay)  # [K, size, D]
        average = sizes.mean(dim=1, keepdim=True)  # [K, 1]
        dead = sizes < self.dead_code_share * average
        sizes = torch.where(dead, average, sizes)
        averages = torch.where(dead[..., None], candidates * average[..., None], averages)
        values = (sizes, averages, averages / (sizes[..., None] + SMOOTHING))
        for old, new in zip(buffers, values, strict=True):
            torch._foreach_copy_(old, list(new))


def _search(
    latent: Tensor, books: Tensor, num_codebooks: Tensor, restarts: Tensor
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """As `CodecTraining.quantize`, with books [K, size, D]; and what the books are to learn from:
    counts [K, size], sums and candidates [K, size, D] of each one's residuals.

    No buffer changes here: compiled, a changed one was read before its time (torch 2.11).
    """
    B, D, T = latent.shape
    flat = latent.transpose(1, 2).reshape(B * T, D)
    residual, total, commitment = flat, torch.zeros_like(flat), flat.new_zeros(())
    variance = flat.detach().var(dim=0).mean().clamp(min=1e-9)
    found = []
    for k, book in enumerate(books):
        samples = residual.detach()
        nearest = _nearest(samples, book)  # [B*T]
        quantized = F.embedding(nearest, book)  # [B*T, D]
        found.append((*_assign(samples, nearest, len(book)), samples[restarts[k] % (B * T)]))
        kept = (num_codebooks > k).repeat_interleave(T)[:, None]  # [B*T, 1]
        total = total + quantized * kept
        commitment = commitment + F.mse_loss(residual, quantized)
        residual = residual - quantized
    error = residual.detach().square().mean() / variance
    straight = flat + (total - flat).detach()
    counts, sums, candidates = (torch.stack(parts) for parts in zip(*found, strict=True))
    quantized = straight.view(B, T, D).transpose(1, 2)
    return quantized, commitment, error, (counts, sums, candidates)


def _nearest(samples: Tensor, embed: Tensor) -> Tensor:
    """Index [N] of the row of embed [M, D] closest to each of samples [N, D]."""
    distance = embed.square().sum(dim=1) - 2 * samples @ embed.t()  # [N, M], up to |sample|^2
    return distance.argmin(dim=1)


def _assign(samples: Tensor, nearest: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """How many samples [N, D] each code has, [size], and their sums, [size, D]."""
    one_hot = F.one_hot(nearest, size).to(samples.dtype)  # [N, size]
    return one_hot.sum(dim=0), one_hot.t() @ samples


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
