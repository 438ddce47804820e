"""Generation: any mix of requests in, tokens out, each with the exit that it left at.

    submit → Request → slot → Loop ticks (shared with all others) → Token → Handle → Generation

Whoever wants a token drives the loop for all: iterating a handle runs ticks until its next token is there. There is no
thread; a lock lets several threads iterate.
"""

import threading
import weakref
from collections import deque
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any, Self

from eellm.config.check import check_whole
from eellm.config.infer import GenerateConfig, check_engine, generate_config
from eellm.errors import RequestError, WorkerError
from eellm.exits.lm import EarlyExitLM
from eellm.infer.backend import Backend
from eellm.infer.decode.make import Methods
from eellm.infer.handle import Handle
from eellm.infer.lookup import Recall
from eellm.infer.packing import Packed
from eellm.infer.places import Places
from eellm.infer.quantize import Quantize
from eellm.infer.request import Prompt, check_certified, check_prompts, make_request, make_scoring
from eellm.infer.result import EngineStats, Generation
from eellm.infer.sampling import Sampler
from eellm.infer.score import Score, Scoring
from eellm.infer.sequence import Sequence
from eellm.infer.shadow import Shadow


class Engine:
    """Serves requests on one model, many at a time."""

    def __init__(
        self,
        model: EarlyExitLM | str | Path,
        *,
        max_batch: int = 16,
        max_tokens: int = 4096,
        quantize: Quantize | None = None,
        compile: bool | None = None,
        cache_dir: str | Path | None = None,
        workers: int = 1,
        tp: int = 1,
        timeout_s: float = 60.0,
        shadow: float = 0.0,
        recall: int = 32768,
        packed: Packed | None = None,
    ) -> None:
        """model: a model, or what `eellm.load` takes. max_batch: requests served at the same time; others wait for
        their turn. max_tokens: the most that one request may have, prompt and new tokens together; memory for keys and
        values grows as needed, up to max_batch times that. quantize: matrices of 8 or 4 bits (CPU only). compile:
        whether to run kernels built for this processor (float32 on the CPU; the first time takes a C++ compiler some
        seconds); unset, where they can be; on CUDA, whether passes are recorded as graphs. cache_dir: where kernels,
        rounded weights, and what was measured on this machine are kept for the next engine.

        workers: processes that share the model's layers, this one among them; each of them computes with its part of
        this one's threads. Under torchrun they are its processes, with the threads that they have: on rank 0 this is
        the engine, on the others it serves until the engine closes, and then ends the process. tp: so many of them
        share each matrix of a stage. timeout_s: without a sign of life, after which a worker is given up. shadow: share
        of the tokens that are held against the final exit after they left early, to see whether certificates still hold
        (see `stats`); not with workers. recall: tokens of finished texts that are remembered, to look drafts up in;
        they change how fast a text is made, never the text; 0: none. packed: where engines of models that share
        parameters share the matrices made of them; not with workers."""
        check_engine(max_batch, max_tokens, quantize, compile, workers, tp, timeout_s=timeout_s, shadow=shadow)
        self.recall = Recall(recall)
        self.backend = Backend(
            model,
            quantize=quantize,
            compile=compile,
            cache_dir=cache_dir,
            packed=packed,
            workers=workers,
            tp=tp,
            max_batch=max_batch,
            timeout_s=timeout_s,
        )
        self.model, self.network, self.loop = self.backend.model, self.backend.network, self.backend.loop
        self.scheduler = self.loop.scheduler
        self.crew = self.backend.crew
        if self.crew is not None:
            weakref.finalize(self, self.crew.close)
        self.failure: WorkerError | None = None
        self.shadow = Shadow(shadow)
        self.methods = Methods(self.backend.costs, self.recall, self.shadow)
        self.max_tokens = min(max_tokens, self.model.config.max_seq_len)
        self.places = Places(max_batch, self.backend.memory, self.loop.own_layer, self.max_tokens)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.lock = threading.RLock()
        self.num_ticks = self.num_finished = self.new_tokens = self.reused_tokens = 0
        self.is_closed = False

    def submit(self, prompt: Prompt, options: GenerateConfig | None = None, **fields: Any) -> "Handle":
        """One request; it begins when a slot is free and someone drives the engine.

        options, or its fields by name: see `GenerateConfig`. Raises RequestError for what can't be served (nothing
        else is touched by it), ConfigError for options that the model doesn't have.
        """
        assert options is None or not fields, "options as an object or by name, not both"
        request = make_request(self.model, prompt, options or generate_config(**fields))
        if request.options.method == "pipelined" and self.crew is None:
            raise RequestError("method = 'pipelined' needs worker processes: make the engine with workers=2 or more")
        check_certified(request, self.backend.quantize)
        config = self.model.config
        needed = request.capacity(config.max_seq_len)
        if needed > self.max_tokens:
            raise RequestError(
                f"the request needs room for {needed} tokens ({len(request.tokens)} of the prompt), and the engine has "
                f"{self.max_tokens} for each; ask for fewer, or make the engine with a larger max_tokens"
            )
        seq = Sequence(
            request,
            self.methods.serve(request),
            Sampler(request.options.sampling, request.tokens, self.network.device),
            stops=self.loop.stops,
            max_seq_len=config.max_seq_len,
            eos_token_ids=config.eos_token_ids,
            tokenizer=self.model.tokenizer,
        )
        with self.lock:
            if self.is_closed:
                raise RequestError("the engine is closed; make a new one")
            self._check_workers()
            self.waiting.append(seq)
        return Handle(self, seq)

    def generate(
        self, prompts: SequenceOf[Prompt], options: GenerateConfig | None = None, **fields: Any
    ) -> list[Generation]:
        """Continues each prompt; what comes out for one doesn't depend on the others. Options as in `submit`.

        prompts: strings, lists of token ids, or lists of chat messages ({"role": …, "content": …}). If one can't be
        served, none is.
        """
        handles = []
        try:
            for prompt in check_prompts(prompts):
                handles.append(self.submit(prompt, options, **fields))
            return [handle.result() for handle in handles]
        finally:
            for handle in handles:
                handle.cancel()

    def score(
        self,
        texts: SequenceOf[Prompt | tuple[Prompt, Prompt]],
        *,
        exit: int | None = None,
        top_logprobs: int = 0,
        **fields: Any,
    ) -> list[Score]:
        """Log-likelihood of each text but its first token, given what comes before; of a pair (context, continuation)
        that of the continuation. Short texts go through the model together.

        At full depth; at the exit of layer `exit`; or, with a `risk`, `policy` or `threshold` (and `exits`, as in
        `submit`), each token at the exit that it would take. top_logprobs: how many of the likeliest tokens each place
        tells. Raises RequestError for a text that can't be scored.
        """
        if not texts:
            return []
        scoring = self.scoring(texts, exit=exit, top_logprobs=top_logprobs, **fields)
        while scoring.advance():
            pass
        return scoring.result()

    def scoring(
        self,
        texts: SequenceOf[Prompt | tuple[Prompt, Prompt]],
        *,
        exit: int | None = None,
        top_logprobs: int = 0,
        **fields: Any,
    ) -> Scoring:
        """`score` for at least one text, a part at a time: for between two steps."""
        check_whole("top_logprobs", top_logprobs, 0)
        made = [make_scoring(self.model, text, exit, fields) for text in texts]
        rule = made[0][0]  # all have the same
        check_certified(rule, self.backend.quantize)
        tokens = [(request.tokens, first) for request, first in made]
        return Scoring(self.backend.whole_network(), tokens, rule.thresholds, rule.policy, top_logprobs=top_logprobs)

    def step(self) -> bool:
        """One tick for everyone. Returns whether there was anything to do. Raises WorkerError where a worker is lost;
        then what is running and waiting has failed. A tick that is broken off (Ctrl-C, memory that is full) ends what
        is running, as `interrupted`; what is waiting goes on with the next one, but for an engine with workers, which
        has failed."""
        with self.lock:
            self._check_workers()
            try:
                return self._tick()
            except WorkerError as error:
                self.failure = error
                raise
            except BaseException:
                self._break_off()
                raise

    def cancel(self, seq: Sequence) -> None:
        """Ends a request at once; one that is over stays as it is."""
        with self.lock:
            if seq.finish_reason is None:
                seq.finish_reason = "cancelled"
                if seq in self.waiting:
                    self.waiting.remove(seq)
                elif seq in self.running:
                    self._leave(seq)

    def stats(self) -> EngineStats:
        """What the engine has done so far, and holds."""
        with self.lock:
            return EngineStats(
                num_running=len(self.running),
                num_waiting=len(self.waiting),
                num_free_slots=self.places.slots.num_free,
                num_ticks=self.num_ticks,
                num_finished=self.num_finished,
                new_tokens=self.new_tokens,
                reused_tokens=self.reused_tokens,
                memory_bytes=self.backend.memory.num_bytes,
                weight_bytes=self.backend.weight_bytes,
                shadow=self.shadow.report(),
            )

    def close(self) -> None:
        """Cancels what is running, takes nothing more, and ends the workers."""
        with self.lock:
            self.is_closed = True
            for seq in [*self.waiting, *self.running]:
                self.cancel(seq)
            if self.crew is not None:
                self.crew.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_workers(self) -> None:
        if self.failure is not None:
            raise WorkerError(str(self.failure))

    def _tick(self) -> bool:
        before = sum(len(seq.emitted) for seq in self.running)
        self._admit()
        self.methods.running(len(self.running))
        changed = self.loop.step(self.running, self.num_ticks)
        if changed is None:
            return False
        self.num_ticks += 1
        self.new_tokens += sum(len(seq.emitted) for seq in self.running) - before
        for seq in changed:
            self.places.share_prompt(seq)
            if seq.finish_reason is not None:
                self._leave(seq)
        return True

    def _break_off(self) -> None:
        """Rows are half-way, and nothing says whose: what ran ends, and nothing that was in memory is reused."""
        if self.crew is not None:
            self.failure = WorkerError("a pass was broken off, and the workers are out of step: make a new engine")
            self.crew.kill()
            return
        for seq in self.running:
            seq.interrupt()
        self.num_finished += len(self.running)
        self.running.clear()
        self.waiting = deque(seq for seq in self.waiting if seq.finish_reason is None)
        self.places.clear()
        self.recall.clear()

    def _admit(self) -> None:
        while self.waiting:
            seq = self.waiting[0]
            try:
                num_reused = self.places.give(seq)
            except Exception:  # memory that can't grow: this one would break off every tick to come
                self.waiting.popleft().interrupt()
                raise
            if num_reused is None:
                return
            self.reused_tokens += num_reused
            seq.ready_since = self.num_ticks
            self.running.append(seq)  # NOTE first there, then no longer here: an interrupt in between loses nobody
            self.waiting.popleft()

    def _leave(self, seq: Sequence) -> None:
        self.places.take_back(seq)
        self.running.remove(seq)
        self.num_finished += 1
        self.recall.add(seq.tokens)
