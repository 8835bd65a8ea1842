#include "masked_attention/masked_attention.h"

#include "common/simd.h"
#include "common/small_gemm.h"

namespace maskdm::MASKDM_ISA {
namespace {

constexpr int64_t kRowBlock = 96;  // queries at once: with 417 keys a block of S is 160 KiB, inside any level-2 cache

// Hands out pieces of the scratch, each on a 64-byte boundary.
class Arena {
 public:
  explicit Arena(char* memory) : memory_(memory) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = memory_ != nullptr ? reinterpret_cast<T*>(memory_ + used_) : nullptr;  // null: only the size is wanted
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

// Where the forward and the backward pass keep one (image, head). S is held transposed, keys down and queries across: a
// vector then holds one key of several queries, and maxima and sums over the keys need no step across lanes.
template <class Acc>
struct Workspace {
  int64_t padded, width;  // longest and head_dim, rounded up to whole vectors
  Acc *q, *q_t;           // [padded, width] and [width, padded], times scale
  Acc *k, *v;             // [longest, width]
  Acc* p_t;               // a block of S^T, then of P^T [longest, kRowBlock]
  Acc* out_rows;          // a block of o, or of grad_q [kRowBlock, width]
  // backward only
  Acc *grad_o, *grad_o_t;  // as q
  Acc* grad_s_t;           // as p_t
  Acc *grad_k, *grad_v;    // as k
  int64_t bytes;

