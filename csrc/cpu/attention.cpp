// attention · CPU
//   o[i] = sum_j p[i,j] v[j],  p = softmax_j(score),  lse[i] = log sum_j exp(score[i,j])      (common/attention.h)
//   dv[j] = sum_i p do[i],  ds = p * (do[i].v[j] - delta[i]) * scale,  delta[i] = do[i].o[i] - dlse[i]
//   dq[i] = sum_j ds k[j],  dk[j] = sum_i ds q[i]
// layout   q: [B, H, L, D] · k: [B, H / G, S, D] · v: [B, H / G, S, E] · o: [B, H, L, E] · lse: [B, H, L], or packed
// mapping  forward: a thread takes blocks of queries through all keys they see (online softmax)
//          backward: a thread takes blocks of keys of one key head through all queries of its G heads
// memory   keys transposed once; a block of scores stays in the nearest cache; O(L + S) beyond inputs and outputs
// numerics products and sums in acc_t; bf16 on CPUs that multiply it (product_bf16.h): p, rounded to bf16 before it is
//          multiplied by values, not where it is summed, and ds too
//          dq in a fixed number of partial sums, added in order: deterministic
#include "common/attention_binding.h"
#include "common/attention_choice.h"
#include "cpu/attention.h"
#include "cpu/parallel.h"
#include "cpu/product_bf16.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

// ---- kernels

// Keys of every head, transposed block by block: [B, H / G, blocks][depth][key_block]; values: [.., blocks][rows][stride].
// Of keys or values that the examples share there is one packing, but where lengths say what of them counts.
template <class Products, class scalar_t, class acc_t>
struct PackedKeys {
  using Word = typename Products::Word;
  int64_t blocks, depth, rows, stride, heads;  // depth and rows in words
  int64_t of_keys, of_values;                  // how many examples are packed
  bool direct;                                 // values are read where they are
  Buffer<Word> keys, values;
  const scalar_t* v;

  PackedKeys(const Problem<acc_t>& p, const scalar_t* k, const scalar_t* v)
      : blocks(ceil_div(p.S, key_block)),
        depth(ceil_div(p.D, Products::step)),
        rows(key_block / Products::step),
        stride(round_up(p.E, Vec<acc_t>::width)),
        heads(p.G > 0 ? p.H / p.G : 0),
        of_keys(p.k.batch == 0 && p.lengths == nullptr && p.cu_k == nullptr ? std::min<int64_t>(p.B, 1) : p.B),
        of_values(p.v.batch == 0 && p.lengths == nullptr && p.cu_k == nullptr ? std::min<int64_t>(p.B, 1) : p.B),
        direct(std::is_same_v<scalar_t, Word> && stride == p.E),
        keys(of_keys * heads * blocks * depth * key_block),
        values(direct ? 0 : of_values * heads * blocks * rows * stride),
        v(v) {
    parallel_for(std::max(of_keys, of_values) * heads * blocks, 4, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) {
        const int64_t b = at / (heads * blocks), h = at / blocks % heads, j = at % blocks * key_block;
        const Example e = attention::example(p, b);
        const int64_t n = std::min(key_block, e.S - j);
        if (n <= 0) continue;
        const scalar_t* k_row = k + b * p.k.batch + h * p.k.head + (e.k0 + j) * p.k.row;
        if (b < of_keys) Products::pack_columns(keys.get() + at * depth * key_block, key_block, k_row, p.k.row, n, p.D);
        if (direct || b >= of_values) continue;
        const scalar_t* v_row = v + b * p.v.batch + h * p.v.head + (e.k0 + j) * p.v.row;
        Products::pack_summed(values.get() + at * rows * stride, stride, v_row, p.v.row, n, p.E);
      }
    });
  }

  int64_t block(int64_t packed, int64_t b, int64_t h, int64_t j) const {
    return ((packed == 1 ? 0 : b) * heads + h) * blocks + j / key_block;
  }
  Matrix<const Word> keys_of(int64_t b, int64_t h, int64_t j) const {
    return {keys.get() + block(of_keys, b, h, j) * depth * key_block, key_block, 1};
  }
  Matrix<const Word> values_of(const Problem<acc_t>& p, const Example& e, int64_t b, int64_t h, int64_t j) const {
    if constexpr (std::is_same_v<scalar_t, Word>)
      if (direct) return {v + b * p.v.batch + h * p.v.head + (e.k0 + j) * p.v.row, p.v.row, 1};
    return {values.get() + block(of_values, b, h, j) * rows * stride, stride, 1};
  }
};

