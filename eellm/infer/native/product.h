// Rows times a weight matrix, in panels of sixteen outputs.
//
// A panel holds its sixteen outputs' weights of input 0, then of input 1, and so on: reading it is one stream, and each
// weight read serves all rows of a tile. Every output of every row is one sum over the inputs in their order, whatever
// tile it is in: what a row gives doesn't depend on the rows beside it, nor on the number of threads, to the last bit.
#pragma once
#include <algorithm>

#include "vector.h"

enum Kind : int64_t { FLOAT32 = 0, INT8 = 1, INT4 = 2 };
constexpr int64_t GROUP = 32;  // inputs that share a scale under int4

struct Matrix {
    const void* weight;    // float32 and int8: (panels, I, 16). int4: (panels, I / 2, 16), the even input's code low
    const float* scales;   // int8: (panels, 16). int4: (panels, I / 32, 2, 16): scale and middle - 8 · scale
    const float* bias;     // (panels, 16), or null
    int64_t num_outputs;   // without what fills the last panel up
    int64_t num_inputs;
    int64_t kind;
    int64_t num_panels() const { return (num_outputs + 15) / 16; }
};

// The rows' sums over each group of inputs, which int4's middles are multiplied by: (N, I / 32).
static inline void group_sums(const float* x, int64_t num_rows, int64_t num_inputs, float* sums) {
    for (int64_t g = 0; g < num_rows * num_inputs / GROUP; g++) sums[g] = sum(load(x + g * GROUP) + load(x + g * GROUP + 16));
}

// A tile's sums stay in registers beside its weights: AVX-512 and NEON have 32 of them, AVX2 16.
constexpr int MOST_SUMS = PARTS == 2 ? 12 : 24;
constexpr int MOST_ROWS = 6;  // of a tile

// What P panels make of R rows, row after row.
template <int R, int P>
static inline Many<R * P> tile_float32(const float* w, const float* x, int64_t I) {
    Many<R * P> acc;
    for (int64_t i = 0; i < I; i++) {
        Many<P> weight;
        times<P>([&](auto p) { weight[p] = load(w + (p * I + i) * 16); });
        times<R>([&](auto r) { times<P>([&](auto p) { acc[at<r * P + p>] += weight[p] * x[r * I + i]; }); });
    }
    return acc;
}

template <int R, int P>
static inline Many<R * P> tile_int8(const int8_t* w, const float* scales, const float* x, int64_t I) {
    Many<R * P> acc;
    for (int64_t i = 0; i < I; i++) {
        Many<P> weight;
        times<P>([&](auto p) { weight[p] = floats(w + (p * I + i) * 16); });
        times<R>([&](auto r) { times<P>([&](auto p) { acc[at<r * P + p>] += weight[p] * x[r * I + i]; }); });
    }
    times<R>([&](auto r) { times<P>([&](auto p) { acc[at<r * P + p>] *= load(scales + p * 16); }); });
    return acc;
}

template <int R, int P>
static inline Many<R * P> tile_int4(const uint8_t* w, const float* scales, const float* x, const float* sums, int64_t I) {
    int64_t num_groups = I / GROUP;
    Many<R * P> acc;
    for (int64_t g = 0; g < num_groups; g++) {
        Many<R * P> group;
        for (int64_t i = g * GROUP; i < (g + 1) * GROUP; i += 2) {
            Many<P> even, odd;
            times<P>([&](auto p) { halves(w + (p * I + i) * 8, even[p], odd[p]); });
            times<R>([&](auto r) {
                times<P>([&](auto p) {
                    group[at<r * P + p>] += even[p] * x[r * I + i];
                    group[at<r * P + p>] += odd[p] * x[r * I + i + 1];
                });
            });
        }
        times<P>([&](auto p) {
            const float* s = scales + (p * num_groups + g) * 32;
            v16 scale = load(s), middle = load(s + 16);
            times<R>([&](auto r) {
                acc[at<r * P + p>] += group[at<r * P + p>] * scale;
                acc[at<r * P + p>] += middle * sums[r * num_groups + g];
            });
        });
    }
    return acc;
}

