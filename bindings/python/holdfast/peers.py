"""Other implementations that Holdfast is timed against, each prepared to run at its best.

A peer gets the same numbers as Holdfast and lays them out as it likes; what that takes is timed apart. Peers that are
not installed, or cannot do a job, are `Absent`: they stay in the tables, with the reason. Used by `holdfast bench` and
by examples/demo.py; no part of the library's public interface.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import (
    Gradients,
    decay,
    info,
    retention,
    retention_backward,
    retention_step,
    set_num_threads,
    set_verbose,
    state_interval,
    state_size,
)

CHUNKS = (32, 64, 128)  # tried for every chunkwise peer
POWER_CHUNKS = (64, 128, 256, 512, 1024)  # and for those of degree 2, whose states are large
TOKENS_AT_A_TIME = (256, 512)  # tried for PyTorch, besides all at once: fewer stay in cache, more are fewer calls
OURS = "Holdfast"
STEPS = "Holdfast, a call for each token"
ORT = "ONNX Runtime LinearAttention"
EAGER = "PyTorch chunkwise, eager"
COMPILED = "PyTorch chunkwise, torch.compile"
PUBLISHED = "PyTorch, as published, eager"
PUBLISHED_COMPILED = "PyTorch, as published, torch.compile"
ATTENTION = "PyTorch attention"
SGEMM = "PyTorch matrix product of as many operations"
FORWARD = "Holdfast, forward alone"
BACKWARD = "Holdfast, backward alone"
ALL_PUBLISHED = PUBLISHED, PUBLISHED_COMPILED
SAME = ORT, EAGER, COMPILED, *ALL_PUBLISHED  # what computes retention, and is not ours

LONGEST_ATTENTION = 16384  # its time grows with T^2
MOST_STEPS = 4096


def aligned(shape: tuple[int, ...]) -> np.ndarray:
    """fp32, not initialised, at a multiple of 64 bytes: vectors do not straddle cache lines. NumPy promises 16."""
    size, line = math.prod(shape), 64 // 4
    memory = np.empty(size + line, np.float32)
    start = -(memory.ctypes.data // 4) % line
    return memory[start : start + size].reshape(shape)


@dataclass(frozen=True)
class Inputs:
    """q, k `[B, T, H, K]`, v `[B, T, H, V]`, log_decay `[B, T, H]`, fp32 and contiguous; of degree 2, out is divided by
    the sum of weights."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    log_decay: np.ndarray
    degree: int = 1

    @classmethod
    def random(cls, B: int, T: int, H: int, K: int, V: int, degree: int = 1, seed: int = 0) -> Inputs:
        """Normal q, k, v; RetNet's decay of each head times a number from 0.5 to 1.5 per token. Decays near 1 hide no
        error between chunks."""
        rng = np.random.default_rng(seed)
        q, k, v = (aligned((B, T, H, size)) for size in (K, K, V))
        for x in (q, k, v):
            rng.standard_normal(dtype=np.float32, out=x)
        log_decay = aligned((B, T, H))
        log_decay[...] = decay(H) * rng.uniform(0.5, 1.5, log_decay.shape)
        return cls(q, k, v, log_decay, degree)

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """B, T, H, K, V."""
        return (*self.q.shape, self.v.shape[3])

    @property
    def scale(self) -> float:
        return self.q.shape[3] ** -0.5


@dataclass
class Peer:
    """One implementation, ready to be timed: `run()` does the work, `result()` gives `[B, T, H, V]` of the last run."""

    name: str
    run: Callable[[], Any]
    result: Callable[[], np.ndarray]
    how: str = ""
    layout_seconds: float = 0.0  # to convert from and to [B, T, H, size], which `run` leaves out
    error: Callable[[np.ndarray], float] | None = None  # of a result, where that is not to be retention's
    tried: dict[str, float] = field(default_factory=dict)  # best seconds of each setting that was tried


@dataclass(frozen=True)
class Absent:
    """A peer that is not there, and why."""

    name: str
    reason: str


def missing(*modules: str) -> str | None:
    """What to say when one of `modules` is not installed; None when all are."""
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"not installed; pip install {' '.join(absent)}" if absent else None


def settle() -> None:
    """Wait until the threads of whoever ran before (OpenMP, ONNX Runtime, OpenBLAS) stop spinning: they would take a
    core from the next."""
    time.sleep(0.05)


