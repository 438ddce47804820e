// One row's query head over its sequence's keys and values, in their order.
#pragma once
#include "vector.h"

// E16: the head's width over sixteen. scores: room for `count`.
template <int E16>
static inline void attend_to(const float* q, const float* keys, const float* values, int64_t count, float* scores, float* y) {
    constexpr int64_t E = E16 * 16;
    v16 query[E16];
    times<E16>([&](auto e) { query[e] = load(q + e * 16); });
    float scale = 1.0f / std::sqrt(static_cast<float>(E)), top = -INFINITY;
    for (int64_t s = 0; s < count; s++) {
        v16 dot = query[0] * load(keys + s * E);
        times<E16 - 1>([&](auto e) { dot += query[e + 1] * load(keys + s * E + (e + 1) * 16); });
        scores[s] = sum(dot) * scale;
        top = scores[s] > top ? scores[s] : top;
    }
    for (int64_t s = count; s % 16; s++) scores[s] = -INFINITY;  // as good as 0 in the sum, which is at least 1
    v16 total = {};
    for (int64_t s = 0; s < count; s += 16) {
        v16 weight = exp(load(scores + s) - top);
        store(scores + s, weight);
        total += weight;
    }
    v16 acc[E16] = {};
    for (int64_t s = 0; s < count; s++)
        times<E16>([&](auto e) { acc[e] += load(values + s * E + e * 16) * scores[s]; });
    float share = 1.0f / sum(total);
    times<E16>([&](auto e) { store(y + e * 16, acc[e] * share); });
}

static inline void attend(int64_t E, const float* q, const float* keys, const float* values, int64_t count, float* scores, float* y) {
    switch (E / 16) {
        case 1: return attend_to<1>(q, keys, values, count, scores, y);
        case 2: return attend_to<2>(q, keys, values, count, scores, y);
        case 3: return attend_to<3>(q, keys, values, count, scores, y);
        case 4: return attend_to<4>(q, keys, values, count, scores, y);
        case 5: return attend_to<5>(q, keys, values, count, scores, y);
        case 6: return attend_to<6>(q, keys, values, count, scores, y);
        case 7: return attend_to<7>(q, keys, values, count, scores, y);
        case 8: return attend_to<8>(q, keys, values, count, scores, y);
        case 12: return attend_to<12>(q, keys, values, count, scores, y);
        case 16: return attend_to<16>(q, keys, values, count, scores, y);
    }
}
