"""Runs items in worker processes, so that a crash or a hang costs one item and not the run."""

from __future__ import annotations

import json
import os
import queue
import selectors
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any


def serve(work: Callable[[str], dict[str, Any]]) -> None:
    """The worker's side: one item per line in, one line of JSON out."""
    import torch

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the work prints must not mix with the answers
    for line in sys.stdin:
        try:
            answer = json.dumps(work(line.strip()))
        except Exception:
            answer = "harness: " + traceback.format_exc().strip().replace("\n", " | ")
        print(answer, file=answers, flush=True)


def run(
    command: list[str], items: list[str], workers: int, timeout_s: float
) -> Iterator[tuple[str, str]]:
    """Yields each item with its answer: JSON, or a line that says how the worker died.

    Args:
        command: starts a worker, a process that calls `serve`.
        items: one line each.
        workers: processes at a time.
        timeout_s: seconds for one item.
    """
    todo: queue.SimpleQueue[str] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[str, str] | None] = queue.SimpleQueue()
    for item in items:
        todo.put(item)
    threads = [
        threading.Thread(target=_drive, args=(command, todo, done, timeout_s), daemon=True)
        for _ in range(workers)
    ]
    for thread in threads:
        thread.start()
    running = workers
    while running:
        answer = done.get()
        if answer is None:
            running -= 1
        else:
            yield answer


def _drive(
    command: list[str],
    todo: queue.SimpleQueue[str],
    done: queue.SimpleQueue[tuple[str, str] | None],
    timeout_s: float,
) -> None:
    """Feeds one worker at a time, and starts another where it dies."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    worker: subprocess.Popen[str] | None = None
    try:
        while True:
            try:
                item = todo.get_nowait()
            except queue.Empty:
                return
            if worker is None:
                worker = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    env=environment,
                )
            assert worker.stdin is not None
            assert worker.stdout is not None
            try:
                print(item, file=worker.stdin, flush=True)
                answer = _line(worker.stdout, timeout_s)
            except BrokenPipeError:
                answer = ""
            if not answer:
                worker.kill()
                answer = "timed out" if answer is None else f"died with exit status {worker.wait()}"
                worker = None
            done.put((item, answer))
    finally:
        if worker is not None:
            worker.kill()
            worker.wait()
        done.put(None)


def _line(stream: Any, timeout_s: float) -> str | None:
    """The next line, empty at the end of the stream, None after `timeout_s` seconds."""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        return stream.readline().strip() if selector.select(timeout_s) else None