def best_seconds(run: Callable[[], Any], calls: int = 5) -> float:
    """Least time of a call, after one that warms up: of `calls`, or as many as fit into 0.05 s."""
    settle()
    run()
    times: list[float] = []
    while len(times) < calls or sum(times) < 0.05:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def holdfast(x: Inputs, threads: int) -> Peer:
    """Holdfast as a user calls it, with the memory of the output reused as the peers reuse theirs. One token is a step,
    whose state, in place, the step before has left; its result is that of a step from zeros."""
    set_num_threads(threads)
    out = aligned(x.v.shape)

    def run() -> None:
        retention(x.q, x.k, x.v, x.log_decay, degree=x.degree, out=out)

    call, result = (run, lambda: out) if x.shape[1] > 1 else _one_token(x, out)
    lines: list[str] = []
    set_verbose(lines.append)
    call()
    set_verbose(None)
    return Peer(OURS, call, result, how=lines[0].partition(": ")[2])


def _one_token(x: Inputs, out: np.ndarray) -> tuple[Callable[[], None], Callable[[], np.ndarray]]:
    """(a step, the result of one from zeros)."""
    token, y = tuple(a[:, 0] for a in (x.q, x.k, x.v, x.log_decay)), out[:, 0]
    states = _states(x)

    def step() -> None:
        retention_step(*token, *states, degree=x.degree, out=y)

    def first_step() -> np.ndarray:
        for state in states:
            state[...] = 0
        step()
        return out

    return step, first_step


def _states(x: Inputs) -> list[np.ndarray]:
    """A state, and of degree 2 a sum of keys, for a step: zeros."""
    B, _, H, K, V = x.shape
    D = state_size(K, x.degree)
    states = [aligned((B, H, D, V)), aligned((B, H, D))][: 1 if x.degree == 1 else 2]
    for state in states:
        state[...] = 0
    return states


def holdfast_steps(x: Inputs, threads: int) -> Peer | Absent:
    """What a model does that generates: a call for each token, the state in place."""
    T = x.shape[1]
    if T == 1:
        return Absent(STEPS, f"is {OURS} at T = 1")
    if T > MOST_STEPS:
        return Absent(STEPS, f"left out above T = {MOST_STEPS}")
    set_num_threads(threads)
    out = aligned(x.v.shape)
    tokens = [tuple(a[:, t] for a in (x.q, x.k, x.v, x.log_decay, out)) for t in range(T)]
    states = _states(x)

    def run() -> None:
        for state in states:
            state[...] = 0
        for q, k, v, log_decay, y in tokens:
            retention_step(q, k, v, log_decay, *states, degree=x.degree, out=y)

    return Peer(STEPS, run, lambda: out, how=f"{T} calls of retention_step")


# ---- ONNX Runtime ------------------------------------------------------------------------------------------


def onnx_runtime(x: Inputs, threads: int) -> Peer | Absent:
    """The contrib operator com.microsoft.LinearAttention, rule "gated". It takes [B, T, H * size] as it is; inputs and
    outputs are bound beforehand, so that a run copies nothing."""
    if x.degree > 1:
        return Absent(ORT, "has no degrees")
    if reason := missing("onnx", "onnxruntime"):
        return Absent(ORT, reason)
    import onnxruntime
    from onnx import TensorProto, helper

    B, T, H, K, V = x.shape
    arrays = {"query": x.q, "key": x.k, "value": x.v, "decay": x.log_decay}
    arrays = {name: array.reshape(B, T, -1) for name, array in arrays.items()}
    outputs = {"output": (B, T, H * V), "present_state": (B, H, K, V)}

    def declare(name: str, shape: tuple[int, ...]) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    node = helper.make_node(
        "LinearAttention", ["query", "key", "value", "", "decay"], list(outputs), domain="com.microsoft",
        update_rule="gated", q_num_heads=H, kv_num_heads=H, scale=x.scale)  # fmt: skip
    graph = helper.make_graph(
        [node], "retention", [declare(name, array.shape) for name, array in arrays.items()],
        [declare(name, shape) for name, shape in outputs.items()])  # fmt: skip
    operator_sets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=operator_sets, ir_version=10)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except onnxruntime.capi.onnxruntime_pybind11_state.Fail as error:  # a version without the operator
        return Absent(ORT, f"onnxruntime {onnxruntime.__version__} refuses it: {error}")
    binding = session.io_binding()
    for name, array in arrays.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    values = {name: onnxruntime.OrtValue.ortvalue_from_shape_and_type(s, np.float32) for name, s in outputs.items()}
    for name, value in values.items():
        binding.bind_ortvalue_output(name, value)
    return Peer(
        ORT,
        lambda: session.run_with_iobinding(binding),
        lambda: values["output"].numpy().reshape(B, T, H, V),
        how="rule gated, inputs and outputs bound beforehand",
    )


# ---- PyTorch -----------------------------------------------------------------------------------------------