template <class Products, class scalar_t, class acc_t>
void attention_fwd_block(const Problem<acc_t>& p, const PackedKeys<Products, scalar_t, acc_t>& packed,
                         const scalar_t* q, scalar_t* o, acc_t* lse, int64_t b, int64_t h, int64_t i0, acc_t* scratch) {
  using V = Vec<acc_t>;
  const Example e = attention::example(p, b);
  const int64_t rows = std::min(query_block, e.L - i0), width = packed.stride, hk = h / p.G;
  if (rows <= 0) return;
  acc_t *s = scratch, *sum = s + query_block * score_stride, *factor = sum + query_block * width;
  auto* q_rows = reinterpret_cast<typename Products::Word*>(factor + key_block);
  const bool plain = p.softcap == 0 && p.slopes == nullptr;
  OnlineSoftmax<acc_t> state;
  state.begin(rows);
  std::fill(sum, sum + query_block * width, acc_t(0));
  Products::pack_rows(q_rows, packed.depth, q + b * p.q.batch + h * p.q.head + (e.q0 + i0) * p.q.row, p.q.row, rows,
                      p.D);

  const int64_t first = e.first_key_of(i0, i0 + rows) / key_block * key_block, last = e.last_key_of(i0, i0 + rows);
  for (int64_t j0 = first; j0 < last; j0 += key_block) {
    const int64_t n = std::min(key_block, e.S - j0);
    // Rows that see something of this block; the first is rounded down to whole tiles.
    const int64_t r0 = std::max<int64_t>(0, e.first_query_of(j0, j0 + n) - i0) / product_rows * product_rows;
    const int64_t r1 = std::min(rows, e.last_query_of(j0, j0 + n) - i0);
    if (r0 >= r1) continue;
    const Masked mask = masked(p, b, h, i0 + r0, i0 + r1, j0, n);
    if (mask == Masked::none) continue;
    const Matrix<acc_t> scores{s + r0 * score_stride, score_stride, 1};
    Products::template product<false>({q_rows + r0 * packed.depth, packed.depth, 1}, packed.keys_of(b, hk, j0), scores,
                                      r1 - r0, key_block, packed.depth);
    for (int64_t r = r0; r < r1; ++r) {
      acc_t* row = s + r * score_stride;
      const bool whole =
          plain && mask == Masked::all && e.first_key(i0 + r) <= j0 && e.last_key(i0 + r) >= j0 + key_block;
      if (!whole) finish_scores(p, e, b, h, i0 + r, j0, n, mask == Masked::some, row, static_cast<acc_t*>(nullptr));
      state.look(r, row, V(whole ? p.scale : acc_t(1)));
    }
    for (int64_t r = r0; r < r1; ++r) {
      acc_t* row = s + r * score_stride;
      state.weigh(r, row, sum + r * width, width);
      if (p.random != nullptr) {
        keep_row(p, b, h, i0 + r, j0, factor);
        for (int64_t j = 0; j < key_block; j += V::width) (V::load(row + j) * V::load(factor + j)).store(row + j);
      }
    }
    clear_rounding(scores.at, r1 - r0);
    Products::template product<true>(Products::narrow_rows(scores, r1 - r0, key_block),
                                     packed.values_of(p, e, b, hk, j0), {sum + r0 * width, width, 1}, r1 - r0, width,
                                     ceil_div(n, Products::step));
  }

  scalar_t* o_row = o + b * p.o.batch + h * p.o.head + (e.q0 + i0) * p.o.row;
  acc_t* lse_row = lse + b * p.lse_batch + h * p.lse_head + e.q0 + i0;
  for (int64_t r = 0; r < rows; ++r, o_row += p.o.row) {
    const acc_t total = pyops::PYOPS_CPU_CAPABILITY::sum(state.total[r]);
    // A row that saw nothing has a total of 0, one with a score that is no number has none.
    lse_row[r] = total == 0 ? -infinity<acc_t> : state.most[r] + std::log(total);
    const V factor(total == 0 ? acc_t(0) : (p.random != nullptr ? p.keep_scale : 1) / total);
    each_vector<acc_t>(
        p.E, [&](int64_t c, auto lanes) { (V::load(sum + r * width + c, lanes) * factor).store(o_row + c, lanes); });
  }
}

