"""Tasks in processes: what crashes takes no other task along."""

from __future__ import annotations

import multiprocessing
import os

import torch

from bicompile import pool


def test_a_process_that_dies_takes_no_other_task_along():
    tasks = [("1 + 1",), ("1 / 0",), ("__import__('os')._exit(3)",)]
    found = dict(pool.each(eval, tasks, jobs=1, seconds=60))
    assert [type(found[task]).__name__ for task in tasks] == [
        "int",
        "ZeroDivisionError",
        "ProcessExpired",
    ]


def fail():
    error = ValueError("what went wrong")
    error.cause = lambda: fail
    raise error


def test_an_error_that_cannot_be_sent_is_told():
    ((_, found),) = pool.each(fail, [()], jobs=1, seconds=60)
    assert str(found) == "ValueError: what went wrong"


def lose_the_gpu():
    """As after a kernel that failed: each later call raises, too."""

    def synchronize():
        raise RuntimeError("CUDA error: misaligned address")

    torch.cuda.is_initialized, torch.cuda.synchronize = (lambda: True), synchronize
    synchronize()


def answer(number):
    return lose_the_gpu() if number == 1 else (number, os.getpid())


def test_a_process_that_lost_its_gpu_is_replaced():
    found = {task: value for (task,), value in pool.each(
        answer, [(n,) for n in range(4)], jobs=1, seconds=60
    )}  # fmt: skip
    assert "misaligned" in str(found.pop(1))
    assert sorted(number for number, _ in found.values()) == [0, 2, 3]
    assert found[0][1] != found[2][1] == found[3][1]


def test_processes_share_out_the_gpus(monkeypatch):
    chosen = []
    names = ["H200", "T4", "H200"]  # what a T4 says is no evidence for the others
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    begun = multiprocessing.get_context("spawn").Value("i", 0)
    monkeypatch.setattr(pool.logging, "disable", lambda level: None)
    monkeypatch.setattr(pool.warnings, "simplefilter", lambda action: None)
    for device in ("cuda", "cuda", "cuda", "cpu"):
        pool._begin(device, begun, None)
    assert chosen == [0, 2, 0]
    assert begun.value == 3