def eager_segment(q: Any, k: Any, v: Any, log_decay: Any, scale: float, state: Any, out: Any) -> Any:
    """N chunks of retention by PyTorch, written for speed: each step one batched product over all chunks and heads, in
    place where PyTorch has it.

        q, k [N, heads, C, K], v and out [N, heads, C, V], log_decay [N, heads, C], state [heads, K, V]; all contiguous

    Writes `out` and returns the state after the last chunk.
    """
    import torch

    N, heads, C, K = q.shape
    V = v.shape[-1]
    total = log_decay.cumsum(-1)  # log decay from the start of the chunk
    weights = (total.unsqueeze(-1) - total.unsqueeze(-2)).exp_().tril_().mul_(q @ k.mT)
    states = torch.empty(N + 1, heads, K, V)
    states[0] = state
    decayed_keys = k * (total[..., -1:] - total).exp_().unsqueeze(-1)
    torch.matmul(decayed_keys.mT, v, out=states[1:])
    chunk_decay = total[..., -1].exp()[..., None, None]
    for c in range(N):
        torch.addcmul(states[c + 1], chunk_decay[c], states[c], out=states[c + 1])
    queries = (q * total.exp_().unsqueeze(-1)).view(-1, C, K)
    rows = out.view(-1, C, V)
    torch.bmm(weights.view(-1, C, C), v.view(-1, C, V), out=rows)
    rows.baddbmm_(queries, states[:-1].view(-1, K, V), beta=scale, alpha=scale)
    return states[-1]


def chunks_of_retention(q: Any, k: Any, v: Any, log_decay: Any, scale: float, state: Any) -> tuple[Any, Any]:
    """(out, state) of `eager_segment` as a formula, for torch.compile, which fuses what lies between the products by
    itself, and for autograd."""
    import torch

    N, heads, C, K = q.shape
    V = v.shape[-1]
    total = log_decay.cumsum(-1)  # log decay from the start of the chunk
    weights = (total.unsqueeze(-1) - total.unsqueeze(-2)).exp().tril() * scale * (q @ k.mT)
    contribution = (k * (total[..., -1:] - total).exp().unsqueeze(-1)).mT @ v
    chunk_decay = total[..., -1].exp()[..., None, None]
    states = []
    for c in range(N):
        states.append(state)
        state = chunk_decay[c] * state + contribution[c]
    queries = (q * (total.exp() * scale).unsqueeze(-1)).view(-1, C, K)
    intra = torch.bmm(weights.view(-1, C, C), v.view(-1, C, V))
    return torch.baddbmm(intra, queries, torch.stack(states).view(-1, K, V)).view(v.shape), state


def functional_segment(q: Any, k: Any, v: Any, log_decay: Any, scale: float, state: Any, out: Any) -> Any:
    """`eager_segment` by chunks_of_retention."""
    result, state = chunks_of_retention(q, k, v, log_decay, scale, state)
    out.copy_(result)
    return state