// Decoding: the few queries of the heads that share a key head against a long cache. Keys and values are read once,
// where they are; the keys are split into parts, whose softmaxes are merged in order.
inline constexpr int64_t few_keys = 512;
using attention::few_rows;

template <class acc_t>
bool has_few_queries(const Problem<acc_t>& p) {
  return attention::has_few_queries(p.L, p.G) && p.cu_q == nullptr;
}

// Prefetchers lose a stream that is read in blocks.
template <class T>
PYOPS_INLINE void prefetch(const T* p, int64_t elements) {
  for (int64_t i = 0; i < elements; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + i);
}

template <class Products, class scalar_t, class acc_t>
void attention_fwd_few(const Problem<acc_t>& p, const scalar_t* q, const scalar_t* k, const scalar_t* v, scalar_t* o,
                       acc_t* lse) {
  using V = Vec<acc_t>;
  using Word = typename Products::Word;
  const int64_t heads = p.H / p.G, rows = p.L * p.G, parts = std::max<int64_t>(1, ceil_div(p.S, few_keys));
  const int64_t width = round_up(p.E, V::width), depth = ceil_div(p.D, Products::step);
  // Of each part and row: sum over values, largest score, sum of weights.
  Buffer<acc_t> partial(p.B * heads * parts * few_rows * (width + 2));
  const auto part_of = [&](int64_t head, int64_t part) {
    return partial.get() + (head * parts + part) * few_rows * (width + 2);
  };
  parallel_for(p.B * heads * parts, 2, [&](int64_t begin, int64_t end) {
    Buffer<acc_t> scratch(few_rows * score_stride + key_block, acc_t(0));
    Buffer<Word> words(few_rows * depth + key_block * std::max(depth, width), Word(0));
    acc_t *s = scratch.get(), *factor = s + few_rows * score_stride;
    Word *q_rows = words.get(), *block = q_rows + few_rows * depth;
    const Matrix<acc_t> scores{s, score_stride, 1};
    for (int64_t at = begin; at < end; ++at) {
      const int64_t part = at % parts, hk = at / parts % heads, b = at / parts / heads;
      const Example e = attention::example(p, b);
      acc_t *sum = part_of(b * heads + hk, part), *most = sum + few_rows * width, *total = most + few_rows;
      std::fill(sum, sum + few_rows * width, acc_t(0));
      OnlineSoftmax<acc_t> state;
      state.begin(rows);
      for (int64_t r = 0; r < rows; ++r) {
        const scalar_t* row = q + b * p.q.batch + (hk * p.G + r / p.L) * p.q.head + r % p.L * p.q.row;
        Products::pack_rows(q_rows + r * depth, depth, row, p.q.row, 1, p.D);
      }
      const int64_t first = std::max(part * few_keys, e.first_key_of(0, p.L) / key_block * key_block);
      const int64_t last = std::min((part + 1) * few_keys, e.last_key_of(0, p.L));
      for (int64_t j0 = first; j0 < last; j0 += key_block) {
        const int64_t n = std::min(key_block, e.S - j0);
        bool seen = false;
        for (int64_t r = 0; r < rows && !seen; ++r)
          seen = masked(p, b, hk * p.G + r / p.L, r % p.L, r % p.L + 1, j0, n) != Masked::none;
        if (!seen) continue;
        const scalar_t* k_row = k + b * p.k.batch + hk * p.k.head + j0 * p.k.row;
        if constexpr (std::is_same_v<Word, acc_t>) {  // one key at a time needs no transposed copy
          for (int64_t j = 0; j < n; ++j)
            for (int64_t r = 0; r < rows; ++r) {
              Totals<acc_t, 1> dot;
              accumulate(dot, p.D, [&](int64_t d, auto lanes, auto& t) {
                t[0] = fma(V::load(q_rows + r * p.D + d, lanes), V::load(k_row + j * p.k.row + d, lanes), t[0]);
              });
              s[r * score_stride + j] = pyops::PYOPS_CPU_CAPABILITY::sum(dot[0]);
            }
        } else {
          prefetch(k_row + key_block * p.k.row, key_block * p.D);
          Products::pack_columns(block, key_block, k_row, p.k.row, n, p.D);
          Products::template product<false>({q_rows, depth, 1}, {block, key_block, 1}, scores, rows, key_block, depth);
        }
        for (int64_t r = 0; r < rows; ++r) {
          acc_t* row = s + r * score_stride;
          const int64_t h = hk * p.G + r / p.L, i = r % p.L;
          finish_scores(p, e, b, h, i, j0, n, true, row, static_cast<acc_t*>(nullptr));
          state.look(r, row, V(acc_t(1)));
          state.weigh(r, row, sum + r * width, width);
          if (p.random == nullptr) continue;
          keep_row(p, b, h, i, j0, factor);
          for (int64_t j = 0; j < key_block; j += V::width) (V::load(row + j) * V::load(factor + j)).store(row + j);
        }
        const scalar_t* v_row = v + b * p.v.batch + hk * p.v.head + j0 * p.v.row;
        Matrix<const Word> values{block, width, 1};
        if constexpr (std::is_same_v<scalar_t, Word>)
          if (width == p.E) values = {v_row, p.v.row, 1};
        prefetch(v_row + key_block * p.v.row, key_block * p.E);
        if (values.at == block) Products::pack_summed(block, width, v_row, p.v.row, n, p.E);
        Products::template product<true>(Products::narrow_rows(scores, rows, key_block), values, {sum, width, 1}, rows,
                                         width, ceil_div(n, Products::step));
      }
      for (int64_t r = 0; r < rows; ++r)
        most[r] = state.most[r], total[r] = pyops::PYOPS_CPU_CAPABILITY::sum(state.total[r]);
    }
  });
  Buffer<acc_t> merged(width);
  for (int64_t head = 0; head < p.B * heads; ++head)
    for (int64_t r = 0; r < rows; ++r) {
      acc_t top = -infinity<acc_t>, total = 0;
      for (int64_t part = 0; part < parts; ++part) top = std::max(top, part_of(head, part)[few_rows * width + r]);
      const acc_t base = top == -infinity<acc_t> ? acc_t(0) : top;
      std::fill(merged.get(), merged.get() + width, acc_t(0));
      for (int64_t part = 0; part < parts; ++part) {
        const acc_t* from = part_of(head, part);
        const acc_t weight = std::exp(from[few_rows * width + r] - base);
        total += weight * from[few_rows * (width + 1) + r];
        for (int64_t c = 0; c < width; ++c) merged[c] += weight * from[r * width + c];
      }
      const int64_t b = head / heads, h = head % heads * p.G + r / p.L, i = r % p.L;
      lse[b * p.lse_batch + h * p.lse_head + i] = total == 0 ? -infinity<acc_t> : top + std::log(total);
      const V factor(total == 0 ? acc_t(0) : (p.random != nullptr ? p.keep_scale : 1) / total);
      scalar_t* row = o + b * p.o.batch + h * p.o.head + i * p.o.row;
      each_vector<acc_t>(
          p.E, [&](int64_t c, auto lanes) { (V::load(merged.get() + c, lanes) * factor).store(row + c, lanes); });
    }
}

