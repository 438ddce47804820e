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
