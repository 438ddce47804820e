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

template <int R, int P>
static inline void tile_float32(const float* w, const float* x, int64_t I, v16 (&acc)[R][P]) {
    for (int64_t i = 0; i < I; i++) {
        v16 weight[P];
        times<P>([&](auto p) { weight[p] = load(w + (p * I + i) * 16); });
        times<R>([&](auto r) { times<P>([&](auto p) { acc[r][p] += weight[p] * x[r * I + i]; }); });
    }
}

template <int R, int P>
static inline void tile_int8(const int8_t* w, const float* scales, const float* x, int64_t I, v16 (&acc)[R][P]) {
    for (int64_t i = 0; i < I; i++) {
        v16 weight[P];
        times<P>([&](auto p) { weight[p] = floats(w + (p * I + i) * 16); });
        times<R>([&](auto r) { times<P>([&](auto p) { acc[r][p] += weight[p] * x[r * I + i]; }); });
    }
    times<R>([&](auto r) { times<P>([&](auto p) { acc[r][p] *= load(scales + p * 16); }); });
}

template <int R, int P>
static inline void tile_int4(const uint8_t* w, const float* scales, const float* x, const float* sums, int64_t I, v16 (&acc)[R][P]) {
    int64_t num_groups = I / GROUP;
    for (int64_t g = 0; g < num_groups; g++) {
        v16 group[R][P] = {};
        for (int64_t i = g * GROUP; i < (g + 1) * GROUP; i += 2) {
            v16 even[P], odd[P];
            times<P>([&](auto p) { halves(w + (p * I + i) * 8, even[p], odd[p]); });
            times<R>([&](auto r) {
                times<P>([&](auto p) {
                    group[r][p] += even[p] * x[r * I + i];
                    group[r][p] += odd[p] * x[r * I + i + 1];
                });
            });
        }
        times<P>([&](auto p) {
            const float* s = scales + (p * num_groups + g) * 32;
            v16 scale = load(s), middle = load(s + 16);
            times<R>([&](auto r) {
                acc[r][p] += group[r][p] * scale;
                acc[r][p] += middle * sums[r * num_groups + g];
            });
        });
    }
}

// P panels for R rows; `put(row, panel, P sums)` takes the results.
template <int R, int P, class Put>
static inline void tile(const Matrix& m, int64_t panel, const float* x, const float* sums, int64_t row, const Put& put) {
    int64_t I = m.num_inputs, at = panel * I * 16;
    v16 acc[R][P] = {};
    if (m.kind == FLOAT32) tile_float32<R, P>(static_cast<const float*>(m.weight) + at, x + row * I, I, acc);
    if (m.kind == INT8) tile_int8<R, P>(static_cast<const int8_t*>(m.weight) + at, m.scales + panel * 16, x + row * I, I, acc);
    if (m.kind == INT4)
        tile_int4<R, P>(static_cast<const uint8_t*>(m.weight) + at / 2, m.scales + panel * I, x + row * I, sums + row * (I / GROUP), I, acc);
    times<R>([&](auto r) {
        if (m.bias) times<P>([&](auto p) { acc[r][p] += load(m.bias + (panel + p) * 16); });
        put(row + r, panel, acc[r], P);
    });
}

// Rows of a tile: as many as leave its sums and weights in registers, of which AVX-512 has 32 for v16, AVX2 16 for halves.
constexpr int most_rows(int P) { return PARTS == 1 ? 6 : P == 1 ? 6 : P == 2 ? 3 : 1; }

template <int R, int P, class Put>
static inline void rows_left(const Matrix& m, int64_t panel, const float* x, const float* sums, int64_t row, int64_t N, const Put& put) {
    if constexpr (R > 0) {
        if (N - row == R) return tile<R, P>(m, panel, x, sums, row, put);
        rows_left<R - 1, P>(m, panel, x, sums, row, N, put);
    }
}

template <int P, class Put>
static inline void rows_of_panels(const Matrix& m, int64_t panel, const float* x, const float* sums, int64_t N, const Put& put) {
    constexpr int R = most_rows(P);
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
    bool is_wide = PARTS == 1 ? m.kind != INT4 || N == 1 : m.kind != INT4 && N == 1;
    if (is_wide)
        for (; panel + 4 <= end; panel += 4) rows_of_panels<4>(m, panel, x, sums, N, put);
    if (PARTS == 1 || unit == 2 || N < 6 || m.kind == FLOAT32)
        for (; panel + 2 <= end; panel += 2) rows_of_panels<2>(m, panel, x, sums, N, put);
    for (; panel < end; panel++) rows_of_panels<1>(m, panel, x, sums, N, put);
}
