// ldmatrix, stmatrix, mma.sync and wgmma. Register layouts follow the PTX ISA; accumulation is plain float, in order of
// k.
#include <algorithm>
#include <cstring>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "emulator/race.h"

namespace pyops::emulator {

float half_to_float(uint16_t bits, bool is_bf16) {
  uint32_t word;
  float value;
  if (is_bf16) {
    word = uint32_t(bits) << 16;
    std::memcpy(&value, &word, 4);
    return value;
  }
  // Shift into place and rescale the exponent; infinities and NaNs get theirs back.
  word = uint32_t(bits & 0x7fff) << 13;
  std::memcpy(&value, &word, 4);
  value *= 0x1p112f;
  std::memcpy(&word, &value, 4);
  if ((bits & 0x7c00) == 0x7c00) word |= 0x7f800000u;
  word |= uint32_t(bits & 0x8000) << 16;
  std::memcpy(&value, &word, 4);
  return value;
}

void add_half(char* to, const char* from, bool is_bf16) {
  uint16_t a, b;
  std::memcpy(&a, to, 2);
  std::memcpy(&b, from, 2);
  const float sum = half_to_float(a, is_bf16) + half_to_float(b, is_bf16);
  if (is_bf16) {
    const __nv_bfloat16 rounded = __float2bfloat16(sum);
    std::memcpy(to, &rounded, 2);
  } else {
    const __half rounded = __float2half(sum);
    std::memcpy(to, &rounded, 2);
  }
}

namespace {

#if defined(__GNUC__) && !defined(__clang__)
#define PYOPS_WIDE __attribute__((target_clones("default", "arch=haswell"), optimize("O3")))
#else
#define PYOPS_WIDE
#endif
// sum[n] += a * b[n]
PYOPS_WIDE void multiply_add(float* __restrict__ sum, float a, const float* __restrict__ b, int n) {
  for (int i = 0; i < n; ++i) sum[i] += a * b[i];
}

void require_full_warp(unsigned mask, const char* what) {
  if (mask != ~0u) raise_error(std::string(what) + " in an incomplete warp; " + describe(engine()->current));
}

// Lane i passes the row address; the fiber of that lane is the one that touches memory.
Fiber* fiber_of_lane(int lane) {
  Fiber* fiber = engine()->current;
  return &fiber->block->fibers[static_cast<size_t>(fiber->warp->first_thread + lane)];
}

void count_bank_conflicts(Engine* e, const void* const (&rows)[8]) {
  int depth[8] = {}, worst = 1;
  for (int r = 0; r < 8; ++r) {
    bool repeated = false;
    for (int k = 0; k < r; ++k) repeated |= rows[k] == rows[r];
    const auto bank = reinterpret_cast<uintptr_t>(rows[r]) >> 4 & 7;
    if (!repeated && ++depth[bank] > worst) worst = depth[bank];
  }
  e->statistics.ldmatrix_conflicts += static_cast<uint64_t>(worst - 1);
}

void run_load_matrix(Lane* lanes, unsigned mask, bool transposed) {
  Engine* e = engine();
  require_full_warp(mask, "ldmatrix");
  ++e->statistics.ldmatrix;
  const int matrices = static_cast<int>(lanes[0].argument);
  for (int m = 0; m < matrices; ++m) {
    const void* rows[8];
    for (int r = 0; r < 8; ++r) {
      rows[r] = lanes[m * 8 + r].in;
      check_shared(rows[r], 16, 16, "ldmatrix", nullptr);
      if (e->race) check_access(e, fiber_of_lane(m * 8 + r), rows[r], 16, false, nullptr, "ldmatrix");
    }
    count_bank_conflicts(e, rows);
    for (int l = 0; l < 32; ++l) {
      uint16_t pair[2];
      for (int k = 0; k < 2; ++k) {
        const int row = transposed ? l % 4 * 2 + k : l / 4, column = transposed ? l / 4 : l % 4 * 2 + k;
        std::memcpy(&pair[k], static_cast<const uint16_t*>(rows[row]) + column, 2);
      }
      std::memcpy(static_cast<uint32_t*>(lanes[l].out) + m, pair, 4);
    }
  }
}

void run_store_matrix(Lane* lanes, unsigned mask, bool transposed) {
  Engine* e = engine();
  require_full_warp(mask, "stmatrix");
  const int matrices = static_cast<int>(lanes[0].argument);
  for (int m = 0; m < matrices; ++m) {
    for (int r = 0; r < 8; ++r) {
      const void* row = lanes[m * 8 + r].out;
      check_shared(row, 16, 16, "stmatrix", nullptr);
      if (e->race) check_access(e, fiber_of_lane(m * 8 + r), row, 16, true, nullptr, "stmatrix");
    }
    for (int l = 0; l < 32; ++l) {
      uint16_t pair[2];
      std::memcpy(pair, static_cast<const uint32_t*>(lanes[l].in) + m, 4);
      for (int k = 0; k < 2; ++k) {
        const int row = transposed ? l % 4 * 2 + k : l / 4, column = transposed ? l / 4 : l % 4 * 2 + k;
        std::memcpy(static_cast<uint16_t*>(lanes[m * 8 + row].out) + column, &pair[k], 2);
      }
    }
  }
}

float low_half(uint32_t v, bool is_bf16) { return half_to_float(static_cast<uint16_t>(v), is_bf16); }
float high_half(uint32_t v, bool is_bf16) { return half_to_float(static_cast<uint16_t>(v >> 16), is_bf16); }

// Accumulators of a 16 x 8 tile: lane l holds rows l/4 and l/4 + 8, columns l%4*2 and the next.
void finish_mma(Lane* lanes, const float (*a)[16], const float (*b)[8], int depth) {
  float sum[16][8] = {};
  for (int r = 0; r < 16; ++r) {
    for (int k = 0; k < depth; ++k) multiply_add(sum[r], a[r][k], b[k], 8);
  }
  for (int l = 0; l < 32; ++l) {
    const auto* operands = static_cast<const MmaOperands*>(lanes[l].in);
    auto* d = static_cast<float*>(lanes[l].out);
    for (int i = 0; i < 4; ++i) d[i] = operands->c[i] + sum[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
  }
}

void run_mma_half(Lane* lanes, unsigned mask, bool is_bf16) {
  require_full_warp(mask, "mma.sync");
  ++engine()->statistics.mma;
  float a[16][16], b[16][8];
  for (int l = 0; l < 32; ++l) {
    const auto* operands = static_cast<const MmaOperands*>(lanes[l].in);
    const int group = l / 4, pair = l % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const int row = group + i % 2 * 8, column = pair + i / 2 * 8;
      a[row][column] = low_half(operands->a[i], is_bf16);
      a[row][column + 1] = high_half(operands->a[i], is_bf16);
    }
    for (int i = 0; i < 2; ++i) {
      b[pair + i * 8][group] = low_half(operands->b[i], is_bf16);
      b[pair + i * 8 + 1][group] = high_half(operands->b[i], is_bf16);
    }
  }
  finish_mma(lanes, a, b, 16);
}

// The tensor core ignores the low 13 bits of a tf32 operand.
float tf32(uint32_t bits) {
  bits &= 0xffffe000u;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
void run_mma_tf32(Lane* lanes, unsigned mask) {
  require_full_warp(mask, "mma.sync");
  ++engine()->statistics.mma;
  float a[16][16], b[16][8];
  for (int l = 0; l < 32; ++l) {
    const auto* operands = static_cast<const MmaOperands*>(lanes[l].in);
    const int group = l / 4, column = l % 4;
    for (int i = 0; i < 4; ++i) a[group + i % 2 * 8][column + i / 2 * 4] = tf32(operands->a[i]);
    for (int i = 0; i < 2; ++i) b[column + i * 4][group] = tf32(operands->b[i]);
  }
  finish_mma(lanes, a, b, 8);
}

}  // namespace

const WarpOp load_matrix{"ldmatrix", [](Lane* l, unsigned m) { run_load_matrix(l, m, false); }, false};
const WarpOp load_matrix_transposed{"ldmatrix.trans", [](Lane* l, unsigned m) { run_load_matrix(l, m, true); }, false};
const WarpOp store_matrix{"stmatrix", [](Lane* l, unsigned m) { run_store_matrix(l, m, false); }, false};
const WarpOp store_matrix_transposed{"stmatrix.trans", [](Lane* l, unsigned m) { run_store_matrix(l, m, true); },
                                     false};
const WarpOp mma_bf16{"mma.m16n8k16.bf16", [](Lane* l, unsigned m) { run_mma_half(l, m, true); }, false};
const WarpOp mma_fp16{"mma.m16n8k16.fp16", [](Lane* l, unsigned m) { run_mma_half(l, m, false); }, false};
const WarpOp mma_tf32{"mma.m16n8k8.tf32", run_mma_tf32, false};

// wgmma

namespace {

// A decoded shared-memory descriptor and its canonical layout, in 16-byte chunks of 8 elements.
struct Operand {
  size_t start, leading, stride;
  int swizzle;
  bool mn_major;
  Operand(uint64_t descriptor, bool mn_major) : mn_major(mn_major) {
    start = (descriptor & 0x3FFF) << 4;
    leading = (descriptor >> 16 & 0x3FFF) << 4;
    stride = (descriptor >> 32 & 0x3FFF) << 4;
    const int layout = static_cast<int>(descriptor >> 62);
    swizzle = layout == 1 ? 128 : layout == 2 ? 64 : layout == 3 ? 32 : 0;
  }
  // K-major: chunk c of row mn holds k = 8c .. 8c + 7.
  size_t k_chunk(int mn, int c) const {
    const auto row = static_cast<size_t>(mn), chunk = static_cast<size_t>(c);
    const size_t group = row / 8 * stride;
    return start + group +
           (swizzle != 0 ? row % 8 * static_cast<size_t>(swizzle) + chunk * 16 : row % 8 * 16 + chunk * leading);
  }
  // MN-major: chunk c of line k holds mn = 8c .. 8c + 7.
  size_t mn_chunk(int k, int c) const {
    const auto line = static_cast<size_t>(k), chunk = static_cast<size_t>(c);
    if (swizzle == 0) return start + chunk * stride + line / 8 * leading + line % 8 * 16;
    const auto width = static_cast<size_t>(swizzle), per_line = width / 16;
    return start + chunk / per_line * leading + line / 8 * stride + line % 8 * width + chunk % per_line * 16;
  }
  // Calls f(address, mn, k, step along mn, step along k) for every chunk of an extent x 16 tile.
  template <class F>
  void for_each_chunk(Engine* e, const Fiber* fiber, int extent, F f) const {
    const int lines = mn_major ? 16 : extent, chunks = mn_major ? extent / 8 : 2;
    for (int line = 0; line < lines; ++line) {
      for (int c = 0; c < chunks; ++c) {
        const size_t offset = swizzled(mn_major ? mn_chunk(line, c) : k_chunk(line, c), swizzle);
        if (offset + 16 > e->shared_bytes) {
          raise_error("wgmma: a descriptor reaches outside shared memory; " + describe(fiber));
        }
        f(fiber->block->arena + offset, mn_major ? c * 8 : line, mn_major ? line : c * 8);
      }
    }
  }
};

void read_operand(Engine* e, const Fiber* fiber, const Operand& operand, int extent, bool is_bf16, float* tile,
                  int mn_step, int k_step) {
  operand.for_each_chunk(e, fiber, extent, [&](const char* chunk, int mn, int k) {
    for (int i = 0; i < 8; ++i) {
      uint16_t bits;
      std::memcpy(&bits, chunk + 2 * i, 2);
      const int row = operand.mn_major ? mn + i : mn, column = operand.mn_major ? k : k + i;
      tile[row * mn_step + column * k_step] = half_to_float(bits, is_bf16);
    }
  });
}

void read_register_operand(Fiber* const* fibers, size_t index, bool is_bf16, float* a) {
  for (int r = 0; r < 64; ++r) {
    for (int k = 0; k < 16; ++k) {
      const Fiber* owner = fibers[r / 16 * 32 + r % 8 * 4 + k % 8 / 2];
      const uint32_t v = owner->product_groups.front()[index].registers[r % 16 / 8 + k / 8 * 2];
      a[r * 16 + k] = k % 2 != 0 ? high_half(v, is_bf16) : low_half(v, is_bf16);
    }
  }
}

HeldAccumulator& held(Fiber* fiber, const float* registers) {
  for (HeldAccumulator& h : fiber->accumulators) {
    if (h.registers == registers) return h;
  }
  raise_error("wgmma: accumulator lost; " + describe(fiber));
}

void multiply(Engine* e, Fiber* const* fibers, size_t index) {
  ++e->statistics.wgmma;
  const WgmmaIssue& issue = fibers[0]->product_groups.front()[index].issue;
  for (int l = 0; l < 128; ++l) {
    const WgmmaIssue& other = fibers[l]->product_groups.front()[index].issue;
    if (other.descriptor_a != issue.descriptor_a || other.descriptor_b != issue.descriptor_b ||
        other.columns != issue.columns || other.accumulate != issue.accumulate) {
      raise_error("wgmma: the threads of the warpgroup disagree on its operands; " + describe(fibers[l]));
    }
  }
  const int columns = issue.columns;
  std::vector<float> a(64 * 16), b(static_cast<size_t>(16 * columns)), sum(static_cast<size_t>(columns));
  if (issue.registers_a != nullptr) {
    read_register_operand(fibers, index, issue.is_bf16, a.data());
  } else {
    read_operand(e, fibers[0], Operand(issue.descriptor_a, issue.a_mn_major), 64, issue.is_bf16, a.data(), 16, 1);
  }
  read_operand(e, fibers[0], Operand(issue.descriptor_b, issue.b_mn_major), columns, issue.is_bf16, b.data(), 1,
               columns);
  for (int r = 0; r < 64; ++r) {
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (int k = 0; k < 16; ++k)
      multiply_add(sum.data(), a[static_cast<size_t>(r * 16 + k)], &b[static_cast<size_t>(k * columns)], columns);
    // Row r belongs to four lanes; lane q of them holds columns 8j + 2q and the next.
    for (int quad = 0; quad < 4; ++quad) {
      Fiber* owner = fibers[r / 16 * 32 + r % 8 * 4 + quad];
      HeldAccumulator& d = held(owner, owner->product_groups.front()[index].issue.accumulator);
      for (int j = 0; j < columns / 8; ++j) {
        for (int i = 0; i < 2; ++i) {
          float& value = d.value[j * 4 + r % 16 / 8 * 2 + i];
          value = (issue.accumulate ? value : 0.0f) + sum[static_cast<size_t>(j * 8 + quad * 2 + i)];
        }
      }
    }
  }
}

// Registers come back once no product in flight uses them.
void return_accumulators(Fiber* fiber) {
  const auto in_flight = [fiber](const float* registers) {
    for (const auto& group : fiber->product_groups) {
      for (const WgmmaOperation& op : group) {
        if (op.issue.accumulator == registers) return true;
      }
    }
    for (const WgmmaOperation& op : fiber->open_products) {
      if (op.issue.accumulator == registers) return true;
    }
    return false;
  };
  for (size_t i = 0; i < fiber->accumulators.size();) {
    HeldAccumulator& h = fiber->accumulators[i];
    if (in_flight(h.registers)) {
      ++i;
      continue;
    }
    std::memcpy(h.registers, h.value, static_cast<size_t>(h.count) * 4);
    fiber->accumulators.erase(fiber->accumulators.begin() + static_cast<ptrdiff_t>(i));
    fiber->product_fenced = false;
  }
}

void finish_groups(Engine* e, Fiber* any, int pending) {
  Fiber* fibers[128];
  for (int l = 0; l < 128; ++l) fibers[l] = &any->block->fibers[static_cast<size_t>(any->thread / 128 * 128 + l)];
  while (static_cast<int>(fibers[0]->product_groups.size()) > pending) {
    const size_t count = fibers[0]->product_groups.front().size();
    uint32_t time = 0;
    for (int l = 0; l < 128; ++l) {
      if (fibers[l]->product_groups.empty() || fibers[l]->product_groups.front().size() != count) {
        raise_error("wgmma: the threads of the warpgroup committed different groups; " + describe(fibers[l]));
      }
    }
    for (size_t i = 0; i < count; ++i) {
      multiply(e, fibers, i);
      time = std::max(time, fibers[0]->product_groups.front()[i].time);
    }
    for (Fiber* fiber : fibers) {
      fiber->product_groups.pop_front();
      fiber->async_seen = std::max(fiber->async_seen, time);
    }
  }
  for (Fiber* fiber : fibers) return_accumulators(fiber);
}

}  // namespace

// A block begins with as many registers per thread as the multiprocessor has for it, rounded down to eights, and
// warpgroups exchange these: one that asks for more than the others leave waits for ever.
void set_registers(int per_thread, const Location& location) {
  const EngineScope scope;
  Engine* e = engine();
  Fiber* fiber = e->current;
  if (compute_capability() != 90) fail("setmaxnreg needs sm_90a", location);
  if (e->threads_per_block % 128 != 0) fail("setmaxnreg: the block is not made of whole warpgroups", location);
  constexpr int fewest = 24, most = 256, of_multiprocessor = 65536;
  const int groups = e->threads_per_block / 128;
  const int pool = std::min(of_multiprocessor / e->threads_per_block / 8 * 8, most) * groups;
  fiber->block->registers[fiber->thread / 128] = per_thread;
  int asked = 0;
  for (int g = 0; g < groups; ++g) asked += std::max(fiber->block->registers[g], fewest);
  if (asked > pool) {
    const std::string what = std::to_string(asked) + " registers of " + std::to_string(pool);
    fail(("setmaxnreg waits for ever: " + what).c_str(), location);
  }
}

void wgmma_fence(const Location&) { engine()->current->product_fenced = true; }

void wgmma_issue(const WgmmaIssue& issue, const Location& location) {
  const EngineScope scope;
  Engine* e = engine();
  Fiber* fiber = e->current;
  if (compute_capability() != 90) fail("wgmma needs sm_90a", location);
  if (issue.columns < 8 || issue.columns > 256 || issue.columns % 8 != 0) fail("wgmma: no such N", location);
  if ((fiber->thread / 128 + 1) * 128 > e->threads_per_block) fail("wgmma: not in a whole warpgroup", location);
  if (!fiber->product_fenced) fail("wgmma without wgmma_fence since its registers were last touched", location);
  WgmmaOperation op{issue, {}, 0};
  if (issue.registers_a != nullptr) std::memcpy(op.registers, issue.registers_a, sizeof op.registers);
  bool known = false;
  for (const HeldAccumulator& h : fiber->accumulators) known |= h.registers == issue.accumulator;
  if (!known) {
    HeldAccumulator h{issue.accumulator, issue.columns / 2, {}};
    std::memcpy(h.value, issue.accumulator, static_cast<size_t>(h.count) * 4);
    fiber->accumulators.push_back(h);
    if (configuration().poison) std::memset(issue.accumulator, 0xFF, static_cast<size_t>(h.count) * 4);
  }
  // One lane stands for the warpgroup: the unit reads each operand once.
  if (e->race && fiber->thread % 128 == 0) {
    op.time = async_tick(e);
    const auto mark = [&](const char* chunk, int, int) { async_read(e, fiber, chunk, 16, op.time, true, "wgmma"); };
    fiber->location = location;
    if (issue.registers_a == nullptr) Operand(issue.descriptor_a, issue.a_mn_major).for_each_chunk(e, fiber, 64, mark);
    Operand(issue.descriptor_b, issue.b_mn_major).for_each_chunk(e, fiber, issue.columns, mark);
  }
  fiber->open_products.push_back(op);
}

void wgmma_commit() {
  const EngineScope scope;
  Fiber* fiber = engine()->current;
  fiber->product_groups.push_back(std::move(fiber->open_products));
  fiber->open_products.clear();
}

void wgmma_wait(int pending, const Location& location) {
  const EngineScope scope;
  Engine* e = engine();
  Fiber* fiber = e->current;
  int& waiters = fiber->block->product_waiters[fiber->thread / 128];
  if (++waiters < 128) {
    wait_here("wgmma_wait", 0, location);
    return;
  }
  waiters = 0;
  finish_groups(e, fiber, pending);
  Fiber* fibers[128];
  for (int l = 0; l < 128; ++l) fibers[l] = &fiber->block->fibers[static_cast<size_t>(fiber->thread / 128 * 128 + l)];
  e->wake(fibers, 128);
  continue_with_next();
}

}  // namespace pyops::emulator
