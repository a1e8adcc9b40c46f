"""Language models for PyTorch whose layers are those of `holdfast.nn`: `RetentionLM`, made from a `Config` or the name
of a preset, and `State`, all that it remembers of a text.

    model = RetentionLM("demo")                     # or Config(dim=512, layers=8, heads=8, attention="power")
    logits = model(tokens)                          # [B, T] -> [B, T, vocab_size]
    for token in model.stream([prompt], 400):       # prompts of different lengths, packed
        ...

A block is y = x + mixer(norm(x)), z = y + ffn(norm(y)). The mixer is chosen layer by layer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .nn import (
    Form,
    GatedRetention,
    LayerState,
    MultiScaleRetention,
    Norm,
    Packed,
    PowerRetention,
    SoftmaxAttention,
)

__all__ = ["ATTENTIONS", "Config", "PRESETS", "RetentionLM", "State"]

ATTENTIONS = ("retnet", "gated", "power", "softmax")


@dataclass(frozen=True)
class Config:
    """What a RetentionLM is made of."""

    vocab_size: int = 256  # bytes
    dim: int = 128
    layers: int = 4
    heads: int = 2
    # "retnet", "gated", "power", "softmax", for all layers, or a name for each
    attention: str | tuple[str, ...] = "gated"
    kv_heads: int | None = None  # None: heads
    key_size: int | None = None  # None: dim / heads
    value_size: int | None = None  # None: 2 key_size for "retnet", else key_size
    ffn: Literal["gelu", "swiglu"] = "gelu"
    ffn_size: int | None = None  # None: 2 dim after "retnet", 4 dim after the others, and of that 2/3 for "swiglu"
    conv_width: int = 4  # of a causal convolution before q, k and v; 0: none
    degree: int = 2  # of "power"
    gating: bool = True  # decays of the token in "gated" and "power"; False: none
    decay: Literal["retnet", "linspace", "none"] = "retnet"  # of "retnet"
    head_norm: Norm = "rms"  # after "retnet" and "gated"
    eps: float = 1e-6  # of all norms
    chunk_size: int | None = None
    dropout: float = 0.0
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.attention, list):
            object.__setattr__(self, "attention", tuple(self.attention))
        for name in ("vocab_size", "dim", "layers", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("kv_heads", "key_size", "value_size", "ffn_size", "chunk_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1, or None")
        if self.conv_width < 0:
            raise ValueError(f"conv_width is {self.conv_width}; expected at least 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; expected at least 0, less than 1")
        for name, known in (
            ("ffn", ("gelu", "swiglu")), ("degree", (2, 3, 4)),
            ("decay", ("retnet", "linspace", "none")), ("head_norm", ("rms", "layer", None)),
        ):  # fmt: skip
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, known))}")
        if len(self.mixers) != self.layers:
            raise ValueError(f"attention has {len(self.mixers)} names; expected one, or layers, {self.layers}")
        for name in self.mixers:
            if name not in ATTENTIONS:
                raise ValueError(f"attention has {name!r}; expected {', '.join(map(repr, ATTENTIONS))}")

    @property
    def mixers(self) -> tuple[str, ...]:
        """Of each layer."""
        return (self.attention,) * self.layers if isinstance(self.attention, str) else self.attention


# Those of RetNet's paper: d, layers, keys of 256 and values of 512 a head, 12 d^2 weights a layer. Its vocabulary is
# not named; this one is GPT-2's, up to a multiple of 128.
_PAPER = {"vocab_size": 50304, "attention": "retnet", "conv_width": 0, "head_norm": "layer", "tie_embeddings": True}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"dim": 32, "layers": 2, "heads": 2},
    "demo": {"dim": 128, "layers": 4, "heads": 2, "ffn_size": 256},
    "10m": {"dim": 384, "layers": 6, "heads": 6, "attention": "retnet", "conv_width": 0},
    "125m": {"vocab_size": 50304, "dim": 768, "layers": 12, "heads": 12},
    "retnet-1.3b": {**_PAPER, "dim": 2048, "layers": 24, "heads": 8},
    "retnet-2.7b": {**_PAPER, "dim": 2560, "layers": 32, "heads": 10},
    "retnet-6.7b": {**_PAPER, "dim": 4096, "layers": 32, "heads": 16},
}

_FORMAT, _VERSION = "holdfast state", 1


class State:
    """All that a model remembers of `batch` texts: `layers`, a dictionary of tensors for each layer, whose first axis
    is the batch. Calls of the model advance it in place; `clone` keeps what it was."""

    def __init__(self, layers: list[LayerState]) -> None:
        self.layers = layers

    def _map(self, function: Any) -> State:
        return State([{name: function(x) for name, x in layer.items()} for layer in self.layers])

    @property
    def batch(self) -> int:
        return len(self.layers[0]["position"])

    @property
    def position(self) -> Tensor:
        """Tokens so far, [batch]."""
        return self.layers[0]["position"]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for layer in self.layers for x in layer.values())

    def clone(self) -> State:
        return self._map(torch.clone)

    def detach(self) -> State:
        """The same memory without a history: for training on a text piece by piece."""
        return self._map(torch.Tensor.detach)

    def to(self, device: torch.device | str) -> State:
        return self._map(lambda x: x.to(device))

    def reorder(self, indices: Tensor | Sequence[int]) -> State:
        """A new state whose text i is text indices[i] of this one: beams that go on, some of them several times."""
        rows = torch.as_tensor(indices, dtype=torch.int64, device=self.position.device)
        return self._map(lambda x: x.index_select(0, rows))

    def save(self, path: str | PathLike[str]) -> None:
        layers = [{name: x.detach().cpu() for name, x in layer.items()} for layer in self.layers]
        torch.save({"format": _FORMAT, "version": _VERSION, "layers": layers}, path)

    @classmethod
    def load(cls, path: str | PathLike[str], device: torch.device | str = "cpu") -> State:
        """What `save` has written. ValueError for another file, or one of a later version."""
        check_device(device)
        return cls(load_versioned(path, _FORMAT, _VERSION)["layers"]).to(device)


def load_versioned(path: str | PathLike[str], format: str, version: int) -> dict[str, Any]:
    """A dictionary that torch.save has written, with its format and version, on the CPU; nothing in it is run."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception:  # many kinds: any bytes may be read as instructions that make no sense
        saved = None
    if not isinstance(saved, dict) or saved.get("format") != format:
        raise ValueError(f"{path} is not a {format}")
    if saved["version"] > version:
        raise ValueError(f"{path} is of version {saved['version']}; this version of Holdfast reads up to {version}")
    return saved


