// Decoding's passes in float32 on a CPU: rows of any sequences through a range of layers, and what heads say of them.
//
// Shapes: N rows, D hidden, H query heads, K key/value heads, E head width, C rows a slot holds, F width of the MLP,
// V vocabulary. Everything is row after row. eellm/infer/native/network.py fills the structs and calls; nothing here
// allocates but scratch, or checks what it is given.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

#include "attention.h"
#include "product.h"
#include "team.h"

struct MLP {
    const float* norm;
    Matrix gate_up;  // panels of gate and up in turns
    Matrix down;
    int64_t activation;
    double eps;
};

struct Layer {
    const float* norm;
    Matrix qkv, out;
    const float *q_norm, *k_norm;  // (E), or null
    int64_t num_heads, num_kv_heads, head_size;
    int64_t window;  // positions a row sees, itself among them; 0: all
    MLP mlp;
};

struct Rows {
    int64_t num_rows;
    const int32_t *slots, *positions;  // (N)
    const float *cos, *sin;            // (positions, E / 2)
};

struct Head {
    const MLP* mlp;     // or null
    const float* norm;  // or null
    const Matrix* output;
    double eps;
};

struct Leg {
    const Layer* const* layers;
    float* const* kv;  // of each layer, (slots, 2K, C, E)
    int64_t num_layers;
    int64_t first_row;  // those before it don't take part
    Head head;
    int64_t num_asked;  // newest rows that the head is asked about
    int64_t score;      // which of a row's five numbers that is
    double threshold;   // of the score, at which the head is sure
    float* logits;      // (num_asked, V)
    double* table;      // (num_asked, 5)
    double layers_s, head_s;  // what they took, once it was gone
};

static double now_s() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static thread_local Room normed_room, sums_room, scores_room, qkv_room, y_room, width_room;

static inline void rms_norm(const float* x, const float* weight, int64_t size, double eps, float* y) {
    v16 total = {};
    int64_t i = 0;
    float rest = 0;
    for (; i + 16 <= size; i += 16) total += load(x + i) * load(x + i);
    for (; i < size; i++) rest += x[i] * x[i];
    float scale = 1.0f / std::sqrt((sum(total) + rest) / size + static_cast<float>(eps));
    for (i = 0; i + 16 <= size; i += 16) store(y + i, load(x + i) * scale * load(weight + i));
    for (; i < size; i++) y[i] = x[i] * scale * weight[i];
}

static const float* sums_of(const Matrix& m, const float* x, int64_t N) {
    if (m.kind != INT4) return nullptr;
    float* sums = sums_room.of(N * m.num_inputs / GROUP);
    group_sums(x, N, m.num_inputs, sums);
    return sums;
}

static inline void put_panel(float* y, int64_t num_outputs, int64_t panel, v16 value) {
    int64_t first = panel * 16;
    if (first + 16 <= num_outputs) return store(y + first, value);
    for (int64_t i = first; i < num_outputs; i++) y[i] = value[i - first];
}

static inline void add_panel(float* y, int64_t num_outputs, int64_t panel, v16 value) {
    int64_t first = panel * 16;
    if (first + 16 <= num_outputs) return store(y + first, load(y + first) + value);
    for (int64_t i = first; i < num_outputs; i++) y[i] += value[i - first];
}

// y = x · m, this thread's outputs of it; or y += x · m
template <bool ADD>
static void multiply(const Matrix& m, const float* x, int64_t N, float* y, int thread, int num_threads) {
    int64_t O = m.num_outputs;
    product(m, x, sums_of(m, x, N), N, 1, thread, num_threads, [=](int64_t row, int64_t panel, const v16* values, int P) {
        for (int p = 0; p < P; p++) (ADD ? add_panel : put_panel)(y + row * O, O, panel + p, values[p]);
    });
}

// h += MLP(norm(h)); `width` (N, F) is shared by the threads
static void run_mlp(const MLP& mlp, float* h, int64_t N, float* width, int thread, int num_threads, Barrier& barrier) {
    int64_t D = mlp.gate_up.num_inputs, F = mlp.down.num_inputs, activation = mlp.activation;
    float* z = normed_room.of(N * D);
    for (int64_t n = 0; n < N; n++) rms_norm(h + n * D, mlp.norm, D, mlp.eps, z + n * D);
    product(mlp.gate_up, z, sums_of(mlp.gate_up, z, N), N, 2, thread, num_threads, [=](int64_t row, int64_t panel, const v16* values, int P) {
        for (int p = 0; p < P; p += 2) put_panel(width + row * F, F, (panel + p) / 2, activated(values[p], activation) * values[p + 1]);
    });
    barrier.wait();
    multiply<true>(mlp.down, width, N, h, thread, num_threads);
    barrier.wait();
}

