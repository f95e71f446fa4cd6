"""Start of a call's workers: their processes come up and receive the recorded program."""

from __future__ import annotations

import logging
from typing import Any

import torch

from shardmap import errors
from shardmap.planning.memory import format_bytes
from shardmap.run.messages import Failure
from shardmap.run.pool import RayWorker, first_line
from shardmap.run.schedule import RETRIES

logger = logging.getLogger("shardmap")


class Startup:
    """Starts the workers of one call and sends the program to each of them.

    Args:
        ray: The ray package.
        call: The user's call, for errors.
        workers: The call's workers, a list that grows with the cluster.
        program: Arguments of `Worker.bind`.
    """

    def __init__(self, ray: Any, call: str, workers: list[RayWorker], program: tuple[Any, ...]):
        self.ray = ray
        self.call = call
        self.workers = workers
        self.program = program
        self.waiting = dict.fromkeys(workers)
        """Workers whose process has not started or has not received the program yet."""
        self._binding: dict[RayWorker, Any] = {}
        """References that are ready once workers have the program."""
        self._failures = 0

    def add(self, worker: RayWorker) -> None:
        """Start a worker that has joined, or one whose process has ended."""
        self.waiting[worker] = None

    def pending(self) -> dict[Any, RayWorker]:
        """References that are ready once a worker has started, or has the program."""
        return {
            self._bind(worker) if worker.ready else worker.start(): worker
            for worker in self.waiting
        }

    def _bind(self, worker: RayWorker) -> Any:
        ref = self._binding.get(worker)
        if ref is None:
            ref = self._binding[worker] = worker.actor.bind.remote(*self.program)
        return ref

    def answered(self, worker: RayWorker, ref: Any) -> bool:
        """Take the answer of a worker that has started, or has received the program.

        Args:
            worker: The worker.
            ref: One of `pending()`, which is ready.

        Returns:
            True if the worker can compute tasks from now on.

        Raises:
            WorkerError: Worker processes do not start, or cannot load the program.
            ShardmapError: The error of a worker that cannot use the store, by its own class.
        """
        try:
            answer = self.ray.get(ref)
        except self.ray.exceptions.RayError as error:
            worker.stop(self.ray)
            self._binding.pop(worker, None)
            if not self._may_try_again():
                raise errors.WorkerError(
                    f"{self.call}: worker processes do not start; install one version of shardmap "
                    f"on every machine of the cluster. {error}"
                ) from error
            text = "%s: %s did not start and is started again: %s"
            logger.warning(text, self.call, worker.name, first_line(error))
            return False
        if not worker.ready:
            self._started(worker, answer)
            return False
        del self._binding[worker]
        if answer is not None:
            self._cannot_bind(worker, answer)
            return False
        self._failures = 0
        del self.waiting[worker]
        return True

    def _may_try_again(self) -> bool:
        self._failures += 1
        return self._failures <= RETRIES * (2 + len(self.workers))

    def _started(self, worker: RayWorker, info: dict[str, Any]) -> None:
        worker.started(info)
        if info["torch"] != torch.__version__:
            text = "%s on %s has torch %s, the driver has %s: results may differ"
            logger.warning(text, worker.name, info["node"], info["torch"], torch.__version__)
        free = "unknown" if info["free_bytes"] is None else format_bytes(info["free_bytes"])
        logger.debug(
            "%s is on %s (%s), %s free, %d threads",
            worker.place,
            info["device"],
            info["name"],
            free,
            info["threads"],
        )

    def _cannot_bind(self, worker: RayWorker, failure: Failure) -> None:
        """Start a worker again that failed to load the program or to reach the store, or raise."""
        if failure.poisoned or failure.passing:
            worker.stop(self.ray)
            if self._may_try_again():
                text = "%s: %s is started again: %s"
                logger.warning(text, self.call, worker.name, failure.error)
                return
        if failure.kind:
            text = failure.error.removeprefix(f"{self.call}: ")
            raise getattr(errors, failure.kind)(f"{self.call}: {text} ({worker.place})")
        raise errors.WorkerError(
            f"{self.call}: {worker.place}: {failure.error}\n\nOn the worker:\n{failure.traceback}"
        )
