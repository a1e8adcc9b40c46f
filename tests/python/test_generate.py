"""holdfast.lm: whole models, their state, and generation."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from holdfast.lm import ATTENTIONS, PRESETS, Config, RetentionLM, State, sample  # noqa: E402

SIZES = {"vocab_size": 19, "dim": 32, "layers": 2, "heads": 2, "conv_width": 4}
MODELS = {
    **{name: {"attention": name} for name in ATTENTIONS},
    "mixed": {"attention": ("retnet", "softmax", "power", "gated"), "layers": 4, "kv_heads": 1, "ffn": "swiglu"},
    "other": {"attention": ["gated", "power"], "gating": False, "conv_width": 0, "tie_embeddings": True, "degree": 4},
}
# Of logits, over their root mean square.
OUT = 2e-5


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Of PyTorch: for sizes like these more of them take longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=MODELS, scope="module")
def model(request):
    torch.manual_seed(0)
    return RetentionLM(Config(**{**SIZES, **MODELS[request.param]})).eval()


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(3))


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= OUT * expected.norm()


@torch.no_grad()
def test_forms(model):
    text = tokens(2, 21)
    expected = model(text)
    assert expected.shape == (2, 21, 19)
    for form in ("parallel", "chunkwise", "recurrent"):
        assert_close(model(text, form=form), expected)
    state = model.new_state(2)
    parts = [model(text[:, :11], state), *(model(text[:, t : t + 1], state) for t in range(11, 21))]
    assert_close(torch.cat(parts, 1), expected)
    assert state.position.tolist() == [21, 21] and state.batch == 2


def test_generate_is_recomputation(model):
    """At every step what follows a prompt, by its state, is what the whole text gives from scratch."""
    prompts = [tokens(1, 9)[0], tokens(1, 4)[0].tolist(), [5]]
    texts = model.generate(prompts, 12, temperature=0)
    for prompt, text in zip(prompts, texts, strict=True):
        whole = torch.cat([torch.as_tensor(prompt), text])
        for n in range(12):
            with torch.no_grad():
                logits = model(whole[None, : len(prompt) + n])[0, -1]
            # Where two tokens are as likely to rounding, either may be taken.
            assert logits[text[n]] >= logits.max() - OUT * logits.norm()


@torch.no_grad()
def test_logits_of_packed_prompts(model):
    """Prefill of prompts of different lengths, packed, and steps of all of them, against each alone."""
    prompts, following = [tokens(1, n)[0] for n in (7, 1, 12)], tokens(3, 5)
    state = model.new_state(3)
    starts = torch.tensor([0, 7, 8, 20])
    packed = model(torch.cat(prompts)[None], state, cu_seqlens=starts)
    steps = torch.cat([model(following[:, t : t + 1], state) for t in range(5)], 1)
    for n, prompt in enumerate(prompts):
        expected = model(torch.cat([prompt, following[n]])[None])[0]
        assert_close(torch.cat([packed[0, starts[n] : starts[n + 1]], steps[n]]), expected)
    assert state.position.tolist() == [12, 6, 17]


@torch.no_grad()
def test_state(model, tmp_path):
    """Reordered as beams are, cloned, written and read: the same continuations, to the bit."""
    text = tokens(3, 9)
    state = model.new_state(3)
    model(text[:, :8], state)
    expected = model(text[:, 8:], state.clone())
    assert state.position.tolist() == [8, 8, 8]
    beams = state.reorder([2, 0, 2, 1])
    state.save(tmp_path / "state.pt")
    loaded = State.load(tmp_path / "state.pt").to("cpu")
    for again, row in ((beams, [2, 0, 2, 1]), (loaded, [0, 1, 2]), (state.detach(), [0, 1, 2])):
        assert torch.allclose(model(text[row, 8:], again), expected[row], atol=1e-5)
    with pytest.raises(IndexError):
        state.reorder([3])


@torch.no_grad()
def test_state_of_another_device(model, tmp_path):
    """Moved, or read to there. The other device that every machine has is the one without memory."""
    state = model.new_state(2)
    model(tokens(2, 8), state)
    state.save(tmp_path / "state.pt")

    def described(state):
        return [{name: (x.device.type, x.shape, x.dtype) for name, x in layer.items()} for layer in state.layers]

    here, there = (
        [{n: (device, *x[1:]) for n, x in y.items()} for y in described(state)] for device in ("cpu", "meta")
    )
    for moved in (state.to("meta"), State.load(tmp_path / "state.pt", "meta"), state.to("meta").reorder([1, 0])):
        assert described(moved) == there and moved.nbytes == state.nbytes
    assert described(state) == here


def test_size_of_state():
    """That of retention does not grow with the text; that of softmax attention does."""
    for attention, grows in (("retnet", False), ("gated", False), ("power", False), ("softmax", True)):
        model = RetentionLM(Config(**SIZES, attention=attention))
        state, sizes = model.new_state(1), []
        for _ in range(3):
            with torch.no_grad():
                model(tokens(1, 50), state)
            sizes.append(state.nbytes)
        assert (sizes[0] < sizes[1] < sizes[2]) == grows and (grows or len(set(sizes)) == 1)


def test_training_on_pieces(model):
    """Gradients end at detach(); a text may be longer than memory."""
    text, state = tokens(2, 30), model.new_state(2)
    for piece in text.split(10, 1):
        state = state.detach()
        model(piece, state).logsumexp(-1).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad()


def test_state_of_another_file(tmp_path):
    path = tmp_path / "state.pt"
    torch.save({"format": "holdfast state", "version": 2, "layers": []}, path)
    with pytest.raises(ValueError, match="is of version 2; this version of Holdfast reads up to 1"):
        State.load(path)
    for content in ({"format": "another"}, [1], {"format": "holdfast checkpoint", "version": 1}):
        torch.save(content, path)
        with pytest.raises(ValueError, match="is not a holdfast state"):
            State.load(path)
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match="is not a holdfast state"):
        State.load(path)
    RetentionLM(Config(**SIZES)).new_state(1).save(path)
    for device in ("foo", *([] if torch.cuda.is_available() else ["cuda"])):
        with pytest.raises(ValueError, match=f"device is '{device}'; expected one that PyTorch has here"):
            State.load(path, device)


def test_stream_and_stop():
    torch.manual_seed(0)
    model = RetentionLM(Config(**SIZES)).eval()
    prompts = tokens(2, 5)
    state = model.new_state(2)
    columns = list(model.stream(prompts, 6, temperature=0, state=state))
    assert len(columns) == 6 and all(c.shape == (2,) for c in columns)
    assert state.position.tolist() == [10, 10]  # all but the last token
    texts = model.generate(prompts, 6, temperature=0)
    assert torch.equal(torch.stack(columns, 1), torch.stack(texts))
    stopped = model.generate(prompts, 6, temperature=0, stop=int(texts[0][2]))
    end = texts[0].tolist().index(int(texts[0][2])) + 1
    assert torch.equal(stopped[0], texts[0][:end])
    assert [len(text) for text in model.generate(prompts, 0)] == [0, 0]
    assert model.generate([], 3) == []
    # A text that goes on from a state is the text of both prompts together.
    state = model.new_state(1)
    with torch.no_grad():
        model(prompts[:1, :3], state)
    assert torch.equal(model.generate(prompts[:1, 3:], 6, temperature=0, state=state)[0], texts[0])


def test_sampling():
    """Frequencies are the probabilities, of what the filters leave."""
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    generator = torch.Generator().manual_seed(0)

    def frequencies(**options):
        settings = {"temperature": 1.0, "top_k": None, "top_p": None, **options}
        drawn = sample(probabilities.log().expand(20000, 4), **settings, generator=generator)
        return (drawn[:, None] == torch.arange(4)).double().mean(0)

    def near(expected):  # five standard deviations
        return pytest.approx(expected, abs=5 * math.sqrt(0.25 / 20000))

    assert frequencies() == near([0.4, 0.3, 0.2, 0.1])
    assert frequencies(temperature=0.5) == near([16 / 30, 9 / 30, 4 / 30, 1 / 30])
    assert frequencies(top_k=2) == near([4 / 7, 3 / 7, 0, 0])
    assert frequencies(top_p=0.75) == near([4 / 9, 3 / 9, 2 / 9, 0])
    assert frequencies(top_p=0.3) == near([1, 0, 0, 0])
    assert frequencies(top_k=3, top_p=0.5) == near([4 / 7, 3 / 7, 0, 0])
    assert frequencies(temperature=0).tolist() == [1, 0, 0, 0]
    assert frequencies(top_k=9, top_p=1) == near([0.4, 0.3, 0.2, 0.1])


def test_seeded():
    torch.manual_seed(0)
    model = RetentionLM(Config(**SIZES)).eval()
    one, same, other = (
        model.generate([[1, 2]], 20, generator=torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize(
    ("preset", "millions"),
    [("demo", 0.66), ("10m", 10.8), ("retnet-1.3b", 1311), ("retnet-2.7b", 2645), ("retnet-6.7b", 6649)],
)
def test_presets(preset, millions):
    with torch.device("meta"):
        model = RetentionLM(preset)
    assert model.parameters_count / 1e6 == pytest.approx(millions, rel=0.03)
    if preset.startswith("retnet"):  # the paper's: 12 d^2 weights a layer, keys of 256, values of 512
        mixer, dim = model.blocks[0].mixer, model.config.dim
        assert (mixer.key_size, mixer.value_size) == (256, 512)
        assert sum(p.numel() for p in model.blocks[0].parameters() if p.ndim == 2) == 12 * dim**2


def test_documented_examples(tmp_path, monkeypatch, capsys):
    """Python in docs/training.md runs."""
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs/training.md").read_text()
    examples = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(examples) == 2
    for example in examples:
        exec(example, {})


def test_config():
    assert set(PRESETS) >= {"tiny", "demo", "10m", "125m"}
    model = RetentionLM("tiny", layers=3, attention=("retnet", "power", "softmax"))
    assert [type(block.mixer).__name__ for block in model.blocks] == [
        "MultiScaleRetention",
        "PowerRetention",
        "SoftmaxAttention",
    ]
    assert RetentionLM(Config(), dim=64).config.dim == 64


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RetentionLM("huge"), "config is 'huge'; expected a Config, or one of tiny, demo"),
        (lambda: Config(attention="linear"), "attention has 'linear'; expected 'retnet', 'gated', 'power', 'softmax'"),
        (lambda: Config(attention=("power", "power")), "attention has 2 names; expected one, or layers, 4"),
        (lambda: Config(layers=0), "layers is 0; expected at least 1"),
        (lambda: Config(ffn="relu"), "ffn is 'relu'"),
        # Those of layers that it does not have, too.
        (lambda: Config(decay="foo"), "decay is 'foo'; expected one of 'retnet', 'linspace', 'none'"),
        (
            lambda: Config(attention="power", head_norm="foo"),
            "head_norm is 'foo'; expected one of 'rms', 'layer', None",
        ),
        (lambda: Config(conv_width=-3), "conv_width is -3; expected at least 0"),
        (lambda: Config(degree=1), "degree is 1; expected one of 2, 3, 4"),
        (lambda: Config(ffn_size=0), "ffn_size is 0; expected at least 1, or None"),
        (lambda: Config(chunk_size=0), "chunk_size is 0; expected at least 1, or None"),
        (lambda: Config(dropout=math.nan), "dropout is nan; expected at least 0, less than 1"),
    ],
)
def test_bad_configs(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_calls():
    model = RetentionLM(Config(**SIZES))
    for call, message in (
        (lambda: model(tokens(1, 5)[0]), "tokens has 1 dimensions; expected 2"),
        (lambda: model(tokens(2, 5), model.new_state(3)), "state is of 3 sequences; expected 2"),
        (lambda: model.generate([[1], []], 3), "prompt 1 has shape"),
        (lambda: model.generate([[[1]]], 3), "prompt 0 has shape"),
        (lambda: model.generate([[1]], -1), "tokens is -1"),
        (lambda: model.generate([[1]], 3, temperature=-1), "temperature is -1"),
        (lambda: model.generate([[1]], 3, temperature=math.nan), "temperature is nan"),
        (lambda: model.generate([[1]], 3, top_k=0), "top_k is 0"),
        (lambda: model.generate([[1]], 3, top_p=0.0), "top_p is 0.0"),
        # At once, not where the first token is asked for.
        (lambda: model.stream([[1]], 3, top_k=0), "top_k is 0"),
        (lambda: model.stream([[1], []], 3), "prompt 1 has shape"),
        (lambda: model.stream([[1]], 3, state=model.new_state(2)), "state is of 2 sequences; expected 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
