// A session as bytes: what it holds of its tokens, as codes, whatever the kernels of this CPU make
// of them in memory.
//
//   Head                        magic, version, how many tokens, the model's identity, all bytes
//   tokens                      int32 each
//   first                       by layer, position of the oldest token that it holds: int32 each
//   recent                      where recent keys are seen in 8 bits, position of the oldest: int32
//   widths                      where a site is 4:8, by layer, 8 or 4: a byte for each token
//   by layer with attention,
//     by key head               what the keys multiply their steps by, if they do: a byte each;
//                               the same of the values; the keys, one after the other; the values;
//                               the recent keys in 8 bits, where others may have 4
//   by layer with a convolution what it mixes of the tokens held: float32 [held][n_embd]
//   hash64                      of all before it
//
// A vector of 8-bit codes has a byte for each, one of 4-bit codes half a byte, the first one low,
// and so there is no byte of it that would not be a code, nor one that is no multiplier. Numbers
// are little-endian.
//
// Bytes may come from a stranger, who can make any hash. The sizes of everything follow from the
// model, the number of tokens (at most the context), `first` and `widths`, which are checked before
// they are used; a file has exactly that size.
#include <algorithm>
#include <cstring>
#include <string>

#include "base/error.h"
#include "base/hash.h"
#include "sequence.h"

namespace squat {

namespace {

struct Head {
  char magic[8];
  uint32_t version;
  uint32_t length;
  uint64_t identity;
  uint64_t size;
};
static_assert(sizeof(Head) == 32, "no padding");

constexpr char kMagic[] = {'S', 'Q', 'U', 'A', 'T', 'S', 'E', 'S'};
constexpr uint32_t kVersion = 1;

size_t vector_bytes(int head_dim, bool wide) {
  return static_cast<size_t>(wide ? head_dim : (head_dim + 1) / 2);
}

void write_vector(const int8_t* codes, int head_dim, bool wide, uint8_t* to) {
  if (wide) {
    std::memcpy(to, codes, static_cast<size_t>(head_dim));
    return;
  }
  for (int i = 0; i < head_dim; i += 2) {
    const int low = codes[i] & 15, high = i + 1 < head_dim ? codes[i + 1] & 15 : 0;
    *to++ = static_cast<uint8_t>(low | high << 4);
  }
}

void read_vector(const uint8_t* from, int head_dim, bool wide, int8_t* codes) {
  if (wide) {
    std::memcpy(codes, from, static_cast<size_t>(head_dim));
    return;
  }
  const auto code = [](int nibble) { return static_cast<int8_t>((nibble ^ 8) - 8); };
  for (int i = 0; i < head_dim; i++) codes[i] = code(from[i / 2] >> i % 2 * 4 & 15);
}

// Whether a token is wide at a site, by the widths that decide (null: all are wide).
bool wide_at(const Site& site, const uint8_t* by_token, int token) {
  if (!site.by_token()) return site.bits == Site::Bits::k8 || (site.wide_first && token == 0);
  return by_token == nullptr || by_token[token] == 8;
}

}  // namespace

// The parts of the bytes, once they are known to be a session of this model.
struct Sequence::Saved {
  int length;
  const uint8_t* tokens;
  std::vector<int> first;  // by layer
  int recent_first;
  std::vector<const uint8_t*> widths;  // by layer; empty if no site is 4:8
  std::vector<const uint8_t*> layers;  // where each begins

