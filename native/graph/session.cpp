#include "session.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "base/error.h"
#include "token_steps.h"

namespace squat {

namespace {

// Attention probabilities of what is in flight take heads * rows * keys bytes: fewer rows at a time
// where a layer holds very many tokens.
int most_rows(const Model& model, int longest) {
  constexpr int64_t kMostBytes = int64_t{1} << 28;
  const int64_t fits = kMostBytes / (int64_t{model.n_head} * longest);
  return static_cast<int>(std::clamp<int64_t>(fits, 1, Sequence::kChunk));
}

}  // namespace

Session::Session(const Model& model, const kernels::Choice& choice, ThreadPool& threads,
                 int context)
    : Sequence(model, choice, context),
      threads_(threads),
      ops_(float_ops(choice.isa->features)),
      most_rows_(most_rows(model, longest_)),
      score_rows_(std::clamp((1 << 19) / model.n_vocab, 1, 32)),
      angles_(model.graph.rotations.size()),
      scratch_(static_cast<size_t>(threads.size())) {
  chunks_.reserve(static_cast<size_t>(most_rows_));
  buffers_ = Memory(lay_out(Arena()));
  lay_out(Arena(buffers_));
  std::memset(narrow_rows_, 4, static_cast<size_t>(most_rows_));
}

size_t Session::lay_out(Arena arena) {
  const Model& m = model_;
  const size_t rows = static_cast<size_t>(most_rows_);
  const size_t keys = static_cast<size_t>(keys_padded(longest_));
  const size_t head_dim = static_cast<size_t>(m.head_dim);
  const int widest = std::max({m.n_embd, m.n_ff, m.n_embd_q()});

  row_tokens_ = arena.take<int32_t>(rows);
  row_positions_ = arena.take<int32_t>(rows);
  for (uint8_t*& widths : row_widths_) widths = arena.take<uint8_t>(rows);
  first_wide_rows_ = arena.take<uint8_t>(rows);
  narrow_rows_ = arena.take<uint8_t>(rows);
  residual_ = arena.take<float>(rows * static_cast<size_t>(m.n_embd));
  codes_ = arena.take<int8_t>(rows * static_cast<size_t>(widest));
  steps_ = arena.take<float>(rows);
  size_t made = 0, attended = 0;  // elements of a token, of whatever kind its layer is
  for (int l = 0; l < m.n_layer; l++) {
    made = std::max(made, static_cast<size_t>(made_by(l)));
    attended = std::max(attended, static_cast<size_t>(attended_by(l)));
  }
  qkv_ = arena.take<float>(rows * made);
  query_codes_ = arena.take<int8_t>(rows * static_cast<size_t>(m.n_embd_q()));
  key_codes_ = arena.take<int8_t>(rows * static_cast<size_t>(m.n_embd_kv()));
  const bool recent = m.sites.k.recent > 0;
  recent_codes_ = arena.take<int8_t>(recent ? rows * static_cast<size_t>(m.n_embd_kv()) : 0);
  value_codes_ = arena.take<int8_t>(rows * static_cast<size_t>(m.n_embd_kv()));
  query_multipliers_ = arena.take<int8_t>(rows * static_cast<size_t>(m.n_head));
  key_multipliers_ = arena.take<int8_t>(rows * static_cast<size_t>(m.n_head_kv));
  value_multipliers_ = arena.take<int8_t>(rows * static_cast<size_t>(m.n_head_kv));
  probs_steps_ = arena.take<float>(rows * static_cast<size_t>(m.n_head));
  attention_ = arena.take<float>(rows * attended);
  mlp_ = arena.take<float>(rows * 2 * static_cast<size_t>(m.n_ff));
  const size_t angles = rows * static_cast<size_t>(m.graph.rotated());
  for (Angles& a : angles_) a = {arena.take<float>(angles), arena.take<float>(angles)};
  branch_ = arena.take<float>(needs_branch() ? rows * static_cast<size_t>(m.n_embd) : 0);
  probs_ = arena.take<uint8_t>(rows * static_cast<size_t>(m.n_head) * keys);
  first_probs_ = arena.take<float>(rows * static_cast<size_t>(m.n_head));
  prepared_ = arena.take<uint8_t>(kernels::prepared_bytes(choice_, most_rows_, widest));
  score_logits_ =
      arena.take<float>(static_cast<size_t>(score_rows_) * static_cast<size_t>(m.n_vocab));

  const int query_rows = kQueryBlock * m.group();
  const size_t queries = static_cast<size_t>(query_rows);
  for (Scratch& s : scratch_) {
    s.row = arena.take<float>(static_cast<size_t>(widest));
    s.query_widths = arena.take<uint8_t>(queries);
    for (int32_t*& sums : s.sums) sums = arena.take<int32_t>(queries * std::max(keys, head_dim));
    s.recent_sums = arena.take<int32_t>(recent ? queries * recent_stride() : 0);
    s.scores = arena.take<float>(keys + kVector);
    s.key_multipliers = arena.take<float>(keys + kVector);
    s.value_multipliers = arena.take<float>(keys + kVector);
    for (uint8_t*& probs : s.probs) probs = arena.take<uint8_t>(queries * keys);
    s.prepared = arena.take<uint8_t>(
        kernels::prepared_bytes(choice_, query_rows, std::max(m.head_dim, longest_)));
  }

  return arena.used();
}

// ---------------------------------------------------------------------------------------------
// What the engine calls

size_t Session::take(Sequence* sequence, const int32_t* tokens, size_t n, size_t wanted) {
  const size_t count = std::min(n, static_cast<size_t>(most_rows_ - rows_));
  const size_t begin = std::min(n - wanted, count);
  Chunk chunk = {};
  chunk.sequence = sequence;
  chunk.row = rows_;
  chunk.position = sequence->length_;
  chunk.count = static_cast<int>(count);
  chunk.wanted = static_cast<int>(begin);
  for (int i = 0; i < chunk.count; i++) {
    const int row = chunk.row + i, position = chunk.position + i;
    row_tokens_[row] = sequence->tokens_[position] = tokens[i];
    row_positions_[row] = position;
    first_wide_rows_[row] = position == 0 ? 8 : 4;
  }
  rows_ += chunk.count;
  chunks_.push_back(chunk);
  return count;
}

template <class Body>
void Session::eval_chunks(const int32_t* tokens, size_t n, size_t wanted, Body&& body) {
  check_tokens(tokens, n, length_);
  while (n > 0) {
    const size_t count = take(this, tokens, n, wanted);
    forward();
    body(rows_);
    wanted -= static_cast<size_t>(rows_);
    rows_ = 0;
    tokens += count;
    n -= count;
  }
}

void Session::eval(const int32_t* tokens, size_t n, size_t wanted, float* logits) {
  eval_chunks(tokens, n, wanted, [&](int count) {
    head(0, count, logits);
    logits += static_cast<size_t>(count) * static_cast<size_t>(model_.n_vocab);
  });
}

void Session::eval_hidden(const int32_t* tokens, size_t n, size_t wanted, float* hidden) {
  const size_t n_embd = static_cast<size_t>(model_.n_embd);
  eval_chunks(tokens, n, wanted, [&](int count) {
    for (int i = 0; i < count; i++, hidden += n_embd) {
      normalize(model_.out_norm, residual_ + static_cast<size_t>(i) * n_embd, hidden);
    }
  });
}

void Session::step(const Turn* turns, size_t n, float* logits) {
  for (size_t i = 0; i < n; i++) {
    const Turn& turn = turns[i];
    try {
      turn.sequence->check_tokens(turn.tokens, turn.n, turn.sequence->length_);
    } catch (const Error& error) {
      throw Error(error.status(), "turn " + std::to_string(i) + ": " + error.what());
    }
  }
  size_t done = 0;  // tokens of the turn that is next
  for (size_t next = 0; next < n;) {
    while (next < n && rows_ < most_rows_) {
      const Turn& turn = turns[next];
      done += take(turn.sequence, turn.tokens + done, turn.n - done, 1);
      if (done < turn.n) break;
      done = 0;
      next++;
    }
    forward();
    head(0, rows_, logits);
    logits += static_cast<size_t>(rows_) * static_cast<size_t>(model_.n_vocab);
    rows_ = 0;
  }
}

double Session::score(const int32_t* tokens, size_t n, double* each) {
  check_tokens(tokens, n, 0);
  const int32_t* const end = tokens_ + std::min(static_cast<int>(n), scored_);
  int kept = static_cast<int>(std::mismatch<const int32_t*>(tokens_, end, tokens).first - tokens_);
  // The last of them says what comes next, which may be another token now.
  kept = kept > 0 && kept - 1 >= least_length() ? kept - 1 : 0;
  rewind(static_cast<size_t>(kept));
  int position = kept;
  const size_t left = n - static_cast<size_t>(kept);
  eval_chunks(tokens + kept, left, left, [&](int count) {
    // The last token's logits predict nothing that was asked for.
    const int predicting = std::min(count, static_cast<int>(n) - 1 - position);
    for (int first = 0; first < predicting; first += score_rows_) {
      const int rows = std::min(score_rows_, predicting - first);
      head(first, rows, score_logits_);
      threads_.parallel_for(rows, [&](int from, int to, int) {
        for (int i = from; i < to; i++) {
          const float* logits =
              score_logits_ + static_cast<size_t>(i) * static_cast<size_t>(model_.n_vocab);
          const int next = position + first + i + 1;
          terms_[next] = logits[tokens[next]] - ops_.log_sum_exp(logits, model_.n_vocab);
        }
      });
    }
    position += count;
  });
  scored_ = length_;
  double sum = 0;
  for (size_t i = 1; i < n; i++) sum += terms_[i];
  if (each != nullptr) std::copy(terms_ + 1, terms_ + n, each);
  return sum;
}

// ---------------------------------------------------------------------------------------------
// Steps that all parts of the network share

float* Session::normalize(const Norm& norm, const float* x, float* out) const {
  const int n = static_cast<int>(norm.weight.size());
  if (!norm.exists()) {
    if (out != x) std::memcpy(out, x, static_cast<size_t>(model_.n_embd) * sizeof(float));
  } else if (norm.bias.empty()) {
    ops_.rms_norm(x, norm.weight.data(), model_.norm_epsilon, n, out);
  } else {
    ops_.layer_norm(x, norm.weight.data(), norm.bias.data(), model_.norm_epsilon, n, out);
  }
  return out;
}

float Session::hadamard_scale(int block, int inner) {
  float scale = 1;
  for (int count = (block & -block) / inner; count >= 4; count /= 4) scale /= 2;
  return scale;
}

void Session::transform(const Site& site, int layer, float* x, int n) const {
  const int block = site.block(layer);
  if (block > 1) ops_.hadamard(x, n, block, site.inner, hadamard_scale(block, site.inner));
}

int8_t Session::multiplier_of(const Site& site, int layer, bool wide, const float* x, int n) const {
  if (site.peaks) return peak_quarters(ops_.largest(x, n));
  if (!site.token_exponents()) return kOne;
  const int most = wide || site.has_levels() ? 127 : 7;
  const float reach = site.step(layer, wide) * static_cast<float>(most << site.margin(wide));
  return exponent_quarters(ops_.largest(x, n), reach);
}

int8_t Session::quantize(const Site& site, int layer, bool wide, const float* x, int n,
                         int8_t* codes) const {
  const bool levels = !wide && site.has_levels();
  const int8_t quarters = multiplier_of(site, layer, wide, x, n);
  kernels::quantize(choice_, x, n, site.step(layer, wide) * multiplier(quarters),
                    wide || levels ? 8 : 4, codes);
  if (levels) {
    const Levels& table = site.levels[static_cast<size_t>(layer)];
    (site.cached ? ops_.to_level_codes : ops_.to_levels)(table, n, codes);
  }
  return quarters;
}

template <class Row>
Session::Input Session::quantize_rows(Step step_of_graph, const Site& site, int layer,
                                      const uint8_t* by_token, int first, int count, int size,
                                      Row&& row) {
  const Profile::Timer timer(profile_, step_of_graph);
  const uint8_t* widths = site_widths(site, by_token);
  Input input;
  input.codes = codes_ + static_cast<size_t>(first) * static_cast<size_t>(size);
  input.widths = code_widths(site, widths == nullptr ? nullptr : widths + first);
  input.rows = count;
  input.inner = size;
  input.steps = steps_ + first;
  threads_.parallel_for(count, [&](int begin, int end, int thread) {
    for (int i = first + begin; i < first + end; i++) {
      float* values = row(i, scratch_[static_cast<size_t>(thread)].row);
      transform(site, layer, values, size);
      const bool wide = is_wide(widths, i);
      const int8_t quarters = quantize(site, layer, wide, values, size,
                                       codes_ + static_cast<size_t>(i) * static_cast<size_t>(size));
      steps_[i] = site.step(layer, wide) * multiplier(quarters);
    }
  });
  return input;
}

void Session::multiply(Step step_of_graph, const Input& input, const Weights* weights,
                       size_t matrices, float* out, size_t stride, Add add,
                       const kernels::Aside* aside) {
  int64_t weight_count = 0, weight_bits = 0;
  for (size_t i = 0; i < matrices; i++) {
    const int64_t size = int64_t{weights[i].matrix.rows} * weights[i].matrix.inner;
    weight_count += size;
    weight_bits += size * kernels::bits_of(weights[i].matrix.layout->weights);
  }
  const Profile::Timer timer(profile_, step_of_graph, weight_count * input.rows, weight_bits / 8);
  kernels::ActivationRows rows;
  rows.codes = input.codes;
  rows.stride = static_cast<size_t>(input.inner);
  rows.rows = input.rows;
  rows.inner = input.inner;
  rows.bits = input.widths;
  rows.steps = input.steps;
  for (const kernels::WeightForm form : kernels::kWeightForms) {
    kernels::Product products[3];
    int count = 0;
    int64_t columns = 0;
    float* to = out;
    for (size_t i = 0; i < matrices; i++) {
      const Weights& w = weights[i];
      if (w.matrix.layout->weights == form) {
        const float* bias = w.bias.empty() ? nullptr : w.bias.data();
        kernels::Product& product = products[count++];
        product = {&w.matrix, kernels::Output::scaled(to, stride, w.steps, bias)};
        product.out.add = add == Add::kYes;
        columns += w.matrix.rows;
      }
      to += w.matrix.rows;
    }
    if (count == 0) continue;
    ThreadPool* threads = columns * input.rows * input.inner < kParallelWork ? nullptr : &threads_;
    kernels::matmul(kernels::prepare(choice_, form, rows, prepared_, threads), products, count,
                    threads, aside);
  }
}

void Session::add_to_residual(Step step_of_graph, const Input& input, const Weights& weights,
                              const Norm& after) {
  const size_t n_embd = static_cast<size_t>(model_.n_embd);
  const float scale = model_.graph.residual_scale;
  if (!after.exists() && scale == 1) {
    multiply(step_of_graph, input, &weights, 1, residual_, n_embd, Add::kYes);
    return;
  }
  multiply(step_of_graph, input, &weights, 1, branch_, n_embd);
  threads_.parallel_for(input.rows, [&](int begin, int end, int) {
    for (int i = begin; i < end; i++) {
      float* row = branch_ + static_cast<size_t>(i) * n_embd;
      normalize(after, row, row);
      for (size_t k = 0; k < n_embd; k++) row[k] *= scale;
      ops_.add(row, model_.n_embd, residual_ + static_cast<size_t>(i) * n_embd);
    }
  });
}

// ---------------------------------------------------------------------------------------------
// The network

void Session::forward() {
  const Model& m = model_;
  const size_t n_embd = static_cast<size_t>(m.n_embd), n_ff = static_cast<size_t>(m.n_ff);
  const size_t mlp_stride = m.gated() ? 2 * n_ff : n_ff;
  const auto normalized = [&](const Norm& norm) {
    return [&](int i, float* buffer) {
      return normalize(norm, residual_ + static_cast<size_t>(i) * n_embd, buffer);
    };
  };

  previous_ = nullptr;
  for (const Chunk& chunk : chunks_) {
    if (m.sites.k.recent > 0) chunk.sequence->make_recent_room(chunk.count);
  }
  embed();
  for (int l = 0; l < m.n_layer; l++) {
    const Layer& layer = m.layers[static_cast<size_t>(l)];
    const bool last = l + 1 == m.n_layer;
    current_ = widths_.empty() ? nullptr : row_widths_[l % 2];
    for (Chunk& chunk : chunks_) {
      chunk.sequence->make_room(l, chunk.count);
      chunk.first = chunk.sequence->first_[static_cast<size_t>(l)];
      chunk.needed = last ? chunk.wanted : 0;
    }
    const Input attn_in = quantize_rows(Step::kAttnIn, m.sites.attn_in, l, previous_, 0, rows_,
                                        m.n_embd, normalized(layer.attn_norm));
    const auto ask = [&](int part, int parts) { read_ahead(l, part, parts); };
    const kernels::Aside aside = kernels::Aside::of(ask);
    multiply(Step::kQkv, attn_in, layer.qkv.data(), layer.qkv.size(), qkv_,
             static_cast<size_t>(made_by(l)), Add::kNo, reads_ahead(l) ? &aside : nullptr);
    if (m.graph.attends(l)) {
      attend(l);
    } else {
      convolve(l);
    }
    if (last) keep_wanted();

    const int attended = attended_by(l);
    const Input attn_out = quantize_rows(
        Step::kAttnOut, m.sites.attn_out, l, current_, 0, rows_, attended,
        [&](int i, float*) { return attention_ + static_cast<ptrdiff_t>(i) * attended; });
    if (m.graph.parallel) {
      multiply(Step::kOutput, attn_out, &layer.attn_out, 1, branch_, n_embd);
    } else {
      add_to_residual(Step::kOutput, attn_out, layer.attn_out, layer.after_attn_norm);
    }

    const Input mlp_in = quantize_rows(Step::kMlpIn, m.sites.mlp_in, l, current_, 0, rows_,
                                       m.n_embd, normalized(layer.mlp_norm));
    multiply(Step::kGateUp, mlp_in, layer.mlp_in.data(), layer.mlp_in.size(), mlp_, mlp_stride);

    const auto activation = m.graph.activation == Graph::Activation::kSilu       ? ops_.silu
                            : m.graph.activation == Graph::Activation::kGeluTanh ? ops_.gelu_tanh
                                                                                 : ops_.gelu;
    const auto activate = [&](int i, float*) {
      float* row = mlp_ + static_cast<size_t>(i) * mlp_stride;
      activation(row, m.gated() ? row + n_ff : nullptr, m.n_ff, row);
      return row;
    };
    const Input mlp_mid =
        quantize_rows(Step::kMlpMid, m.sites.mlp_mid, l, current_, 0, rows_, m.n_ff, activate);
    if (m.graph.parallel) {
      multiply(Step::kDown, mlp_mid, &layer.mlp_mid, 1, branch_, n_embd, Add::kYes);
      ops_.add(branch_, rows_ * m.n_embd, residual_);
    } else {
      add_to_residual(Step::kDown, mlp_mid, layer.mlp_mid, layer.after_mlp_norm);
    }
    previous_ = current_;
  }
  for (const Chunk& chunk : chunks_) {
    chunk.sequence->length_ += chunk.count;
    chunk.sequence->token_count_ += static_cast<uint64_t>(chunk.count);
  }
  chunks_.clear();
}

void Session::keep_wanted() {
  const size_t n_embd = static_cast<size_t>(model_.n_embd);
  const size_t attended = static_cast<size_t>(attended_by(model_.n_layer - 1));
  const auto move = [](auto* rows, size_t size, size_t from, size_t to, size_t count) {
    std::memmove(rows + to * size, rows + from * size, count * size * sizeof *rows);
  };
  size_t kept = 0;
  for (const Chunk& chunk : chunks_) {
    const size_t from = static_cast<size_t>(chunk.row + chunk.wanted);
    const size_t count = static_cast<size_t>(chunk.count - chunk.wanted);
    move(residual_, n_embd, from, kept, count);
    move(attention_, attended, from, kept, count);
    move(first_wide_rows_, 1, from, kept, count);
    if (current_ != nullptr) move(current_, 1, from, kept, count);
    kept += count;
  }
  rows_ = static_cast<int>(kept);
}

// Tokens keep the width that they had. Everything else is elementwise in float32, in the order of
// docs/format.md, "Graph".
void Session::convolve(int layer) {
  const Profile::Timer timer(profile_, Step::kConvolution);
  const size_t n = static_cast<size_t>(model_.n_embd);
  const size_t taps = static_cast<size_t>(model_.graph.reach(layer));
  const float* weights = model_.layers[static_cast<size_t>(layer)].convolution.data();
  for (const Chunk& chunk : chunks_) {
    if (current_ != nullptr) {
      for (int i = 0; i < chunk.count; i++) {
        set_width(chunk, layer, i, is_wide(previous_, chunk.row + i));
      }
    }
    float* const rows = chunk.sequence->mixed(layer) + static_cast<size_t>(chunk.past()) * n;
    const float* const made = qkv_ + static_cast<size_t>(chunk.row) * 3 * n;
    float* const results = attention_ + static_cast<size_t>(chunk.row) * n;
    threads_.parallel_for(chunk.count, [&](int begin, int end, int) {
      for (size_t i = static_cast<size_t>(begin); i < static_cast<size_t>(end); i++) {
        const float *before = made + i * 3 * n, *x = before + 2 * n;
        for (size_t k = 0; k < n; k++) rows[i * n + k] = before[k] * x[k];
      }
    });
    threads_.parallel_for(chunk.count - chunk.needed, [&](int begin, int end, int) {
      for (int t = chunk.needed + begin; t < chunk.needed + end; t++) {
        const size_t i = static_cast<size_t>(t);
        const float* behind = made + i * 3 * n + n;
        const float* oldest = rows + i * n - (taps - 1) * n;
        float* out = results + i * n;
        for (size_t k = 0; k < n; k++) out[k] = weights[k] * oldest[k];
        for (size_t tap = 1; tap < taps; tap++) {
          for (size_t k = 0; k < n; k++) out[k] += weights[tap * n + k] * oldest[tap * n + k];
        }
        for (size_t k = 0; k < n; k++) out[k] *= behind[k];
      }
    });
  }
}

void Session::turn(const Rotation& rotation, int position, const Angles& row) {
  for (size_t p = 0; p < rotation.frequencies.size(); p++) {
    const double angle = static_cast<float>(position) * rotation.frequencies[p];
    float *cosine = row.cosine + 2 * p, *sine = row.sine + 2 * p;
    cosine[0] = cosine[1] = static_cast<float>(std::cos(angle)) * rotation.scale;
    sine[1] = static_cast<float>(std::sin(angle)) * rotation.scale;
    sine[0] = -sine[1];
  }
}

void Session::embed() {
  const Profile::Timer timer(profile_, Step::kEmbedding);
  const Model& m = model_;
  const size_t n_embd = static_cast<size_t>(m.n_embd);
  const auto dequantize = [&](const CodeTensor& table, int row, int8_t* codes, float* out) {
    table.unpack(row, codes);  // the scales were checked when the model was loaded
    const float step = table.step(row);
    const int8_t* levels = table.levels();
    for (size_t k = 0; k < n_embd; k++) {
      out[k] = static_cast<float>(levels != nullptr ? levels[codes[k] + 8] : codes[k]) * step;
    }
  };
  threads_.parallel_for(rows_, [&](int begin, int end, int thread) {
    for (int i = begin; i < end; i++) {
      const size_t row = static_cast<size_t>(i);
      int8_t* codes = codes_ + row * n_embd;
      float* x = residual_ + row * n_embd;
      dequantize(*m.embedding, row_tokens_[i], codes, x);
      if (m.embedding_block > 1) {
        ops_.hadamard(x, m.n_embd, m.embedding_block, 1, hadamard_scale(m.embedding_block));
      }
      if (m.graph.embedding_scale != 1) {
        for (size_t k = 0; k < n_embd; k++) x[k] *= m.graph.embedding_scale;
      }
      const int position = row_positions_[i];
      float* learned = scratch_[static_cast<size_t>(thread)].row;
      if (m.positions.codes) {
        dequantize(*m.positions.codes, position, codes, learned);
        ops_.add(learned, m.n_embd, x);
      } else if (m.positions.floats != nullptr) {
        const size_t bytes = n_embd * sizeof(float);
        std::memcpy(learned, m.positions.floats + static_cast<size_t>(position) * bytes, bytes);
        ops_.add(learned, m.n_embd, x);
      }
      for (size_t r = 0; r < angles_.size(); r++) {
        turn(m.graph.rotations[r], position, angles_[r].of(i, m.graph.rotated()));
      }
    }
  });
}

void Session::head(int first, int count, float* logits) {
  if (count == 0) return;
  const size_t n_embd = static_cast<size_t>(model_.n_embd);
  const Input input = quantize_rows(
      Step::kHeadIn, model_.sites.head_in, 0, nullptr, first, count, model_.n_embd,
      [&](int i, float* buffer) {
        return normalize(model_.out_norm, residual_ + static_cast<size_t>(i) * n_embd, buffer);
      });
  const size_t n_vocab = static_cast<size_t>(model_.n_vocab);
  multiply(Step::kHead, input, &model_.head, 1, logits, n_vocab);
  if (model_.graph.logit_divisor == 1) return;
  for (size_t i = 0; i < static_cast<size_t>(count) * n_vocab; i++) {
    logits[i] /= model_.graph.logit_divisor;
  }
}

}  // namespace squat
