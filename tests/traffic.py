"""Requests that come, go and are cancelled at random: what the engine's tests draw."""

from hypothesis import strategies as st

LONG = [(7 * i + i * i) % 29 for i in range(60)]
PROMPTS = st.one_of(
    st.lists(st.integers(0, 28), min_size=1, max_size=12),
    st.integers(1, 60).map(lambda n: LONG[:n]),  # these begin alike: rows are reused
)


def events(requests):
    """requests: a strategy of their options. Gives lists of (what happens, …)."""
    return st.lists(
        st.one_of(
            st.tuples(st.just("submit"), PROMPTS, requests),
            st.tuples(st.just("step"), st.integers(1, 9)),
            st.tuples(st.just("cancel"), st.integers(0, 20)),
        ),
        min_size=4,
        max_size=24,
    )


LOCAL_REQUESTS = st.fixed_dictionaries(
    {
        "method": st.sampled_from(["full", "early", "speculative"]),
        "threshold": st.sampled_from([0.0, 0.2, 0.4, 0.7]),
        "max_new_tokens": st.integers(1, 14),
        "max_deferred": st.sampled_from([1, 2, 5, 16]),
        "policy": st.sampled_from(["max_prob", "gate", "margin"]),
        "exits": st.sampled_from([None, (1, 3, 5), (3,)]),
        "max_draft": st.sampled_from([1, 3, 8]),
        "always_draft": st.booleans(),
        "lookup": st.booleans(),
    }
)
"""Options of any request to an engine of one process."""


def play(engine, events):
    """Lets it happen. Returns what was submitted: (handle, prompt, options)."""
    submitted = []
    for kind, *rest in events:
        if kind == "submit":
            prompt, options = rest
            submitted.append((engine.submit(prompt, **options), prompt, options))
        elif kind == "step":
            for _ in range(rest[0]):
                engine.step()
        elif submitted:
            submitted[rest[0] % len(submitted)][0].cancel()
    return submitted
