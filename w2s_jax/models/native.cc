// The training of a trunk of 3x3 convolutions on a CPU, called from JAX through XLA's foreign function interface.
//
// Images are [batch, mel, channels, stride] float32: time is the last axis, so vector lanes run over time and 13 channels waste
// none of them. Rows are padded from `time` to `stride` floats; what stands in the padding is never read as a value. A
// convolution normalises its input (centre, factor, beta, ReLU: the BatchNorm of the block before) while it loads it, so the
// image that PyTorch or XLA would keep in between is never written to memory; it also returns the moments of what it computed.
//
// Results do not depend on the number of threads: the work is cut by the shape alone, each task has sums of its own, and they
// are added up in the tasks' order.

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRegisters = 32;
#else
constexpr int kLanes = 4, kRegisters = 16;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef float Loose __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// Register tiles. A convolution holds two vectors of each output channel, two inputs and a weight; the kernel's gradient holds
// three taps of each output channel, three inputs and one gradient.
constexpr int kOutputs = kRegisters == 32 ? 14 : 6;
constexpr int kGradients = kRegisters == 32 ? 8 : 4;

// A tile of time: seven channels of a row are then 21 KB and stay in the first-level cache while their gradient is taken.
constexpr int64_t kStrip = 768;
constexpr int64_t kStep = 32;  // widths are multiples of two of the longest vectors
constexpr int64_t kLead = 16;  // room for the column before a strip; keeps the strip itself aligned

template <class V>
inline V load(const float* p);
template <>
inline float load<float>(const float* p) { return *p; }
template <>
inline Vec load<Vec>(const float* p) { return *reinterpret_cast<const Loose*>(p); }
inline void store(float* p, float v) { *p = v; }
inline void store(float* p, Vec v) { *reinterpret_cast<Loose*>(p) = v; }

inline float sum(Vec v) {
  float parts[kLanes];
  std::memcpy(parts, &v, sizeof v);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
  return parts[0];
}

// The first lanes of a vector, zeros behind: for the vector at the end of a row, half of which is padding.
inline Vec head(Vec v, int64_t lanes) {
  float parts[kLanes];
  std::memcpy(parts, &v, sizeof v);
  for (int64_t i = std::max<int64_t>(lanes, 0); i < kLanes; ++i) parts[i] = 0;
  std::memcpy(&v, parts, sizeof v);
  return v;
}

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Shape {
  int64_t batch, mel, channels, stride;
  explicit Shape(ffi::Span<const int64_t> d) : batch(d[0]), mel(d[1]), channels(d[2]), stride(d[3]) {}
  int64_t at(int64_t b, int64_t m) const { return (b * mel + m) * channels * stride; }
};

// Strips of time that a clip is cut into, all of one width but the last.
struct Strips {
  int64_t count, width, span;
  explicit Strips(int64_t time) : span(round_up(time, kStep)) {
    count = (span + kStrip - 1) / kStrip;
    width = round_up((span + count - 1) / count, kStep);
    count = (span + width - 1) / width;
  }
  int64_t begin(int64_t i) const { return i * width; }
  int64_t size(int64_t i) const { return std::min(width, span - i * width); }
};

// Run work(0) ... work(tasks - 1) on XLA's own threads and this one. This thread takes tasks too and waits only for those that
// have begun, so it cannot starve however busy the pool is.
template <class F>
void parallel(ffi::ThreadPool& pool, int64_t tasks, const F& work) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable finished;
  };
  auto shared = std::make_shared<Shared>();
  // a helper that comes late finds no task left and never touches `work`, which may be gone by then
  auto help = [shared, tasks, &work] {
    for (int64_t i; (i = shared->next.fetch_add(1)) < tasks;) {
      work(i);
      if (shared->done.fetch_add(1) + 1 == tasks) {
        std::lock_guard<std::mutex> lock(shared->mutex);
        shared->finished.notify_all();
      }
    }
  };
  for (int64_t helper = 1; helper < std::min(pool.num_threads(), tasks); ++helper) pool.Schedule(decltype(help)(help));
  help();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->finished.wait(lock, [&] { return shared->done.load() == tasks; });
}