def check_device(device: torch.device | str) -> None:
    """ValueError where PyTorch has no such device, in this build or on this machine."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device is {str(device)!r}; expected one that PyTorch has here ({reason})") from error


class FeedForward(nn.Module):
    """down(gelu(up(x))), or down(swish(gate(x)) up(x)) for "swiglu"."""

    def __init__(self, dim: int, size: int, kind: Literal["gelu", "swiglu"]) -> None:
        super().__init__()
        self.up = nn.Linear(dim, size, bias=False)
        self.gate = nn.Linear(dim, size, bias=False) if kind == "swiglu" else None
        self.down = nn.Linear(size, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(F.gelu(self.up(x)))
        return self.down(F.silu(self.gate(x)) * self.up(x))


def make_mixer(config: Config, attention: str) -> nn.Module:
    sizes: dict[str, Any] = {
        "kv_heads": config.kv_heads,
        "key_size": config.key_size,
        "value_size": config.value_size,
        "conv_width": config.conv_width,
    }
    if attention == "softmax":
        return SoftmaxAttention(config.dim, config.heads, **sizes)
    sizes.update(chunk_size=config.chunk_size, eps=config.eps)
    if attention == "retnet":
        return MultiScaleRetention(config.dim, config.heads, decay=config.decay, norm=config.head_norm, **sizes)
    if attention == "gated":
        return GatedRetention(config.dim, config.heads, gating=config.gating, norm=config.head_norm, **sizes)
    return PowerRetention(config.dim, config.heads, degree=config.degree, gating=config.gating, **sizes)


class Block(nn.Module):
    def __init__(self, config: Config, attention: str) -> None:
        super().__init__()
        size = config.ffn_size
        if size is None:
            size = (2 if attention == "retnet" else 4) * config.dim
            if config.ffn == "swiglu":
                size = -(-size * 2 // 3 // 32) * 32
        self.norm1 = nn.RMSNorm(config.dim, config.eps)
        self.mixer = make_mixer(config, attention)
        self.norm2 = nn.RMSNorm(config.dim, config.eps)
        self.ffn = FeedForward(config.dim, size, config.ffn)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, state: LayerState | None, form: Form, packed: Packed | None) -> Tensor:
        x = x + self.dropout(self.mixer(self.norm1(x), state, form=form, cu_seqlens=packed))
        return x + self.dropout(self.ffn(self.norm2(x)))


class RetentionLM(nn.Module):
    """A language model: embedding, blocks, norm, head.

    Args:
        config: a Config, or the name of one of PRESETS.
        changes: fields of the config that are to be other."""

    def __init__(self, config: Config | str = "demo", **changes: Any) -> None:
        super().__init__()
        if isinstance(config, str):
            if config not in PRESETS:
                raise ValueError(f"config is {config!r}; expected a Config, or one of {', '.join(PRESETS)}")
            config = Config(**{**PRESETS[config], **changes})
        elif changes:
            config = dataclasses.replace(config, **changes)
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, attention) for attention in config.mixers)
        self.norm = nn.RMSNorm(config.dim, config.eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.reset_parameters()
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def reset_parameters(self) -> None:
        """Weights keep the size of what they are given; blocks start small, so that their sum does too."""
        config = self.config
        nn.init.normal_(self.embedding.weight, std=config.dim**-0.5 if config.tie_embeddings else 1.0)
        nn.init.normal_(self.head.weight, std=config.dim**-0.5)
        for block in self.blocks:
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear) and not name.endswith("decay_proj"):
                    nn.init.normal_(module.weight, std=module.in_features**-0.5)
            for linear in (block.mixer.out_proj, block.ffn.down):
                with torch.no_grad():
                    linear.weight.mul_((2 * config.layers) ** -0.5)

    @property
    def parameters_count(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def new_state(self, batch: int = 1) -> State:
        return State([block.mixer.new_state(batch) for block in self.blocks])

    def hidden(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        form: Form = "auto",
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """What the head reads, [B, T, dim]; arguments are those of a call."""
        if tokens.ndim != 2:
            raise ValueError(f"tokens has {tokens.ndim} dimensions; expected 2, [B, T]")
        packed = Packed.of(cu_seqlens, tokens)
        x = self.dropout(self.embedding(tokens))
        for n, block in enumerate(self.blocks):
            x = block(x, None if state is None else state.layers[n], form, packed)
        return self.norm(x)

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        form: Form = "auto",
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, vocab_size] of the token that follows each one.

        Args:
            tokens: [B, T].
            state: what came before, of `new_state` or an earlier call; it is advanced to the end of tokens.
            form: of retention: "parallel", "chunkwise", "recurrent", "auto".
            cu_seqlens: tokens are [1, T], of sequences packed one after the other, as in `holdfast.retention`."""
        return self.head(self.hidden(tokens, state, form=form, cu_seqlens=cu_seqlens))

    def stream(
        self,
        prompts: Tensor | Sequence[Tensor | Sequence[int]],
        tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        state: State | None = None,
    ) -> Iterator[Tensor]:
        """Continue prompts by `tokens` tokens; yields the next one of each, [N], as soon as it is known.

        Args:
            prompts: [N, T], or N sequences of different lengths, at least one token each.
            temperature: divides the logits; 0: always the likeliest token.
            top_k: choose among the k likeliest alone.
            top_p: choose among the likeliest that together have this probability.
            generator: of random numbers; None: PyTorch's own.
            state: what came before the prompts, of N texts; advanced to the last token but one. None: nothing."""
        check_sampling(temperature, top_k, top_p)
        if tokens < 0:
            raise ValueError(f"tokens is {tokens}; expected at least 0")
        device = self.embedding.weight.device
        rows = [torch.as_tensor(prompt, dtype=torch.int64, device=device) for prompt in prompts]
        for n, row in enumerate(rows):
            if row.ndim != 1 or not len(row):
                raise ValueError(f"prompt {n} has shape {list(row.shape)}; expected [T] with at least one token")
        if state is None:
            state = self.new_state(len(rows))
        elif state.batch != len(rows):
            raise ValueError(f"state is of {state.batch} sequences; expected {len(rows)}, as many as there are prompts")
        return self._continue(rows, tokens, state, (temperature, top_k, top_p, generator))

    @torch.no_grad()
    def _continue(self, rows: list[Tensor], tokens: int, state: State, sampling: tuple) -> Iterator[Tensor]:
        if not rows or not tokens:
            return
        last = self._prefill(rows, state)
        for n in range(tokens):
            token = sample(self.head(last).float(), *sampling)
            yield token
            if n + 1 < tokens:
                last = self.hidden(token[:, None], state)[:, 0]

    def _prefill(self, rows: list[Tensor], state: State) -> Tensor:
        """What the head reads of each row's last token, [N, dim]."""
        lengths = torch.tensor([len(row) for row in rows])
        if (lengths == lengths[0]).all():
            return self.hidden(torch.stack(rows), state)[:, -1]
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
        return self.hidden(torch.cat(rows)[None], state, cu_seqlens=cu_seqlens)[0, cu_seqlens[1:] - 1]

    def generate(
        self,
        prompts: Tensor | Sequence[Tensor | Sequence[int]],
        tokens: int,
        *,
        stop: int | None = None,
        **options: Any,
    ) -> list[Tensor]:
        """The continuation of each prompt, without it; arguments are those of `stream`, and

        stop: a token that ends its text; it is the last one that is returned."""
        columns: list[Tensor] = []
        done = None
        for token in self.stream(prompts, tokens, **options):
            columns.append(token)
            if stop is not None:
                done = token == stop if done is None else done | (token == stop)
                if done.all():
                    break
        if not columns:
            return [torch.empty(0, dtype=torch.int64) for _ in prompts]
        texts = torch.stack(columns, 1)
        if stop is None:
            return list(texts)
        ends = [(text == stop).nonzero() for text in texts]
        return [text[: int(end[0]) + 1] if len(end) else text for text, end in zip(texts, ends, strict=True)]


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature is {temperature}; expected a finite number, at least 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; expected at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; expected more than 0, at most 1")


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """A token of each row of logits [N, vocab_size]; see `RetentionLM.stream`."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.softmax(-1).sort(-1, descending=True)
        needed = ordered.cumsum(-1) - ordered < top_p  # without those before it, it would be less
        logits = logits.masked_fill(~torch.zeros_like(needed).scatter(-1, order, needed), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