  // What decides the widths of a layer's keys, and of its values.
  const uint8_t* key_widths(int layer) const {
    return widths.empty() || layer == 0 ? nullptr : widths[static_cast<size_t>(layer - 1)];
  }
  const uint8_t* value_widths(int layer) const {
    return widths.empty() ? nullptr : widths[static_cast<size_t>(layer)];
  }
};

size_t Sequence::saved_layer_bytes(int layer, int held, int wide_keys, int wide_values,
                                   int recent_keys) const {
  const size_t tokens = static_cast<size_t>(held);
  if (!model_.graph.attends(layer)) {
    return tokens * static_cast<size_t>(model_.n_embd) * sizeof(float);
  }
  const auto vectors = [&](int wide) {
    return static_cast<size_t>(wide) * vector_bytes(model_.head_dim, true) +
           static_cast<size_t>(held - wide) * vector_bytes(model_.head_dim, false);
  };
  const size_t multipliers =
      tokens * (size_t{model_.sites.k.multiplied()} + size_t{model_.sites.v.multiplied()});
  const size_t recent = model_.recent_keys(layer) == 0 ? 0
                                                       : static_cast<size_t>(recent_keys) *
                                                             vector_bytes(model_.head_dim, true);
  return static_cast<size_t>(model_.n_head_kv) *
         (multipliers + vectors(wide_keys) + vectors(wide_values) + recent);
}

size_t Sequence::most_saved_bytes() const {
  const int context = std::min(model_.n_context, most_tokens(model_));
  const size_t length = static_cast<size_t>(context), layers = first_.size();
  size_t size = sizeof(Head) + length * sizeof(int32_t) + (layers + 1) * sizeof(int32_t) +
                widths_.size() * length + sizeof(uint64_t);
  for (int l = 0; l < model_.n_layer; l++) {
    const int held = capacity(l, context);
    size += saved_layer_bytes(l, held, held, held, std::min(context, saved_recent()));
  }
  return size;
}

std::vector<uint8_t> Sequence::save(uint64_t identity) const {
  const size_t length = static_cast<size_t>(length_),
               head_dim = static_cast<size_t>(model_.head_dim);
  std::vector<uint8_t> bytes;
  const auto append = [&bytes](const void* from, size_t size) {
    const uint8_t* data = static_cast<const uint8_t*>(from);
    bytes.insert(bytes.end(), data, data + size);
  };
  Head head = {{}, kVersion, static_cast<uint32_t>(length_), identity, 0};
  std::memcpy(head.magic, kMagic, sizeof kMagic);
  append(&head, sizeof head);
  append(tokens_, length * sizeof(int32_t));
  const auto append_position = [&append](int32_t position) { append(&position, sizeof position); };
  for (const int first : first_) append_position(first);
  const int recent_first = std::max(recent_first_, length_ - saved_recent());
  if (model_.sites.k.recent > 0) append_position(recent_first);
  for (const uint8_t* widths : widths_) append(widths, length);

  std::vector<int8_t> codes(head_dim);
  std::vector<uint8_t> vector(head_dim);
  const auto append_vectors = [&](const Site& site, const uint8_t* by_token, int first,
                                  const auto& wide_pool, const auto& narrow_pool) {
    int next[2] = {0, 0};  // of the wide, of the narrow pool
    for (int t = first; t < length_; t++) {
      const bool wide = wide_at(site, by_token, t);
      int& at = next[wide ? 0 : 1];
      (wide ? wide_pool : narrow_pool).read(at++, codes.data());
      write_vector(codes.data(), model_.head_dim, wide, vector.data());
      append(vector.data(), vector_bytes(model_.head_dim, wide));
    }
  };
  for (int l = 0; l < model_.n_layer; l++) {
    const size_t layer = static_cast<size_t>(l);
    const int first = first_[layer];
    const size_t held = static_cast<size_t>(length_ - first);
    if (!model_.graph.attends(l)) {
      const size_t size = static_cast<size_t>(model_.n_embd);
      append(mixed(l), held * size * sizeof(float));
      continue;
    }
    const uint8_t* by_value = widths_.empty() ? nullptr : widths_[layer];
    const uint8_t* by_key = widths_.empty() || l == 0 ? nullptr : widths_[layer - 1];
    for (int h = 0; h < model_.n_head_kv; h++) {
      const HeadPools& pools = this->pools(l, h);
      for (const int8_t* multipliers : {pools.key_multipliers, pools.value_multipliers}) {
        if (multipliers != nullptr) append(multipliers, held);
      }
      append_vectors(model_.sites.k, by_key, first, pools.key8, pools.key4);
      append_vectors(model_.sites.v, by_value, first, pools.value8, pools.value4);
      if (model_.recent_keys(l) == 0) continue;
      for (int t = recent_first; t < length_; t++) {
        pools.recent.read(t - recent_first_, codes.data());
        append(codes.data(), head_dim);
      }
    }
  }
  head.size = bytes.size() + sizeof(uint64_t);
  std::memcpy(bytes.data(), &head, sizeof head);
  const uint64_t hash = hash64(bytes.data(), bytes.size());
  append(&hash, sizeof hash);
  return bytes;
}

Sequence::Saved Sequence::check_saved(const std::vector<uint8_t>& bytes, uint64_t identity,
                                      const std::string& name) const {
  const auto refuse = [&name](const std::string& what) {
    throw Error(SQUAT_ERROR_FORMAT, name + ": " + what);
  };
  const auto damaged = [&refuse](const std::string& what) {
    refuse("is damaged: " + what + "; save the session again");
  };
  Head head;
  if (bytes.size() < sizeof head || std::memcmp(bytes.data(), kMagic, sizeof kMagic) != 0) {
    refuse("is no saved session; give a file that such an engine has written");
  }
  std::memcpy(&head, bytes.data(), sizeof head);
  if (head.version != kVersion) {
    refuse("its version is " + std::to_string(head.version) + ", and this engine reads " +
           std::to_string(kVersion) + "; save the session again with this engine");
  }
  if (head.size != bytes.size()) {
    damaged("it has " + std::to_string(bytes.size()) + " bytes, and says that they are " +
            std::to_string(head.size));
  }
  uint64_t hash;
  const size_t end = bytes.size() - sizeof hash;  // the head alone is longer
  std::memcpy(&hash, bytes.data() + end, sizeof hash);
  if (end < sizeof head || hash != hash64(bytes.data(), end)) damaged("its checksum is wrong");
  if (head.identity != identity) {
    refuse("is a session of another model file; load the file that it was saved with");
  }
  if (head.length > static_cast<uint32_t>(context_)) {
    throw Error(SQUAT_ERROR_CONTEXT, name + ": has " + std::to_string(head.length) +
                                         " tokens, and the context is " + std::to_string(context_) +
                                         "; load the model with a longer context");
  }

  Saved saved;
  saved.length = static_cast<int>(head.length);
  const size_t length = head.length;
  size_t at = sizeof head;
  const auto take = [&](size_t size) {
    if (size > end - at) damaged("it ends before its parts do");
    const uint8_t* part = bytes.data() + at;
    at += size;
    return part;
  };
  const auto number = [](const uint8_t* from, size_t index) {
    int32_t value;
    std::memcpy(&value, from + index * sizeof value, sizeof value);
    return value;
  };
  saved.tokens = take(length * sizeof(int32_t));
  for (size_t i = 0; i < length; i++) {
    const int32_t token = number(saved.tokens, i);
    if (token < 0 || token >= model_.n_vocab) {
      damaged("token " + std::to_string(i) + " is " + std::to_string(token));
    }
  }
  const uint8_t* first = take(first_.size() * sizeof(int32_t));
  for (int l = 0; l < model_.n_layer; l++) {
    const int32_t position = number(first, static_cast<size_t>(l));
    if (!may_begin_at(l, position, saved.length)) {
      damaged("layer " + std::to_string(l) + " holds tokens from " + std::to_string(position));
    }
    saved.first.push_back(position);
  }
  saved.recent_first = 0;
  if (const int recent = model_.sites.k.recent; recent > 0) {
    saved.recent_first = number(take(sizeof(int32_t)), 0);
    const int from = saved.recent_first, seen = saved.length - (recent - 1);
    if (from < 0 || from > std::max(seen, 0) || saved.length - from > saved_recent()) {
      damaged("it holds recent keys from " + std::to_string(from));
    }
  }
  for (int l = 0; l < static_cast<int>(widths_.size()); l++) {
    const uint8_t* widths = take(length);
    // Before the first attention all tokens are wide, and a convolution decides nothing.
    const uint8_t* before = l == 0 ? nullptr : saved.widths.back();
    for (size_t t = 0; t < length; t++) {
      const bool kept = model_.graph.attends(l) || widths[t] == (before ? before[t] : 8);
      if ((widths[t] != 8 && widths[t] != 4) || !kept) {
        damaged("token " + std::to_string(t) + " has " + std::to_string(widths[t]) +
                " bits in layer " + std::to_string(l));
      }
    }
    saved.widths.push_back(widths);
  }
  for (int l = 0; l < model_.n_layer; l++) {
    const int begin = saved.first[static_cast<size_t>(l)], held = saved.length - begin;
    int keys = 0, values = 0;
    for (int t = begin; t < saved.length; t++) {
      keys += wide_at(model_.sites.k, saved.key_widths(l), t);
      values += wide_at(model_.sites.v, saved.value_widths(l), t);
    }
    const int recent = saved.length - saved.recent_first;
    saved.layers.push_back(take(saved_layer_bytes(l, held, keys, values, recent)));
  }
  if (at != end) damaged("there is more than its parts");
  return saved;
}

void Sequence::restore(const std::vector<uint8_t>& bytes, uint64_t identity,
                       const std::string& name) {
  const Saved saved = check_saved(bytes, identity, name);  // nothing below can fail
  rewind(0);
  length_ = saved.length;
  const size_t length = static_cast<size_t>(length_);
  std::memcpy(tokens_, saved.tokens, length * sizeof(int32_t));
  for (size_t l = 0; l < widths_.size(); l++) std::memcpy(widths_[l], saved.widths[l], length);
  first_ = saved.first;
  recent_first_ = saved.recent_first;
  const auto append_vectors = [&](const Site& site, const uint8_t* by_token, int first,
                                  const uint8_t* from, auto& wide_pool, auto& narrow_pool) {
    for (int t = first; t < length_; t++) {
      const bool wide = wide_at(site, by_token, t);
      read_vector(from, model_.head_dim, wide, vector_);
      (wide ? wide_pool : narrow_pool).append(vector_);
      from += vector_bytes(model_.head_dim, wide);
    }
    return from;
  };
  for (int l = 0; l < model_.n_layer; l++) {
    const size_t layer = static_cast<size_t>(l);
    const int first = first_[layer];
    const size_t held = static_cast<size_t>(length_ - first);
    const uint8_t* from = saved.layers[layer];
    if (!model_.graph.attends(l)) {
      const size_t size = static_cast<size_t>(model_.n_embd);
      std::memcpy(mixed(l), from, held * size * sizeof(float));
      continue;
    }
    for (int h = 0; h < model_.n_head_kv; h++) {
      HeadPools& pools = this->pools(l, h);
      for (int8_t* multipliers : {pools.key_multipliers, pools.value_multipliers}) {
        if (multipliers == nullptr) continue;
        std::memcpy(multipliers, from, held);
        from += held;
      }
      from =
          append_vectors(model_.sites.k, saved.key_widths(l), first, from, pools.key8, pools.key4);
      from = append_vectors(model_.sites.v, saved.value_widths(l), first, from, pools.value8,
                            pools.value4);
      if (model_.recent_keys(l) == 0) continue;
      const int recent = length_ - recent_first_;
      pools.recent.append(reinterpret_cast<const int8_t*>(from), recent);
      from += static_cast<size_t>(recent) * vector_bytes(model_.head_dim, true);
    }
  }
}

}  // namespace squat
