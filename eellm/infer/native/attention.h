// One row's query head over its sequence's keys and values, in their order.
#pragma once
#include <algorithm>

#include "vector.h"

// E16: the head's width over sixteen. scores: room for `count` and 15 more.
template <int E16>
static inline void attend_to(const float* q, const float* keys, const float* values, int64_t count, float* scores, float* y) {
    constexpr int64_t E = E16 * 16;
    Many<E16> query;
    times<E16>([&](auto e) { query[e] = load(q + e * 16); });
    float scale = 1.0f / std::sqrt(static_cast<float>(E));
    v16 tops = all(-INFINITY);
    for (int64_t s = 0; s < count; s += 16) {
        v16 found = sums([&](int64_t k) {
            const float* key = keys + std::min(s + k, count - 1) * E;  // there may be no memory behind the last
            v16 dot = query[at<0>] * load(key);
            times<E16 - 1>([&](auto e) { dot += query[at<e + 1>] * load(key + (e + 1) * 16); });
            return dot;
        }) * scale;
        tops = larger(found, tops);
        store(scores + s, found);
    }
    float top = largest(tops);
    for (int64_t s = count; s % 16; s++) scores[s] = -INFINITY;  // as good as 0 in the sum, which is at least 1
    v16 total = {};
    for (int64_t s = 0; s < count; s += 16) {
        v16 weight = exp(load(scores + s) - top);
        store(scores + s, weight);
        total += weight;
    }
    // keys take turns with SETS sums: the next product need not wait for the last
    constexpr int SETS = PARTS == 1 && E16 <= 8 ? 2 : 1;
    Many<E16> acc[SETS];
    for (int64_t s = 0; s < count; s += SETS)
        times<SETS>([&](auto k) {
            if (k == 0 || s + k < count) times<E16>([&](auto e) { acc[k][e] += load(values + (s + k) * E + e * 16) * scores[s + k]; });
        });
    float share = 1.0f / sum(total);
    times<E16>([&](auto e) { store(y + e * 16, (SETS == 2 ? acc[0][e] + acc[SETS - 1][e] : acc[0][e]) * share); });
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
