// The attention of a session: scores, probabilities, the tokens' widths, weighted values.
//
// Tokens are rotated and quantized one after the other, as their vectors stand side by side; the
// codes are laid out by head, and from there on heads are independent of each other. Probabilities
// come first for all heads, since a token's importance, and with it the width of its value, is an
// average over heads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "session.h"
#include "token_steps.h"

namespace squat {

constexpr float kOctaves = 1.44269504f;  // log2(e): of scores, for a softmax in base 2

template <class Append, class Attend>
void Session::for_blocks(int64_t macs, Append&& append, Attend&& attend) {
  const int heads = model_.n_head_kv, all = static_cast<int>(chunks_.size()) * heads;
  const auto chunk_of = [&](int i) -> const Chunk& { return chunks_[static_cast<size_t>(i)]; };
  const auto block_of = [](const Chunk& chunk, int begin) {
    return Tokens{begin, std::min(begin + kQueryBlock, chunk.count)};
  };
  const bool alone = macs < kParallelWork;
  const auto share = [&](int count, auto&& body) {
    const auto run = [&](int begin, int end, int thread) {
      for (int i = begin; i < end; i++) body(i, scratch_[static_cast<size_t>(thread)]);
    };
    alone ? run(0, count, 0) : threads_.parallel_for(count, run);
  };
  int longest = 0;
  for (const Chunk& chunk : chunks_) longest = std::max(longest, chunk.count);
  // Few heads are not many threads' work: then queries are shared as well, in so many parts that
  // threads have as much to do, and each block waits for its keys or values.
  const int threads = alone ? 1 : threads_.size();
  const int parts = std::min({threads / std::gcd(threads, all), longest, kQueryBlock});
  if (parts == 1) {
    share(all, [&](int i, Scratch& scratch) {
      const Chunk& chunk = chunk_of(i / heads);
      for (int begin = 0; begin < chunk.count; begin += kQueryBlock) {
        const Tokens block = block_of(chunk, begin);
        append(chunk, i % heads, block);
        attend(chunk, i % heads, block, block, scratch);
      }
    });
    return;
  }
  for (int begin = 0; begin < longest; begin += kQueryBlock) {
    share(all, [&](int i, Scratch&) {
      const Chunk& chunk = chunk_of(i / heads);
      if (begin < chunk.count) append(chunk, i % heads, block_of(chunk, begin));
    });
    share(all * parts, [&](int i, Scratch& scratch) {
      const int head = i / parts % heads, part = i % parts;
      const Chunk& chunk = chunk_of(i / parts / heads);
      if (begin >= chunk.count) return;
      const Tokens block = block_of(chunk, begin);
      const int size = block.end - begin;
      const Tokens queries = {begin + size * part / parts, begin + size * (part + 1) / parts};
      attend(chunk, head, block, queries, scratch);
    });
  }
}

int Session::parts_of_heads(int64_t macs) const {
  // The products of all heads stand in the buffer of one block.
  const bool alone =
      chunks_.size() == 1 && chunks_[0].count == 1 && model_.n_head_kv <= kQueryBlock;
  if (!alone || macs < kParallelWork) return 1;
  return threads_.size() / std::gcd(threads_.size(), model_.n_head_kv);
}

size_t Session::sums_of_head() const {
  return static_cast<size_t>(model_.group()) *
         static_cast<size_t>(std::max(keys_padded(longest_), model_.head_dim));
}

template <class Body>
void Session::for_parts(int parts, Body&& body) {
  threads_.parallel_for(model_.n_head_kv * parts, [&](int begin, int end, int thread) {
    for (int i = begin; i < end; i++) {
      // Every head has its place in the sums of the first thread.
      const int head = i / parts;
      Scratch scratch = scratch_[static_cast<size_t>(thread)];
      for (size_t width = 0; width < 2; width++) {
        scratch.sums[width] = scratch_[0].sums[width] + static_cast<size_t>(head) * sums_of_head();
      }
      const int rows = head * model_.group();
      scratch.recent_sums = scratch_[0].recent_sums + static_cast<size_t>(rows) * recent_stride();
      body(head, kernels::Part{i % parts, parts}, scratch);
    }
  });
}

template <class Pool>
void Session::append(const Chunk& chunk, int head, Tokens block, const uint8_t* widths,
                     const int8_t* codes, Pool* wide, Pool* narrow) const {
  const int end = chunk.row + block.end;
  for (int row = chunk.row + block.begin, next = row; row < end; row = next) {
    const bool is = is_wide(widths, row);
    while (next < end && is_wide(widths, next) == is) next++;
    (is ? wide : narrow)->append(codes + codes_at(1, head, row), next - row);
  }
}

void Session::attend(int layer) {
  const Model& m = model_;
  int64_t pairs = 0, keys_read = 0;
  size_t probs = 0;
  for (Chunk& chunk : chunks_) {
    // A token sees on average this many keys.
    pairs += int64_t{chunk.count} * (2 * chunk.past() + chunk.count + 1) / 2;
    keys_read += chunk.keys();
    chunk.probs_at = probs;
    probs += static_cast<size_t>(chunk.count * m.n_head) *
             static_cast<size_t>(keys_padded(chunk.keys()));
  }
  const int64_t macs = pairs * m.n_embd_q(), bytes = keys_read * m.n_embd_kv();
  const int keys_at = m.n_embd_q(), values_at = keys_at + m.n_embd_kv();
  const int parts = parts_of_heads(macs);
  const Chunk& alone = chunks_[0];
  const Tokens token = {0, 1};
  const kernels::Part whole;
  {
    const Profile::Timer timer(profile_, Step::kScores, macs, bytes);
    const int block = m.sites.k.block(layer);
    const int power = block & -block;
    const float scale = hadamard_scale(block);
    // Scores stay what they were: queries get what keys have left of 1 / power.
    const float rest = 1 / (static_cast<float>(power) * scale);
    const Layer& l = m.layers[static_cast<size_t>(layer)];
    const float* center = l.k_center.empty() ? nullptr : l.k_center.data();
    int8_t* recent = m.recent_keys(layer) > 0 ? recent_codes_ : nullptr;
    quantize_vectors(layer, {m.sites.k, previous_, keys_at, 1, &l.k_norm, scale, center, key_codes_,
                             key_multipliers_, recent});
    quantize_vectors(layer, {m.sites.q, previous_, 0, m.group(), &l.q_norm, rest, nullptr,
                             query_codes_, query_multipliers_, nullptr});
    if (m.sites.v.multiplied()) measure_values(layer, values_at);
    if (parts > 1) {
      for (int h = 0; h < m.n_head_kv; h++) append_keys(alone, layer, h, token);
      for_parts(parts, [&](int head, kernels::Part part, Scratch& scratch) {
        multiply_keys(alone, layer, head, token, token, part, scratch);
      });
      for_parts(parts, [&](int head, kernels::Part part, Scratch& scratch) {
        make_probs(alone, layer, head, token, token, part, scratch);
      });
    } else {
      for_blocks(
          macs,
          [&](const Chunk& chunk, int head, Tokens block) {
            append_keys(chunk, layer, head, block);
          },
          [&](const Chunk& chunk, int head, Tokens block, Tokens queries, Scratch& scratch) {
            multiply_keys(chunk, layer, head, block, queries, whole, scratch);
            make_probs(chunk, layer, head, block, queries, whole, scratch);
          });
    }
    for (const Chunk& chunk : chunks_) decide_widths(chunk, layer);
  }
  const Profile::Timer timer(profile_, Step::kValues, macs, bytes);
  quantize_vectors(layer, {m.sites.v, current_, values_at, 1, nullptr, 1, nullptr, value_codes_,
                           value_multipliers_, nullptr});
  if (parts > 1) {
    for (int h = 0; h < m.n_head_kv; h++) append_values(alone, layer, h, token);
    for_parts(parts, [&](int head, kernels::Part part, Scratch& scratch) {
      weigh(alone, layer, head, token, token, part, scratch);
    });
    return;
  }
  for_blocks(
      macs,
      [&](const Chunk& chunk, int head, Tokens block) { append_values(chunk, layer, head, block); },
      [&](const Chunk& chunk, int head, Tokens block, Tokens queries, Scratch& scratch) {
        weigh(chunk, layer, head, block, queries, whole, scratch);
      });
}

bool Session::reads_ahead(int layer) const {
  if (chunks_.size() < static_cast<size_t>(rows_)) return false;
  size_t bytes = 0;
  for (const Chunk& chunk : chunks_) {
    for (int h = 0; h < model_.n_head_kv; h++) {
      bytes += chunk.sequence->pools(layer, h).used_bytes();
    }
  }
  return bytes <= kReadAhead * static_cast<size_t>(threads_.size());
}

void Session::read_ahead(int layer, int part, int parts) const {
  // Parts, and heads of all sequences, on lines of one length: most of what a thread asks for is
  // what it will read.
  const int heads = model_.n_head_kv, all = static_cast<int>(chunks_.size()) * heads;
  const int begin = part * all, end = begin + all;
  for (int i = begin / parts; i * parts < end; i++) {
    const Chunk& chunk = chunks_[static_cast<size_t>(i / heads)];
    chunk.sequence->pools(layer, i % heads)
        .prefetch(std::max(begin - i * parts, 0), std::min(end - i * parts, parts), parts);
  }
}

void Session::quantize_vectors(int layer, const Vectors& vectors) {
  const Model& m = model_;
  const Site& site = vectors.site;
  const int group = vectors.group;
  const uint8_t* widths = site_widths(site, vectors.by_token);
  const bool is_value = vectors.norm == nullptr;
  const int block = is_value ? 1 : m.sites.k.block(layer);
  const int rotation = is_value ? -1 : m.graph.rotation[static_cast<size_t>(layer)];
  const int turned = m.graph.rotated(), heads = m.n_head_kv * group;
  const size_t size = static_cast<size_t>(m.head_dim);
  const size_t normed = is_value ? 0 : vectors.norm->weight.size();
  threads_.parallel_for(rows_, [&](int begin, int end, int) {
    for (int i = begin; i < end; i++) {
      const bool wide = is_wide(widths, i);
      float* x =
          qkv_ + static_cast<size_t>(i) * static_cast<size_t>(m.n_embd_qkv()) + vectors.column;
      if (normed > size) normalize(*vectors.norm, x, x);  // all heads together
      for (int v = 0; v < heads; v++, x += m.head_dim) {
        if (normed == size) normalize(*vectors.norm, x, x);
        if (rotation >= 0) {
          const Angles angles = angles_[static_cast<size_t>(rotation)].of(i, turned);
          ops_.rotate(angles.cosine, angles.sine, turned, x);
        }
        if (block > 1) ops_.hadamard(x, m.head_dim, block, 1, vectors.scale);
        if (vectors.center != nullptr) {
          const float* center = vectors.center + v * m.head_dim;
          for (int k = 0; k < m.head_dim; k++) x[k] -= center[k];
        }
        const size_t to = vector_of(group, v / group, i) + static_cast<size_t>(v % group);
        const size_t at = to * static_cast<size_t>(m.head_dim);
        vectors.multipliers[to] = quantize(site, layer, wide, x, m.head_dim, vectors.codes + at);
        if (vectors.wide_codes != nullptr) {
          quantize(site, layer, true, x, m.head_dim, vectors.wide_codes + at);
        }
      }
    }
  });
}

// Probabilities take in what values multiply their steps by, which no width changes: it is known
// before the tokens' widths are.
void Session::measure_values(int layer, int column) {
  const Model& m = model_;
  for (int i = 0; i < rows_; i++) {
    const float* x = qkv_ + static_cast<size_t>(i) * static_cast<size_t>(m.n_embd_qkv()) + column;
    for (int h = 0; h < m.n_head_kv; h++, x += m.head_dim) {
      value_multipliers_[vector_of(1, h, i)] = multiplier_of(m.sites.v, layer, true, x, m.head_dim);
    }
  }
}

uint8_t* Session::probs_row(const Chunk& chunk, int token, int query_head) const {
  const int group = model_.group();
  const int row = (query_head / group * chunk.count + token) * group + query_head % group;
  return probs_ + chunk.probs_at +
         static_cast<size_t>(row) * static_cast<size_t>(keys_padded(chunk.keys()));
}

void Session::append_keys(const Chunk& chunk, int layer, int head, Tokens block) {
  HeadPools& pools = chunk.sequence->pools(layer, head);
  append(chunk, head, block, site_widths(model_.sites.k, previous_), key_codes_, &pools.key8,
         &pools.key4);
  if (model_.recent_keys(layer) > 0) {
    pools.recent.append(recent_codes_ + codes_at(1, head, chunk.row + block.begin),
                        block.end - block.begin);
  }
  const auto keep = [&](int8_t* kept, const int8_t* made) {
    if (kept == nullptr) return;
    std::memcpy(kept + chunk.past() + block.begin,
                made + vector_of(1, head, chunk.row + block.begin),
                static_cast<size_t>(block.end - block.begin));
  };
  keep(pools.key_multipliers, key_multipliers_);
  keep(pools.value_multipliers, value_multipliers_);
}

Session::RecentKeys Session::recent_keys(const Chunk& chunk, int layer, int head, int query) const {
  const int begin = chunk.sequence->recent_first_;
  const int oldest = std::max(chunk.position + query - model_.recent_keys(layer) + 1 - begin, 0);
  RecentKeys keys = {chunk.sequence->pools(layer, head).recent, begin};
  keys.first += keys.pool.skip_panels(oldest);
  return keys;
}

void Session::set_query_widths(const Chunk& chunk, Tokens queries, Scratch& scratch) const {
  const uint8_t* widths = site_widths(model_.sites.q, previous_);
  const int group = model_.group(), rows = (queries.end - queries.begin) * group;
  for (int row = 0; row < rows; row++) {
    const int token = queries.begin + row / group;
    scratch.query_widths[row] = is_wide(widths, chunk.row + token) ? 8 : 4;
  }
}

void Session::multiply_keys(const Chunk& chunk, int layer, int head, Tokens block, Tokens queries,
                            kernels::Part part, Scratch& scratch) const {
  const Model& m = model_;
  const int group = m.group();
  queries.begin = std::max(queries.begin, first_query(chunk));
  if (queries.begin >= queries.end) return;
  set_query_widths(chunk, queries, scratch);
  const HeadPools& pools = chunk.sequence->pools(layer, head);
  const uint8_t* widths = site_widths(m.sites.q, previous_);
  kernels::ActivationRows input;
  input.codes = query_codes_ + codes_at(group, head, chunk.row + queries.begin);
  input.stride = static_cast<size_t>(m.head_dim);
  input.rows = (queries.end - queries.begin) * group;
  input.inner = m.head_dim;
  input.bits = code_widths(m.sites.q, widths) == nullptr ? nullptr : scratch.query_widths;
  const size_t stride = static_cast<size_t>(keys_padded(chunk.past() + block.end));
  const auto prepare = [&](kernels::WeightForm form) {
    return kernels::prepare(choice_, form, input, scratch.prepared);
  };
  if (pools.key4.count() > 0) {
    kernels::scores(prepare(pools.key4.form()), pools.key4, scratch.sums[1], stride, part);
  }
  const bool recent = m.recent_keys(layer) > 0;
  if (pools.key8.count() == 0 && !recent) return;
  const kernels::Prepared rows = prepare(kernels::WeightForm::w8);
  if (pools.key8.count() > 0) {
    kernels::scores(rows, pools.key8, scratch.sums[0], stride, part);
  }
  if (recent) {
    kernels::scores(rows, recent_keys(chunk, layer, head, queries.begin).pool, scratch.recent_sums,
                    recent_stride(), part);
  }
}

void Session::make_probs(const Chunk& chunk, int layer, int head, Tokens block, Tokens queries,
                         kernels::Part part, Scratch& scratch) {
  const int group = model_.group();
  queries.begin = std::max(queries.begin, first_query(chunk));
  const int rows = (queries.end - queries.begin) * group;
  const int begin = rows * part.index / part.of, end = rows * (part.index + 1) / part.of;
  if (begin >= end) return;
  set_query_widths(chunk, queries, scratch);
  const HeadPools& pools = chunk.sequence->pools(layer, head);
  const int keys = chunk.past() + block.end;
  // Once for all of them.
  const auto decode = [&](const int8_t* kept, float* multipliers) {
    if (kept != nullptr) ops_.decode_multipliers(kept, keys, multipliers);
  };
  decode(pools.key_multipliers, scratch.key_multipliers);
  decode(pools.value_multipliers, scratch.value_multipliers);
  const int recent = model_.recent_keys(layer) > 0
                         ? recent_keys(chunk, layer, head, queries.begin).first - chunk.first
                         : 0;
  for (int row = begin; row < end; row++) {
    const int token = queries.begin + row / group, query_head = head * group + row % group;
    attention_row(chunk, layer, token, query_head, row, keys_padded(keys), recent, pools, scratch);
    // What later tokens of the block have put into the pools is not seen.
    const int visible = chunk.past() + token + 1;
    std::memset(probs_row(chunk, token, query_head) + visible, 0,
                static_cast<size_t>(keys - visible));
  }
}

// One query row: products with the pools to probabilities, in the order of positions. Here a key is
// a place among those that the layer holds; `recent` is the one where products in 8 bits begin.
void Session::attention_row(const Chunk& chunk, int layer, int token, int query_head, int row,
                            int stride, int recent, const HeadPools& pools, Scratch& scratch) {
  const Model& m = model_;
  const Site &q = m.sites.q, &k = m.sites.k;
  const int visible = chunk.past() + token + 1;
  const bool makes_codes = m.sites.probs_are_codes();
  const float scaling = m.graph.attention_scale * (makes_codes ? kOctaves : 1);
  const float* of_keys = pools.key_multipliers == nullptr ? nullptr : scratch.key_multipliers;
  const float* of_values = pools.value_multipliers == nullptr ? nullptr : scratch.value_multipliers;
  const int window = m.graph.window[static_cast<size_t>(layer)];
  const int first = window == 0 ? 0 : std::max(0, visible - window);
  const int group = m.group();
  const size_t vector = vector_of(group, query_head / group, chunk.row + token) +
                        static_cast<size_t>(query_head % group);
  const float query_step =
      q.step(layer, scratch.query_widths[row] == 8) * multiplier(query_multipliers_[vector]);
  const float step8 = query_step * k.step(layer, true);
  const float step4 = query_step * k.step(layer, false);
  const size_t offset = static_cast<size_t>(row) * static_cast<size_t>(stride);
  const int32_t *wide = scratch.sums[0] + offset, *narrow = scratch.sums[1] + offset;
  float* scores = scratch.scores;
  if (pools.key4.count() == 0) {
    ops_.scale_scores(wide, step8, of_keys, scaling, visible, scores);
  } else if (pools.key8.count() == 0) {
    ops_.scale_scores(narrow, step4, of_keys, scaling, visible, scores);
  } else {
    ops_.merge_scores(chunk.sequence->cached_widths(k, layer - 1) + chunk.first, wide, step8,
                      narrow, step4, of_keys, scaling, visible, scores);
  }
  if (m.recent_keys(layer) > 0) {
    const int from = std::max(visible - m.recent_keys(layer), 0);
    const int32_t* sums = scratch.recent_sums + static_cast<size_t>(row) * recent_stride();
    ops_.scale_scores(sums + (from - recent), step8, of_keys + from, scaling, visible - from,
                      scores + from);
  }
  // What lies before the window is masked up to a whole vector, and not computed with before that.
  const int begin = first / kVector * kVector;
  for (int i = begin; i < first; i++) scores[i] = -std::numeric_limits<float>::infinity();
  uint8_t* probs = probs_row(chunk, token, query_head);
  std::memset(probs, 0, static_cast<size_t>(begin));
  float* first_p = first_probs_ + (chunk.row + token) * m.n_head + query_head;
  scores += begin;
  probs += begin;
  if (of_values != nullptr) of_values += begin;
  const int count = visible - begin, at_first = first - begin;
  if (makes_codes) {
    const CodedRow coded = ops_.softmax_codes(scores, count, at_first, of_values, probs);
    *first_p = coded.first;
    probs_steps_[vector] = coded.step;
    return;
  }
  *first_p = ops_.softmax(scores, count, at_first);
  float step = m.sites.probs_step[static_cast<size_t>(layer)];
  if (of_values != nullptr) {
    step *= multiplier(peak_quarters(ops_.weigh(of_values, count, scores)));
  }
  probs_steps_[vector] = step;
  ops_.unsigned_codes(scores, count, 1.0f / step, probs);
}

float Session::importance(int layer, int row, int position) const {
  const Model& m = model_;
  if (m.importance == Importance::kRarity) {
    return static_cast<float>(m.token_ranks[static_cast<size_t>(row_tokens_[row])]);
  }
  if (m.importance == Importance::kValuePeak) {
    const size_t values_at = static_cast<size_t>(m.n_embd_q() + m.n_embd_kv());
    const size_t made = static_cast<size_t>(row) * static_cast<size_t>(m.n_embd_qkv());
    return ops_.value_peak(qkv_ + made + values_at, m.n_embd_kv());
  }
  float sum = 0;
  for (int h = 0; h < m.n_head; h++) sum += first_probs_[row * m.n_head + h];
  const float mean = sum / static_cast<float>(m.n_head);
  const int window = m.graph.window[static_cast<size_t>(layer)];
  const int visible = window == 0 ? position + 1 : std::min(position + 1, window);
  return m.importance == Importance::kFirstToken ? mean : mean * static_cast<float>(visible);
}

void Session::decide_widths(const Chunk& chunk, int layer) {
  if (widths_.empty()) return;
  const float threshold = model_.thresholds[static_cast<size_t>(layer)];
  for (int i = 0; i < chunk.count; i++) {
    const int position = chunk.position + i;
    const bool important = (model_.wide_first_token && position == 0) ||
                           importance(layer, chunk.row + i, position) >= threshold;
    set_width(chunk, layer, i, important);
  }
}

void Session::append_values(const Chunk& chunk, int layer, int head, Tokens block) {
  HeadPools& pools = chunk.sequence->pools(layer, head);
  append(chunk, head, block, site_widths(model_.sites.v, current_), value_codes_, &pools.value8,
         &pools.value4);
}

// The pools hold the values of their block.
void Session::weigh(const Chunk& chunk, int layer, int head, Tokens block, Tokens queries,
                    kernels::Part part, Scratch& scratch) {
  const Model& m = model_;
  const Site& v = m.sites.v;
  const int group = m.group();
  const int from = std::max(queries.begin, chunk.needed);
  if (from >= queries.end) return;
  const HeadPools& pools = chunk.sequence->pools(layer, head);
  const size_t head_dim = static_cast<size_t>(m.head_dim);
  const size_t stride = static_cast<size_t>(keys_padded(chunk.keys()));
  const float step8 = v.step(layer, true), step4 = v.step(layer, false);
  const float* steps_p = probs_steps_ + vector_of(group, head, chunk.row);

  const int rows = (queries.end - from) * group;
  const uint8_t* probs = probs_row(chunk, from, head * group);
  const bool both = pools.value8.count() > 0 && pools.value4.count() > 0;
  if (both) {
    const uint8_t* widths = chunk.sequence->cached_widths(v, layer) + chunk.first;
    for (size_t row = 0; row < static_cast<size_t>(rows); row++) {
      const size_t offset = row * stride;
      ops_.split_codes(widths, probs + offset, chunk.past() + block.end, scratch.probs[0] + offset,
                       scratch.probs[1] + offset);
    }
  }
  kernels::Columns made = {0, 0};
  for (const int bits : {8, 4}) {
    const kernels::ValuePool& pool = bits == 8 ? pools.value8 : pools.value4;
    if (pool.count() == 0) continue;
    kernels::ProbabilityRows input;
    input.codes = probs;
    input.stride = stride;
    input.rows = rows;
    input.inner = pool.count();
    if (both) input.codes = scratch.probs[bits == 4];
    made = kernels::weighted_values(choice_, input, pool, scratch.prepared, scratch.sums[bits == 4],
                                    head_dim, part);
  }
  for (int row = 0; row < rows; row++) {
    const size_t offset = static_cast<size_t>(row) * head_dim + static_cast<size_t>(made.begin);
    const int32_t* wide = pools.value8.count() > 0 ? scratch.sums[0] + offset : nullptr;
    const int32_t* narrow = pools.value4.count() > 0 ? scratch.sums[1] + offset : nullptr;
    const size_t token = static_cast<size_t>(from + row / group);
    float* out = attention_ +
                 (static_cast<size_t>(chunk.row) + token) * static_cast<size_t>(m.n_embd_q()) +
                 static_cast<size_t>(head * group + row % group) * head_dim +
                 static_cast<size_t>(made.begin);
    const float step_p =
        steps_p[token * static_cast<size_t>(group) + static_cast<size_t>(row % group)];
    ops_.combine_values(wide, step8, narrow, step4, step_p, made.end - made.begin, out);
  }
}

}  // namespace squat
