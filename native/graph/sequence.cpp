#include "sequence.h"

#include <algorithm>
#include <cstring>

#include "base/error.h"

namespace squat {

namespace {

// The oldest token that a layer holds is a multiple of this many into the text, so that float sums
// over what it holds have the same order whatever was dropped.
constexpr int kFirst = 64;

// Rows of widths and multipliers are padded to whole vectors and cache lines.
size_t padded(int tokens) { return static_cast<size_t>((tokens + 63) / 64 * 64); }

}  // namespace

Sequence::Sequence(const Model& model, const kernels::Choice& choice, int context)
    : model_(model),
      choice_(choice),
      context_(context),
      longest_([&] {
        int longest = 0;
        for (int l = 0; l < model.n_layer; l++) longest = std::max(longest, capacity(l, context));
        return longest;
      }()),
      wide_counts_(static_cast<size_t>(model.n_layer)),
      widths_(model.thresholds.size()),
      first_(static_cast<size_t>(model.n_layer)),
      pools_(static_cast<size_t>(model.n_layer) * static_cast<size_t>(model.n_head_kv)),
      mixed_(static_cast<size_t>(model.n_layer)) {
  memory_ = Memory(lay_out(Arena()));
  lay_out(Arena(memory_));
  std::memset(first_wide_ + 1, 4, padded(context_));
  *first_wide_ = 8;
}

size_t Sequence::lay_out(Arena arena) {
  const Model& m = model_;
  tokens_ = arena.take<int32_t>(static_cast<size_t>(context_));
  terms_ = arena.take<double>(static_cast<size_t>(context_));
  first_wide_ = arena.take<uint8_t>(1 + padded(context_));
  vector_ = arena.take<int8_t>(static_cast<size_t>(m.head_dim));

  const size_t before = arena.used();
  for (uint8_t*& widths : widths_) {
    widths = arena.take<uint8_t>(padded(context_));
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
    pools_[i].key8 = key_pool(Form::w8, k.ever_wide(), wide_room(k));
    pools_[i].key4 = key_pool(k.narrow_form(), m.narrow_keys(layer), room, k.level_table(layer));
    pools_[i].recent = key_pool(Form::w8, m.recent_keys(layer) > 0, recent_capacity());
    pools_[i].value8 = value_pool(Form::w8, v.ever_wide(), wide_room(v));
    pools_[i].value4 =
        value_pool(v.narrow_form(), v.bits != Site::Bits::k8, room, v.level_table(layer));
    const size_t positions = padded(room);
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

void Sequence::check_tokens(const int32_t* tokens, size_t n, int length) const {
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

int Sequence::least_length() const {
  int least = recent_first_ > 0 ? recent_first_ + model_.sites.k.recent - 1 : 0;
  for (int l = 0; l < model_.n_layer; l++) {
    const int first = first_[static_cast<size_t>(l)];
    if (first > 0) least = std::max(least, first + model_.graph.reach(l) - 1);
  }
  return least;
}

void Sequence::rewind(size_t length) {
  if (length > static_cast<size_t>(length_)) {
    throw Error(SQUAT_ERROR_ARGUMENT, "length: " + std::to_string(length) + " is more than the " +
                                          std::to_string(length_) + " tokens in the session");
  }
  const int left = static_cast<int>(length), least = least_length();
  if (left > 0 && left < least) {
    throw Error(SQUAT_ERROR_ARGUMENT,
                "length: " + std::to_string(length) + " of " + std::to_string(length_) +
                    " tokens is too far back for what looks at a few tokens and holds no more; "
                    "rewind to " +
                    std::to_string(least) + " or more, or to 0 and evaluate the text again");
  }
  length_ = left;
  scored_ = std::min(scored_, left);
  if (left == 0) {
    std::fill(first_.begin(), first_.end(), 0);
    recent_first_ = 0;
  }
  for (size_t i = 0; i < pools_.size(); i++) {
    const int layer = static_cast<int>(i) / model_.n_head_kv;
    if (!model_.graph.attends(layer)) continue;
    const int first = first_[static_cast<size_t>(layer)], held = left - first;
    const WideCounts wide = count_wide(layer, first, left);
    pools_[i].key8.truncate(wide.keys);
    pools_[i].key4.truncate(held - wide.keys);
    if (model_.recent_keys(layer) > 0) pools_[i].recent.truncate(left - recent_first_);
    pools_[i].value8.truncate(wide.values);
    pools_[i].value4.truncate(held - wide.values);
  }
}

Sequence::WideCounts Sequence::count_wide(int layer, int begin, int end) const {
  // By the decision of a layer; before the first one all are wide.
  const auto count = [&](const Site& site, int by) {
    if (site.bits == Site::Bits::k8 || (site.by_token() && by < 0)) return end - begin;
    const uint8_t* widths = cached_widths(site, by);
    return static_cast<int>(std::count(widths + begin, widths + end, 8));
  };
  return {count(model_.sites.k, layer - 1), count(model_.sites.v, layer)};
}

int Sequence::capacity(int layer, int context) const {
  const int reach = model_.graph.reach(layer);
  return reach == 0 ? context : std::min(context, kept(reach) + kFirst + std::max(reach, kChunk));
}

bool Sequence::may_begin_at(int layer, int first, int length) const {
  if (first == 0) return length <= capacity(layer);
  const int reach = model_.graph.reach(layer);
  return reach > 0 && first > 0 && first % kFirst == 0 && first <= length - (reach - 1) &&
         length - first <= capacity(layer);
}

void Sequence::make_room(int layer, int count) {
  int& first = first_[static_cast<size_t>(layer)];
  if (length_ + count - first <= capacity(layer)) return;
  const int reach = model_.graph.reach(layer);
  const int dropped = (length_ - kept(reach)) / kFirst * kFirst - first;
  const size_t left = static_cast<size_t>(length_ - first - dropped);
  if (!model_.graph.attends(layer)) {
    const size_t size = static_cast<size_t>(model_.n_embd);
    float* rows = mixed(layer);
    std::memmove(rows, rows + static_cast<size_t>(dropped) * size, left * size * sizeof(float));
    first += dropped;
    return;
  }
  const WideCounts wide = count_wide(layer, first, first + dropped);
  for (int h = 0; h < model_.n_head_kv; h++) {
    HeadPools& pools = this->pools(layer, h);
    for (const bool is_wide : {true, false}) {
      const int keys = is_wide ? wide.keys : dropped - wide.keys;
      const int values = is_wide ? wide.values : dropped - wide.values;
      if (keys > 0) (is_wide ? pools.key8 : pools.key4).drop(keys);
      if (values > 0) (is_wide ? pools.value8 : pools.value4).drop(values, vector_);
    }
    for (int8_t* multipliers : {pools.key_multipliers, pools.value_multipliers}) {
      if (multipliers != nullptr) std::memmove(multipliers, multipliers + dropped, left);
    }
  }
  first += dropped;
}

void Sequence::make_recent_room(int count) {
  if (length_ + count - recent_first_ <= recent_capacity()) return;
  const int dropped = length_ - kept(model_.sites.k.recent) - recent_first_;
  for (size_t i = 0; i < pools_.size(); i++) {
    if (model_.recent_keys(static_cast<int>(i) / model_.n_head_kv) == 0) continue;
    pools_[i].recent.drop(dropped);
  }
  recent_first_ += dropped;
}

}  // namespace squat
