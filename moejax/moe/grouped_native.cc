// The grouped matmul on CPUs, float32: y = x w[e], dx = dy w[e]^T and dw[e] = x^T dy of rows grouped by expert.
//
// All three are one product C = A B of strided matrices for each task, as in Goto and van de Geijn 2008 (doi
// 10.1145/1356052.1356053): a part of A is packed so that it stays in the second cache, a panel of B so that it stays in
// the first, and a tile of C in registers. B's next panel is fetched from memory meanwhile: an expert's matrix is read
// for few rows, so waiting for it would take as long as multiplying by it. Tasks write disjoint parts of the result, each
// element as one sum in the order of its terms: it depends neither on threads nor on where its row lies.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// A tile of C takes 2 kRows vectors, of 16 registers in AVX2 and of 32 in AVX-512 and NEON (there two a vector).
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 12;
#else
constexpr int kLanes = 8, kRows = 6;
#endif
constexpr int kColumns = 2 * kLanes;  // of a panel of B
constexpr int64_t kDepth = 256;       // terms summed before C is written: a panel of B is 16 or 32 KiB
constexpr int64_t kMostRows = 288;    // of A packed at once, with kDepth terms 288 KiB; whole tiles
constexpr int64_t kMostColumns = 512; // of dw in a task
constexpr int64_t kTasksPerThread = 4;

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef float Unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vector Load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline void Store(float* to, Vector v) { *reinterpret_cast<Unaligned*>(to) = v; }

// Element (i, j) lies at[i * row + j * column].
struct Matrix {
  const float* at;
  int64_t row, column;

  Matrix From(int64_t i, int64_t j) const { return {at + i * row + j * column, row, column}; }
};

// R rows of C, up to kColumns columns wide, from packed A and B; added to what is there, or in its place.
template <int R>
void Tile(const float* a, const float* b, int64_t depth, float* c, int64_t stride, int64_t columns, bool add) {
  Vector sum[R][2] = {};
#pragma GCC unroll 12
  for (int i = 0; i < R; ++i) {  // while they are summed
    __builtin_prefetch(c + i * stride, 1, 3);
    __builtin_prefetch(c + i * stride + columns - 1, 1, 3);
  }
  for (int64_t k = 0; k < depth; ++k, a += kRows, b += kColumns) {
    const Vector left = Load(b), right = Load(b + kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i) {
      sum[i][0] += a[i] * left;
      sum[i][1] += a[i] * right;
    }
  }
  if (columns == kColumns) {
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i, c += stride) {
      Store(c, add ? sum[i][0] + Load(c) : sum[i][0]);
      Store(c + kLanes, add ? sum[i][1] + Load(c + kLanes) : sum[i][1]);
    }
    return;
  }
  for (int i = 0; i < R; ++i, c += stride) {
    float whole[kColumns];
    std::memcpy(whole, sum[i], sizeof whole);
    for (int64_t j = 0; j < columns; ++j) c[j] = add ? c[j] + whole[j] : whole[j];
  }
}

using TileFunction = void (*)(const float*, const float*, int64_t, float*, int64_t, int64_t, bool);

template <int... R>
TileFunction TileOf(int64_t rows, std::integer_sequence<int, R...>) {
  static constexpr TileFunction kTiles[] = {Tile<R + 1>...};
  return kTiles[rows - 1];
}

// Packs A as tiles of kRows rows, each [depth][kRows].
void PackRows(Matrix a, int64_t rows, int64_t depth, float* to) {
  for (int64_t i = 0; i < rows; i += kRows, to += kRows * depth) {
    const float* from = a.at + i * a.row;
    if (rows - i >= kRows && a.row == 1) {
      for (int64_t k = 0; k < depth; ++k) std::memcpy(to + k * kRows, from + k * a.column, sizeof(float) * kRows);
    } else {
      const int64_t used = std::min<int64_t>(kRows, rows - i);
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t r = 0; r < used; ++r) to[k * kRows + r] = from[r * a.row + k * a.column];
    }
  }
}

typedef float Eight __attribute__((vector_size(32)));
typedef float UnalignedEight __attribute__((vector_size(32), aligned(4), may_alias));
typedef int Order __attribute__((vector_size(32)));
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Order{__VA_ARGS__})
#endif

