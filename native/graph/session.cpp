#include "session.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "base/error.h"
#include "token_steps.h"

namespace squat {

namespace {

constexpr int kChunk = 128;
// The oldest token that a layer holds is a multiple of this many into the text, so that float sums
// over what it holds have the same order whatever was dropped.
constexpr int kFirst = 64;

// Tokens before the next one that a layer keeps when it drops the others.
int kept(int reach) { return reach - 1 + Session::kTakenBack; }

// Tokens that a layer has room for.
int capacity(const Model& model, int layer, int context) {
  const int reach = model.graph.reach(layer);
  return reach == 0 ? context : std::min(context, kept(reach) + kFirst + std::max(reach, kChunk));
}

// The most tokens that any layer has room for.
int longest_of(const Model& model, int context) {
  int longest = 0;
  for (int l = 0; l < model.n_layer; l++) longest = std::max(longest, capacity(model, l, context));
  return longest;
}

// Attention probabilities of a chunk take heads * chunk * keys bytes: fewer tokens at a time where
// a layer holds very many.
int chunk_size(const Model& model, int longest) {
  constexpr int64_t kMostBytes = int64_t{1} << 28;
  const int64_t fits = kMostBytes / (int64_t{model.n_head} * longest);
  return static_cast<int>(std::clamp<int64_t>(fits, 1, std::min(kChunk, longest)));
}

}  // namespace

Session::Session(const Model& model, const kernels::Choice& choice, ThreadPool& threads,
                 int context)
    : model_(model),
      choice_(choice),
      threads_(threads),
      ops_(float_ops(choice.isa->features)),
      context_(context),
      longest_(longest_of(model, context)),
      chunk_(chunk_size(model, longest_)),
      score_rows_(std::clamp((1 << 19) / model.n_vocab, 1, 32)),
      wide_counts_(static_cast<size_t>(model.n_layer)),
      widths_(model.thresholds.size()),
      first_(static_cast<size_t>(model.n_layer)),
      angles_(model.graph.rotations.size()),
      pools_(static_cast<size_t>(model.n_layer) * static_cast<size_t>(model.n_head_kv)),
      mixed_(static_cast<size_t>(model.n_layer)),
      scratch_(static_cast<size_t>(threads.size())) {
  memory_ = Memory(lay_out(Arena()));
  lay_out(Arena(memory_));
  std::memset(first_wide_ + 1, 4, static_cast<size_t>(context_ + chunk_));
  *first_wide_ = 8;
}

size_t Session::lay_out(Arena arena) {
  const Model& m = model_;
  const size_t chunk = static_cast<size_t>(chunk_);
  const size_t keys = static_cast<size_t>(keys_padded(longest_));
  const size_t head_dim = static_cast<size_t>(m.head_dim);
  const int widest = std::max({m.n_embd, m.n_ff, m.n_embd_q()});

  tokens_ = arena.take<int32_t>(static_cast<size_t>(context_));
  residual_ = arena.take<float>(chunk * static_cast<size_t>(m.n_embd));
  codes_ = arena.take<int8_t>(chunk * static_cast<size_t>(widest));
  steps_ = arena.take<float>(chunk);
  size_t made = 0, attended = 0;  // elements of a token, of whatever kind its layer is
  for (int l = 0; l < m.n_layer; l++) {
    made = std::max(made, static_cast<size_t>(made_by(l)));
    attended = std::max(attended, static_cast<size_t>(attended_by(l)));
  }
  qkv_ = arena.take<float>(chunk * made);
  query_codes_ = arena.take<int8_t>(chunk * static_cast<size_t>(m.n_embd_q()));
  key_codes_ = arena.take<int8_t>(chunk * static_cast<size_t>(m.n_embd_kv()));
  value_codes_ = arena.take<int8_t>(chunk * static_cast<size_t>(m.n_embd_kv()));
  query_multipliers_ = arena.take<int8_t>(chunk * static_cast<size_t>(m.n_head));
  key_multipliers_ = arena.take<int8_t>(chunk * static_cast<size_t>(m.n_head_kv));
  value_multipliers_ = arena.take<int8_t>(chunk * static_cast<size_t>(m.n_head_kv));
  probs_steps_ = arena.take<float>(chunk * static_cast<size_t>(m.n_head));
  attention_ = arena.take<float>(chunk * attended);
  mlp_ = arena.take<float>(chunk * 2 * static_cast<size_t>(m.n_ff));
  const size_t angles = chunk * static_cast<size_t>(m.graph.rotated());
  for (Angles& a : angles_) a = {arena.take<float>(angles), arena.take<float>(angles)};
  branch_ = arena.take<float>(needs_branch() ? chunk * static_cast<size_t>(m.n_embd) : 0);
  probs_ = arena.take<uint8_t>(chunk * static_cast<size_t>(m.n_head) * keys);
  first_probs_ = arena.take<float>(chunk * static_cast<size_t>(m.n_head));
  first_wide_ = arena.take<uint8_t>(1 + static_cast<size_t>(context_) + chunk);
  prepared_ = arena.take<uint8_t>(kernels::prepared_bytes(choice_, chunk_, widest));
  score_logits_ =
      arena.take<float>(static_cast<size_t>(score_rows_) * static_cast<size_t>(m.n_vocab));
  score_terms_ = arena.take<double>(static_cast<size_t>(score_rows_));

  const int query_rows = kQueryBlock * m.group();
  const size_t rows = static_cast<size_t>(query_rows);
  for (Scratch& s : scratch_) {
    s.row = arena.take<float>(static_cast<size_t>(widest));
    s.query_widths = arena.take<uint8_t>(rows);
    for (int32_t*& sums : s.sums) sums = arena.take<int32_t>(rows * std::max(keys, head_dim));
    s.scores = arena.take<float>(keys);
    for (uint8_t*& probs : s.probs) probs = arena.take<uint8_t>(rows * keys);
    s.prepared = arena.take<uint8_t>(
        kernels::prepared_bytes(choice_, query_rows, std::max(m.head_dim, longest_)));
  }

  const size_t before = arena.used();
  for (uint8_t*& widths : widths_) {
    widths = arena.take<uint8_t>(static_cast<size_t>(keys_padded(context_)));
  }
  using Form = kernels::WeightForm;
  const auto key_pool = [&](Form form, bool used, int room, const int8_t* levels = nullptr) {
    const size_t bytes = kernels::KeyPool::bytes(choice_, form, m.head_dim, room);
    uint8_t* data = arena.take<uint8_t>(used ? bytes : 0);
    return data == nullptr ? kernels::KeyPool{}
                           : kernels::KeyPool::empty(choice_, form, m.head_dim, data, levels);
  };
  const auto value_pool = [&](Form form, bool used, int room, const int8_t* levels = nullptr) {
    const size_t bytes = kernels::ValuePool::bytes(choice_, form, m.head_dim, room);
    uint8_t* data = arena.take<uint8_t>(used ? bytes : 0);
    return data == nullptr
               ? kernels::ValuePool{}
               : kernels::ValuePool::empty(choice_, form, m.head_dim, room, data, levels);
  };
  const Site &k = m.sites.k, &v = m.sites.v;
  for (size_t i = 0; i < pools_.size(); i++) {
    const int layer = static_cast<int>(i) / m.n_head_kv;
    const int room = capacity(layer);
    const auto wide_room = [room](const Site& site) { return site.wide_first ? 1 : room; };
    pools_[i].key_multipliers = pools_[i].value_multipliers = nullptr;
    if (!m.graph.attends(layer)) continue;
    const bool narrow_keys =
        k.bits == Site::Bits::k4 || (k.by_token() && layer > m.graph.first_attention());
    pools_[i].key8 = key_pool(Form::w8, k.ever_wide(), wide_room(k));
    pools_[i].key4 = key_pool(k.narrow_form(), narrow_keys, room, k.level_table(layer));
    pools_[i].value8 = value_pool(Form::w8, v.ever_wide(), wide_room(v));
    pools_[i].value4 =
        value_pool(v.narrow_form(), v.bits != Site::Bits::k8, room, v.level_table(layer));
    const size_t positions = static_cast<size_t>(keys_padded(room));
    if (k.multiplied()) pools_[i].key_multipliers = arena.take<int8_t>(positions);
    if (v.multiplied()) pools_[i].value_multipliers = arena.take<int8_t>(positions);
  }
  for (int l = 0; l < m.n_layer; l++) {
    const int rows = m.graph.attends(l) ? 0 : m.graph.reach(l) - 1 + capacity(l);
    mixed_[static_cast<size_t>(l)] =
        arena.take<float>(static_cast<size_t>(rows) * static_cast<size_t>(m.n_embd));
  }
  cache_bytes_ = arena.used() - before;
  return arena.used();
}

// ---------------------------------------------------------------------------------------------
// What the engine calls

void Session::check_tokens(const int32_t* tokens, size_t n, int length) const {
  if (n > static_cast<size_t>(context_ - length)) {
    const int most = std::min(model_.n_context, most_tokens(model_));
    const std::string way_out =
        context_ < most
            ? "; shorten the text, or load with a context of up to " + std::to_string(most)
        : most == most_tokens(model_) ? ", the most that a session can hold; shorten the text"
                                      : ", all that the model can see; shorten the text";
    throw Error(SQUAT_ERROR_CONTEXT,
                "tokens: " + std::to_string(n) + " after the " + std::to_string(length) +
                    " in the session exceed the context of " + std::to_string(context_) + way_out);
  }
  for (size_t i = 0; i < n; i++) {
    if (tokens[i] < 0 || tokens[i] >= model_.n_vocab) {
      throw Error(SQUAT_ERROR_ARGUMENT, "tokens: element " + std::to_string(i) + " is " +
                                            std::to_string(tokens[i]) + ", must be from 0 to " +
                                            std::to_string(model_.n_vocab - 1));
    }
  }
}

template <class Body>
void Session::eval_chunks(const int32_t* tokens, size_t n, size_t wanted, Body&& body) {
  check_tokens(tokens, n, length_);
  const size_t first_wanted = n - wanted;
  for (size_t begin = 0; begin < n;) {
    const size_t end = std::min(n, begin + static_cast<size_t>(chunk_));
    const int count = static_cast<int>(end - begin);
    const int first = static_cast<int>(std::clamp(first_wanted, begin, end) - begin);
    forward(tokens + begin, count, first);
    body(first, count - first);
    begin = end;
  }
}

void Session::eval(const int32_t* tokens, size_t n, size_t wanted, float* logits) {
  eval_chunks(tokens, n, wanted, [&](int first, int count) {
    head(first, count, logits);
    logits += static_cast<size_t>(count) * static_cast<size_t>(model_.n_vocab);
  });
}

void Session::eval_hidden(const int32_t* tokens, size_t n, size_t wanted, float* hidden) {
  const size_t n_embd = static_cast<size_t>(model_.n_embd);
  eval_chunks(tokens, n, wanted, [&](int first, int count) {
    for (int i = first; i < first + count; i++, hidden += n_embd) {
      normalize(model_.out_norm, residual_ + static_cast<size_t>(i) * n_embd, hidden);
    }
  });
}

double Session::score(const int32_t* tokens, size_t n, double* each) {
  check_tokens(tokens, n, 0);
  rewind(0);
  double sum = 0;
  for (size_t begin = 0; begin < n;) {
    const size_t end = std::min(n, begin + static_cast<size_t>(chunk_));
    forward(tokens + begin, static_cast<int>(end - begin), 0);
    // The last token's logits predict nothing that was asked for.
    const int predicting = static_cast<int>(std::min(end, n - 1) - begin);
    for (int first = 0; first < predicting; first += score_rows_) {
      const int rows = std::min(score_rows_, predicting - first);
      head(first, rows, score_logits_);
      threads_.parallel_for(rows, [&](int from, int to, int) {
        for (int i = from; i < to; i++) {
          const float* logits =
              score_logits_ + static_cast<size_t>(i) * static_cast<size_t>(model_.n_vocab);
          const int32_t next = tokens[begin + static_cast<size_t>(first + i) + 1];
          score_terms_[i] = logits[next] - ops_.log_sum_exp(logits, model_.n_vocab);
        }
      });
      for (int i = 0; i < rows; i++) sum += score_terms_[i];
      if (each != nullptr) each = std::copy(score_terms_, score_terms_ + rows, each);
    }
    begin = end;
  }
  return sum;
}

void Session::rewind(size_t length) {
  if (length > static_cast<size_t>(length_)) {
    throw Error(SQUAT_ERROR_ARGUMENT, "length: " + std::to_string(length) + " is more than the " +
                                          std::to_string(length_) + " tokens in the session");
  }
  const int left = static_cast<int>(length);
  int least = 0;
  for (int l = 0; l < model_.n_layer; l++) {
    const int first = first_[static_cast<size_t>(l)];
    if (first > 0) least = std::max(least, first + model_.graph.reach(l) - 1);
  }
  if (left > 0 && left < least) {
    throw Error(SQUAT_ERROR_ARGUMENT,
                "length: " + std::to_string(length) + " of " + std::to_string(length_) +
                    " tokens is too far back for a layer that looks at a few tokens and holds no "
                    "more; rewind to " +
                    std::to_string(least) + " or more, or to 0 and evaluate the text again");
  }
  length_ = left;
  if (left == 0) std::fill(first_.begin(), first_.end(), 0);
  for (size_t i = 0; i < pools_.size(); i++) {
    const int layer = static_cast<int>(i) / model_.n_head_kv;
    if (!model_.graph.attends(layer)) continue;
    const int first = first_[static_cast<size_t>(layer)], held = left - first;
    const WideCounts wide = count_wide(layer, first, left);
    pools_[i].key8.truncate(wide.keys);
    pools_[i].key4.truncate(held - wide.keys);
    pools_[i].value8.truncate(wide.values);
    pools_[i].value4.truncate(held - wide.values);
  }
}

Session::WideCounts Session::count_wide(int layer, int begin, int end) const {
  // By the decision of a layer; before the first one all are wide.
  const auto count = [&](const Site& site, int by) {
    if (site.bits == Site::Bits::k8 || (site.by_token() && by < 0)) return end - begin;
    const uint8_t* widths = cached_widths(site, by);
    return static_cast<int>(std::count(widths + begin, widths + end, 8));
  };
  return {count(model_.sites.k, layer - 1), count(model_.sites.v, layer)};
}

int Session::capacity(int layer, int context) const {
  return squat::capacity(model_, layer, context);
}

bool Session::may_begin_at(int layer, int first, int length) const {
  if (first == 0) return length <= capacity(layer);
  const int reach = model_.graph.reach(layer);
  return reach > 0 && first > 0 && first % kFirst == 0 && first <= length - (reach - 1) &&
         length - first <= capacity(layer);
}

void Session::make_room(int layer, int count) {
  int& first = first_[static_cast<size_t>(layer)];
  if (length_ + count - first <= capacity(layer)) return;
  const int reach = model_.graph.reach(layer);
  const int dropped = (length_ - kept(reach)) / kFirst * kFirst - first;
  const size_t left = static_cast<size_t>(length_ - first - dropped);
  if (!model_.graph.attends(layer)) {
    const size_t size = static_cast<size_t>(model_.n_embd);
    float* rows = mixed_[static_cast<size_t>(layer)] + static_cast<size_t>(reach - 1) * size;
    std::memmove(rows, rows + static_cast<size_t>(dropped) * size, left * size * sizeof(float));
    first += dropped;
    return;
  }
  const WideCounts wide = count_wide(layer, first, first + dropped);
  for (int h = 0; h < model_.n_head_kv; h++) {
    HeadPools& pools = pools_[static_cast<size_t>(layer * model_.n_head_kv + h)];
    for (const bool is_wide : {true, false}) {
      const int keys = is_wide ? wide.keys : dropped - wide.keys;
      const int values = is_wide ? wide.values : dropped - wide.values;
      if (keys > 0) (is_wide ? pools.key8 : pools.key4).drop(keys);
      if (values > 0) (is_wide ? pools.value8 : pools.value4).drop(values, codes_);
    }
    for (int8_t* multipliers : {pools.key_multipliers, pools.value_multipliers}) {
      if (multipliers != nullptr) std::memmove(multipliers, multipliers + dropped, left);
    }
  }
  first += dropped;
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
                              const Norm& after, int from) {
  const size_t n_embd = static_cast<size_t>(model_.n_embd);
  const float scale = model_.graph.residual_scale;
  float* residual = residual_ + static_cast<size_t>(from) * n_embd;
  if (!after.exists() && scale == 1) {
    multiply(step_of_graph, input, &weights, 1, residual, n_embd, Add::kYes);
    return;
  }
  multiply(step_of_graph, input, &weights, 1, branch_, n_embd);
  threads_.parallel_for(input.rows, [&](int begin, int end, int) {
    for (int i = begin; i < end; i++) {
      float* row = branch_ + static_cast<size_t>(i) * n_embd;
      normalize(after, row, row);
      for (size_t k = 0; k < n_embd; k++) row[k] *= scale;
      ops_.add(row, model_.n_embd, residual + static_cast<size_t>(i) * n_embd);
    }
  });
}

// ---------------------------------------------------------------------------------------------
// The network

void Session::forward(const int32_t* tokens, int count, int wanted) {
  const Model& m = model_;
  Chunk chunk = {length_, count, wanted, 0, nullptr, nullptr};
  const size_t n_embd = static_cast<size_t>(m.n_embd), n_ff = static_cast<size_t>(m.n_ff);
  const size_t mlp_stride = m.gated() ? 2 * n_ff : n_ff;
  const auto residual = [&](int i) { return residual_ + static_cast<size_t>(i) * n_embd; };
  const auto normalized = [&](const Norm& norm) {
    return [&](int i, float* buffer) { return normalize(norm, residual(i), buffer); };
  };

  std::copy(tokens, tokens + count, tokens_ + length_);
  embed(tokens, chunk);
  for (int l = 0; l < m.n_layer; l++) {
    const Layer& layer = m.layers[static_cast<size_t>(l)];
    chunk.current = widths_.empty() ? nullptr : widths_[static_cast<size_t>(l)] + length_;
    make_room(l, count);
    chunk.first = first_[static_cast<size_t>(l)];
    const Input attn_in = quantize_rows(Step::kAttnIn, m.sites.attn_in, l, chunk.previous, 0, count,
                                        m.n_embd, normalized(layer.attn_norm));
    const auto ask = [&](int part, int parts) { read_ahead(l, part, parts); };
    const kernels::Aside aside = kernels::Aside::of(ask);
    multiply(Step::kQkv, attn_in, layer.qkv.data(), layer.qkv.size(), qkv_,
             static_cast<size_t>(made_by(l)), Add::kNo, reads_ahead(chunk, l) ? &aside : nullptr);
    // After the last attention, only the tokens whose logits are wanted go on.
    const int from = l + 1 < m.n_layer ? 0 : wanted;
    chunk.wanted = from;
    if (m.graph.attends(l)) {
      attend(chunk, l);
    } else {
      convolve(chunk, l);
    }
    const int rows = count - from, attended = attended_by(l);

    const Input attn_out = quantize_rows(
        Step::kAttnOut, m.sites.attn_out, l, chunk.current, from, rows, attended,
        [&](int i, float*) { return attention_ + static_cast<ptrdiff_t>(i) * attended; });
    float* const branch = branch_ + static_cast<size_t>(from) * n_embd;
    if (m.graph.parallel) {
      multiply(Step::kOutput, attn_out, &layer.attn_out, 1, branch, n_embd);
    } else {
      add_to_residual(Step::kOutput, attn_out, layer.attn_out, layer.after_attn_norm, from);
    }

    const Input mlp_in = quantize_rows(Step::kMlpIn, m.sites.mlp_in, l, chunk.current, from, rows,
                                       m.n_embd, normalized(layer.mlp_norm));
    multiply(Step::kGateUp, mlp_in, layer.mlp_in.data(), layer.mlp_in.size(),
             mlp_ + static_cast<size_t>(from) * mlp_stride, mlp_stride);

    const auto activation = m.graph.activation == Graph::Activation::kSilu       ? ops_.silu
                            : m.graph.activation == Graph::Activation::kGeluTanh ? ops_.gelu_tanh
                                                                                 : ops_.gelu;
    const auto activate = [&](int i, float*) {
      float* row = mlp_ + static_cast<size_t>(i) * mlp_stride;
      activation(row, m.gated() ? row + n_ff : nullptr, m.n_ff, row);
      return row;
    };
    const Input mlp_mid = quantize_rows(Step::kMlpMid, m.sites.mlp_mid, l, chunk.current, from,
                                        rows, m.n_ff, activate);
    if (m.graph.parallel) {
      multiply(Step::kDown, mlp_mid, &layer.mlp_mid, 1, branch, n_embd, Add::kYes);
      ops_.add(branch, rows * m.n_embd, residual(from));
    } else {
      add_to_residual(Step::kDown, mlp_mid, layer.mlp_mid, layer.after_mlp_norm, from);
    }
    chunk.previous = chunk.current;
  }
  length_ += count;
  token_count_ += static_cast<uint64_t>(count);
}

// Tokens keep the width that they had. Everything else is elementwise in float32, in the order of
// docs/format.md, "Graph".
void Session::convolve(const Chunk& chunk, int layer) {
  const Profile::Timer timer(profile_, Step::kConvolution);
  for (int i = 0; chunk.current != nullptr && i < chunk.count; i++) {
    chunk.current[i] = is_wide(chunk.previous, i) ? 8 : 4;
    wide_counts_[static_cast<size_t>(layer)] += chunk.current[i] == 8;
  }
  const size_t n = static_cast<size_t>(model_.n_embd);
  const size_t taps = static_cast<size_t>(model_.graph.reach(layer));
  const float* weights = model_.layers[static_cast<size_t>(layer)].convolution.data();
  // Before the row of a token are those of the tokens before it, and zeros before the text.
  float* const rows =
      mixed_[static_cast<size_t>(layer)] + (taps - 1 + static_cast<size_t>(chunk.past())) * n;
  threads_.parallel_for(chunk.count, [&](int begin, int end, int) {
    for (size_t i = static_cast<size_t>(begin); i < static_cast<size_t>(end); i++) {
      const float *before = qkv_ + i * 3 * n, *x = before + 2 * n;
      for (size_t k = 0; k < n; k++) rows[i * n + k] = before[k] * x[k];
    }
  });
  threads_.parallel_for(chunk.count - chunk.wanted, [&](int begin, int end, int) {
    for (int t = chunk.wanted + begin; t < chunk.wanted + end; t++) {
      const size_t i = static_cast<size_t>(t);
      const float* behind = qkv_ + i * 3 * n + n;
      const float* oldest = rows + i * n - (taps - 1) * n;
      float* out = attention_ + i * n;
      for (size_t k = 0; k < n; k++) out[k] = weights[k] * oldest[k];
      for (size_t tap = 1; tap < taps; tap++) {
        for (size_t k = 0; k < n; k++) out[k] += weights[tap * n + k] * oldest[tap * n + k];
      }
      for (size_t k = 0; k < n; k++) out[k] *= behind[k];
    }
  });
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

void Session::embed(const int32_t* tokens, const Chunk& chunk) {
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
  threads_.parallel_for(chunk.count, [&](int begin, int end, int thread) {
    for (int i = begin; i < end; i++) {
      const size_t row = static_cast<size_t>(i);
      int8_t* codes = codes_ + row * n_embd;
      float* x = residual_ + row * n_embd;
      dequantize(*m.embedding, tokens[i], codes, x);
      if (m.embedding_block > 1) {
        ops_.hadamard(x, m.n_embd, m.embedding_block, 1, hadamard_scale(m.embedding_block));
      }
      if (m.graph.embedding_scale != 1) {
        for (size_t k = 0; k < n_embd; k++) x[k] *= m.graph.embedding_scale;
      }
      const int position = chunk.position + i;
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
