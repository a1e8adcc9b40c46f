"""Every exception of retention(): its type, its text, and that nothing has been written."""

from __future__ import annotations

import holdfast
import numpy as np
import pytest
from exporter import ROCM, Exporter

B, T, H, K, V = SHAPE = 2, 5, 3, 8, 6


def like(x, **changes):
    """Ones of x's shape with some axes changed: like(x, T=4)."""
    names = "BTHK" if x.ndim == 4 else "BTH"
    return np.ones([changes.get(name, extent) for name, extent in zip(names, x.shape, strict=True)], np.float32)


@pytest.fixture
def check(problem):
    """check(error, text, argument=value, ...): retention raises `error` with `text`, and writes to no output."""
    p = problem(*SHAPE)
    arguments = {"q": p.q, "k": p.k, "v": p.v, "log_decay": p.log_decay, "initial_state": p.initial_state, "out": p.out}

    def run(error, text, **changes):
        inputs = {name: x.copy() for name, x in arguments.items() if name != "out"}
        with pytest.raises(error) as caught:
            holdfast.retention(**{**arguments, **changes})
        assert type(caught.value) is error
        assert text in str(caught.value)
        assert np.all(p.out == 7)
        for name, x in inputs.items():
            np.testing.assert_array_equal(arguments[name], x)

    run.problem = p
    return run


NAMES = ["q", "k", "v", "log_decay", "initial_state", "out"]


@pytest.mark.parametrize("name", NAMES)
def test_not_an_array(check, name):
    check(TypeError, f"{name} is of type list; expected an array", **{name: [1.0]})
    check(TypeError, f"{name} is of type str; expected an array", **{name: "text"})


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_none(check, name):
    check(TypeError, f"{name} is of type NoneType; expected an array", **{name: None})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "dtype, named", [("f8", "float64"), ("u2", "uint16"), ("i4", "int32"), ("u1", "uint8"), ("M8[s]", "datetime64[s]")]
)
def test_dtypes(check, name, dtype, named):
    x = getattr(check.problem, name).astype(dtype)
    expected = "float32" if name in ("log_decay", "initial_state") else "float32, float16 or bfloat16"
    check(NotImplementedError, f"{name} has dtype {named}; expected {expected}", **{name: x})