// Scratch of one thread, kept: it is larger than what malloc keeps, and its pages would be faulted in for every task.
float* scratch(int64_t floats) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<void, Free> memory;
  static thread_local int64_t size = 0;
  if (floats > size) {
    size = round_up(floats, 1024);
    memory.reset(std::aligned_alloc(64, size * sizeof(float)));
    if (!memory) std::abort();
  }
  return static_cast<float*>(memory.get());
}

// Ask for huge pages before a large result is first written: half of the time of a pass is page faults otherwise.
void huge(const void* p, size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + kPage - 1) & ~(kPage - 1);
  uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) & ~(kPage - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

using Array = ffi::Buffer<ffi::F32>;
using Result = ffi::Result<ffi::Buffer<ffi::F32>>;
using Codes = ffi::Buffer<ffi::U8>;

void huge(Result& result) { huge(result->typed_data(), result->element_count() * sizeof(float)); }

// The BatchNorm and ReLU of the block before, per channel; without `on` a value is taken as it is.
struct Affine {
  const float *centre, *factor, *beta;
  bool on;
};

template <class V>
inline V positive(V v) { return v < V{} ? V{} : v; }  // NaN stays NaN, so that a loss shows it

// row[kLead + i] = value(begin + i) for i in [-1, width], zeros outside [0, time): one channel of one row with its padding.
template <class F>
inline void fill(float* row, int64_t begin, int64_t width, int64_t time, const F& value) {
  float* out = row + kLead;
  int64_t valid = std::clamp<int64_t>(time - begin, 0, width);
  for (int64_t i = 0; i < valid; i += kLanes) store(out + i, value(Vec{}, begin + i));
  std::fill(out + valid, out + width + 1, 0.0f);
  out[-1] = begin > 0 ? value(0.0f, begin - 1) : 0.0f;
  if (begin + width < time) out[width] = value(0.0f, begin + width);
}

void fill_input(float* rows, int64_t stride, const float* x, const Shape& shape, const Affine& norm, int64_t begin,
                int64_t width, int64_t time) {
  for (int64_t c = 0; c < shape.channels; ++c) {
    const float* p = x + c * shape.stride;
    if (norm.on) {
      float centre = norm.centre[c], factor = norm.factor[c], beta = norm.beta[c];
      fill(rows + c * stride, begin, width, time, [=](auto zero, int64_t t) {
        return positive((load<decltype(zero)>(p + t) - centre) * factor + beta);
      });
    } else {
      fill(rows + c * stride, begin, width, time, [=](auto zero, int64_t t) { return load<decltype(zero)>(p + t); });
    }
  }
}

// Three rows of an image that move down with the output row: the slots of rows m - 1, m, m + 1.
struct Ring {
  float* data;
  int64_t size, stride;
  float* row(int64_t m) const { return data + m % 3 * size; }
};

// Weights [kernel row][input][kernel column][output], cut into tiles of outputs that fit into registers.
struct Weights {
  std::vector<float> values;
  int64_t inputs, outputs, tiles;
  int64_t from(int64_t tile) const { return outputs * tile / tiles; }
  const float* tile(int64_t tile) const { return values.data() + 9 * inputs * from(tile); }

  template <class F>
  Weights(int64_t inputs, int64_t outputs, const F& value)
      : values(9 * inputs * outputs), inputs(inputs), outputs(outputs), tiles((outputs + kOutputs - 1) / kOutputs) {
    float* p = values.data();
    for (int64_t tile = 0; tile < tiles; ++tile)
      for (int64_t ky = 0; ky < 3; ++ky)
        for (int64_t i = 0; i < inputs; ++i)
          for (int64_t kx = 0; kx < 3; ++kx)
            for (int64_t o = from(tile); o < from(tile + 1); ++o) *p++ = value(ky, kx, i, o);
  }
};

// One row of T outputs: rows[ky] is the column before the strip of input row m - 1 + ky, or null outside the image.
template <int T>
void convolve_tile(const float* const* rows, int64_t inputs, int64_t stride, const float* weights, int64_t width, float* out,
                   int64_t out_stride) {
  for (int64_t t = 0; t < width; t += 2 * kLanes) {
    Vec a[T] = {}, b[T] = {};
    const float* w = weights;
    for (int ky = 0; ky < 3; ++ky) {
      if (!rows[ky]) {
        w += 3 * T * inputs;
        continue;
      }
      const float* x = rows[ky] + t;
      for (int64_t i = 0; i < inputs; ++i, x += stride) {
#pragma GCC unroll 3
        for (int kx = 0; kx < 3; ++kx, w += T) {
          Vec u = load<Vec>(x + kx), v = load<Vec>(x + kx + kLanes);
#pragma GCC unroll 16
          for (int o = 0; o < T; ++o) {
            a[o] += w[o] * u;
            b[o] += w[o] * v;
          }
        }
      }
    }
#pragma GCC unroll 16
    for (int o = 0; o < T; ++o) {
      store(out + o * out_stride + t, a[o]);
      store(out + o * out_stride + t + kLanes, b[o]);
    }
  }
}

// Add to sums[3][T] (vectors, still one sum per lane) the products of an input row at three shifts with T gradient rows.
template <int T>
void correlate_tile(const float* x, const float* g, int64_t stride, int64_t width, Vec* sums, int64_t outputs) {
  Vec a[T] = {}, b[T] = {}, c[T] = {};
  for (int64_t t = 0; t < width; t += kLanes) {
    Vec u = load<Vec>(x + t), v = load<Vec>(x + t + 1), w = load<Vec>(x + t + 2);
#pragma GCC unroll 16
    for (int o = 0; o < T; ++o) {
      Vec d = load<Vec>(g + o * stride + t);
      a[o] += u * d;
      b[o] += v * d;
      c[o] += w * d;
    }
  }
#pragma GCC unroll 16
  for (int o = 0; o < T; ++o) {
    sums[o] += a[o];
    sums[o + outputs] += b[o];
    sums[o + 2 * outputs] += c[o];
  }
}

template <int... T>
constexpr auto convolve_table(std::integer_sequence<int, T...>) { return std::array{convolve_tile<T + 1>...}; }
template <int... T>
constexpr auto correlate_table(std::integer_sequence<int, T...>) { return std::array{correlate_tile<T + 1>...}; }
constexpr auto kConvolve = convolve_table(std::make_integer_sequence<int, kOutputs>{});
constexpr auto kCorrelate = correlate_table(std::make_integer_sequence<int, kGradients>{});

// Row m of a convolution, [outputs][width], from a ring that holds rows m - 1 to m + 1 of an image of `mel` rows.
void convolve(const Ring& ring, int64_t m, int64_t mel, const Weights& weights, int64_t width, float* out, int64_t out_stride) {
  const float* rows[3];
  for (int64_t ky = 0; ky < 3; ++ky) {
    int64_t at = m - 1 + ky;
    rows[ky] = at >= 0 && at < mel ? ring.row(at) + kLead - 1 : nullptr;
  }
  for (int64_t tile = 0; tile < weights.tiles; ++tile) {
    int64_t from = weights.from(tile), outputs = weights.from(tile + 1) - from;
    kConvolve[outputs - 1](rows, weights.inputs, ring.stride, weights.tile(tile), width, out + from * out_stride, out_stride);
  }
}

// Mean and sum of squared deviations of so many values; Chan's formula joins two without losing digits to a large mean.
struct Moments {
  double count = 0, mean = 0, square = 0;
  void join(const Moments& other) {
    if (!other.count) return;
    double all = count + other.count, step = other.mean - mean;
    mean += step * (other.count / all);
    square += other.square + step * step * (count * other.count / all);
    count = all;
  }
};

Moments moments(const float* p, int64_t n) {
  if (n <= 0) return {};
  Vec total{};
  for (int64_t i = 0; i < n; i += kLanes) total += i + kLanes <= n ? load<Vec>(p + i) : head(load<Vec>(p + i), n - i);
  float middle = sum(total) / n;  // to float32's precision; the second pass corrects what it is off by
  Vec off{}, square{};
  for (int64_t i = 0; i < n; i += kLanes) {
    Vec d = load<Vec>(p + i) - middle;
    if (i + kLanes > n) d = head(d, n - i);
    off += d;
    square += d * d;
  }
  double left = sum(off);
  return {double(n), middle + left / n, sum(square) - left * left / n};
}

// The gradients of a normalisation's factor and beta: what the tasks have summed, [tasks, 2, channels], in the order of tasks.
void add_norms(const std::vector<double>& norms, int64_t channels, Result& gfactor, Result& gbeta) {
  for (int64_t c = 0; c < channels; ++c) {
    double scale = 0, shift = 0;
    for (size_t task = 0; task < norms.size(); task += 2 * channels) {
      scale += norms[task + c];
      shift += norms[task + channels + c];
    }
    gfactor->typed_data()[c] = scale;
    gbeta->typed_data()[c] = shift;
  }
}

// y, mean and variance of the convolution of the normalised x with kernel [3, 3, inputs, outputs].
ffi::Error Forward(ffi::ThreadPool pool, Array x, Array centre, Array factor, Array beta, Array kernel, Result y, Result mean,
                   Result variance, int64_t time, bool affine) {
  Shape in(x.dimensions()), out(y->dimensions());
  Affine norm{centre.typed_data(), factor.typed_data(), beta.typed_data(), affine};
  const float* k = kernel.typed_data();
  Weights weights(in.channels, out.channels, [&](int64_t ky, int64_t kx, int64_t i, int64_t o) {
    return k[((kx * 3 + ky) * in.channels + i) * out.channels + o];  // [time, mel, input, output]
  });
  Strips strips(time);
  int64_t tasks = in.batch * strips.count, channels = out.channels;
  std::vector<Moments> partial(tasks * channels);
  huge(y);
  parallel(pool, tasks, [&](int64_t task) {
    int64_t b = task / strips.count, begin = strips.begin(task % strips.count), width = strips.size(task % strips.count);
    int64_t stride = width + 2 * kLead;
    Ring ring{scratch(3 * in.channels * stride), in.channels * stride, stride};
    auto fetch = [&](int64_t m) {
      if (m < in.mel) fill_input(ring.row(m), stride, x.typed_data() + in.at(b, m), in, norm, begin, width, time);
    };
    fetch(0);
    for (int64_t m = 0; m < in.mel; ++m) {
      fetch(m + 1);
      float* rows = y->typed_data() + out.at(b, m) + begin;
      convolve(ring, m, in.mel, weights, width, rows, out.stride);
      for (int64_t c = 0; c < channels; ++c)
        partial[task * channels + c].join(moments(rows + c * out.stride, std::min(width, time - begin)));
    }
  });
  for (int64_t c = 0; c < channels; ++c) {
    Moments all;
    for (int64_t task = 0; task < tasks; ++task) all.join(partial[task * channels + c]);
    mean->typed_data()[c] = all.mean;
    variance->typed_data()[c] = all.count ? all.square / all.count : 0;
  }
  return ffi::Error::Success();
}

// Gradients of Forward. What is asked for: 1 the kernel's, 2 the input's and its BatchNorm's, 3 both.
ffi::Error Backward(ffi::ThreadPool pool, Array x, Array centre, Array factor, Array beta, Array kernel, Array y, Array mean,
                    Array gy, Array gmean, Array gvariance, Result gx, Result gfactor, Result gbeta, Result gkernel,
                    int64_t time, bool affine, int64_t parts) {
  Shape in(x.dimensions()), out(y.dimensions());
  Affine norm{centre.typed_data(), factor.typed_data(), beta.typed_data(), affine};
  bool of_kernel = parts & 1, of_input = parts & 2;
  const float* k = kernel.typed_data();
  // the transposed convolution: turned around in both directions, inputs and outputs exchanged
  Weights weights(out.channels, in.channels, [&](int64_t ky, int64_t kx, int64_t o, int64_t i) {
    return k[(((2 - kx) * 3 + 2 - ky) * in.channels + i) * out.channels + o];
  });
  Strips strips(time);
  int64_t tasks = in.batch * strips.count, taps = 9 * in.channels * out.channels;
  int64_t tiles = (out.channels + kGradients - 1) / kGradients;
  double count = double(in.batch) * in.mel * time;
  std::vector<float> constant(out.channels), slope(out.channels);
  for (int64_t c = 0; c < out.channels; ++c) {
    constant[c] = gmean.typed_data()[c] / count;
    slope[c] = 2 * gvariance.typed_data()[c] / count;
  }
  std::vector<double> norms(tasks * 2 * in.channels);
  std::vector<float> kernels(of_kernel ? tasks * taps : 0);
  if (of_input) huge(gx);
  parallel(pool, tasks, [&](int64_t task) {
    int64_t b = task / strips.count, begin = strips.begin(task % strips.count), width = strips.size(task % strips.count);
    int64_t stride = width + 2 * kLead;
    float* memory = scratch(3 * (in.channels + out.channels) * stride + (of_kernel ? taps * kLanes : 0));
    Ring inputs{memory, in.channels * stride, stride};
    Ring gradients{memory + 3 * in.channels * stride, out.channels * stride, stride};
    Vec* sums = reinterpret_cast<Vec*>(memory + 3 * (in.channels + out.channels) * stride);
    if (of_kernel) std::fill(sums, sums + taps, Vec{});
    auto fetch = [&](int64_t m) {
      if (m >= in.mel) return;
      fill_input(inputs.row(m), stride, x.typed_data() + in.at(b, m), in, norm, begin, width, time);
      for (int64_t c = 0; c < out.channels; ++c) {
        const float* value = y.typed_data() + out.at(b, m) + c * out.stride;
        const float* g = gy.typed_data() + out.at(b, m) + c * out.stride;
        float middle = mean.typed_data()[c], shift = constant[c], scale = slope[c];
        fill(gradients.row(m) + c * stride, begin, width, time, [=](auto zero, int64_t t) {
          using V = decltype(zero);
          return load<V>(g + t) + shift + scale * (load<V>(value + t) - middle);
        });
      }
    };
    fetch(0);
    for (int64_t m = 0; m < in.mel; ++m) {
      fetch(m + 1);
      for (int64_t ky = 0; of_kernel && ky < 3; ++ky) {
        int64_t at = m - 1 + ky;
        if (at < 0 || at >= in.mel) continue;
        for (int64_t tile = 0; tile < tiles; ++tile) {
          int64_t from = out.channels * tile / tiles, size = out.channels * (tile + 1) / tiles - from;
          const float* g = gradients.row(m) + from * stride + kLead;
          for (int64_t i = 0; i < in.channels; ++i)
            kCorrelate[size - 1](inputs.row(at) + i * stride + kLead - 1, g, stride, width,
                                 sums + (ky * in.channels + i) * 3 * out.channels + from, out.channels);
        }
      }
      if (!of_input) continue;
      float* rows = gx->typed_data() + in.at(b, m) + begin;
      convolve(gradients, m, in.mel, weights, width, rows, in.stride);
      for (int64_t i = 0; affine && i < in.channels; ++i) {
        const float* value = x.typed_data() + in.at(b, m) + i * in.stride + begin;
        const float* normal = inputs.row(m) + i * stride + kLead;
        float* g = rows + i * in.stride;
        float middle = norm.centre[i], scale = norm.factor[i];
        Vec total{}, product{};
        for (int64_t t = 0; t < width; t += kLanes) {
          // zero in the padding too, where the normalised input is
          Vec passed = load<Vec>(normal + t) > Vec{} ? load<Vec>(g + t) : Vec{};
          Vec off = load<Vec>(value + t) - middle;
          total += passed;
          product += passed * off;
          store(g + t, passed * scale);
        }
        norms[(task * 2 + 0) * in.channels + i] += sum(product);
        norms[(task * 2 + 1) * in.channels + i] += sum(total);
      }
    }
    for (int64_t n = 0; of_kernel && n < taps; ++n) kernels[task * taps + n] = sum(sums[n]);
  });
  add_norms(norms, in.channels, gfactor, gbeta);
  for (int64_t ky = 0; of_kernel && ky < 3; ++ky)
    for (int64_t i = 0; i < in.channels; ++i)
      for (int64_t kx = 0; kx < 3; ++kx)
        for (int64_t o = 0; o < out.channels; ++o) {
          double total = 0;
          for (int64_t task = 0; task < tasks; ++task)
            total += kernels[task * taps + ((ky * in.channels + i) * 3 + kx) * out.channels + o];
          gkernel->typed_data()[((kx * 3 + ky) * in.channels + i) * out.channels + o] = total;
        }
  return ffi::Error::Success();
}

constexpr uint8_t kNone = 9;  // no positive value in the window: the ReLU lets no gradient through

// Normalise, ReLU, and the maximum of 3x3 windows with stride 2 and padding 1. The code of a window's first maximum in (time,
// mel) order, 3 * column + row, is where PyTorch's gradient goes.
ffi::Error Pool(ffi::ThreadPool pool, Array x, Array centre, Array factor, Array beta, Result out, ffi::Result<Codes> codes,
                int64_t time) {
  Shape in(x.dimensions()), half(out->dimensions());
  int64_t size = (time + 1) / 2, room = round_up(size, kStep) + kStep;
  huge(out);
  parallel(pool, in.batch * half.mel, [&](int64_t task) {
    int64_t b = task / half.mel, j = task % half.mel;
    float* memory = scratch(6 * room);
    for (int64_t c = 0; c < in.channels; ++c) {
      float middle = centre.typed_data()[c], scale = factor.typed_data()[c], shift = beta.typed_data()[c];
      const float* columns[9];
      for (int64_t r = 0; r < 3; ++r) {
        int64_t m = 2 * j - 1 + r;
        float *even = memory + 2 * r * room, *odd = even + room;  // odd[k] is column 2 k - 1, the one before even[k]
        if (m < 0 || m >= in.mel) {
          std::fill(even, even + 2 * room, 0.0f);
        } else {
          const float* p = x.typed_data() + in.at(b, m) + c * in.stride;
          for (int64_t n = 0; n < time / 2; ++n) {
            even[n] = (p[2 * n] - middle) * scale + shift;
            odd[n + 1] = (p[2 * n + 1] - middle) * scale + shift;
          }
          odd[0] = 0;  // zeros never win: a maximum must be above zero
          if (time % 2) {
            even[size - 1] = (p[time - 1] - middle) * scale + shift;
            odd[size] = 0;
          }
        }
        columns[r] = odd, columns[3 + r] = even, columns[6 + r] = odd + 1;
      }
      float* best = out->typed_data() + half.at(b, j) + c * half.stride;
      uint8_t* code = codes->typed_data() + half.at(b, j) + c * half.stride;
      for (int64_t n = 0; n < size; n += kLanes) {
        Vec most{};
        auto which = most < most;  // integers as wide as the floats
        which = which - which + kNone;
        for (int i = 0; i < 9; ++i) {
          Vec v = load<Vec>(columns[i] + n);
          auto kept = v <= most;  // NaN is not, so it wins and stays visible
          most = kept ? most : v;
          which = kept ? which : which - which + i;
        }
        store(best + n, most);
        for (int l = 0; l < kLanes; ++l) code[n + l] = which[l];
      }
    }
  });
  return ffi::Error::Success();
}

ffi::Error PoolBackward(ffi::ThreadPool pool, Array x, Array centre, Array factor, Codes codes, Array gout, Result gx,
                        Result gfactor, Result gbeta, int64_t time) {
  Shape in(x.dimensions()), half(gout.dimensions());
  int64_t size = (time + 1) / 2, tasks = in.batch * in.mel;
  std::vector<double> norms(tasks * 2 * in.channels);
  huge(gx);
  parallel(pool, tasks, [&](int64_t task) {
    int64_t b = task / in.mel, m = task % in.mel;
    float *even = scratch(2 * round_up(size + 1, kStep)), *odd = even + round_up(size + 1, kStep);
    for (int64_t c = 0; c < in.channels; ++c) {
      std::fill(even, even + size, 0.0f);
      std::fill(odd, odd + size, 0.0f);
      // the windows that see row m: one for even rows, two for odd ones
      for (int64_t j = m / 2; j <= (m + 1) / 2 && j < half.mel; ++j) {
        const float* g = gout.typed_data() + half.at(b, j) + c * half.stride;
        const uint8_t* code = codes.typed_data() + half.at(b, j) + c * half.stride;
        uint8_t row = m - (2 * j - 1), before = row, at = row + 3, after = row + 6;
        for (int64_t n = 0; n < size; ++n) even[n] += code[n] == at ? g[n] : 0.0f;
        for (int64_t n = 0; n < size; ++n) odd[n] += code[n] == after ? g[n] : 0.0f;
        for (int64_t n = 1; n < size; ++n) odd[n - 1] += code[n] == before ? g[n] : 0.0f;
      }
      const float* p = x.typed_data() + in.at(b, m) + c * in.stride;
      float* out = gx->typed_data() + in.at(b, m) + c * in.stride;
      for (int64_t n = 0; n < size; ++n) {
        out[2 * n] = even[n];
        out[2 * n + 1] = odd[n];
      }
      float middle = centre.typed_data()[c], scale = factor.typed_data()[c];
      Vec total{}, product{};
      for (int64_t t = 0; t < time; t += kLanes) {
        Vec g = load<Vec>(out + t), off = load<Vec>(p + t) - middle;
        if (t + kLanes > time) g = head(g, time - t), off = head(off, time - t);
        total += g;
        product += g * off;
        store(out + t, g * scale);
      }
      norms[(task * 2 + 0) * in.channels + c] = sum(product);
      norms[(task * 2 + 1) * in.channels + c] = sum(total);
    }
  });
  add_norms(norms, in.channels, gfactor, gbeta);
  return ffi::Error::Success();
}

constexpr int64_t kBlock = 32;  // columns that are turned at once

// Normalise, ReLU, and turn around: [batch, mel, channels, stride] to [batch, time, mel, channels].
ffi::Error Finish(ffi::ThreadPool pool, Array x, Array centre, Array factor, Array beta, Result out, int64_t time) {
  Shape in(x.dimensions());
  int64_t blocks = (time + kBlock - 1) / kBlock, width = in.mel * in.channels;
  huge(out);
  parallel(pool, in.batch * blocks, [&](int64_t task) {
    int64_t b = task / blocks, begin = task % blocks * kBlock, n = std::min(kBlock, time - begin);
    for (int64_t row = 0; row < width; ++row) {
      int64_t c = row % in.channels;
      float middle = centre.typed_data()[c], scale = factor.typed_data()[c], shift = beta.typed_data()[c];
      const float* p = x.typed_data() + in.at(b, 0) + row * in.stride + begin;
      float* q = out->typed_data() + (b * time + begin) * width + row;
      for (int64_t t = 0; t < n; ++t) q[t * width] = positive((p[t] - middle) * scale + shift);
    }
  });
  return ffi::Error::Success();
}

ffi::Error FinishBackward(ffi::ThreadPool pool, Array x, Array centre, Array factor, Array beta, Array gout, Result gx,
                          Result gfactor, Result gbeta, int64_t time) {
  Shape in(x.dimensions());
  int64_t blocks = (time + kBlock - 1) / kBlock, width = in.mel * in.channels, tasks = in.batch * blocks;
  std::vector<double> norms(tasks * 2 * in.channels);
  huge(gx);
  parallel(pool, tasks, [&](int64_t task) {
    int64_t b = task / blocks, begin = task % blocks * kBlock, n = std::min(kBlock, time - begin);
    for (int64_t row = 0; row < width; ++row) {
      int64_t c = row % in.channels;
      float middle = centre.typed_data()[c], scale = factor.typed_data()[c], shift = beta.typed_data()[c];
      const float* p = x.typed_data() + in.at(b, 0) + row * in.stride + begin;
      const float* g = gout.typed_data() + (b * time + begin) * width + row;
      float* q = gx->typed_data() + in.at(b, 0) + row * in.stride + begin;
      float turned[kBlock] = {};
      for (int64_t t = 0; t < n; ++t) turned[t] = g[t * width];
      Vec total{}, product{};
      for (int64_t t = 0; t < n; t += kLanes) {
        Vec off = load<Vec>(p + t) - middle;
        Vec passed = off * scale + shift > Vec{} ? load<Vec>(turned + t) : Vec{};
        total += passed;
        product += passed * off;
        store(q + t, passed * scale);
      }
      norms[(task * 2 + 0) * in.channels + c] += sum(product);
      norms[(task * 2 + 1) * in.channels + c] += sum(total);
    }
  });
  add_norms(norms, in.channels, gfactor, gbeta);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(w2s_forward, Forward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()  // x
                                  .Arg<Array>()  // centre
                                  .Arg<Array>()  // factor
                                  .Arg<Array>()  // beta
                                  .Arg<Array>()  // kernel
                                  .Ret<Array>()  // y
                                  .Ret<Array>()  // mean
                                  .Ret<Array>()  // variance
                                  .Attr<int64_t>("time")
                                  .Attr<bool>("affine"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(w2s_backward, Backward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()  // x
                                  .Arg<Array>()  // centre
                                  .Arg<Array>()  // factor
                                  .Arg<Array>()  // beta
                                  .Arg<Array>()  // kernel
                                  .Arg<Array>()  // y
                                  .Arg<Array>()  // mean
                                  .Arg<Array>()  // gradient of y
                                  .Arg<Array>()  // of mean
                                  .Arg<Array>()  // of variance
                                  .Ret<Array>()  // of x
                                  .Ret<Array>()  // of factor
                                  .Ret<Array>()  // of beta
                                  .Ret<Array>()  // of kernel
                                  .Attr<int64_t>("time")
                                  .Attr<bool>("affine")
                                  .Attr<int64_t>("parts"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(w2s_pool, Pool,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()  // x
                                  .Arg<Array>()  // centre
                                  .Arg<Array>()  // factor
                                  .Arg<Array>()  // beta
                                  .Ret<Array>()  // pooled
                                  .Ret<Codes>()  // where the maximum is
                                  .Attr<int64_t>("time"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(w2s_pool_backward, PoolBackward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()  // x
                                  .Arg<Array>()  // centre
                                  .Arg<Array>()  // factor
                                  .Arg<Codes>()  // where the maximum is
                                  .Arg<Array>()  // gradient of pooled
                                  .Ret<Array>()  // of x
                                  .Ret<Array>()  // of factor
                                  .Ret<Array>()  // of beta
                                  .Attr<int64_t>("time"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(w2s_finish, Finish,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()  // x
                                  .Arg<Array>()  // centre
                                  .Arg<Array>()  // factor
                                  .Arg<Array>()  // beta
                                  .Ret<Array>()  // features
                                  .Attr<int64_t>("time"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(w2s_finish_backward, FinishBackward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()  // x
                                  .Arg<Array>()  // centre
                                  .Arg<Array>()  // factor
                                  .Arg<Array>()  // beta
                                  .Arg<Array>()  // gradient of features
                                  .Ret<Array>()  // of x
                                  .Ret<Array>()  // of factor
                                  .Ret<Array>()  // of beta
                                  .Attr<int64_t>("time"));
