"""Worker processes for the converter and the doctor: results in the order of the tasks, with a progress bar."""

import collections
import concurrent.futures
import itertools
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

import tqdm

from data_pipeline.system.processes import end_with_parent

AHEAD = 4  # tasks submitted per worker: enough to keep it busy, few enough that their entries fit in memory

_context: Any = None  # in a worker process: the context of all its tasks


class Workers:
    """A pool of `count` processes, used in a `with` block. Each gets a copy of `context`, such as a layout.

    They start with the first `run` of two tasks or more. A single task, or a count of 1, runs in this process.
    """

    def __init__(self, count: int, context: Any) -> None:
        self.count = count
        self.context = context
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def run(
        self,
        function: Callable[..., Any],
        tasks: Iterable[tuple],
        label: str,
        *,
        total: int,
        unit: str = "part",
        weigh: Callable[[tuple], int] = lambda task: 1,
    ) -> Iterator[Any]:
        """Yields function(context, *task) of every task, in the order of the tasks, and prints a progress bar.

        total: units of the whole bar; 0: no bar. weigh: the units of one task. An error of a task, of any type, is
        raised in its turn, and BrokenProcessPool if a worker died.
        """
        interval = 0.5 if sys.stdout.isatty() else 10.0  # seconds; a log file keeps every line
        options: dict[str, Any] = {"file": sys.stdout, "mininterval": interval, "disable": not total}
        with tqdm.tqdm(total=total, desc=label, unit=f" {unit}", **options) as bar:
            for task, result in self._results(function, tasks):
                bar.update(weigh(task))
                yield result

    def _results(self, function: Callable[..., Any], tasks: Iterable[tuple]) -> Iterator[tuple[tuple, Any]]:
        remaining = iter(tasks)
        first = list(itertools.islice(remaining, 2))
        waiting = itertools.chain(first, remaining)
        if self.count == 1 or len(first) < 2:
            for task in waiting:
                yield task, function(self.context, *task)
            return
        if self._pool is None:
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self.count, multiprocessing.get_context("spawn"), _start_worker, (self.context,)
            )
        pending: collections.deque[tuple[tuple, concurrent.futures.Future]] = collections.deque()
        while True:
            for task in itertools.islice(waiting, AHEAD * self.count - len(pending)):
                pending.append((task, self._pool.submit(_call, function, task)))
            if not pending:
                return
            task, future = pending.popleft()
            yield task, future.result()


def _call(function: Callable[..., Any], task: tuple) -> Any:
    return function(_context, *task)


def _start_worker(context: Any) -> None:
    global _context
    _context = context
    end_with_parent()