static void rotate(float* x, const float* cos, const float* sin, int64_t E) {
    for (int64_t i = 0; i < E / 2; i++) {
        float left = x[i], right = x[i + E / 2];
        x[i] = left * cos[i] - right * sin[i];
        x[i + E / 2] = right * cos[i] + left * sin[i];
    }
}

// Turns a row's query or key head; keys and values go to memory.
static void place_head(const Layer& layer, const Rows& rows, int64_t n, int64_t head, float* x, float* kv, int64_t C) {
    int64_t E = layer.head_size, H = layer.num_heads, K = layer.num_kv_heads, position = rows.positions[n];
    if (head < H + K) {
        const float* norm = head < H ? layer.q_norm : layer.k_norm;
        if (norm) rms_norm(x, norm, E, layer.mlp.eps, x);
        rotate(x, rows.cos + position * (E / 2), rows.sin + position * (E / 2), E);
    }
    if (head >= H) std::memcpy(kv + ((rows.slots[n] * 2 * K + head - H) * C + position) * E, x, E * sizeof(float));
}

static void run_layer(const Layer& layer, const Rows& rows, float* h, float* kv, int64_t C, float* qkv, float* y, float* width, int thread, int num_threads, Barrier& barrier) {
    int64_t N = rows.num_rows, D = layer.qkv.num_inputs, E = layer.head_size, H = layer.num_heads, K = layer.num_kv_heads, all_heads = H + 2 * K;
    float* z = normed_room.of(N * D);
    for (int64_t n = 0; n < N; n++) rms_norm(h + n * D, layer.norm, D, layer.mlp.eps, z + n * D);
    multiply<false>(layer.qkv, z, N, qkv, thread, num_threads);
    barrier.wait();
    for (int64_t i = thread; i < N * all_heads; i += num_threads) place_head(layer, rows, i / all_heads, i % all_heads, qkv + i * E, kv, C);
    barrier.wait();
    for (int64_t i = thread; i < N * H; i += num_threads) {
        int64_t n = i / H, head = i % H, end = rows.positions[n] + 1;
        int64_t first = layer.window ? std::max<int64_t>(0, end - layer.window) : 0;
        const float* keys = kv + ((rows.slots[n] * 2 * K + head / (H / K)) * C + first) * E;
        attend(E, qkv + (n * all_heads + head) * E, keys, keys + K * C * E, end - first, scores_room.of(end + 16), y + i * E);
    }
    barrier.wait();
    multiply<true>(layer.out, y, N, h, thread, num_threads);
    barrier.wait();
    run_mlp(layer.mlp, h, N, width, thread, num_threads, barrier);
}

struct Best {
    float top, second;
    int64_t token;
    double total, weighted;  // Σ e^(l - top), Σ e^(l - top) · (l - top)
};

static Best best_of(const float* logits, int64_t end) {
    Best best{-INFINITY, -INFINITY, 0, 0, 0};
    int64_t i = 0;
    v16 top = all(-INFINITY);
    for (; i + 16 <= end; i += 16) top = larger(load(logits + i), top);
    best.top = largest(top);
    for (; i < end; i++) best.top = std::max(best.top, logits[i]);
    while (best.token < end - 1 && logits[best.token] != best.top) best.token++;
    v16 second = all(-INFINITY);
    for (i = 0; i + 16 <= end;) {
        v16 total = {}, weighted = {};
        for (int64_t until = std::min(i + 1024, end - 15); i < until; i += 16) {  // floats add up a few, doubles many
            v16 x = load(logits + i);
            v16 e = exp(x - best.top);
            total += e;
            weighted += e * (x - best.top);
            if (i <= best.token && best.token < i + 16) x[best.token - i] = -INFINITY;
            second = larger(x, second);
        }
        best.total += sum(total), best.weighted += sum(weighted);
    }
    best.second = largest(second);
    for (; i < end; i++) {
        double e = std::exp(logits[i] - best.top);
        best.total += e;
        best.weighted += e * (logits[i] - best.top);
        if (i != best.token) best.second = std::max(best.second, logits[i]);
    }
    return best;
}

static void read_row(const float* logits, int64_t V, double* out) {
    Best best = best_of(logits, V);
    double log_total = std::log(best.total), top_prob = 1 / best.total;
    out[0] = best.token;
    out[1] = -log_total;
    out[2] = top_prob;
    out[3] = V > 1 ? top_prob - std::exp(best.second - best.top) / best.total : top_prob;
    out[4] = V > 1 ? 1 + (best.weighted / best.total - log_total) / std::log(double(V)) : top_prob;
}

// What rows are made of on their way; shared by the threads.
struct Scratch {
    float *qkv, *y, *width;
    Scratch(const Layer& one, int64_t N)
        : qkv(qkv_room.of(N * (one.num_heads + 2 * one.num_kv_heads) * one.head_size)),
          y(y_room.of(N * one.num_heads * one.head_size)),
          width(width_room.of(N * one.mlp.down.num_inputs)) {}
};