template <class scalar_t, class acc_t>
void attention_fwd_all(const Problem<acc_t>& p, const scalar_t* q, const scalar_t* k, const scalar_t* v, scalar_t* o,
                       acc_t* lse) {
  with_products<scalar_t>([&]<class Products>(Products) {
    if (has_few_queries(p)) return attention_fwd_few<Products>(p, q, k, v, o, lse);
    const PackedKeys<Products, scalar_t, acc_t> packed(p, k, v);
    const int64_t blocks = ceil_div(p.L, query_block);
    parallel_for(p.B * p.H * blocks, 1, [&](int64_t begin, int64_t end) {
      // Rows that a product rounds up to are read and never used; they must only be numbers.
      static_assert(sizeof(acc_t) == sizeof(typename Products::Word));
      Buffer<acc_t> scratch(query_block * (score_stride + packed.stride + packed.depth) + key_block, acc_t(0));
      for (int64_t at = begin; at < end; ++at) {
        // First, last, second, last but one: with a causal mask each thread gets as much work as the others.
        const int64_t n = at % blocks, block = n % 2 == 0 ? n / 2 : blocks - 1 - n / 2, head = at / blocks;
        attention_fwd_block(p, packed, q, o, lse, head / p.H, head % p.H, block * query_block, scratch.get());
      }
    });
  });
}

