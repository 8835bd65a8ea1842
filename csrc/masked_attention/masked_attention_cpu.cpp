#include "masked_attention/masked_attention.h"

#include "common/simd.h"
#include "common/small_gemm.h"

namespace maskdm::MASKDM_ISA {
namespace {

constexpr int64_t kRowBlock = 96;  // rows of S at once: with 417 keys one block is 160 KiB, inside any level-2 cache

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

// Where the forward and the backward pass keep one (image, head).
template <class Acc>
struct Workspace {
  int64_t keys, width;  // longest and head_dim, rounded up to whole vectors
  Acc *k_t, *q;         // k^T [E, keys], q [L, width]
  Acc* s;               // a block of S, then of P [kRowBlock, keys]
  Acc* out_rows;        // a block of o, or of grad_q [kRowBlock, width]
  Acc* v;               // forward: [L, width]
  // backward: v^T [E, keys], a block of grad_s [kRowBlock, keys], the others [L, width]
  Acc *v_t, *k, *grad_o, *grad_s, *grad_k, *grad_v;
  int64_t bytes;

  Workspace(const AttentionArgs& a, bool backward, char* scratch)
      : keys(round_up_to_lanes<Acc>(a.longest)), width(round_up_to_lanes<Acc>(a.head_dim)) {
    Arena arena(scratch);
    const int64_t block = (a.longest < kRowBlock ? a.longest : kRowBlock);
    k_t = arena.take<Acc>(a.head_dim * keys);
    q = arena.take<Acc>(a.longest * width);
    s = arena.take<Acc>(block * keys);
    out_rows = arena.take<Acc>(block * width);
    if (!backward) {
      v = arena.take<Acc>(a.longest * width);
    } else {
      v_t = arena.take<Acc>(a.head_dim * keys);
      k = arena.take<Acc>(a.longest * width);
      grad_o = arena.take<Acc>(a.longest * width);
      grad_s = arena.take<Acc>(block * keys);
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

// [L, E] of one head, times factor, into rows of `width` with the padding zeroed.
template <class T, class Acc>
void read_rows(const AttentionArgs& a, const HeadsView& view, int64_t image, int64_t head, int64_t length, Acc factor,
               Acc* to, int64_t width) {
  for (int64_t t = 0; t < length; ++t, to += width) {
    const T* from = row_of<T>(a, view, image, t, head);
    for (int64_t e = 0; e < a.head_dim; ++e) to[e] = static_cast<Acc>(to_acc(from[e])) * factor;
    for (int64_t e = a.head_dim; e < width; ++e) to[e] = 0;
  }
}

// [E, L] of one head, in rows of `keys` with the padding zeroed.
template <class T, class Acc>
void read_transposed(const AttentionArgs& a, const HeadsView& view, int64_t image, int64_t head, int64_t length,
                     Acc* to, int64_t keys) {
  for (int64_t t = 0; t < length; ++t) {
    const T* from = row_of<T>(a, view, image, t, head);
    for (int64_t e = 0; e < a.head_dim; ++e) to[e * keys + t] = static_cast<Acc>(to_acc(from[e]));
  }
  for (int64_t e = 0; e < a.head_dim; ++e) {
    for (int64_t t = length; t < keys; ++t) to[e * keys + t] = 0;
  }
}

// exp(s_j - shift) for j < length, zero in the padding; returns the sum.
template <class Acc>
Acc exponentials(Acc* s, int64_t length, int64_t keys, Acc shift) {
  vector_t<Acc> total{};
  int64_t j = 0;
  for (; j + kLanes<Acc> <= length; j += kLanes<Acc>) {
    const vector_t<Acc> p = exp_of(load(s + j) - shift);
    store(s + j, p);
    total += p;
  }
  Acc sum = sum_of<Acc>(total);
  if (j < length) {
    store(s + j, exp_of(load(s + j) - shift));
    for (int64_t i = j; i < length; ++i) sum += s[i];
    for (int64_t i = length; i < keys; ++i) s[i] = 0;
  }
  return sum;
}

template <class Acc>
Acc largest(const Acc* s, int64_t length) {
  Acc best = s[0];
  int64_t j = 0;
  if (length >= kLanes<Acc>) {
    vector_t<Acc> v = load(s);
    for (j = kLanes<Acc>; j + kLanes<Acc> <= length; j += kLanes<Acc>) v = maximum(v, load(s + j));
    best = max_of<Acc>(v);
  }
  for (; j < length; ++j) best = s[j] > best ? s[j] : best;
  return best;
}

template <class T>
void forward_item(const AttentionArgs& a, const Workspace<accumulate_t<T>>& w, int64_t image, int64_t head) {
  using Acc = accumulate_t<T>;
  const int64_t first = segment_begin(a.segments, image);
  const int64_t length = segment_begin(a.segments, image + 1) - first;
  const int64_t keys = round_up_to_lanes<Acc>(length), width = w.width;
  read_rows<T>(a, a.q, image, head, length, static_cast<Acc>(a.scale), w.q, width);
  read_transposed<T>(a, a.k, image, head, length, w.k_t, keys);
  read_rows<T>(a, a.v, image, head, length, Acc(1), w.v, width);
  for (int64_t row = 0; row < length; row += kRowBlock) {
    const int64_t rows = length - row < kRowBlock ? length - row : kRowBlock;
    gemm<Acc, false>(rows, keys, a.head_dim, {w.q + row * width, width, 1}, w.k_t, keys, w.s, keys);
    Acc inverse[kRowBlock];
    for (int64_t i = 0; i < rows; ++i) {
      Acc* s = w.s + i * keys;
      const Acc shift = largest(s, length);
      const Acc sum = exponentials(s, length, keys, shift);
      inverse[i] = Acc(1) / sum;
      reinterpret_cast<Acc*>(a.lse)[(first + row + i) * a.num_heads + head] = shift + std::log(sum);
    }
    gemm<Acc, false>(rows, width, length, {w.s, keys, 1}, w.v, width, w.out_rows, width);
    for (int64_t i = 0; i < rows; ++i) {
      T* out = reinterpret_cast<T*>(a.o) + ((first + row + i) * a.num_heads + head) * a.head_dim;
      for (int64_t e = 0; e < a.head_dim; ++e) from_acc(w.out_rows[i * width + e] * inverse[i], out[e]);
    }
  }
}

template <class T, class Acc>
void write_grad(const AttentionArgs& a, int which, int64_t first, int64_t head, int64_t rows, const Acc* from,
                int64_t width) {
  const int64_t stride = 3 * a.num_heads * a.head_dim;
  T* out = reinterpret_cast<T*>(a.grad_qkv) + first * stride + (which * a.num_heads + head) * a.head_dim;
  for (int64_t i = 0; i < rows; ++i) convert_row(from + i * width, out + i * stride, a.head_dim);
}

template <class T>
void backward_item(const AttentionArgs& a, const Workspace<accumulate_t<T>>& w, int64_t image, int64_t head) {
  using Acc = accumulate_t<T>;
  const int64_t first = segment_begin(a.segments, image);
  const int64_t length = segment_begin(a.segments, image + 1) - first;
  const int64_t keys = round_up_to_lanes<Acc>(length), width = w.width;
  const Acc scale = static_cast<Acc>(a.scale);
  read_rows<T>(a, a.q, image, head, length, scale, w.q, width);  // scaled: S and grad_k both take scale q
  read_rows<T>(a, a.k, image, head, length, scale, w.k, width);  // scaled: grad_q takes scale k
  read_transposed<T>(a, a.k, image, head, length, w.k_t, keys);
  read_transposed<T>(a, a.v, image, head, length, w.v_t, keys);
  read_rows<T>(a, a.grad_o, image, head, length, Acc(1), w.grad_o, width);
  for (int64_t row = 0; row < length; row += kRowBlock) {
    const int64_t rows = length - row < kRowBlock ? length - row : kRowBlock;
    const Acc* q = w.q + row * width;
    const Acc* grad_o = w.grad_o + row * width;
    gemm<Acc, false>(rows, keys, a.head_dim, {q, width, 1}, w.k_t, keys, w.s, keys);
    gemm<Acc, false>(rows, keys, a.head_dim, {grad_o, width, 1}, w.v_t, keys, w.grad_s, keys);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = (first + row + i) * a.num_heads + head;
      const T* o = reinterpret_cast<const T*>(a.o) + at * a.head_dim;
      Acc delta = 0;
      for (int64_t e = 0; e < a.head_dim; ++e) delta += grad_o[i * width + e] * static_cast<Acc>(to_acc(o[e]));
      Acc* p = w.s + i * keys;
      Acc* grad_s = w.grad_s + i * keys;
      exponentials(p, length, keys, reinterpret_cast<const Acc*>(a.lse)[at]);
      for (int64_t j = 0; j < keys; ++j) grad_s[j] = p[j] * (grad_s[j] - delta);
    }
    if (row == 0) {
      gemm<Acc, false>(length, width, rows, {w.s, 1, keys}, grad_o, width, w.grad_v, width);
      gemm<Acc, false>(length, width, rows, {w.grad_s, 1, keys}, q, width, w.grad_k, width);
    } else {
      gemm<Acc, true>(length, width, rows, {w.s, 1, keys}, grad_o, width, w.grad_v, width);
      gemm<Acc, true>(length, width, rows, {w.grad_s, 1, keys}, q, width, w.grad_k, width);
    }
    gemm<Acc, false>(rows, width, length, {w.grad_s, keys, 1}, w.k, width, w.out_rows, width);
    write_grad<T>(a, 0, first + row, head, rows, w.out_rows, width);
  }
  write_grad<T>(a, 1, first, head, length, w.grad_k, width);
  write_grad<T>(a, 2, first, head, length, w.grad_v, width);
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
