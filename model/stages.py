"""The stages of AudioLM: one wrapper around one transformer, told apart by layout alone.

stage      reads                  writes                          pattern
semantic   nothing                semantic tokens                 one codebook: they are the same
coarse     semantic tokens        the first num_coarse codebooks  flatten, or delay
fine       the coarse codebooks   the other codebooks             flatten, or delay
acoustic   semantic tokens        all codebooks                   delay, or flatten
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import ModelConfig
from model.attend import Segments
from model.backends import AttentionChoice
from model.kv_cache import KVCache
from model.layouts import IGNORE, PAD, Layout, Sequences
from model.transformer import Transformer

STAGES = ("semantic", "coarse", "fine", "acoustic")


@dataclass(frozen=True)
class StageSpec:
    """A stage over given tokenizers. `codebooks` is the range of codec codebooks it writes."""

    name: str
    num_semantic: int
    codebook_size: int
    codebooks: tuple[int, int]
    layout: Layout

    @property
    def codebook_names(self) -> list[str]:
        """For logs: one name per head."""
        return (
            ["semantic"] if self.name == "semantic" else [f"c{k}" for k in range(*self.codebooks)]
        )

    def streams(self, semantic: Tensor, codes: Tensor) -> tuple[Tensor | None, Tensor]:
        """semantic [T_s], codes [K,T] of one clip -> (condition [K_c,T_c] or None, target)."""
        first, last = self.codebooks
        if self.name == "semantic":
            return None, semantic[None]
        condition = codes[:first] if self.name == "fine" else semantic[None]
        return condition, codes[first:last]

    def sequences(
        self,
        semantic: Tensor,
        codes: Tensor,
        starts: Tensor,
        ends: Tensor,
        collapse: bool = False,
        packed: bool = False,
    ) -> Sequences:
        """A padded batch of crops -> what `Stage.forward` takes.

        semantic [B,T_s] and codes [B,K,T], padded with -1; starts, ends [B] bool: the crop touches
        its recording's ends. `collapse` drops repeats of semantic tokens; `packed` lays the crops
        one after another instead of padding them.
        """
        encoded = []
        for row in range(len(codes)):
            tokens = semantic[row][semantic[row] >= 0]  # [T_s]
            frames = codes[row][:, codes[row, 0] >= 0]  # [K,T]
            tokens = torch.unique_consecutive(tokens) if collapse else tokens
            clip = self.streams(tokens, frames)
            encoded.append(self.layout.encode(*clip, bool(starts[row]), bool(ends[row])))
        return self.layout.pack(encoded) if packed else self.layout.collate(encoded)

    def longest(self, num_semantic: int, num_frames: int, packed: bool) -> Sequences:
        """A batch of one clip than which none is longer, that has at most so many."""
        semantic = torch.zeros(1, num_semantic, dtype=torch.long)
        codes = torch.zeros(1, max(1, self.codebooks[1]), num_frames, dtype=torch.long)
        return self.sequences(semantic, codes, *torch.ones(2, 1, dtype=torch.bool), packed=packed)


def stage_spec(
    name: str,
    num_semantic: int,
    num_codebooks: int,
    codebook_size: int,
    num_coarse: int,
    semantic_rate: float = 1.0,
    pattern: str = "auto",
) -> StageSpec:
    """The spec of stage `name`; `semantic_rate` is semantic tokens per codec frame; pattern "auto"
    is the first that the table above has for the stage.

    ValueError: unknown name, or num_coarse leaves a stage empty.
    """
    if name not in STAGES:
        raise ValueError(f"stage={name}: expected one of {', '.join(STAGES)}")
    if name in ("coarse", "fine") and not 0 < num_coarse < num_codebooks:
        raise ValueError(
            f"num_coarse={num_coarse} must be between 1 and {num_codebooks - 1}: "
            f"the codec has {num_codebooks} codebooks and both stages need some"
        )
    coarse = (codebook_size,) * num_coarse
    fine = (codebook_size,) * (num_codebooks - num_coarse)
    if pattern == "auto":
        pattern = "delay" if name == "acoustic" else "flatten"
    layout, codebooks = {
        "semantic": (Layout((), (num_semantic,)), (0, 0)),
        "coarse": (Layout((num_semantic,), coarse, pattern, semantic_rate), (0, num_coarse)),
        "fine": (Layout(coarse, fine, pattern), (num_coarse, num_codebooks)),
        "acoustic": (
            Layout((num_semantic,), coarse + fine, pattern, semantic_rate),
            (0, num_codebooks),
        ),
    }[name]
    return StageSpec(name, num_semantic, codebook_size, codebooks, layout)


class Stage(nn.Module):
    """Embedding -> transformer -> one head per codebook.

    | parameter    | initialised from                                          |
    |--------------|-----------------------------------------------------------|
    | embed        | normal(0, 0.02), PAD's row 0; a place's slots are summed  |
    | embed_stream | the same; added to every id of a codebook, so that what   |
    |              | its ids have in common is learnt once                     |
    | heads        | normal(0, 0.02): the first loss is close to uniform       |
    """

    def __init__(
        self, spec: StageSpec, config: ModelConfig, attention: AttentionChoice | None = None
    ):
        super().__init__()
        self.spec, self.layout = spec, spec.layout
        self.decoding: object = "plain"  # see `model/decoder.py`
        streams = self.layout.streams
        self.register_buffer("stream_of", streams, persistent=False)  # [num_ids]
        self.embed = nn.Embedding(self.layout.num_ids, config.dim, padding_idx=PAD)
        self.embed_stream = nn.Embedding(int(streams.max()) + 1, config.dim, padding_idx=PAD)
        self.transformer = Transformer(config, attention)
        self.heads = nn.ModuleList(
            nn.Linear(config.dim, size, bias=False) for size in self.layout.head_sizes
        )
        for embed in (self.embed, self.embed_stream):
            nn.init.normal_(embed.weight, std=0.02)
            nn.init.zeros_(embed.weight[PAD].detach())
        for head in self.heads:
            nn.init.normal_(head.weight, std=0.02)

    def hidden(
        self,
        ids: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        kv_cache: KVCache | None = None,
        segments: Segments | None = None,
    ) -> Tensor:
        """ids [B,T,S], positions [B,T] -> hidden [B,T,dim].

        mask [B,J], True = real, over cached and new places; None = all are real. segments: B is 1,
        and the row holds several clips.
        """
        x = self.embedded(ids).sum(dim=2)  # [B,T,S,dim] -> [B,T,dim]
        return self.transformer(x, positions, mask, kv_cache, segments)

    def sampled_in(self, dtype: torch.dtype) -> "Stage":
        """This stage, changed: all but the embeddings, which are looked up, in that dtype."""
        self.transformer.to(dtype)
        self.heads.to(dtype)
        return self

    def embedded(self, ids: Tensor) -> Tensor:
        """ids [...] -> [...,dim]: the same sums, for all ids once or for each place."""
        if ids.numel() < len(self.stream_of):
            return self.embed(ids) + self.embed_stream(self.stream_of[ids])
        table = self.embed.weight + self.embed_stream(self.stream_of)  # [num_ids,dim]
        return F.embedding(ids, table, padding_idx=PAD)

    def forward(self, batch: Sequences) -> Tensor:
        """-> nats [K]: the summed cross-entropy of each head's targets.

        Sums rather than means: the caller divides by the tokens of the whole global batch, so that
        padding, micro-batches and processes do not weigh in.
        """
        segments = None
        if batch.bounds is not None:
            segments = Segments(batch.segments, batch.bounds, batch.longest)
        hidden = self.hidden(batch.ids, batch.positions, segments=segments)
        hidden = hidden.flatten(0, 1)  # [B,N,dim] -> [B*N,dim]
        if self.layout.pattern == "flatten":  # one for all heads: its gradient is filled once
            chosen = hidden.index_select(0, torch.cat(batch.places))
            chosen = chosen.split([len(places) for places in batch.places])
        else:  # places repeat, and sums of their gradients would come in any order on a GPU
            chosen = [hidden.index_select(0, places) for places in batch.places]
        nats = [
            F.cross_entropy(_logits(head, x), targets, ignore_index=IGNORE, reduction="sum")
            for head, x, targets in zip(self.heads, chosen, batch.targets, strict=True)
        ]
        return torch.stack(nats)


def _logits(head: nn.Linear, x: Tensor) -> Tensor:
    """x [M,dim] -> logits [M,size] in fp32. A GPU's fast products have rows of a multiple of 8."""
    missing = -head.out_features % 8 if x.is_cuda else 0
    if not missing:
        return head(x).float()
    return F.linear(x, F.pad(head.weight, (0, 0, 0, missing)))[:, :-missing].float()