// Rows of one query head as the backward products read them, and what each row contributes to ds.
template <class Products, class acc_t>
struct PackedQueries {
  using Word = typename Products::Word;
  // In words: rows as they are multiplied, and as they are summed over, which with a value in a word is the same.
  static constexpr bool both = Products::step == 1;
  int64_t rows, width, value_width, depth, value_depth;
  Buffer<Word> q, dy, q_summed, dy_summed;
  Buffer<acc_t> lse, delta;

  template <class scalar_t>
  PackedQueries(const Problem<acc_t>& p, const scalar_t* q_in, const scalar_t* dy_in, const scalar_t* o_in,
                const acc_t* lse_in, const acc_t* dlse_in)
      : rows(round_up(p.L, query_block)),
        width(round_up(p.D, Vec<acc_t>::width)),
        value_width(round_up(p.E, Vec<acc_t>::width)),
        depth(both ? width : ceil_div(p.D, Products::step)),
        value_depth(both ? value_width : ceil_div(p.E, Products::step)),
        q(p.B * p.H * rows * depth),
        dy(p.B * p.H * rows * value_depth),
        q_summed(both ? 0 : p.B * p.H * rows / Products::step * width),
        dy_summed(both ? 0 : p.B * p.H * rows / Products::step * value_width),
        lse(p.B * p.H * rows),
        delta(p.B * p.H * rows) {
    using V = Vec<acc_t>;
    parallel_for(p.B * p.H, 1, [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head) {
        const int64_t b = head / p.H, h = head % p.H;
        const Example e = attention::example(p, b);
        const scalar_t* q_row = q_in + b * p.q.batch + h * p.q.head + e.q0 * p.q.row;
        const scalar_t* dy_row = dy_in + b * p.o.batch + h * p.o.head + e.q0 * p.o.row;
        const scalar_t* o_row = o_in + b * p.o.batch + h * p.o.head + e.q0 * p.o.row;
        const int64_t at = b * p.lse_batch + h * p.lse_head + e.q0;
        pack(q, q_summed, head, depth, width, q_row, p.q.row, e.L, p.D);
        pack(dy, dy_summed, head, value_depth, value_width, dy_row, p.o.row, e.L, p.E);
        for (int64_t i = 0; i < e.L; ++i) {
          Totals<acc_t, 1> total;
          accumulate(total, p.E, [&](int64_t c, auto lanes, auto& t) {
            t[0] = fma(V::load(dy_row + i * p.o.row + c, lanes), V::load(o_row + i * p.o.row + c, lanes), t[0]);
          });
          const acc_t l = lse_in[at + i];
          // A row that sees nothing: exp(score - inf) = 0 for every key.
          lse[head * rows + i] = l == -infinity<acc_t> ? infinity<acc_t> : l;
          delta[head * rows + i] = sum(total[0]) - (dlse_in != nullptr ? dlse_in[at + i] : acc_t(0));
        }
      }
    });
  }

  // From row `first` of all heads' on.
  Matrix<const Word> q_rows(int64_t first) const { return {q.get() + first * depth, depth, 1}; }
  Matrix<const Word> dy_rows(int64_t first) const { return {dy.get() + first * value_depth, value_depth, 1}; }
  Matrix<const Word> q_sums(int64_t first) const {
    return {(both ? q : q_summed).get() + first / Products::step * width, width, 1};
  }
  Matrix<const Word> dy_sums(int64_t first) const {
    return {(both ? dy : dy_summed).get() + first / Products::step * value_width, value_width, 1};
  }

 private:
  // Rows beyond the last are multiplied but never kept: zeros, so that no stale NaN slows them down.
  template <class scalar_t>
  void pack(Buffer<Word>& to, Buffer<Word>& summed, int64_t head, int64_t to_row, int64_t summed_row,
            const scalar_t* from, int64_t from_row, int64_t L, int64_t size) {
    Products::pack_rows(to.get() + head * rows * to_row, to_row, from, from_row, L, size);
    std::fill(to.get() + (head * rows + L) * to_row, to.get() + (head + 1) * rows * to_row, Word(0));
    if (both) return;
    const int64_t pairs = rows / Products::step;
    Products::pack_summed(summed.get() + head * pairs * summed_row, summed_row, from, from_row, L, size);
    std::fill(summed.get() + (head * pairs + ceil_div(L, Products::step)) * summed_row,
              summed.get() + (head + 1) * pairs * summed_row, Word(0));
  }
};