@pytest.mark.parametrize(
    "dtype, format", [(">f4", ">f"), ("c8", "Zf"), ("O", "O"), ("S4", "4s"), ("f4,f4", "T{f:f0:f:f1:}")]
)
def test_dtypes_without_a_name(check, dtype, format):
    x = np.zeros((B, T, H, K), dtype)
    check(
        NotImplementedError, f"k has elements of buffer format '{format}'; expected float32, float16 or bfloat16", k=x
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_tensor(check, name):
    expected = f"{name} is on device type {ROCM}; expected that of a backend of this build: 1 (cpu)"
    x = getattr(check.problem, name)
    check(NotImplementedError, expected, **{name: Exporter(x, device=ROCM)})
    check(NotImplementedError, expected, **{name: Exporter(x, device=ROCM, versioned=False)})
    check(NotImplementedError, expected, **{name: Exporter(x, device=ROCM, refuses=True)})


def test_producers_that_do_not_export(check):
    check(
        TypeError, "k is of type Exporter, which does not share its memory", k=Exporter(check.problem.k, refuses=True)
    )
    released = memoryview(check.problem.k)
    released.release()
    check(TypeError, "k is of type memoryview, which does not share its memory", k=released)


def test_the_producers_own_error_is_the_cause(check):
    p = check.problem
    with pytest.raises(TypeError) as caught:
        holdfast.retention(p.q, Exporter(p.k, refuses=True), p.v)
    assert repr(caught.value.__cause__) == "BufferError('not today')"


def test_an_interrupt_during_export_stays_one(check):
    class Interrupted:
        def __dlpack__(self, **keywords):
            raise KeyboardInterrupt

    check(KeyboardInterrupt, "", k=Interrupted())


def test_producers_that_export_nonsense(check):
    class Nonsense:
        def __dlpack__(self, **keywords):
            return 3

    check(TypeError, "k is of type Nonsense, whose __dlpack__ returned an object of type int; expected a", k=Nonsense())
    check(BufferError, "k is exported as DLPack 2.0; expected 1", k=Exporter(check.problem.k, major=2))


@pytest.mark.parametrize("name", ["q", "k", "v", "initial_state", "out"])
def test_rank(check, name):
    check(ValueError, f"{name} has 3 dimensions; expected 4", **{name: getattr(check.problem, name)[0]})
    check(ValueError, f"{name} has 0 dimensions; expected 4", **{name: np.zeros((), np.float32)})


def test_rank_of_log_decay(check):
    check(
        ValueError,
        "log_decay has 2 dimensions; expected 1, [Hk], or 3, [B, T, Hk]",
        log_decay=check.problem.log_decay[0],
    )


@pytest.mark.parametrize(
    "name, axis, text",
    [(name, axis, "") for name, axis in ("kB", "kT", "kK", "vB", "vT")]
    + [
        ("k", "H", "v [B, T, Hk, V] has Hk = 3; expected 1, that of k"),
        ("v", "H", "has Hk = 1; expected 3, that of k"),
    ],
)
@pytest.mark.parametrize("out", [True, False])
def test_shapes_that_disagree(check, name, axis, text, out):
    x = like(getattr(check.problem, name), **{axis: 1})
    changes = {} if out else {"out": None}
    check(
        ValueError,
        text or f"has {axis} = 1; expected {check.problem.q.shape['BTHK'.index(axis)]}, that of q",
        **{name: x},
        **changes,
    )


def test_shapes_of_the_rest(check):
    p = check.problem
    check(ValueError, "log_decay [B, T, Hk] has T = 4; expected 5, that of k", log_decay=p.log_decay[:, :4])
    check(ValueError, "log_decay [Hk] has Hk = 2; expected 3, that of k", log_decay=p.log_decay[0, 0, :2])
    check(
        ValueError,
        "initial_state [N, Hk, D, V] has D = 7; expected 8, the K of q",
        initial_state=p.initial_state[:, :, :7],
    )
    check(
        ValueError,
        "initial_state [N, Hk, D, V] has V = 5; expected 6, that of v",
        initial_state=p.initial_state[..., :5],
    )
    check(ValueError, "out [B, T, H, V] has V = 5; expected 6, that of v", out=p.out[..., :5])
    check(ValueError, "q [B, T, H, K] has K = 0; expected at least 1", q=p.q[..., :0], k=p.k[..., :0])
    check(ValueError, "v [B, T, Hk, V] has V = 0; expected at least 1", v=p.v[..., :0], out=None)


def test_sizes_beyond_the_limits(check):
    ones = np.broadcast_to(np.float32(1), (1, 2**31, 1, 1))
    rest = {"log_decay": None, "initial_state": None, "out": None}
    check(
        NotImplementedError,
        "q has shape [1, 2147483648, 1, 1]; expected extents below 2^31",
        q=ones,
        k=ones,
        v=ones,
        **rest,
    )
    ones = np.broadcast_to(np.float32(1), (1, 1, 1, 2**13))
    check(
        NotImplementedError,
        "q has K = 8192 and v has V = 8192; expected K V of at most",
        q=ones,
        k=ones,
        v=ones,
        **rest,
    )


def test_no_memory_for_the_result():
    ones = np.broadcast_to(np.float32(1), (2**30, 2**10, 2**10, 1))
    with pytest.raises(MemoryError):
        holdfast.retention(ones, ones, ones)


@pytest.mark.parametrize("name", ["q", "k", "v", "initial_state", "out"])
def test_rows_that_are_not_contiguous(check, name):
    x = getattr(check.problem, name)
    check(ValueError, f"{name} has stride 2 on its last axis; expected 1", **{name: np.repeat(x, 2, axis=-1)[..., ::2]})
    check(ValueError, f"{name} has stride -1 on its last axis; expected 1", **{name: x[..., ::-1]})


def test_strides_between_elements(check):
    fields = np.zeros((B, T, H, K), [("x", np.float32), ("y", np.int8)])
    check(ValueError, "k has a stride of 5 bytes on axis 3; expected a multiple of 4", k=fields["x"])
    unaligned = np.frombuffer(bytes(B * T * H * K * 4 + 1), np.float32, offset=1).reshape(B, T, H, K)
    check(ValueError, "k has data and byte_offset", k=unaligned)


def test_outputs_that_overlap(check):
    p = check.problem
    both = np.full((B, T, H, K + V), 7, np.float32)
    check(ValueError, "out overlaps v in memory; expected separate memory", v=both[..., :V], out=both[..., 2 : V + 2])
    assert np.all(both == 7)
    shared = np.lib.stride_tricks.as_strided(p.out, p.out.shape, (0, *p.out.strides[1:]))
    check(ValueError, "out has stride 0 on axis 0, so that its elements share memory", out=shared)


@pytest.mark.parametrize("value", [0.5, np.nan, np.inf])
def test_decays_that_are_none(check, value):
    per_token = check.problem.log_decay.copy()
    per_token[1, 4, 2] = value
    check(ValueError, f"log_decay[1, 4, 2] is {value}; expected a number <= 0", log_decay=per_token)
    per_head = np.array([-1, value, -1], np.float32)
    check(ValueError, f"log_decay[1] is {value}; expected a number <= 0", log_decay=per_head)


@pytest.mark.parametrize("scale, named", [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")])
def test_scales_that_are_not_finite(check, scale, named):
    check(ValueError, f"scale is {named}; expected a finite number", scale=scale)


def test_scale(check):
    check(ValueError, "scale is 0; expected a float32 other than 0, or None for K^-1/2", scale=0)
    check(ValueError, "scale is 1e-60; expected a float32 other than 0", scale=1e-60)
    check(ValueError, "scale is 1e+39; expected a float32 other than 0, or None for K^-1/2", scale=1e39)
    check(ValueError, "scale is -1e+300; expected a float32 other than 0", scale=-1e300)
    check(TypeError, "scale is of type str; expected a number, or None", scale="1")


def test_chunk_size(check):
    for chunk_size in (0, -1, -(10**30)):
        check(ValueError, f"chunk_size is {chunk_size}; expected at least 1, or None", chunk_size=chunk_size)
    check(TypeError, "chunk_size is of type float; expected an int, or None", chunk_size=64.0)


@pytest.mark.parametrize(
    "name, nonsense",
    [
        ("degree", [0, -1, 5, 1.5, "1", None]),
        ("normalize", ["yes", 2]),
        ("form", ["foo", "", None, []]),
        ("return_weights", ["yes"]),
        ("state_layout", ["kk", None]),
        ("expansion", ["loose", None]),
    ],
)
def test_options(check, name, nonsense):
    for value in nonsense:
        check(ValueError, f"{name} is {value!r}; expected", **{name: value})


@pytest.mark.parametrize("name", ["degree", "normalize", "form", "return_weights", "state_layout", "expansion"])
def test_options_that_are_arrays(check, name):
    array = np.array([1, 2])
    check(ValueError, f"{name} is {array!r}; expected", **{name: array})


@pytest.mark.parametrize("name", ["scale", "chunk_size", "state_interval"])
def test_numbers_that_are_arrays(check, name):
    check(TypeError, f"{name} is of type ndarray; expected a", **{name: np.array([1, 2])})


def test_options_of_a_step_that_are_arrays():
    x, state = np.ones((1, 1, 4), np.float32), np.zeros((1, 1, 4, 4), np.float32)
    for name in ("degree", "normalize", "state_layout", "expansion"):
        with pytest.raises(ValueError, match=f"^{name} is array"):
            holdfast.retention_step(x, x, x, None, state, **{name: np.array([1, 2])})


def test_options_that_contradict(check):
    p = check.problem
    check(ValueError, "return_weights is True and form is 'auto'; expected 'parallel'", return_weights=True)
    check(ValueError, "return_weights is True and form is 'chunk", return_weights=True, form="chunkwise")
    check(ValueError, "expansion is 'tiled', degree 1 and K of q 8; expected degree 2 and", expansion="tiled")
    check(ValueError, "initial_sum_of_keys is None and initial_state is given; expected both", normalize=True)
    check(ValueError, "initial_sum_of_keys is given and out, of degree 1", initial_sum_of_keys=p.initial_state[..., 0])
    check(ValueError, "initial_state [N, Hk, V, D] has D = 6; expected 8", state_layout="vk")
    check(ValueError, "initial_state [N, Hk, D, V] has D = 8; expected 36", degree=2, normalize=False)
    check(ValueError, "cu_seqlens is given and q [B, T, H, K] has B = 2; expected 1", cu_seqlens=np.array([0, 5]))
    check(
        NotImplementedError, "cu_seqlens has dtype float32; expected int32 or int64", cu_seqlens=np.ones(3, np.float32)
    )
