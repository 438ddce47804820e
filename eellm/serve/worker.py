"""One thread that owns an engine: jobs go in through a queue, what each step made comes out.

    Job → submit → inbox → [engine.submit, engine.step …] → one hand-over per step → Job.out (in the event loop)

The event loop never waits for the engine's lock, and the engine never waits for a client. Each turn takes what came in
(so a cancelled job is gone within a step), does one piece of other work, steps once, and hands over the tokens of all
jobs at once; without work the thread sleeps on its queue. Jobs are counted in the event loop, so that one too many is
refused before it costs anything.
"""

import asyncio
import math
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from eellm.infer.engine import Engine
from eellm.infer.result import Token
from eellm.infer.shadow import ShadowReport
from eellm.log import log
from eellm.serve.job import Job, Piecewise, Progress
from eellm.serve.refusals import Refusal, refusal_of

T = TypeVar("T")


class Worker:
    """Drives one engine. `start`, then `submit` and `run` from the event loop that it was started in."""

    def __init__(self, engine: Engine, *, max_waiting: int, stream_s: float, name: str) -> None:
        """stream_s: tokens of a stream, but its first, are handed over together where they are made within this."""
        self.engine = engine
        self.stream_s = stream_s
        self.num_slots = engine.stats().num_free_slots
        self.capacity = self.num_slots + max_waiting
        self.num_open = 0
        """Jobs that aren't over."""
        self.num_running = 0
        """Of these, how many the engine runs, after its latest step."""
        self.shadow = ShadowReport()
        """Of the engine, after its latest step."""
        self.failure: Refusal | None = None
        """Why there will be no further answer."""
        self.mean_job_s = 1.0
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._jobs: dict[Job, None] = {}
        self._piecewise: deque[tuple[Piecewise[Any], asyncio.Future[Any]]] = deque()
        self._thread = threading.Thread(target=self._run, name=f"engine {name}", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._next_hand_over_s = 0.0

    # --- in the event loop ---

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """All of them, or a Refusal."""
        if self.failure is not None:
            raise self.failure.again()
        if len(jobs) > self.capacity:
            raise Refusal(400, f"{len(jobs)} answers in one request: at most {self.capacity} are made here")
        self._take_places(len(jobs))
        for job in jobs:
            job.is_open = True
            self._inbox.put(lambda job=job: self._begin(job))

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Ends those that aren't over, before the next step."""
        for job in jobs:
            if job.is_open:
                self._inbox.put(lambda job=job: self._cancel(job))

    async def run(self, begin: Callable[[], Piecewise[T]]) -> T:
        """Work on the engine, of which one piece is done between two steps, whoever else has work: its result, or its
        error. It takes a place in the queue, and is dropped when nobody waits for it any more."""
        if self.failure is not None:
            raise self.failure.again()
        self._take_places(1)
        assert self._loop is not None, "start comes first"
        future: asyncio.Future[T] = self._loop.create_future()
        self._inbox.put(lambda: self._begin_piecewise(begin, future))
        try:
            return await future
        finally:
            self.num_open -= 1

    def stop(self) -> None:
        """Ends the thread before its next step; jobs that are open hear of it."""
        self._inbox.put(None)

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def check_room(self, number: int = 1) -> None:
        """Raises a Refusal where so many jobs more would be too many."""
        if self.num_open + number > self.capacity:
            wait_s = math.ceil(min(60, max(1, self.mean_job_s * self.num_open / self.num_slots)))
            message = f"{self.num_open} requests are running or waiting here; ask again later"
            raise Refusal(429, message, code="queue_full", headers={"retry-after": str(wait_s)})

    def _take_places(self, number: int) -> None:
        self.check_room(number)
        self.num_open += number

    def _deliver(self, items: list[tuple[Job, Progress]]) -> None:
        for job, progress in items:
            if progress.finish_reason is not None or progress.error is not None:
                job.is_open = False
                self.num_open -= 1
                job.over(job, progress)
                if progress.stats is not None:
                    spent_s = progress.stats.prefill_s + progress.stats.decode_s
                    self.mean_job_s += 0.1 * (spent_s - self.mean_job_s)
            job.out.put(progress)

    # --- in the engine's thread ---

    def _run(self) -> None:
        try:
            while self._take_in():
                if self._piecewise:
                    self._do_piece()
                if self._jobs:
                    self.engine.step()
                    self._hand_over()
            reason = Refusal(503, "the server is shutting down", code="shutting_down")
        except Exception as error:  # a lost worker, or a bug: nobody may wait for an answer that won't come
            log.error("the engine's thread has ended:\n%s", traceback.format_exc())
            reason = refusal_of(error)
        self.failure = reason
        self._post(self._deliver, [(job, Progress(job.index, [], error=reason)) for job in self._jobs])
        self._jobs.clear()
        for _, future in self._piecewise:
            self._post(_reject, future, reason.again())
        self._piecewise.clear()
        self.num_running = 0
        self.engine.close()
        self._post(self._refuse_rest)

    def _refuse_rest(self) -> None:
        """In the event loop, after the thread's last word: nothing comes into the inbox any more."""
        while not self._inbox.empty():
            command = self._inbox.get_nowait()
            if command is not None:
                command()

    def _take_in(self) -> bool:
        """Does what was asked; waits for it where there is no work. Returns whether to go on."""
        while not (self._jobs or self._piecewise) or not self._inbox.empty():
            if (command := self._inbox.get()) is None:
                return False
            command()
            del command  # it holds a job, and nothing may come for long
        return True

    def _begin(self, job: Job) -> None:
        error = self.failure
        if error is None:
            try:
                job.handle = self.engine.submit(job.tokens, job.options)
                self._jobs[job] = None
                return
            except Exception as caught:  # what can't be served ends this job alone
                error = refusal_of(caught)
                if error.status == 500:
                    log.error("a request can't be begun:\n%s", traceback.format_exc())
        assert error is not None, "a job is begun once"
        self._post(self._deliver, [(job, Progress(job.index, [], error=error))])

    def _cancel(self, job: Job) -> None:
        if self._jobs.pop(job, 0) is None:
            assert job.handle is not None, "it has begun"
            job.handle.cancel()
            self.num_running = len(self.engine.running)
            self._post(self._deliver, [(job, self._last(job, []))])

    def _begin_piecewise(self, begin: Callable[[], Piecewise[Any]], future: "asyncio.Future[Any]") -> None:
        try:
            if self.failure is not None:
                raise self.failure.again()
            self._piecewise.append((begin(), future))
        except Exception as error:  # handed to who asked
            self._post(_reject, future, error)

    def _do_piece(self) -> None:
        """One, of the work that has waited longest."""
        work, future = self._piecewise.popleft()
        if future.done():  # who asked has left
            return
        try:
            if work.advance():
                self._piecewise.append((work, future))
            else:
                self._post(_resolve, future, work.result())
        except Exception as error:  # handed to who asked
            self._post(_reject, future, error)

    def _hand_over(self) -> None:
        """One message for all jobs."""
        now = time.perf_counter()
        items, over = [], []
        is_time = now >= self._next_hand_over_s
        if is_time:
            self._next_hand_over_s = now + self.stream_s
        for job in self._jobs:
            handle = job.handle
            assert handle is not None, "it has begun"
            new = handle.take()
            if new:
                job.times += [now] * len(new)
            if handle.failure is not None:
                over.append(job)
                items.append((job, Progress(job.index, [*job.kept, *new], error=refusal_of(handle.failure))))
            elif handle.finish_reason is not None:
                over.append(job)
                items.append((job, self._last(job, [*job.kept, *new])))
            elif now > job.deadline_s:
                handle.cancel()
                over.append(job)
                error = Refusal(504, "the request took longer than it may here", code="deadline")
                items.append((job, Progress(job.index, [], error=error)))
            else:
                is_first = len(job.times) == len(new)
                job.kept += new
                if job.stream and job.kept and (is_time or is_first):
                    items.append((job, Progress(job.index, job.kept)))
                    job.kept = []
        for job in over:
            del self._jobs[job]
        self.num_running = len(self.engine.running)
        if self.engine.shadow.share > 0:
            self.shadow = self.engine.shadow.report()
        if items:
            self._post(self._deliver, items)

    @staticmethod
    def _last(job: Job, tokens: list[Token]) -> Progress:
        assert job.handle is not None, "it has begun"
        return Progress(job.index, tokens, job.handle.finish_reason, job.handle.stats())

    def _post(self, function: Callable[..., None], *args: Any) -> None:
        assert self._loop is not None, "start comes first"
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)


def _resolve(future: "asyncio.Future[Any]", value: Any) -> None:
    if not future.done():
        future.set_result(value)


def _reject(future: "asyncio.Future[Any]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