// One block of keys against one block of queries of one head.
template <class Word, class acc_t>
struct BackwardBlock {
  Word *keys_t, *keys, *values_t;            // [depth][key_block], key_block x width, [value_depth][key_block]
  acc_t *s, *ds, *dk, *dv, *factor, *slope;  // scores become p; ds; sums over queries
};

template <class Products, class acc_t>
void attention_bwd_block(const Problem<acc_t>& p, const Example& e, const PackedQueries<Products, acc_t>& queries,
                         const BackwardBlock<typename Products::Word, acc_t>& w, acc_t* dq, int64_t b, int64_t h,
                         int64_t i0, int64_t j0, int64_t n) {
  using V = Vec<acc_t>;
  constexpr int64_t step = Products::step;
  const int64_t rows = std::min(query_block, e.L - i0);
  const int64_t r0 = std::max<int64_t>(0, e.first_query_of(j0, j0 + n) - i0) / product_rows * product_rows;
  const int64_t r1 = std::min(rows, e.last_query_of(j0, j0 + n) - i0);
  if (r0 >= r1) return;
  const Masked mask = masked(p, b, h, i0 + r0, i0 + r1, j0, n);
  if (mask == Masked::none) return;
  const int64_t first = (b * p.H + h) * queries.rows + i0 + r0, m = r1 - r0;
  const Matrix<acc_t> p_block{w.s, score_stride, 1}, ds_block{w.ds, score_stride, 1};
  Products::template product<false>(queries.q_rows(first), {w.keys_t, key_block, 1}, p_block, m, key_block,
                                    ceil_div(p.D, step));
  Products::template product<false>(queries.dy_rows(first), {w.values_t, key_block, 1}, ds_block, m, key_block,
                                    ceil_div(p.E, step));
  const bool capped = p.softcap != 0;
  for (int64_t r = 0; r < m; ++r) {
    acc_t *s = w.s + r * score_stride, *ds = w.ds + r * score_stride;
    finish_scores(p, e, b, h, i0 + r0 + r, j0, n, mask == Masked::some, s, capped ? w.slope : nullptr);
    if (p.random != nullptr) keep_row(p, b, h, i0 + r0 + r, j0, w.factor);
    const V lse(queries.lse[first + r]), delta(queries.delta[first + r]);
    for (int64_t j = 0; j < key_block; j += V::width) {
      const V power = exp(V::load(s + j) - lse);
      V dp = V::load(ds + j), kept = power;
      if (p.random != nullptr) {
        const V factor = V::load(w.factor + j) * V(p.keep_scale);
        dp = dp * factor, kept = power * factor;
      }
      V d = power * (dp - delta) * V(p.scale);
      if (capped) d = d * V::load(w.slope + j);
      kept.store(s + j);
      d.store(ds + j);
    }
  }
  clear_rounding(w.s, m);
  clear_rounding(w.ds, m);
  const Matrix<acc_t> dk{w.dk, queries.width, 1}, dv{w.dv, queries.value_width, 1};
  Products::template product<true>(Products::narrow_columns(p_block, p_block, m, key_block), queries.dy_sums(first), dv,
                                   n, queries.value_width, ceil_div(m, step));
  // p is not needed any more.
  Products::template product<true>(Products::narrow_columns(p_block, ds_block, m, key_block), queries.q_sums(first), dk,
                                   n, queries.width, ceil_div(m, step));
  Products::template product<true>(Products::narrow_rows(ds_block, m, key_block), {w.keys, queries.width, 1},
                                   {dq + (i0 + r0) * queries.width, queries.width, 1}, m, queries.width,
                                   ceil_div(n, step));
}

