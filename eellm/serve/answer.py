"""From a request's jobs to its answer: one JSON object, or server-sent events while the tokens are made.

The status is sent once the first progress is there, so what can't be served is refused properly. Should the client
leave, its jobs are cancelled before the engine's next step.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import Response
from starlette.types import Receive, Scope, Send

from eellm.infer.result import Stats
from eellm.infer.score import Score
from eellm.serve.ask import Ask, Prompt
from eellm.serve.forms import FINISH, Chats, Completions, Form, echoes_of, event_of, usage_of
from eellm.serve.job import Job, Mailbox, Progress
from eellm.serve.metrics import Meters
from eellm.serve.models import Served
from eellm.serve.observe import note
from eellm.serve.refusals import Refusal, dump
from eellm.serve.schema import CompletionRequest

DONE = b"data: [DONE]\n\n"


class Answer(Response):
    """Given to FastAPI as the response; sends itself."""

    def __init__(self, served: Served, ask: Ask, meters: Meters, *, key: str, deadline_s: float) -> None:
        super().__init__()
        self._served, self._ask, self._meters, self._key = served, ask, meters, key
        self._begin_s = time.perf_counter()
        self._deadline_s = self._begin_s + deadline_s
        self._mailbox = Mailbox()
        count = partial(_count, meters, served.name, key, self._begin_s)  # no method: jobs don't hold their answer
        self._jobs = [
            Job(
                index=index,
                tokens=ask.prompts[prompt].tokens,
                options=options,
                out=self._mailbox,
                stream=ask.body.stream,
                deadline_s=self._deadline_s,
                over=count,
            )
            for index, (prompt, options) in enumerate(ask.runs)
        ]
        self._stats: list[Stats] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        served, ask = self._served, self._ask
        note(scope, model=served.name, stream=ask.body.stream, prompt_tokens=ask.num_prompt_tokens, new_tokens=0)
        try:
            async with _ends_with_client(receive):
                form = await self._form()
                served.worker.submit(self._jobs)
                self._meters.prompt(served.name, self._key, ask.num_prompt_tokens)
                await (self._stream(form, send) if ask.body.stream else self._whole(form, send))
        finally:
            served.worker.cancel(self._jobs)
            note(scope, new_tokens=sum(len(job.times) for job in self._jobs))

    # --- whole ---

    async def _whole(self, form: Form, send: Send) -> None:
        ends: dict[int, Progress] = {}
        while len(ends) < len(self._jobs):
            for progress in await self._mailbox.take():
                self._settle(progress)
                ends[progress.index] = progress
        choices = [form.choice(i, ends[i].tokens, FINISH[ends[i].finish_reason or ""]) for i in range(len(ends))]
        if not self._jobs:  # only the prompts were asked about
            choices = [form.choice(i, (), "length") for i in range(len(self._ask.prompts) * self._ask.body.n)]
        body = dump(form.whole(choices, usage_of(self._ask, self._stats)))
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    # --- in chunks ---

    async def _stream(self, form: Form, send: Send) -> None:
        first = await self._mailbox.take() if self._jobs else []
        for progress in first:
            if progress.error is not None:  # nothing was sent yet: it can still be the status
                raise progress.error
        headers = [
            (b"content-type", b"text/event-stream"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            await self._events(form, first, send)
        except Refusal as refusal:
            await _send_event(send, refusal.body)
        await send({"type": "http.response.body", "body": DONE, "more_body": False})

    async def _events(self, form: Form, first: list[Progress], send: Send) -> None:
        if isinstance(form, Chats):
            await _send_event(send, form.chunk([form.opening(job.index) for job in self._jobs]))
        if not self._jobs:
            for i in range(len(self._ask.prompts) * self._ask.body.n):
                await _send_event(send, form.chunk([form.choice(i, (), "length")]))
        open_jobs, items = len(self._jobs), first
        while open_jobs:
            events = b""
            for progress in items:
                self._settle(progress)
                finish = progress.finish_reason and FINISH[progress.finish_reason]
                open_jobs -= finish is not None
                events += form.event(progress.index, progress.tokens, finish)
            if events:
                await send({"type": "http.response.body", "body": events, "more_body": True})
            items = await self._mailbox.take() if open_jobs else []
        if self._ask.wants_usage:
            await _send_event(send, form.last_chunk(usage_of(self._ask, self._stats)))

    # --- both ---

    async def _form(self) -> Form:
        ask, served = self._ask, self._served
        if not isinstance(ask.body, CompletionRequest):
            return Chats(ask, served.names, served.name)
        echoes: list[Any] = []
        if ask.echo:
            scores = [await self._score(prompt) for prompt in ask.prompts]
            echoes = await asyncio.to_thread(echoes_of, ask, served.model.tokenizer, scores)
        return Completions(ask, served.names, served.name, echoes)

    async def _score(self, prompt: Prompt) -> Score | None:
        """In the engine's thread, a piece between two steps."""
        if self._ask.score_fields is None or len(prompt.tokens) < 2:
            return None
        engine, fields = self._served.engine, self._ask.score_fields
        try:
            async with asyncio.timeout(self._deadline_s - time.perf_counter()):
                (score,) = await self._served.worker.run(lambda: engine.scoring([prompt.tokens], **fields))
                return score
        except TimeoutError:
            raise Refusal(504, "the request took longer than it may here", code="deadline") from None

    def _settle(self, progress: Progress) -> None:
        """Keeps what a job that is over has used; raises where it has failed."""
        if progress.error is not None:
            raise progress.error
        if progress.stats is not None:
            self._stats.append(progress.stats)


def _count(meters: Meters, model: str, key: str, begin_s: float, job: Job, progress: Progress) -> None:
    """What a job has come to, for the metrics: also what was made for a client that has left."""
    reason = progress.finish_reason or ""
    outcome = FINISH.get(reason, reason) if progress.error is None else progress.error.code or "failed"
    meters.answer(model, key, outcome, job.handle, begin_s, job.times)


@asynccontextmanager
async def _ends_with_client(receive: Receive) -> AsyncIterator[None]:
    """Cancels the block when the client has left, and goes on after it as if it had ended."""
    task = asyncio.current_task()
    assert task is not None, "a request runs in a task"
    has_left = False

    async def watch() -> None:
        nonlocal has_left
        while (await receive())["type"] != "http.disconnect":
            pass
        has_left = True
        task.cancel()

    watcher = asyncio.ensure_future(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not has_left or task.uncancel() > 0:
            raise
    finally:
        watcher.cancel()


async def _send_event(send: Send, data: dict[str, Any]) -> None:
    await send({"type": "http.response.body", "body": event_of(data), "more_body": True})