template <int R, int P>
static inline Many<R * P> tile_of(const Matrix& m, int64_t panel, const float* x, const float* sums) {
    if constexpr (R * P * PARTS > MOST_SUMS && P == 2) {  // one panel after the other
        Many<R> left = tile_of<R, 1>(m, panel, x, sums), right = tile_of<R, 1>(m, panel + 1, x, sums);
        Many<R * 2> acc;
        times<R>([&](auto r) { acc[at<2 * r>] = left[r], acc[at<2 * r + 1>] = right[r]; });
        return acc;
    } else {
        int64_t I = m.num_inputs, from = panel * I * 16;
        if (m.kind == INT8) return tile_int8<R, P>(static_cast<const int8_t*>(m.weight) + from, m.scales + panel * 16, x, I);
        if (m.kind == INT4) return tile_int4<R, P>(static_cast<const uint8_t*>(m.weight) + from / 2, m.scales + panel * I, x, sums, I);
        return tile_float32<R, P>(static_cast<const float*>(m.weight) + from, x, I);
    }
}

// P panels for R rows; `put(row, panel, P sums)` takes the results.
template <int R, int P, class Put>
static inline void tile(const Matrix& m, int64_t panel, const float* x, const float* sums, int64_t row, const Put& put) {
    const float* own_sums = m.kind == INT4 ? sums + row * (m.num_inputs / GROUP) : nullptr;
    Many<R * P> acc = tile_of<R, P>(m, panel, x + row * m.num_inputs, own_sums);
    times<R>([&](auto r) {
        v16 values[P];
        times<P>([&](auto p) { values[p] = m.bias ? acc[at<r * P + p>] + load(m.bias + (panel + p) * 16) : acc[at<r * P + p>]; });
        put(row + r, panel, values, P);
    });
}

template <int R, int P, class Put>
static inline void rows_left(const Matrix& m, int64_t panel, const float* x, const float* sums, int64_t row, int64_t N, const Put& put) {
    if constexpr (R > 0) {
        if (N - row == R) return tile<R, P>(m, panel, x, sums, row, put);
        rows_left<R - 1, P>(m, panel, x, sums, row, N, put);
    }
}

template <int P, int R, class Put>
static inline void rows_of_panels(const Matrix& m, int64_t panel, const float* x, const float* sums, int64_t N, const Put& put) {
    int64_t row = 0;
    for (; row + R <= N; row += R) tile<R, P>(m, panel, x, sums, row, put);
    rows_left<R - 1, P>(m, panel, x, sums, row, N, put);
}

// This thread's share of the panels, `unit` of them staying together. x: (N, I). sums: as `group_sums` has them.
template <class Put>
static inline void product(const Matrix& m, const float* x, const float* sums, int64_t N, int64_t unit, int thread, int num_threads, const Put& put) {
    int64_t num_units = m.num_panels() / unit;
    int64_t panel = num_units * thread / num_threads * unit, end = num_units * (thread + 1) / num_threads * unit;
    // several panels at a time read a row's inputs once, as long as there are registers; int4 keeps a second sum of each output
    constexpr int WIDE = PARTS == 1 ? MOST_ROWS : 1, FEW = PARTS == 1 ? MOST_ROWS : MOST_ROWS / 2;
    bool is_wide = N == 1 ? PARTS == 1 || m.kind != INT4 : PARTS == 1 && m.kind != INT4;
    if (is_wide)
        for (; panel + 4 <= end; panel += 4) rows_of_panels<4, WIDE>(m, panel, x, sums, N, put);
    if (N < MOST_ROWS)  // memory is the limit, and two panels at once come faster from there
        for (; panel + 2 <= end; panel += 2) rows_of_panels<2, FEW>(m, panel, x, sums, N, put);
    for (; panel + 2 <= end; panel += 2) rows_of_panels<2, MOST_ROWS>(m, panel, x, sums, N, put);
    for (; panel < end; panel++) rows_of_panels<1, MOST_ROWS>(m, panel, x, sums, N, put);
}