template <class Products, class scalar_t, class acc_t>
void attention_bwd_all(const Problem<acc_t>& p, const scalar_t* dy, const scalar_t* q, const scalar_t* k,
                       const scalar_t* v, const scalar_t* o, const acc_t* lse, const acc_t* dlse, scalar_t* dq,
                       scalar_t* dk, scalar_t* dv) {
  using Word = typename Products::Word;
  const PackedQueries<Products, acc_t> queries(p, q, dy, o, lse, dlse);
  const int64_t heads = p.H / std::max<int64_t>(p.G, 1), blocks = ceil_div(p.S, key_block);
  // Partial sums of dq: as many as keep a few threads busy, a number that depends on the shape alone.
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(blocks, 8 / std::max<int64_t>(p.B * heads, 1)));
  const int64_t part_size = p.B * p.H * queries.rows * queries.width;
  Buffer<acc_t> partial(parts * part_size);
  parallel_for(p.B * heads * parts, 1, [&](int64_t begin, int64_t end) {
    const int64_t rows = round_up(key_block, product_rows), width = queries.width, value_width = queries.value_width;
    const int64_t depth = ceil_div(p.D, Products::step), value_depth = ceil_div(p.E, Products::step);
    const int64_t sizes[] = {depth * key_block,
                             key_block / Products::step * width,
                             value_depth * key_block,
                             query_block * score_stride,
                             query_block * score_stride,
                             rows * width,
                             rows * value_width,
                             key_block,
                             key_block};
    int64_t total = 0;
    for (int64_t size : sizes) total += round_up(size, 16);
    Buffer<acc_t> scratch(total, acc_t(0));
    acc_t* next = scratch.get();
    auto take = [&, n = 0]() mutable {
      acc_t* here = next;
      next += round_up(sizes[n++], 16);
      return here;
    };
    BackwardBlock<Word, acc_t> w;
    static_assert(sizeof(Word) == sizeof(acc_t));
    for (Word** field : {&w.keys_t, &w.keys, &w.values_t}) *field = reinterpret_cast<Word*>(take());
    for (acc_t** field : {&w.s, &w.ds, &w.dk, &w.dv, &w.factor, &w.slope}) *field = take();
    for (int64_t at = begin; at < end; ++at) {
      const int64_t part = at % parts, hk = at / parts % heads, b = at / parts / heads;
      const Example e = attention::example(p, b);
      acc_t* sum_dq = partial.get() + part * part_size + (b * p.H + hk * p.G) * queries.rows * width;
      std::fill(sum_dq, sum_dq + p.G * queries.rows * width, acc_t(0));
      const int64_t all_rows = p.cu_q != nullptr ? e.S : p.S;  // keys beyond a length have gradient 0
      for (int64_t j0 = part * key_block; j0 < all_rows; j0 += parts * key_block) {
        const int64_t n = std::min(key_block, e.S - j0);
        std::fill(w.dk, w.dk + rows * width, acc_t(0));
        std::fill(w.dv, w.dv + rows * value_width, acc_t(0));
        if (n > 0) {
          const scalar_t* k_row = k + b * p.k.batch + hk * p.k.head + (e.k0 + j0) * p.k.row;
          const scalar_t* v_row = v + b * p.v.batch + hk * p.v.head + (e.k0 + j0) * p.v.row;
          Products::pack_columns(w.keys_t, key_block, k_row, p.k.row, n, p.D);
          Products::pack_summed(w.keys, width, k_row, p.k.row, n, p.D);
          Products::pack_columns(w.values_t, key_block, v_row, p.v.row, n, p.E);
          for (int64_t g = 0; g < p.G; ++g)
            for (int64_t i0 = e.first_query_of(j0, j0 + n) / query_block * query_block;
                 i0 < e.last_query_of(j0, j0 + n); i0 += query_block)
              attention_bwd_block(p, e, queries, w, sum_dq + g * queries.rows * width, b, hk * p.G + g, i0, j0, n);
        }
        const int64_t kept = std::min(key_block, all_rows - j0);
        scalar_t* dk_row = dk + b * p.dk.batch + hk * p.dk.head + (e.k0 + j0) * p.dk.row;
        scalar_t* dv_row = dv + b * p.dv.batch + hk * p.dv.head + (e.k0 + j0) * p.dv.row;
        for (int64_t j = 0; j < kept; ++j) {
          unpack_row(dk_row + j * p.dk.row, w.dk + j * width, p.D);
          unpack_row(dv_row + j * p.dv.row, w.dv + j * value_width, p.E);
        }
      }
    }
  });
  parallel_for(p.B * p.H, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      const int64_t b = head / p.H, h = head % p.H;
      const Example e = attention::example(p, b);
      acc_t* sum = partial.get() + head * queries.rows * queries.width;
      for (int64_t part = 1; part < parts; ++part)
        each_vector<acc_t>(e.L * queries.width, [&](int64_t i, auto lanes) {
          (Vec<acc_t>::load(sum + i, lanes) + Vec<acc_t>::load(sum + part * part_size + i, lanes))
              .store(sum + i, lanes);
        });
      for (int64_t i = 0; i < e.L; ++i)
        unpack_row(dq + b * p.q.batch + h * p.q.head + (e.q0 + i) * p.q.row, sum + i * queries.width, p.D);
    }
  });
}

