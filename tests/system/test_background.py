"""Work behind the main thread: in order, bounded, and never silent about an error."""

from __future__ import annotations

import threading

import pytest
import torch

from thanos.system.background import Background

CPU = torch.device("cpu")


def fail() -> None:
    raise OSError("disk gone")


def test_work_is_done_in_order_in_another_thread() -> None:
    background, seen = Background("t", CPU, limit=3), []
    futures = [background.submit(lambda i=i: seen.append((i, threading.current_thread().name)) or i) for i in range(20)]
    background.flush()
    assert [i for i, _ in seen] == list(range(20))
    assert {name for _, name in seen} == {"t_0"}
    assert [future.result() for future in futures] == list(range(20))
    background.close()


def test_no_more_than_the_limit_is_unfinished() -> None:
    background, gate, begun = Background("t", CPU, limit=2), threading.Event(), []
    for i in range(2):
        background.submit(lambda i=i: (begun.append(i), gate.wait(120)))
    handed = threading.Event()
    third = threading.Thread(target=lambda: (background.submit(begun.append, 2), handed.set()))
    third.start()
    assert not handed.wait(0.2), "a third piece was taken while two were unfinished"
    gate.set()
    assert handed.wait(120)
    third.join()
    background.close()


def test_an_error_comes_out_where_the_result_is_asked_for_and_only_there() -> None:
    background = Background("t", CPU, limit=2)
    future = background.submit(fail)
    with pytest.raises(OSError, match="disk gone"):
        future.result()
    background.flush()
    assert background.submit(int).result() == 0
    background.close()


@pytest.mark.parametrize("ask", ["flush", "post"])
def test_an_error_of_posted_work_comes_out_once_in_the_caller(ask: str) -> None:
    background = Background("t", CPU, limit=2)
    background.post(fail)
    background.submit(int).result()
    with pytest.raises(OSError, match="disk gone"):
        background.flush() if ask == "flush" else background.post(int)
    background.flush()
    background.close()


def test_flush_waits_for_everything_and_sees_its_error() -> None:
    background = Background("t", CPU, limit=3)
    gate = threading.Event()
    background.post(gate.wait, 120)
    background.post(fail)
    threading.Timer(0.05, gate.set).start()  # however late: there is nothing to see before
    with pytest.raises(OSError, match="disk gone"):
        background.flush()
    assert gate.is_set()
    background.close()


def test_closing_drops_what_has_not_begun_and_raises_nothing() -> None:
    background, done = Background("t", CPU, limit=5), []
    started, gate = threading.Event(), threading.Event()
    background.submit(lambda: (started.set(), gate.wait(120), done.append("first")))
    background.submit(fail)
    third = background.submit(done.append, "third")
    third.add_done_callback(lambda _: gate.set())  # so the first ends when the last one is dropped, and not before
    assert started.wait(120)
    background.close()
    assert third.cancelled()
    assert done == ["first"]
    assert not any(thread.name.startswith("t_") for thread in threading.enumerate())


def test_work_records_no_gradient_and_its_tensors_may_be_trained_on() -> None:
    background = Background("t", CPU)
    assert background.submit(torch.is_grad_enabled).result() is False
    assert background.submit(torch.zeros, 2).result().is_inference() is False
    background.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_work_sees_what_was_launched_before_it_was_handed_over() -> None:
    device = torch.device("cuda")
    background = Background("t", device)
    for number in range(5):
        x = torch.randn(4096, 4096, device=device)
        for _ in range(20):
            x = x @ x
            x /= x.norm()
        x.fill_(number)
        assert background.submit(lambda x=x: x.cpu()).result().eq(number).all()
    background.close()
