"""Attributes of a thread and views of dicts are compared: functions that read them are replayed."""

from __future__ import annotations

import threading
import types

import torch
from torch import Tensor

import shardmap
from tests.call.runs import counting


class Settings(threading.local):
    factor = 3.0

    def __init__(self) -> None:
        self.stack: list[float] = []


def test_what_a_thread_keeps_and_a_view_of_a_dict() -> None:
    settings, table = Settings(), {"shift": 1.0}
    view = types.MappingProxyType(table)
    local = threading.local()
    local.scale = 2.0

    def function(r: Tensor) -> Tensor:
        settings.stack.append(local.scale)  # and taken away, as jaxtyping does
        try:
            return r * settings.stack[-1] * settings.factor + view["shift"]
        finally:
            settings.stack.pop()

    mapped, runs = shardmap.vmap(function), []

    def check() -> None:
        x = torch.randn(5, 3)
        with counting(function) as calls:
            found = mapped(x)
        runs.append(calls())
        torch.testing.assert_close(found, torch.stack([function(r) for r in x]))

    for _ in range(10):
        check()
    assert runs[4:].count(0) >= 4, runs
    for change in (
        lambda: setattr(local, "scale", 4.0),
        lambda: table.update(shift=5.0),
        lambda: setattr(settings, "factor", 6.0),
        lambda: setattr(Settings, "factor", 7.0),
        lambda: delattr(settings, "factor"),
    ):
        change()
        for _ in range(3):
            check()


def test_each_thread_reads_its_own() -> None:
    settings = Settings()
    mapped, wrong = shardmap.vmap(lambda r: r * settings.factor), []

    def work(factor: float) -> None:
        settings.factor = factor
        for _ in range(6):
            x = torch.randn(3, 2)
            if not torch.equal(mapped(x), x * factor):
                wrong.append(factor)

    work(2.0)
    threads = [threading.Thread(target=work, args=(factor,)) for factor in (4.0, 5.0, 6.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    work(2.0)
    assert not wrong
