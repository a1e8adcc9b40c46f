"""Threads, targets, the verbose listener, and the GIL."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import holdfast
import numpy as np
import pytest
import reference

TARGETS = {target["name"]: target["runs_here"] for target in holdfast.info()["targets"]}
# Some targets have kernels for some types and sizes only.
ANY_CALL = [
    name
    for name, runs_here in TARGETS.items()
    if runs_here
    and any(v["target"] == name and v["dtype"] == "f32" and v["key_size"] == 0 for v in holdfast.info()["variants"])
]


def lines_of(*arguments):
    """What the listener is told about one call of retention."""
    lines = []
    holdfast.set_verbose(lines.append)
    holdfast.retention(*arguments)
    holdfast.set_verbose(None)
    return lines


# ---- Targets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K, V", [(64, 64), (9, 7)])
def test_every_target_that_runs_here_can_be_forced(problem, K, V):
    p = problem(1, 70, 2, K, V)
    expected, _ = reference.retention(p.q, p.k, p.v, p.log_decay)
    for name in ANY_CALL:
        holdfast.set_target(name)
        [line] = lines_of(p.q, p.k, p.v)
        assert f"_{name} (target forced by the context)" in line
        reference.assert_close(holdfast.retention(p.q, p.k, p.v, p.log_decay), expected)
        selected = [v for v in holdfast.info()["variants"] if v["selected"]]
        assert selected and all(v["target"] == name for v in selected)
    holdfast.set_target(None)
    [line] = lines_of(p.q, p.k, p.v)
    best = next(name for name in holdfast.info()["backends"]["cpu"]["targets"] if name in ANY_CALL)
    assert f"_{best} (" in line and "forced by the context" not in line


@pytest.mark.parametrize("name", ["bogus", "", *(name for name, runs_here in TARGETS.items() if not runs_here)])
def test_other_targets_are_refused_and_change_nothing(problem, name):
    p = problem(1, 3, 1, 4, 4)
    holdfast.set_target("generic")
    with pytest.raises(holdfast.TargetUnavailable, match=f"target is '{name}'"):
        holdfast.set_target(name)
    assert "_generic (target forced by the context)" in lines_of(p.q, p.k, p.v)[0]


def test_target_unavailable_is_a_runtime_error():
    assert issubclass(holdfast.TargetUnavailable, RuntimeError)
    assert holdfast.TargetUnavailable.__module__ == "holdfast"
    with pytest.raises(TypeError, match="target is of type int; expected str or None"):
        holdfast.set_target(3)


def test_the_target_is_that_of_all_threads(problem):
    p = problem(1, 3, 1, 4, 4)
    lines = []
    barrier = threading.Barrier(2)

    def other_thread():
        holdfast.retention(p.q, p.k, p.v)  # has its context before the settings change
        barrier.wait()
        barrier.wait()
        holdfast.retention(p.q, p.k, p.v)

    thread = threading.Thread(target=other_thread)
    thread.start()
    barrier.wait()
    holdfast.set_verbose(lines.append)
    holdfast.set_target("generic")
    holdfast.set_num_threads(1)
    barrier.wait()
    thread.join()
    [line] = lines
    assert "_generic (target forced by the context)" in line and "1 threads" in line


SCRIPT = """
import numpy as np, holdfast
x = np.ones((1, 3, 2, 64), np.float32)
holdfast.set_verbose(print)
try:
    holdfast.retention(x, x, x)
except holdfast.TargetUnavailable as e:
    print("refused:", e)
    holdfast.set_target("generic")
    holdfast.retention(x, x, x)