static void run_layers(const Layer* const* layers, float* const* kv, int64_t num_layers, int64_t C, const Rows& rows, float* h, const Scratch& scratch, int thread, int num_threads, Barrier& barrier) {
    for (int64_t i = 0; i < num_layers; i++) run_layer(*layers[i], rows, h, kv[i], C, scratch.qkv, scratch.y, scratch.width, thread, num_threads, barrier);
}

// x (N, D) → logits (N, V), and unless `table` is null five numbers of each row
static void run_head(const float* norm, double eps, const Matrix& m, int64_t N, const float* x, float* logits, double* table, int thread, int num_threads, Barrier& barrier) {
    int64_t D = m.num_inputs, V = m.num_outputs;
    const float* z = x;
    if (norm) {
        float* own = normed_room.of(N * D);
        for (int64_t n = 0; n < N; n++) rms_norm(x + n * D, norm, D, eps, own + n * D);
        z = own;
    }
    multiply<false>(m, z, N, logits, thread, num_threads);
    if (!table) return;
    barrier.wait();
    for (int64_t n = thread; n < N; n += num_threads) read_row(logits + n * V, V, table + n * 5);
}

extern "C" {

// x (N, D) → out (N, D), through the layers one after another. kv: of each layer, (slots, 2K, C, E).
void eellm_run(const Layer* const* layers, float* const* kv, int64_t num_layers, int64_t C, const Rows* rows, const float* x, float* out, int64_t num_threads) {
    int64_t N = rows->num_rows, D = layers[0]->qkv.num_inputs;
    Scratch scratch(*layers[0], N);
    std::memcpy(out, x, N * D * sizeof(float));
    together(num_threads, [=](int thread, int team, Barrier& barrier) {
        run_layers(layers, kv, num_layers, C, *rows, out, scratch, thread, team, barrier);
    });
}

// x (N, D) → out (N, D), one leg after the other until a head is sure of the newest row or none is left. Returns how many
// legs were gone. asked (rows, D): room for the newest rows, where a head has an MLP.
int64_t eellm_walk(Leg* legs, int64_t num_legs, int64_t C, const Rows* rows, const float* x, float* out, float* asked, int64_t num_threads) {
    int64_t N = rows->num_rows, D = legs[0].layers[0]->qkv.num_inputs, num_gone = 0;
    Scratch scratch(*legs[0].layers[0], N);
    std::memcpy(out, x, N * D * sizeof(float));
    together(num_threads, [=, &num_gone](int thread, int team, Barrier& barrier) {
        double since_s = now_s();
        auto took = [&] {
            double before_s = std::exchange(since_s, now_s());
            return since_s - before_s;
        };
        for (int64_t i = 0; i < num_legs; i++) {
            Leg& leg = legs[i];
            const Head& head = leg.head;
            int64_t first = leg.first_row, n = leg.num_asked;
            Rows own{N - first, rows->slots + first, rows->positions + first, rows->cos, rows->sin};
            run_layers(leg.layers, leg.kv, leg.num_layers, C, own, out + first * D, scratch, thread, team, barrier);
            if (thread == 0) num_gone = i + 1, leg.layers_s = took();
            if (!n) continue;
            const float* newest = out + (N - n) * D;
            if (head.mlp) {
                if (thread == 0) std::memcpy(asked, newest, n * D * sizeof(float));
                barrier.wait();
                run_mlp(*head.mlp, asked, n, scratch.width, thread, team, barrier);
                newest = asked;
            }
            run_head(head.norm, head.eps, *head.output, n, newest, leg.logits, leg.table, thread, team, barrier);
            barrier.wait();
            if (thread == 0) leg.head_s = took();
            if (leg.table[5 * (n - 1) + leg.score] >= leg.threshold) break;
        }
    });
    return num_gone;
}

// x (N, D) → out (N, D)
void eellm_mlp(const MLP* mlp, int64_t N, const float* x, float* out, int64_t num_threads) {
    float* width = width_room.of(N * mlp->down.num_inputs);
    std::memcpy(out, x, N * mlp->gate_up.num_inputs * sizeof(float));
    together(num_threads, [=](int thread, int team, Barrier& barrier) { run_mlp(*mlp, out, N, width, thread, team, barrier); });
}

void eellm_norm(const float* weight, int64_t size, double eps, int64_t N, const float* x, float* out) {
    for (int64_t n = 0; n < N; n++) rms_norm(x + n * size, weight, size, eps, out + n * size);
}

// x (N, D), normed unless `norm` is null → logits (N, V); and unless `table` is null, of each row five numbers: the
// likeliest token, its log-probability, and the scores max_prob, margin and entropy
void eellm_head(const float* norm, double eps, const Matrix* m, int64_t N, const float* x, float* logits, double* table, int64_t num_threads) {
    together(num_threads, [=](int thread, int team, Barrier& barrier) { run_head(norm, eps, *m, N, x, logits, table, thread, team, barrier); });
}
}