// ---- binding

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
                                         const OptionalTensor& mask_examples, const OptionalTensor& lengths,
                                         const OptionalTensor& cu_q, const OptionalTensor& cu_k,
                                         const OptionalTensor& slopes, const OptionalTensor& random, double scale,
                                         double softcap, int64_t left, int64_t right, bool bottom_right, double dropout,
                                         int64_t max_q, int64_t max_k) {
  OpScope op("attention_fwd", q);
  const attention::Arguments a{q,      k,     v,       mask,    mask_examples, lengths, cu_q,  cu_k,  slopes,
                               random, scale, softcap, dropout, left,          right,   max_q, max_k, bottom_right};
  return dispatch_floating(op, q.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    const Problem<acc_t> p = attention::problem<acc_t>(op, a);
    const int64_t heads = a.heads(k);
    Tensor o = attention::empty<scalar_t>(op, a, p.H, p.rows_q, p.E), lse = attention::empty_lse<acc_t>(op, a);
    attention_fwd_all(p, attention::in<scalar_t>(op, a, q, "q", p.H, p.rows_q, p.D),
                      attention::in_shared<scalar_t>(op, a, k, "k", heads, p.rows_k, p.D),
                      attention::in_shared<scalar_t>(op, a, v, "v", heads, p.rows_k, p.E),
                      attention::out<scalar_t>(op, a, o, "o", p.H, p.rows_q, p.E),
                      attention::out_lse<acc_t>(op, a, lse));
    return std::tuple(o, lse);
  });
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd(const Tensor& dy, const OptionalTensor& dlse, const Tensor& q,
                                                 const Tensor& k, const Tensor& v, const Tensor& o, const Tensor& lse,
                                                 const OptionalTensor& mask, const OptionalTensor& mask_examples,
                                                 const OptionalTensor& lengths, const OptionalTensor& cu_q,
                                                 const OptionalTensor& cu_k, const OptionalTensor& slopes,
                                                 const OptionalTensor& random, double scale, double softcap,
                                                 int64_t left, int64_t right, bool bottom_right, double dropout,
                                                 int64_t max_q, int64_t max_k) {
  OpScope op("attention_bwd", dy);
  const attention::Arguments a{q,      k,     v,       mask,    mask_examples, lengths, cu_q,  cu_k,  slopes,
                               random, scale, softcap, dropout, left,          right,   max_q, max_k, bottom_right};
  return dispatch_floating(op, q.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    const Problem<acc_t> p = attention::problem<acc_t>(op, a);
    const int64_t heads = a.heads(k);
    Tensor dq = attention::empty<scalar_t>(op, a, p.H, p.rows_q, p.D);
    Tensor dk = attention::empty<scalar_t>(op, a, heads, p.rows_k, p.D);
    Tensor dv = attention::empty<scalar_t>(op, a, heads, p.rows_k, p.E);
    with_products<scalar_t>([&]<class Products>(Products) {
      attention_bwd_all<Products>(p, attention::in<scalar_t>(op, a, dy, "dy", p.H, p.rows_q, p.E),
                                  attention::in<scalar_t>(op, a, q, "q", p.H, p.rows_q, p.D),
                                  attention::in_shared<scalar_t>(op, a, k, "k", heads, p.rows_k, p.D),
                                  attention::in_shared<scalar_t>(op, a, v, "v", heads, p.rows_k, p.E),
                                  attention::in<scalar_t>(op, a, o, "o", p.H, p.rows_q, p.E),
                                  attention::in_lse<acc_t>(op, a, lse, "lse"),
                                  dlse.has_value() ? attention::in_lse<acc_t>(op, a, *dlse, "dlse") : nullptr,
                                  attention::out<scalar_t>(op, a, dq, "dq", p.H, p.rows_q, p.D),
                                  attention::out<scalar_t>(op, a, dk, "dk", heads, p.rows_k, p.D),
                                  attention::out<scalar_t>(op, a, dv, "dv", heads, p.rows_k, p.E));
    });
    return std::tuple(dq, dk, dv);
  });
}

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, attention_fwd);
  PYOPS_IMPL(m, attention_bwd);
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