def chunks_of_power(q: Any, k: Any, v: Any, log_decay: Any, scale: float, state: Any) -> tuple[Any, Any]:
    """N chunks of power retention of degree 2, divided by the sum of weights: keys and queries expanded in blocks of
    16, the states of all chunks, and the weights inside a chunk. What `published_segment` computes, but for a few
    hundred tokens at a time, without logarithms, and with the sum of keys in the same products. Shapes as for
    `eager_segment`; state [heads, D, V + 1], the sum of keys in its last column."""
    import torch

    N, heads, C, K = q.shape
    V = v.shape[-1]
    first, second = torch.triu_indices(K // 16, K // 16)
    factor = torch.where(first == second, 1.0, 2.0**0.5)[:, None]

    def expanded(x: Any) -> Any:
        blocks = x.unflatten(-1, (-1, 16))
        return ((blocks[..., first, :] * factor).unsqueeze(-1) * blocks[..., second, :].unsqueeze(-2)).flatten(-3)

    total = log_decay.cumsum(-1)  # log decay from the start of the chunk
    values = torch.nn.functional.pad(v, (0, 1), value=1.0)  # 1: what sums the weights
    q = q * scale
    weights = (total.unsqueeze(-1) - total.unsqueeze(-2)).exp().tril() * (q @ k.mT).square()
    contribution = (expanded(k) * (total[..., -1:] - total).exp().unsqueeze(-1)).mT @ values
    chunk_decay = total[..., -1].exp()[..., None, None]
    states = []
    for c in range(N):
        states.append(state)
        state = chunk_decay[c] * state + contribution[c]
    inter = (expanded(q) * total.exp().unsqueeze(-1)) @ torch.stack(states)
    both = inter + weights @ values
    return both[..., :V] / both[..., V:], state


def published_contributions(k: Any, v: Any, log_decay: Any) -> tuple[Any, Any]:
    """What each chunk of keys and values adds to the state by its end, the sum of keys in the last column; and the
    decay of the state over the chunk. A stage of `published_segment`."""
    import torch

    total = log_decay.cumsum(-1)
    rest = ((total[..., -1:] - total) / 2).exp().unsqueeze(-1)  # on keys, which phi multiplies by themselves
    phi = published_expansion(k * rest, of_keys=True)
    return torch.cat([phi.mT @ v, phi.sum(-2).unsqueeze(-1)], -1), total[..., -1].exp()[..., None, None]


def published_outputs(q: Any, k: Any, v: Any, log_decay: Any, scale: float, states: Any) -> Any:
    """Outputs from the state before each chunk, and from the chunk itself by logarithms of the weights less the largest
    of a row. A stage of `published_segment`."""
    import torch

    C, V = q.shape[-2], v.shape[-1]
    total = log_decay.cumsum(-1)
    weights = 2 * (q @ k.mT * scale).abs().log() + (total.unsqueeze(-1) - total.unsqueeze(-2))
    weights = weights.masked_fill(torch.ones(C, C, dtype=torch.bool).triu(1), -torch.inf)
    largest = weights.amax(-1, keepdim=True)
    weights = (weights - largest).exp()
    from_state = published_expansion(q * scale * (total / 2).exp().unsqueeze(-1)) @ states
    common = largest.clamp(min=0)  # neither part overflows
    of_chunk, of_state = (largest - common).exp(), (-common).exp()
    sums = weights.sum(-1, keepdim=True) * of_chunk + from_state[..., V:] * of_state
    return ((weights @ v) * of_chunk + from_state[..., :V] * of_state) / sums


def published_expansion(x: Any, of_keys: bool = False) -> Any:
    """phi of degree 2 in the published order: `[..., D]` of `[..., K]`, products of 16 features with all before them
    and with each other; the former count twice, which keys have as a factor."""
    import torch

    K = x.shape[-1]
    parts = []
    for block in range(0, K, 16):
        others = x[..., : block + 16]
        if of_keys:
            others = torch.cat([2 * others[..., :block], others[..., block:]], -1)
        parts.append((others.unsqueeze(-1) * x[..., None, block : block + 16]).flatten(-2))
    return torch.cat(parts, -1)


PUBLISHED_STAGES = published_contributions, published_outputs


def published_segment(
    q: Any, k: Any, v: Any, log_decay: Any, scale: float, state: Any, out: Any, stages: Any = PUBLISHED_STAGES
) -> Any:
    """What `power_segment` computes as Buckman, Gelada and Zhang publish it (arXiv:2507.04239): three stages, each over
    all tokens, with phi and all states in memory. What chunks add to states; the sums of that, discounted; outputs."""
    import torch

    contributions, outputs = stages
    states = torch.empty(len(q) + 1, *state.shape)
    states[0] = state
    states[1:], decays = contributions(k, v, log_decay)
    for c, chunk_decay in enumerate(decays):
        states[c + 1].addcmul_(chunk_decay, states[c])
    out.copy_(outputs(q, k, v, log_decay, scale, states[:-1]))
    return states[-1]


def power_segment(q: Any, k: Any, v: Any, log_decay: Any, scale: float, state: Any, out: Any) -> Any:
    """`eager_segment` by chunks_of_power."""
    result, state = chunks_of_power(q, k, v, log_decay, scale, state)
    out.copy_(result)
    return state


class TorchChunkwise:
    """Retention by PyTorch in chunks of `chunk`, `at_a_time` chunks to a call of `segment`, with the state carried."""

    def __init__(self, x: Inputs, chunk: int, at_a_time: int, segment: Callable[..., Any] = eager_segment) -> None:
        import torch

        B, T, H, K, V = x.shape
        chunks = -(-T // chunk)
        self.inputs, self.chunk, self.segment, self.at_a_time = x, chunk, segment, at_a_time
        # What is past the end stays zero, and adds nothing to the state.
        self.q, self.k, self.v, self.log_decay, self.out = (
            torch.zeros(chunks, B * H, chunk, *size) for size in ((K,), (K,), (V,), (), (V,))
        )
        self.given = tuple(torch.from_numpy(a) for a in (x.q, x.k, x.v, x.log_decay))
        self.returned = torch.empty(B, T, H, V)
        state = (K, V) if x.degree == 1 else (state_size(K, 2, "tiled"), V + 1)
        self.state = torch.zeros(B * H, *state)  # what the next run starts from
        self.load()

    def parts(self, chunked: Any, plain: Any) -> Iterable[tuple[Any, Any]]:
        """`chunked` [chunks, B * H, C, ...] and `plain` [B, T, H, ...] as pairs of views of one shape: all whole
        chunks, and the rest."""
        B, T, H, *rest = plain.shape
        C, whole = self.chunk, T // self.chunk
        by_head = chunked.view(-1, B, H, C, *rest)
        yield by_head[:whole], plain[:, : whole * C].view(B, whole, C, H, *rest).movedim((1, 0, 3, 2), (0, 1, 2, 3))
        if T % C:
            yield by_head[-1][:, :, : T % C], plain[:, whole * C :].transpose(1, 2)

    def load(self) -> None:
        """Take the inputs into the layout of `segment`."""
        for chunked, plain in zip((self.q, self.k, self.v, self.log_decay), self.given, strict=True):
            for to, source in self.parts(chunked, plain):
                to.copy_(source)

    def store(self) -> None:
        """Bring the output back to [B, T, H, V]."""
        for source, to in self.parts(self.out, self.returned):
            to.copy_(source)

    def convert(self) -> None:
        """What `run` leaves out."""
        self.load()
        self.store()

    def run(self) -> Any:
        """Writes `out` and returns the final state."""
        import torch

        state = self.state
        with torch.inference_mode():
            for n in range(0, len(self.q), self.at_a_time):
                part = slice(n, n + self.at_a_time)
                tensors = (x[part] for x in (self.q, self.k, self.v, self.log_decay))
                state = self.segment(*tensors, self.inputs.scale, state, self.out[part])
        return state

    def result(self) -> np.ndarray:
        self.store()
        return self.returned.numpy()


def fastest_chunkwise(
    x: Inputs,
    tokens_at_a_time: Iterable[int],
    segment: Callable[..., Any] = eager_segment,
    chunks: Iterable[int] = CHUNKS,
    calls: int = 5,
) -> tuple[TorchChunkwise, dict[str, float]]:
    """The chunk size, and number of chunks at a time, that take least time on `x`; and the seconds of all that were
    tried, by "chunk x number"."""
    T = x.shape[1]
    best, tried = None, {}
    for chunk in sorted({min(chunk, T) for chunk in chunks}):
        for at_a_time in sorted({max(1, min(tokens, T) // chunk) for tokens in tokens_at_a_time}):
            candidate = TorchChunkwise(x, chunk, at_a_time, segment)
            seconds = tried[f"{chunk}x{at_a_time}"] = best_seconds(candidate.run, calls)
            if best is None or seconds < best[0]:
                best = seconds, candidate
    assert best, "there is at least one chunk size"
    return best[1], tried


def torch_chunkwise(x: Inputs, threads: int, compiled: bool = False) -> Peer | Absent:
    """The chunkwise form by PyTorch, in the layout and with the chunks that suit it best; `compiled`: through
    torch.compile."""
    name = COMPILED if compiled else EAGER
    if x.degree > 2 or (x.degree == 2 and x.shape[3] % 16):
        return Absent(name, "of degree 1, and of degree 2 for K a multiple of 16")
    if reason := missing("torch"):
        return Absent(name, reason)
    import torch

    torch.set_num_threads(threads)
    eager, functional, chunks = eager_segment, functional_segment, CHUNKS
    if x.degree == 2:
        eager, functional, chunks = power_segment, power_segment, POWER_CHUNKS
    if compiled:
        # One compilation per setting and size, each for fixed shapes; past the limit PyTorch would quietly run eager.
        torch._dynamo.config.recompile_limit = 256
        segment = torch.compile(functional, dynamic=False, fullgraph=True)
        try:
            # Longer segments unroll the scan over more chunks: slow to compile, and slower.
            best, tried = fastest_chunkwise(x, TOKENS_AT_A_TIME[:1], segment, chunks)
        except torch._dynamo.exc.TorchDynamoException as error:  # no C++ compiler, for one
            return Absent(name, "failed: " + str(error).strip().splitlines()[0])
    else:
        # Expanded keys of all tokens would fill the memory.
        tokens_at_a_time = (*TOKENS_AT_A_TIME, x.shape[1]) if x.degree == 1 else TOKENS_AT_A_TIME
        best, tried = fastest_chunkwise(x, tokens_at_a_time, eager, chunks)

    how = f"chunks of {best.chunk}, {best.at_a_time} at a time, laid out [chunks, heads, {best.chunk}, size]"
    return Peer(name, best.run, best.result, how, layout_seconds=best_seconds(best.convert), tried=tried)


def torch_published(x: Inputs, threads: int, compiled: bool = False) -> Peer | Absent:
    """Power retention of degree 2 by `published_segment`, in the layout and with the chunks that suit it best;
    `compiled`: its stages through torch.compile, which would unroll the sums between them over all chunks."""
    name = PUBLISHED_COMPILED if compiled else PUBLISHED
    if x.degree != 2 or x.shape[3] % 16:
        return Absent(name, "power retention's, of degree 2 for K a multiple of 16")
    if reason := missing("torch"):
        return Absent(name, reason)
    import torch

    torch.set_num_threads(threads)
    segment = published_segment
    if compiled:
        torch._dynamo.config.recompile_limit = 256
        stages = [torch.compile(stage, dynamic=False, fullgraph=True) for stage in PUBLISHED_STAGES]
        segment = functools.partial(published_segment, stages=stages)
    try:
        best, tried = fastest_chunkwise(x, (x.shape[1],), segment, POWER_CHUNKS, calls=1)
    except torch._dynamo.exc.TorchDynamoException as error:  # no C++ compiler, for one
        return Absent(name, "failed: " + str(error).strip().splitlines()[0])
    how = f"chunks of {best.chunk}, all at a time, phi in blocks of 16, laid out [chunks, heads, {best.chunk}, size]"
    return Peer(name, best.run, best.result, how, layout_seconds=best_seconds(best.convert), tried=tried)


class TorchGradients:
    """Outputs and gradients by autograd through `segment`, laid out as TorchChunkwise has it, with the gradient `dout`
    of the outputs."""

    def __init__(self, x: Inputs, dout: np.ndarray, chunk: int, at_a_time: int, segment: Callable[..., Any]) -> None:
        import torch

        self.layout, self.segment = TorchChunkwise(x, chunk, at_a_time), segment
        layout, N = self.layout, len(self.layout.q)
        gradient = torch.zeros_like(layout.v)
        for to, source in layout.parts(gradient, torch.from_numpy(dout)):
            to.copy_(source)
        # A leaf for each call: slices of one would each have a gradient as large as it.
        cut = [slice(n, n + at_a_time) for n in range(0, N, at_a_time)]
        self.leaves = [
            tuple(t[part].clone().requires_grad_() for t in (layout.q, layout.k, layout.v, layout.log_decay))
            for part in cut
        ]
        self.dout = [gradient[part].clone() for part in cut]
        self.gradients: tuple[Any, ...] = ()

    def run(self) -> None:
        import torch

        state, outs = self.layout.state, []
        for leaves in self.leaves:
            out, state = self.segment(*leaves, self.layout.inputs.scale, state)
            outs.append(out)
        self.gradients = torch.autograd.grad(outs, [leaf for leaves in self.leaves for leaf in leaves], self.dout)

    def result(self) -> tuple[np.ndarray, ...]:
        import torch

        layout, found = self.layout, []
        B, T, H, K, V = layout.inputs.shape
        for n, size in enumerate(((K,), (K,), (V,), ())):
            plain = torch.empty(B, T, H, *size)
            for source, to in layout.parts(torch.cat(self.gradients[n::4]), plain):
                to.copy_(source)
            found.append(plain.numpy())
        return tuple(found)


def torch_gradients(x: Inputs, dout: np.ndarray, threads: int, compiled: bool = False) -> Peer | Absent:
    """Forward and backward of the chunkwise form by PyTorch's autograd, with the chunks that suit it best."""
    name = COMPILED if compiled else EAGER
    if x.degree > 2 or (x.degree == 2 and x.shape[3] % 16):
        return Absent(name, "of degree 1, and of degree 2 for K a multiple of 16")
    if reason := missing("torch"):
        return Absent(name, reason)
    import torch

    torch.set_num_threads(threads)
    T = x.shape[1]
    segment, chunks = (chunks_of_retention, CHUNKS) if x.degree == 1 else (chunks_of_power, POWER_CHUNKS)
    tokens_at_a_time = TOKENS_AT_A_TIME if x.degree > 1 or compiled else (*TOKENS_AT_A_TIME, T)
    if compiled:
        torch._dynamo.config.recompile_limit = 256
        segment, tokens_at_a_time = torch.compile(segment, dynamic=False, fullgraph=True), TOKENS_AT_A_TIME[:1]
    best, tried = None, {}
    for chunk in sorted({min(chunk, T) for chunk in chunks}):
        for at_a_time in sorted({max(1, min(tokens, T) // chunk) for tokens in tokens_at_a_time}):
            candidate = TorchGradients(x, dout, chunk, at_a_time, segment)
            try:
                seconds = tried[f"{chunk}x{at_a_time}"] = best_seconds(candidate.run, calls=3)
            except torch._dynamo.exc.TorchDynamoException as error:  # no C++ compiler, for one
                return Absent(name, "failed: " + str(error).strip().splitlines()[0])
            if best is None or seconds < best[0]:
                best = seconds, candidate
    assert best, "there is at least one chunk size"
    layout = best[1].layout

    def convert() -> None:  # five tensors in and five out: load() is of four, store() of one
        for _ in range(2):
            layout.load()
            layout.store()

    how = f"autograd, chunks of {layout.chunk}, {layout.at_a_time} at a time"
    return Peer(name, best[1].run, best[1].result, how, layout_seconds=best_seconds(convert), tried=tried)


def holdfast_gradients(x: Inputs, dout: np.ndarray, threads: int) -> list[Peer]:
    """Forward and backward as a user calls them, and either alone, with the memory of results reused: PyTorch gets that
    of its gradients, a part of the sequence each, back from its allocator."""
    set_num_threads(threads)
    out = aligned(x.v.shape)
    results = Gradients(*(aligned(a.shape) for a in (x.q, x.k, x.v, x.log_decay)), None, None)

    interval = state_interval(x.q.shape[3], x.v.shape[3]) if x.degree == 1 else None

    def forward() -> None:
        retention(x.q, x.k, x.v, x.log_decay, degree=x.degree, out=out)

    def forward_with_states() -> np.ndarray | None:
        if interval is None:
            return forward()
        return retention(x.q, x.k, x.v, x.log_decay, state_interval=interval, out=out)[1]

    def differentiate(states: np.ndarray | None) -> None:
        retention_backward(
            dout, x.q, x.k, x.v, x.log_decay, out=out, degree=x.degree, states=states, state_interval=interval,
            gradients=results, wanted=(),
        )  # fmt: skip

    def both() -> None:
        differentiate(forward_with_states())

    kept = forward_with_states()

    def backward() -> None:
        differentiate(kept)

    lines: list[str] = []
    set_verbose(lines.append)
    both()
    set_verbose(None)
    forward_line, backward_line = (line.split(": ", 1)[1] for line in lines)

    def gradients() -> tuple[np.ndarray, ...]:
        return tuple(results[:4])

    return [
        Peer(OURS, both, gradients, how="forward and backward"),
        Peer(FORWARD, forward, lambda: out, how=forward_line),
        Peer(BACKWARD, backward, gradients, how=backward_line),
    ]


def torch_attention(x: Inputs, threads: int) -> Peer | Absent:
    """scaled_dot_product_attention: another function, with softmax and without decay, for what linear time saves."""
    if reason := missing("torch"):
        return Absent(ATTENTION, reason)
    if x.shape[1] > LONGEST_ATTENTION:
        return Absent(ATTENTION, f"left out above T = {LONGEST_ATTENTION}: its time grows with T^2")
    import torch

    torch.set_num_threads(threads)
    q, k, v = (torch.from_numpy(a).transpose(1, 2).contiguous() for a in (x.q, x.k, x.v))
    last: list[Any] = []

    def run() -> None:
        with torch.inference_mode():
            last[:] = [torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=x.scale)]

    def error(result: np.ndarray) -> float:
        return relative_rms(of_heads(result, sample(x))[:, -LAST_ROWS:], attention_reference(x, sample(x)))

    how = "another function: softmax, no decay, T^2; laid out [B, H, T, size]"
    return Peer(ATTENTION, run, lambda: last[0].transpose(1, 2).numpy(), how, error=error)


def operations(x: Inputs, variant: dict[str, Any]) -> float:
    """Of `x` by a variant, a multiplication and an addition two: those with the state, and the causal half of what is
    inside a chunk; of the parallel form the latter of all tokens."""
    B, T, H, K, V = x.shape
    sums = x.degree > 1  # of weights: a column of values more
    chunk, with_state = min(variant["chunk"] or 1, T), 4.0 * state_size(K, x.degree) * (V + sums)
    if variant["kernel"] == "parallel":
        chunk, with_state = T, 0.0
    return B * H * T * (with_state + (chunk + 1) * (K + V + sums))


def torch_product(x: Inputs, threads: int, ours: Peer) -> Peer | Absent:
    """A matrix product with as many operations as `ours` has: how fast the machine is when nothing else is to be done.
    2048 terms for each of 2048 columns, as many rows as it takes."""
    size = 2048
    (variant,) = (v for v in info()["variants"] if v["name"] == ours.how.split()[0])
    rows = round(operations(x, variant) / (2 * size**2))
    if reason := missing("torch"):
        return Absent(SGEMM, reason)
    if rows < 64:
        return Absent(SGEMM, "left out for so few operations")
    import torch

    torch.set_num_threads(threads)
    left, right = (
        torch.from_numpy(np.random.default_rng(0).standard_normal((n, size), np.float32)) for n in (rows, size)
    )
    out = torch.empty(rows, size)

    def error(result: np.ndarray) -> float:
        return relative_rms(result[:8], left[:8].double().numpy() @ right.double().numpy())

    how = f"[{rows}, {size}] x [{size}, {size}]"
    return Peer(SGEMM, lambda: torch.mm(left, right, out=out), out.numpy, how, error=error)


# ---- What is right -----------------------------------------------------------------------------------------


LAST_ROWS = 64  # those of which definitions with T^2 terms are summed


def sample(x: Inputs) -> list[tuple[int, int]]:
    """The (batch entry, head) that forgets fastest and the one that forgets slowest."""
    return sorted({(0, 0), (x.shape[0] - 1, x.shape[2] - 1)})


def of_heads(result: np.ndarray, heads: Iterable[tuple[int, int]]) -> np.ndarray:
    """`[heads, T, V]` of `[B, T, H, V]`."""
    return np.stack([result[b, :, h] for b, h in heads])


def reference(x: Inputs, heads: Iterable[tuple[int, int]]) -> np.ndarray:
    """Retention of some (batch entry, head) in double, token by token from the definition: `[heads, T, V]`."""
    b, h = (np.array(index) for index in zip(*heads, strict=True))
    q, k, v, log_decay = (a[b, :, h].astype(np.float64) for a in (x.q, x.k, x.v, x.log_decay))
    q, decays = q * x.scale, np.exp(log_decay)
    state = np.zeros((len(b), k.shape[2], v.shape[2]))
    out = np.empty(v.shape)
    for t in range(v.shape[1]):
        state *= decays[:, t, None, None]
        state += k[:, t, :, None] * v[:, t, None, :]
        out[:, t] = (q[:, t, None, :] @ state)[:, 0]
    return out


def last_rows(x: Inputs, heads: Iterable[tuple[int, int]], weigh: Callable[..., np.ndarray]) -> np.ndarray:
    """The last (at most LAST_ROWS) tokens in double, `[heads, tokens, V]`: the mean of values up to each, weighed by
    `weigh(scores, log_decay)`, log_decay that from the key to the query."""
    result = []
    for b, h in heads:
        q, k, v, log_decay = (a[b, :, h].astype(np.float64) for a in (x.q, x.k, x.v, x.log_decay))
        scores, T = q[-LAST_ROWS:] @ k.T * x.scale, np.arange(len(q))
        total = log_decay.cumsum()
        weights = weigh(scores, total[-LAST_ROWS:, None] - total)
        weights[T > T[-LAST_ROWS:, None]] = 0
        result.append(weights @ v / weights.sum(1, keepdims=True))
    return np.stack(result)


def power_reference(x: Inputs, heads: Iterable[tuple[int, int]]) -> np.ndarray:
    """Retention of x's degree, divided by the sum of weights: `last_rows`."""
    return last_rows(x, heads, lambda scores, log_decay: scores**x.degree * np.exp(np.minimum(log_decay, 0)))


def gradient_reference(x: Inputs, dout: np.ndarray, heads: Iterable[tuple[int, int]]) -> tuple[np.ndarray, ...]:
    """Gradients of q, k, v and log_decay in double, from all T x T weights: each `[heads, T, ...]`."""
    found: list[list[np.ndarray]] = [[], [], [], []]
    for b, h in heads:
        q, k, v, g, do = (a[b, :, h].astype(np.float64) for a in (x.q, x.k, x.v, x.log_decay, dout))
        total, p = g.cumsum(), x.degree
        decays = np.tril(np.exp(np.minimum(total[:, None] - total, 0)))
        scores = q @ k.T * x.scale
        weights = scores**p * decays
        if p > 1:
            do = do / weights.sum(1, keepdims=True)
        dweights = do @ v.T
        if p > 1:
            dweights -= (weights * dweights).sum(1, keepdims=True) / weights.sum(1, keepdims=True)
        dscores = dweights * decays * p * scores ** (p - 1) * x.scale
        change = dweights * weights
        of_rows = (change.sum(1) - change.sum(0))[::-1].cumsum()[::-1]
        for values, value in zip(found, (dscores @ k, dscores.T @ q, weights.T @ do, of_rows), strict=True):
            values.append(value)
    return tuple(np.stack(values) for values in found)


def attention_reference(x: Inputs, heads: Iterable[tuple[int, int]]) -> np.ndarray:
    """Causal softmax attention: `last_rows`."""
    return last_rows(x, heads, lambda scores, _: np.exp(scores - scores.max(1, keepdims=True)))


def relative_rms(result: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of the difference over that of `expected`, in double. NaN if there is one."""
    difference = np.subtract(result, expected, dtype=np.float64)
    return math.sqrt(np.mean(difference**2) / np.mean(np.square(expected, dtype=np.float64)))
