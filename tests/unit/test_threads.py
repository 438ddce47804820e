"""Several threads on one model, each with an engine of its own."""

import threading

import pytest

import eellm
from eellm.infer.angles import Angles
from eellm.infer.attention import Span
from eellm.infer.native.rows import NativeAngles, NativeRows
from eellm.model.rope import Rope
from tests.models import needs_compiler, tiny_config, tiny_model

PROMPTS = ([3, 1, 4, 1, 5], [9, 2, 6] * 9, [5, 3, 5, 8, 9, 7, 9])
OPTIONS = {"threshold": 0.4, "max_new_tokens": 40}


def together(*works):
    """Runs them at once; the first error of any is raised."""
    errors, start = [], threading.Barrier(len(works))

    def run(work):
        start.wait()
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("compile", [pytest.param(True, marks=needs_compiler), False])
def test_engines_of_one_model_in_several_threads_give_what_each_gives_alone(compile):
    model = tiny_model(dtype="float32", head_dim=16)
    alone = {}
    with eellm.Engine(model, compile=compile) as engine:
        for prompt in PROMPTS:
            (alone[tuple(prompt)],) = engine.generate([prompt], **OPTIONS)

    def serve(prompt):
        for _ in range(12):
            with eellm.Engine(model, compile=compile) as engine:
                for _ in range(3):
                    (out,) = engine.generate([prompt], **OPTIONS)
                    assert (out.tokens, out.exits) == (alone[tuple(prompt)].tokens, alone[tuple(prompt)].exits)

    together(*(lambda prompt=prompt: serve(prompt) for prompt in PROMPTS))


@needs_compiler
def test_memories_of_one_network_keep_addresses_of_their_own():
    engines = [eellm.Engine(tiny_model(dtype="float32", head_dim=16), compile=True)]
    engines.append(eellm.Engine(engines[0].model, compile=True))
    one, other = (engine.backend.memory for engine in engines)
    assert engines[0].network is engines[1].network
    one.reserve(1, 64)
    address = engines[0].network._addresses(1, one)
    kept = one.layers[1].data_ptr()
    other.reserve(2, 128)
    engines[1].network._addresses(1, other)
    assert engines[0].network._addresses(1, one) == address, "the other memory has not moved this one's list"
    assert next(iter(one.addresses)) == kept


class Growing:
    """A rope that another pass grows the tables in front of."""

    def __init__(self, rope, meanwhile):
        self.rope, self.meanwhile = rope, meanwhile

    def __call__(self, positions, dtype):
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        return self.rope(positions, dtype)


def test_tables_that_two_passes_grow_at_once_never_get_shorter():
    config = tiny_config()
    native = NativeAngles(Rope(config))
    torchs = Angles(config, dtype=native.tables[0].dtype, device=native.tables[0].device)
    for angles in (native, torchs):
        finished = threading.Event()

        def grow(angles=angles, finished=finished):
            angles.reserve(1000)
            finished.set()

        thread = threading.Thread(target=grow)
        angles.rope = Growing(
            angles.rope, lambda thread=thread, finished=finished: (thread.start(), finished.wait(0.5))
        )
        angles.reserve(100)
        thread.join()
        assert len(angles.tables[0]) >= 1000
    rows = NativeRows([Span(0, 3, 2)], native)
    assert rows.struct.cos == rows.kept[2].data_ptr()
    assert rows.struct.sin == rows.kept[3].data_ptr()