  Workspace(const AttentionArgs& a, bool backward, char* scratch)
      : padded(round_up_to_lanes<Acc>(a.longest)), width(round_up_to_lanes<Acc>(a.head_dim)) {
    Arena arena(scratch);
    const int64_t block = padded < kRowBlock ? padded : kRowBlock;
    q = arena.take<Acc>(padded * width);
    q_t = arena.take<Acc>(padded * width);
    k = arena.take<Acc>(a.longest * width);
    v = arena.take<Acc>(a.longest * width);
    p_t = arena.take<Acc>(a.longest * block);
    out_rows = arena.take<Acc>(block * width);
    if (backward) {
      grad_o = arena.take<Acc>(padded * width);
      grad_o_t = arena.take<Acc>(padded * width);
      grad_s_t = arena.take<Acc>(a.longest * block);
      grad_k = arena.take<Acc>(a.longest * width);
      grad_v = arena.take<Acc>(a.longest * width);
    }
    bytes = arena.used();
  }
};

template <class T>
const T* row_of(const AttentionArgs& a, const HeadsView& view, int64_t image, int64_t token, int64_t head) {
  const int64_t offset = a.segments.cu_seqlens != nullptr ? (segment_begin(a.segments, image) + token) * view.token
                                                          : image * view.image + token * view.token;
  return reinterpret_cast<const T*>(view.data) + offset + head * view.head;
}

// to[i] = from[i] factor for i < n, and 0 up to width.
template <class From, class To, class Acc>
MASKDM_INLINE void scale_row(const From* from, To* to, int64_t n, int64_t width, Acc factor) {
  int64_t i = 0;
  if constexpr (std::is_same_v<From, Acc> && std::is_same_v<To, Acc>) {
    for (; i + kLanes<Acc> <= n; i += kLanes<Acc>) store(to + i, load(from + i) * factor);
  }
  for (; i < n; ++i) from_acc(static_cast<Acc>(to_acc(from[i])) * factor, to[i]);
  for (; i < width; ++i) from_acc(Acc(0), to[i]);
}

// [L, E] of one head, times factor, into rows of `width`; the padding, down to `rows` too, is zeroed.
template <class T, class Acc>
void read_rows(const AttentionArgs& a, const HeadsView& view, int64_t image, int64_t head, int64_t length, Acc factor,
               Acc* to, int64_t width, int64_t rows) {
  for (int64_t t = 0; t < length; ++t, to += width) {
    const T* from = row_of<T>(a, view, image, t, head);
    // The same row of the next head, which is the next item: rows of one head lie too far apart for the hardware to guess.
    for (int64_t e = 0; e < a.head_dim; e += 64 / sizeof(T)) __builtin_prefetch(from + view.head + e);
    scale_row(from, to, a.head_dim, width, factor);
  }
  for (int64_t i = 0; i < (rows - length) * width; ++i) to[i] = 0;
}

template <class T>
void forward_item(const AttentionArgs& a, const Workspace<accumulate_t<T>>& w, int64_t image, int64_t head) {
  using Acc = accumulate_t<T>;
  constexpr int kStep = kLanes<Acc>;
  const int64_t first = segment_begin(a.segments, image);
  const int64_t length = segment_begin(a.segments, image + 1) - first;
  const int64_t padded = round_up_to_lanes<Acc>(length), width = w.width;
  read_rows<T>(a, a.q, image, head, length, static_cast<Acc>(a.scale), w.q, width, padded);
  transpose(w.q, width, padded, width, w.q_t, padded);
  read_rows<T>(a, a.k, image, head, length, Acc(1), w.k, width, length);
  read_rows<T>(a, a.v, image, head, length, Acc(1), w.v, width, length);
  for (int64_t row = 0; row < length; row += kRowBlock) {
    const int64_t rows = length - row < kRowBlock ? length - row : kRowBlock;
    const int64_t columns = round_up_to_lanes<Acc>(rows);
    gemm<Acc, false>(length, columns, a.head_dim, {w.k, width, 1}, w.q_t + row, padded, w.p_t, columns);
    alignas(64) Acc largest[kRowBlock], sum[kRowBlock];
    for (int64_t c = 0; c < columns; c += kStep) {
      Acc* column = w.p_t + c;
      vector_t<Acc> best = load(column);
      for (int64_t j = 1; j < length; ++j) best = maximum(best, load(column + j * columns));
      vector_t<Acc> total{};
      for (int64_t j = 0; j < length; ++j) {
        const vector_t<Acc> p = exp_of(load(column + j * columns) - best);
        store(column + j * columns, p);
        total += p;
      }
      store(largest + c, best);
      store(sum + c, total);
    }
    gemm<Acc, false>(rows, width, length, {w.p_t, 1, columns}, w.v, width, w.out_rows, width);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = (first + row + i) * a.num_heads + head;
      reinterpret_cast<Acc*>(a.lse)[at] = largest[i] + std::log(sum[i]);
      T* out = reinterpret_cast<T*>(a.o) + at * a.head_dim;
      scale_row(w.out_rows + i * width, out, a.head_dim, a.head_dim, Acc(1) / sum[i]);
    }
  }
}

template <class T, class Acc>
void write_grad(const AttentionArgs& a, int which, int64_t first, int64_t head, int64_t rows, const Acc* from,
                int64_t width, Acc factor) {
  const int64_t stride = 3 * a.num_heads * a.head_dim;
  T* out = reinterpret_cast<T*>(a.grad_qkv) + first * stride + (which * a.num_heads + head) * a.head_dim;
  for (int64_t i = 0; i < rows; ++i) scale_row(from + i * width, out + i * stride, a.head_dim, a.head_dim, factor);
}

template <class T>
void backward_item(const AttentionArgs& a, const Workspace<accumulate_t<T>>& w, int64_t image, int64_t head) {
  using Acc = accumulate_t<T>;
  constexpr int kStep = kLanes<Acc>;
  const int64_t first = segment_begin(a.segments, image);
  const int64_t length = segment_begin(a.segments, image + 1) - first;
  const int64_t padded = round_up_to_lanes<Acc>(length), width = w.width;
  const Acc scale = static_cast<Acc>(a.scale);
  read_rows<T>(a, a.q, image, head, length, scale, w.q, width, padded);  // scaled: S and grad_k both take scale q
  transpose(w.q, width, padded, width, w.q_t, padded);
  read_rows<T>(a, a.grad_o, image, head, length, Acc(1), w.grad_o, width, padded);
  transpose(w.grad_o, width, padded, width, w.grad_o_t, padded);
  read_rows<T>(a, a.k, image, head, length, Acc(1), w.k, width, length);
  read_rows<T>(a, a.v, image, head, length, Acc(1), w.v, width, length);
  for (int64_t row = 0; row < length; row += kRowBlock) {
    const int64_t rows = length - row < kRowBlock ? length - row : kRowBlock;
    const int64_t columns = round_up_to_lanes<Acc>(rows);
    const Acc* q = w.q + row * width;
    const Acc* grad_o = w.grad_o + row * width;
    alignas(64) Acc lse[kRowBlock];
    for (int64_t i = 0; i < rows; ++i) {
      lse[i] = reinterpret_cast<const Acc*>(a.lse)[(first + row + i) * a.num_heads + head];
    }
    for (int64_t i = rows; i < columns; ++i) lse[i] = 0;
    gemm<Acc, false>(length, columns, a.head_dim, {w.k, width, 1}, w.q_t + row, padded, w.p_t, columns);
    gemm<Acc, false>(length, columns, a.head_dim, {w.v, width, 1}, w.grad_o_t + row, padded, w.grad_s_t, columns);
    for (int64_t c = 0; c < columns; c += kStep) {
      Acc* p_column = w.p_t + c;
      Acc* grad_column = w.grad_s_t + c;
      const vector_t<Acc> shift = load(lse + c);
      vector_t<Acc> delta{};
      for (int64_t j = 0; j < length; ++j) {
        const vector_t<Acc> p = exp_of(load(p_column + j * columns) - shift);
        store(p_column + j * columns, p);
        delta += p * load(grad_column + j * columns);
      }
      for (int64_t j = 0; j < length; ++j) {
        const vector_t<Acc> grad_p = load(grad_column + j * columns);
        store(grad_column + j * columns, load(p_column + j * columns) * (grad_p - delta));
      }
    }
    if (row == 0) {
      gemm<Acc, false>(length, width, rows, {w.p_t, columns, 1}, grad_o, width, w.grad_v, width);
      gemm<Acc, false>(length, width, rows, {w.grad_s_t, columns, 1}, q, width, w.grad_k, width);
    } else {
      gemm<Acc, true>(length, width, rows, {w.p_t, columns, 1}, grad_o, width, w.grad_v, width);
      gemm<Acc, true>(length, width, rows, {w.grad_s_t, columns, 1}, q, width, w.grad_k, width);
    }
    gemm<Acc, false>(rows, width, length, {w.grad_s_t, 1, columns}, w.k, width, w.out_rows, width);
    write_grad<T>(a, 0, first + row, head, rows, w.out_rows, width, scale);
  }
  write_grad<T>(a, 1, first, head, length, w.grad_k, width, Acc(1));
  write_grad<T>(a, 2, first, head, length, w.grad_v, width, Acc(1));
}

template <bool Backward>
int64_t scratch_bytes(const AttentionArgs& a) {
  int64_t bytes = 0;
  dispatch_floating(a.dtype, [&](auto* type) {
    using Acc = accumulate_t<std::remove_pointer_t<decltype(type)>>;
    bytes = Workspace<Acc>(a, Backward, nullptr).bytes;
  });
  return bytes;
}

// Items [begin, end) of all (image, head), heads of one image side by side.
template <bool Backward>
void run(const AttentionArgs& a, char* scratch, int64_t begin, int64_t end) {
  dispatch_floating(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Workspace<accumulate_t<T>> workspace(a, Backward, scratch);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t image = item / a.num_heads, head = item % a.num_heads;
      if constexpr (Backward) {
        backward_item<T>(a, workspace, image, head);
      } else {
        forward_item<T>(a, workspace, image, head);
      }
    }
  });
}

}  // namespace

const MaskedAttentionKernels masked_attention_kernels = {scratch_bytes<false>, run<false>, scratch_bytes<true>,
                                                         run<true>};

}  // namespace maskdm::MASKDM_ISA
