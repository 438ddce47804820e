// Threads that go through a whole range of layers together: one parallel region, and between two steps a barrier that
// spins. The threads are those of torch's own OpenMP pool.
#pragma once
#include <omp.h>
#include <sched.h>

#include <atomic>
#include <vector>

class Barrier {
  public:
    explicit Barrier(int num_threads) : num_threads_(num_threads) {}
    void wait() {
        if (num_threads_ == 1) return;
        int phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads_) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; spins++) {
            if (spins > 4096) sched_yield();  // somebody else has our processor's other half
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
    }

  private:
    const int num_threads_;
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> phase_{0};
};

// Memory that a thread keeps from call to call.
struct Room {
    std::vector<float> memory;
    float* of(int64_t size) {
        if (static_cast<int64_t>(memory.size()) < size) memory.resize(size);
        return memory.data();
    }
};

// work(thread, number of threads, barrier)
template <class Work>
static void together(int64_t num_threads, const Work& work) {
    if (num_threads == 1) {
        Barrier barrier(1);
        return work(0, 1, barrier);
    }
    Barrier* barrier = nullptr;
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp single
        barrier = new Barrier(omp_get_num_threads());
        work(omp_get_thread_num(), omp_get_num_threads(), *barrier);
    }
    delete barrier;
}