print(holdfast.info()["backends"]["cpu"])
"""


def run_with_target(name, tmp_path):
    environment = {**os.environ, "HOLDFAST_TARGET": name}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, cwd=tmp_path, check=True, capture_output=True, text=True
    ).stdout.splitlines()


@pytest.mark.parametrize("name", ANY_CALL)
def test_environment_variable(name, tmp_path):
    line, cpu = run_with_target(name, tmp_path)
    assert f"_{name} (target forced by HOLDFAST_TARGET)" in line
    assert "'available': True" in cpu


@pytest.mark.parametrize("name", ["bogus", *(name for name, runs_here in TARGETS.items() if not runs_here)])
def test_a_wrong_environment_variable(name, tmp_path):
    refused, line, cpu = run_with_target(name, tmp_path)
    assert f"refused: HOLDFAST_TARGET: target is '{name}'" in refused
    assert "_generic (target forced by the context)" in line
    assert "'available': True" in cpu


# ---- Threads -------------------------------------------------------------------------------------------------------


def test_num_threads(problem):
    p = problem(1, 100, 8, 4, 4)
    assert holdfast.get_num_threads() == 0
    holdfast.set_num_threads(3)
    assert holdfast.get_num_threads() == 3
    assert "3 threads" in lines_of(p.q, p.k, p.v)[0]
    for threads in (-1, 257):
        with pytest.raises(ValueError, match=f"threads is {threads}; expected 0 to 256"):
            holdfast.set_num_threads(threads)
    with pytest.raises(TypeError, match="threads is of type str; expected int"):
        holdfast.set_num_threads("2")
    assert holdfast.get_num_threads() == 3


def test_calls_from_several_threads(problem):
    problems = [problem(2, 150 + n, 3, (16, 64)[n % 2], 64) for n in range(8)]
    expected = [holdfast.retention(p.q, p.k, p.v, p.log_decay, return_state=True) for p in problems]

    def call(n):
        p = problems[n % 8]
        if n % 5 == 0:  # errors of one thread are not seen by another
            with pytest.raises(ValueError, match=f"v has {n % 3} dimensions"):
                holdfast.retention(p.q, p.k, np.ones((1,) * (n % 3), np.float32))
        return holdfast.retention(p.q, p.k, p.v, p.log_decay, return_state=True)

    with ThreadPoolExecutor(4) as pool:
        for n, (out, state) in enumerate(pool.map(call, range(200))):
            np.testing.assert_array_equal(out, expected[n % 8][0])
            np.testing.assert_array_equal(state, expected[n % 8][1])


def test_other_threads_run_during_a_call():
    x = np.broadcast_to(np.float32(1), (1, 1 << 16, 8, 64))
    x = np.lib.stride_tricks.as_strided(np.ones(64, np.float32), x.shape, (0, 0, 0, 4))
    out = np.zeros(x.shape, np.float32)
    began, ended = [], []

    def call():
        began.append(time.perf_counter())
        holdfast.retention(x, x, x, holdfast.decay(8), out=out)
        ended.append(time.perf_counter())

    holdfast.set_num_threads(1)
    thread = threading.Thread(target=call)
    ticks = []
    thread.start()
    while thread.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.001)
    # With the GIL held there would be a tick or two, just before and after the work.
    assert sum(began[0] < tick < ended[0] for tick in ticks) > 10


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_forked_processes_compute(problem):
    p = problem(2, 150, 4, 64, 64)
    expected = holdfast.retention(p.q, p.k, p.v, p.log_decay)
    forked = threading.Event()

    def keep_the_library_busy():  # its threads do not come along, but what they have locked does
        while not forked.is_set():
            holdfast.retention(p.q, p.k, p.v, p.log_decay)

    def compute():
        for threads in (0, 4):
            holdfast.set_num_threads(threads)
            np.testing.assert_array_equal(holdfast.retention(p.q, p.k, p.v, p.log_decay), expected)

    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            pool.submit(keep_the_library_busy)
        try:
            for _ in range(40):
                child = multiprocessing.get_context("fork").Process(target=compute, daemon=True)
                child.start()
                child.join(10)
                assert child.exitcode == 0, "the child hangs" if child.exitcode is None else "the child failed"
        finally:
            forked.set()


def test_daemon_threads_do_not_disturb_the_exit(tmp_path):
    script = """
import threading, time, numpy as np, holdfast
x = np.ones((1, 500, 2, 64), np.float32)
def call():
    while True:
        holdfast.retention(x, x, x)
for n in range(4):
    threading.Thread(target=call, daemon=True).start()
holdfast.set_verbose(lambda line: None)
time.sleep(0.2)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# ---- The listener --------------------------------------------------------------------------------------------------


def test_verbose(problem):
    p = problem(2, 70, 3, 64, 64)
    [line] = lines_of(p.q, p.k, p.v)
    assert type(line) is str and "chunkwise_f32" in line and "B 2, T 70, H 3, K 64, V 64" in line
    with pytest.raises(TypeError, match="listener is of type int; expected a function"):
        holdfast.set_verbose(3)


def test_the_listener_is_called_by_the_calling_thread(problem):
    p = problem(1, 3, 1, 4, 4)
    callers = []
    holdfast.set_verbose(lambda line: callers.append(threading.get_ident()))
    with ThreadPoolExecutor(1) as pool:
        thread = pool.submit(threading.get_ident).result()
        pool.submit(holdfast.retention, p.q, p.k, p.v).result()
    holdfast.retention(p.q, p.k, p.v)
    assert callers == [thread, threading.get_ident()]


def test_what_the_listener_raises_does_not_stop_the_call(problem, monkeypatch):
    p = problem(1, 3, 1, 4, 4)
    expected = holdfast.retention(p.q, p.k, p.v)
    caught = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: caught.append(unraisable.exc_value))

    def listener(line):
        raise LookupError("mine")

    holdfast.set_verbose(listener)
    np.testing.assert_array_equal(holdfast.retention(p.q, p.k, p.v), expected)
    assert [repr(error) for error in caught] == ["LookupError('mine')"]


def test_the_listener_may_call_back(problem):
    p = problem(1, 3, 1, 4, 4)
    expected = holdfast.retention(p.q, p.k, p.v)
    results = []

    def listener(line):
        holdfast.set_verbose(None)
        results.append(holdfast.retention(p.q, p.k, p.v))

    holdfast.set_verbose(listener)
    results.append(holdfast.retention(p.q, p.k, p.v))
    for result in results:
        np.testing.assert_array_equal(result, expected)
    assert len(results) == 2


def test_the_listener_is_let_go(problem):
    def listener(line):
        pass

    before = sys.getrefcount(listener)
    holdfast.set_verbose(listener)
    assert sys.getrefcount(listener) == before + 1
    p = problem(1, 3, 1, 4, 4)
    holdfast.retention(p.q, p.k, p.v)
    holdfast.set_verbose(None)
    assert sys.getrefcount(listener) == before