// to[k * kColumns + j] = from[j * stride + k], 8 by 8.
inline void TransposeEight(const float* from, int64_t stride, float* to) {
  Eight one[8], two[8];
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) one[j] = *reinterpret_cast<const UnalignedEight*>(from + j * stride);
#pragma GCC unroll 4
  for (int j = 0; j < 8; j += 2) {
    two[j] = SHUFFLE(one[j], one[j + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    two[j + 1] = SHUFFLE(one[j], one[j + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
#pragma GCC unroll 2
  for (int j = 0; j < 8; j += 4) {
    one[j] = SHUFFLE(two[j], two[j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    one[j + 1] = SHUFFLE(two[j], two[j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    one[j + 2] = SHUFFLE(two[j + 1], two[j + 3], 0, 1, 8, 9, 4, 5, 12, 13);
    one[j + 3] = SHUFFLE(two[j + 1], two[j + 3], 2, 3, 10, 11, 6, 7, 14, 15);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    *reinterpret_cast<UnalignedEight*>(to + k * kColumns) = SHUFFLE(one[k], one[k + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    *reinterpret_cast<UnalignedEight*>(to + (k + 4) * kColumns) = SHUFFLE(one[k], one[k + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// Packs up to kColumns columns of B as [depth][kColumns], filled up with zeros.
void PackPanel(Matrix b, int64_t depth, int64_t columns, float* to) {
  if (columns < kColumns) {
    std::memset(to, 0, sizeof(float) * kColumns * depth);
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t j = 0; j < columns; ++j) to[k * kColumns + j] = b.at[k * b.row + j * b.column];
  } else if (b.column == 1) {
    for (int64_t k = 0; k < depth; ++k) {
      Store(to + k * kColumns, Load(b.at + k * b.row));
      Store(to + k * kColumns + kLanes, Load(b.at + k * b.row + kLanes));
    }
  } else {
    int64_t k = 0;
    for (; k + 8 <= depth; k += 8)
      for (int j = 0; j < kColumns; j += 8) TransposeEight(b.From(k, j).at, b.column, to + k * kColumns + j);
    for (; k < depth; ++k)
      for (int j = 0; j < kColumns; ++j) to[k * kColumns + j] = b.at[k * b.row + j * b.column];
  }
}

// What a thread packs, in whole lines of the cache.
struct alignas(64) Packed {
  float panel[kDepth * kColumns];
  float rows[kDepth * kMostRows];
};

// C = A B, with A [rows, depth], B [depth, columns] and C's rows `stride` apart. Of A and of B either rows or columns are
// contiguous. A sum of no terms is 0.
void Multiply(Matrix a, Matrix b, float* c, int64_t stride, int64_t rows, int64_t depth, int64_t columns) {
  if (depth == 0) {
    for (int64_t i = 0; i < rows; ++i) std::fill_n(c + i * stride, columns, 0.0f);
    return;
  }
  static thread_local const auto packed = std::make_unique<Packed>();
  for (int64_t first = 0; first < rows; first += kMostRows) {
    const int64_t high = std::min(kMostRows, rows - first), tiles = (high + kRows - 1) / kRows;
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t terms = std::min(kDepth, depth - k), share = (terms + tiles - 1) / tiles;
      PackRows(a.From(first, k), high, terms, packed->rows);
      for (int64_t j = 0; j < columns; j += kColumns) {
        const int64_t wide = std::min<int64_t>(kColumns, columns - j);
        PackPanel(b.From(k, j), terms, wide, packed->panel);
        // Rows of the next panel lie far apart, so the processor does not foresee that they are wanted.
        const Matrix next = b.From(k, j + kColumns);
        const bool foresee = b.column == 1 && j + kColumns < columns;
        for (int64_t i = 0, line = 0; i < high; i += kRows) {
          for (const int64_t end = foresee ? std::min(line + share, terms) : line; line < end; ++line)
            __builtin_prefetch(next.at + line * next.row, 0, 2);
          TileOf(std::min<int64_t>(kRows, high - i), std::make_integer_sequence<int, kRows>())(
              packed->rows + i * terms, packed->panel, terms, c + (first + i) * stride + j, stride, wide, k > 0);
        }
      }
    }
  }
}

// Runs task(0) to task(count - 1) on this thread and on those of the pool that are free. Tasks never wait, so neither can
// this do so forever; threads that come when nothing is left find only the counters.
void Parallel(ffi::ThreadPool& pool, int64_t count, std::function<void(int64_t)> task) {
  struct Progress {
    std::atomic<int64_t> begun{0};
    int64_t done = 0;
    std::mutex mutex;
    std::condition_variable changed;
  };
  auto progress = std::make_shared<Progress>();
  auto work = [progress, count, task] {
    for (int64_t i; (i = progress->begun.fetch_add(1)) < count;) {
      task(i);
      std::lock_guard<std::mutex> lock(progress->mutex);
      if (++progress->done == count) progress->changed.notify_all();
    }
  };
  for (int64_t t = 1; t < std::min<int64_t>(pool.num_threads(), count); ++t) pool.Schedule(std::function<void()>(work));
  work();
  std::unique_lock<std::mutex> lock(progress->mutex);
  progress->changed.wait(lock, [&] { return progress->done == count; });
}

// A share of so many that leaves each thread several tasks: a multiple of `unit`, `most` at most.
int64_t Share(int64_t total, ffi::ThreadPool& pool, int64_t unit, int64_t most) {
  const int64_t wanted = total / (kTasksPerThread * pool.num_threads());
  return std::min(std::max((wanted + unit - 1) / unit, int64_t{1}) * unit, most);
}

// Rows [start, start + rows) of an expert, or columns of its dw from `column` on.
struct Task {
  int64_t expert, start, rows, column;
};

// The largest come first, so that no thread begins a long one when the others are done.
void RunLargestFirst(ffi::ThreadPool& pool, std::vector<Task>& tasks, std::function<void(const Task&)> run) {
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.rows > b.rows; });
  Parallel(pool, tasks.size(), [&tasks, &run](int64_t i) { run(tasks[i]); });
}

// Calls f(expert, start, end) for the rows of each; no sizes lead out of the rows there are.
template <typename F>
void ForEachGroup(ffi::BufferR1<ffi::S32> sizes, int64_t rows, F f) {
  int64_t start = 0;
  for (int64_t e = 0; e < static_cast<int64_t>(sizes.element_count()); ++e) {
    const int64_t end = std::min(start + std::max<int64_t>(sizes.typed_data()[e], 0), rows);
    f(e, start, end);
    start = end;
  }
}

ffi::Error RowsTimes(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x, ffi::BufferR3<ffi::F32> w,
                     ffi::BufferR1<ffi::S32> sizes, ffi::ResultBufferR2<ffi::F32> y, bool transposed) {
  const int64_t all = x.dimensions()[0], depth = x.dimensions()[1], columns = y->dimensions()[1];
  const auto w_shape = w.dimensions();
  if (w_shape[0] != sizes.dimensions()[0] || w_shape[transposed ? 2 : 1] != depth || w_shape[transposed ? 1 : 2] != columns ||
      y->dimensions()[0] != all)
    return ffi::Error::InvalidArgument("moejax_rows_times: rows, matrices and sizes do not fit each other");
  const int64_t most = Share(all, pool, kRows, kMostRows);
  std::vector<Task> tasks;
  int64_t used = 0;
  ForEachGroup(sizes, all, [&](int64_t expert, int64_t start, int64_t end) {
    for (; start < end; start += most) tasks.push_back({expert, start, std::min(most, end - start), 0});
    used = end;
  });
  const float *rows = x.typed_data(), *weights = w.typed_data();
  float* out = y->typed_data();
  std::fill(out + used * columns, out + all * columns, 0.0f);
  RunLargestFirst(pool, tasks, [=](const Task& task) {
    const float* own = weights + task.expert * depth * columns;
    Multiply({rows + task.start * depth, depth, 1}, transposed ? Matrix{own, 1, depth} : Matrix{own, columns, 1},
             out + task.start * columns, columns, task.rows, depth, columns);
  });
  return ffi::Error::Success();
}

ffi::Error WeightsOf(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x, ffi::BufferR2<ffi::F32> dy,
                     ffi::BufferR1<ffi::S32> sizes, ffi::ResultBufferR3<ffi::F32> dw) {
  const int64_t width = x.dimensions()[1], columns = dy.dimensions()[1];
  const auto dw_shape = dw->dimensions();
  if (dw_shape[0] != sizes.dimensions()[0] || dw_shape[1] != width || dw_shape[2] != columns ||
      dy.dimensions()[0] != x.dimensions()[0])
    return ffi::Error::InvalidArgument("moejax_weights_of: rows, gradients and sizes do not fit each other");
  const int64_t most = Share(columns * sizes.element_count(), pool, kColumns, kMostColumns);
  std::vector<Task> tasks;
  ForEachGroup(sizes, x.dimensions()[0], [&](int64_t expert, int64_t start, int64_t end) {
    for (int64_t column = 0; column < columns; column += most) tasks.push_back({expert, start, end - start, column});
  });
  const float *rows = x.typed_data(), *gradients = dy.typed_data();
  float* out = dw->typed_data();
  RunLargestFirst(pool, tasks, [=](const Task& task) {
    Multiply({rows + task.start * width, 1, width}, {gradients + task.start * columns + task.column, columns, 1},
             out + task.expert * width * columns + task.column, columns, width, task.rows,
             std::min(most, columns - task.column));
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(moejax_rows_times, RowsTimes,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR3<ffi::F32>>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Ret<ffi::BufferR2<ffi::F32>>()
                                  .Attr<bool>("transposed"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(moejax_weights_of, WeightsOf,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Ret<ffi::BufferR3<ffi::F32>>());
