// gather_tokens and scatter_tokens on CUDA; the formulas are in gather_tokens.h.
//
// Rows are copied as bytes, in units of 16, 8, 4, 2 or 1: the largest that divides the addresses, the strides and the
// length of a row. A team of up to 32 threads (one warp; fewer where a row has fewer units) takes one row, and a thread
// has up to four loads under way.
//
// gather: a team copies one row.
// scatter: a block of 256 threads takes up to 256 neighbouring output rows of one image. It inverts the ids of the image
// into a table in shared memory, of the rows that are its own, and its teams then write each row once: from x, from base,
// or zero. With `taken`, the backward pass, a row of base goes to its place in taken or in out, so base is read once.
//
// Bytes: those of gather_tokens.h, and 8 for each id; in scatter each block of an image reads all its ids, mostly from
// the second cache. The rows of a block are so many that this is an eighth of what it writes, or less, wherever 256 rows
// suffice for that. No FLOPs.
//
// Must hold: each output row has one writer, so results are deterministic, also where ids are not distinct: the last one
// counts, and the gradients of the others are left unwritten. An id out of range never becomes an address.
#include <cstring>
#include <initializer_list>

#include "common/cuda.h"
#include "common/divisor.h"
#include "gather_tokens/gather_tokens.h"

namespace maskdm {
namespace MASKDM_ISA {
namespace {

constexpr uint32_t kThreads = 256;
constexpr int kLoads = 4;

struct RowShape {
  Divisor tokens;      // visible tokens per image, where they are not packed; in scatter: blocks per image
  uint32_t team;       // log2 of the threads that share a row
  uint32_t num_units;  // of a row
  uint32_t num_rows;   // scatter: output rows of a block, kThreads at most
};

template <class Unit>
__device__ inline Unit all_ones() {
  Unit unit;
  memset(&unit, 0xff, sizeof(Unit));
  return unit;
}

// The calling thread's share of a row, `member` of its team.
template <class Unit>
__device__ inline void copy_row(const RowShape& s, uint32_t member, const char* from, char* to) {
  const uint32_t team = 1u << s.team;
  for (uint32_t first = member; first < s.num_units; first += kLoads * team) {
    Unit units[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (first + i * team < s.num_units) units[i] = reinterpret_cast<const Unit*>(from)[first + i * team];
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (first + i * team < s.num_units) reinterpret_cast<Unit*>(to)[first + i * team] = units[i];
    }
  }
}
template <class Unit>
__device__ inline void fill_row(const RowShape& s, uint32_t member, const Unit& unit, char* to) {
  for (uint32_t i = member; i < s.num_units; i += 1u << s.team) reinterpret_cast<Unit*>(to)[i] = unit;
}

template <class Unit>
__global__ void __launch_bounds__(kThreads) gather_kernel(const GatherArgs a, const RowShape s) {
  const int64_t t = (int64_t{blockIdx.x} * kThreads + threadIdx.x) >> s.team;
  const uint32_t member = threadIdx.x & ((1u << s.team) - 1);
  if (t >= a.num_visible) return;
  const int64_t b = a.segments.cu_seqlens != nullptr ? image_of(a.segments, t) : s.tokens.quotient(t);
  const int64_t id = a.ids[t];
  const bool exists = id >= 0 && id < a.num_tokens;
  MASKDM_DEVICE_ASSERT(exists);
  char* out = a.out + t * a.row_bytes;
  if (exists) {
    copy_row<Unit>(s, member, a.x + b * a.x_image_bytes + id * a.x_token_bytes, out);
  } else {
    fill_row(s, member, all_ones<Unit>(), out);
  }
}

template <class Unit>
__global__ void __launch_bounds__(kThreads) scatter_kernel(const ScatterArgs a, char* taken, const RowShape s) {
  int32_t* source = reinterpret_cast<int32_t*>(shared_memory());  // of each row of this block: its visible token, or -1
  const int64_t b = s.tokens.quotient(blockIdx.x);
  const int64_t first = int64_t{blockIdx.x - static_cast<uint32_t>(b) * s.tokens.value()} * s.num_rows;
  const int64_t left = a.num_tokens - first;
  const uint32_t rows = left < s.num_rows ? static_cast<uint32_t>(left) : s.num_rows;
  if (threadIdx.x < rows) source[threadIdx.x] = -1;
  __syncthreads();

  const int64_t end = segment_begin(a.segments, b + 1);
  for (int64_t t = segment_begin(a.segments, b) + threadIdx.x; t < end && t < a.num_visible; t += kThreads) {
    const int64_t id = a.ids[t];
    const bool exists = id >= 0 && id < a.num_tokens;
    MASKDM_DEVICE_ASSERT(exists);
    if (id >= first && id < first + rows) atomicMax(&source[id - first], static_cast<int32_t>(t));
    // Nothing goes there, but whoever reads it must see that.
    if (!exists && taken != nullptr && first == 0) {
#pragma unroll 1
      for (uint32_t i = 0; i < s.num_units; ++i) {
        reinterpret_cast<Unit*>(taken + t * a.row_bytes)[i] = all_ones<Unit>();
      }
    }
  }
  __syncthreads();

  const uint32_t member = threadIdx.x & ((1u << s.team) - 1);
  for (uint32_t row = threadIdx.x >> s.team; row < rows; row += kThreads >> s.team) {
    const int64_t n = first + row, t = source[row];
    char* out = a.out + (b * a.num_tokens + n) * a.row_bytes;
    const char* base = a.base == nullptr ? nullptr : a.base + b * a.base_image_bytes + n * a.base_token_bytes;
    const char* from = t < 0 ? base : a.x == nullptr ? nullptr : a.x + t * a.row_bytes;
    if (from != nullptr) {
      copy_row<Unit>(s, member, from, out);
    } else {
      fill_row(s, member, Unit{}, out);
    }
    if (t >= 0 && taken != nullptr) copy_row<Unit>(s, member, base, taken + t * a.row_bytes);
  }
}

// Calls f with a null pointer to the largest unit that divides all of `bytes`, which may be addresses.
template <class F>
void dispatch_unit(std::initializer_list<uint64_t> bytes, const F& f) {
  uint64_t bits = 16;
  for (const uint64_t count : bytes) bits |= count;
  switch (bits & -bits) {
    case 16: return f(static_cast<Pack<uint32_t, 4>*>(nullptr));
    case 8: return f(static_cast<uint64_t*>(nullptr));
    case 4: return f(static_cast<uint32_t*>(nullptr));
    case 2: return f(static_cast<uint16_t*>(nullptr));
    default: return f(static_cast<uint8_t*>(nullptr));
  }
}

uint64_t address(const char* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

RowShape shape_of_rows(int64_t row_bytes, int64_t unit) {
  RowShape s{};
  s.num_units = static_cast<uint32_t>(row_bytes / unit);
  while (s.team < 5 && (1u << s.team) < s.num_units) ++s.team;
  return s;
}

// So many rows for a block of scatter that it reads eight times fewer bytes of ids, of the mean image, than it writes.
uint32_t rows_of_block(const ScatterArgs& a) {
  constexpr int64_t least = 32, most = kThreads;
  const int64_t bytes_of_ids = 8 * a.num_visible / a.segments.num_images;
  const int64_t rows = divide_up(8 * bytes_of_ids, a.row_bytes);
  return static_cast<uint32_t>(rows < least ? least : rows > most ? most : rows);
}

void check_counts(const char* op, int64_t num_visible, int64_t num_rows) {
  constexpr int64_t most = int64_t{1} << 31;
  if (num_visible >= most || num_rows >= most) fail(op, ": a count of tokens does not fit into 31 bits");
}

}  // namespace
}  // namespace MASKDM_ISA

void gather_tokens_cuda(const GatherArgs& a, void* stream) {
  using namespace MASKDM_ISA;
  if (a.num_visible == 0 || a.row_bytes == 0) return;
  check_counts("gather_tokens", a.num_visible, 0);
  const auto strides = {address(a.x), static_cast<uint64_t>(a.x_image_bytes), static_cast<uint64_t>(a.x_token_bytes),
                        address(a.out), static_cast<uint64_t>(a.row_bytes)};
  dispatch_unit(strides, [&](auto* null) {
    using Unit = std::remove_pointer_t<decltype(null)>;
    RowShape s = shape_of_rows(a.row_bytes, sizeof(Unit));
    s.tokens = Divisor(a.segments.tokens_per_image);
    const int64_t blocks = divide_up(a.num_visible << s.team, kThreads);
    launch(gather_kernel<Unit>, Dim3{static_cast<uint32_t>(blocks)}, Dim3{kThreads}, 0, stream, a, s);
  });
}

void scatter_tokens_cuda(const ScatterArgs& a, char* taken, void* stream) {
  using namespace MASKDM_ISA;
  if (a.segments.num_images * a.num_tokens * a.row_bytes == 0) return;
  check_counts("scatter_tokens", a.num_visible, a.segments.num_images * a.num_tokens);
  const auto strides = {address(a.x),    static_cast<uint64_t>(a.base_image_bytes),
                        address(a.base), static_cast<uint64_t>(a.base_token_bytes),
                        address(a.out),  static_cast<uint64_t>(a.row_bytes),
                        address(taken)};
  dispatch_unit(strides, [&](auto* null) {
    using Unit = std::remove_pointer_t<decltype(null)>;
    RowShape s = shape_of_rows(a.row_bytes, sizeof(Unit));
    s.num_rows = rows_of_block(a);
    const int64_t blocks_per_image = divide_up(a.num_tokens, s.num_rows);
    s.tokens = Divisor(blocks_per_image);
    launch(scatter_kernel<Unit>, Dim3{static_cast<uint32_t>(a.segments.num_images * blocks_per_image)}, Dim3{kThreads},
           static_cast<int64_t>(s.num_rows * sizeof(int32_t)), stream, a, taken, s);
  });
}

}  // namespace maskdm
