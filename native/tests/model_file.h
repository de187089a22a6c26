// Model files made in memory for the tests: GGUF bytes piece by piece, and tiny models with random
// codes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "kernels/kernels.h"

namespace squat::test {

using Bytes = std::vector<uint8_t>;
using Logits = std::vector<float>;

inline bool same(const Logits& a, const Logits& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Writes GGUF. The fields are what the file shall say, right or wrong.
class GgufBuilder {
 public:
  uint32_t version = 3;
  uint64_t alignment = 32;

  struct Tensor {
    std::string name;
    std::vector<uint64_t> shape;
    uint32_t type;
    std::vector<uint8_t> data;
    uint64_t offset = UINT64_MAX;  // UINT64_MAX: where it belongs
  };
  std::vector<std::pair<std::string, std::string>> keys;  // name, encoded type and value
  std::vector<Tensor> tensors;

  template <typename T>
  static std::string raw(T value) {
    return std::string(reinterpret_cast<const char*>(&value), sizeof value);
  }
  static std::string text(const std::string& value) { return raw<uint64_t>(value.size()) + value; }

  // Replaces a key of the same name.
  void set(const std::string& name, const std::string& encoded) {
    for (auto& [key, value] : keys) {
      if (key == name) {
        value = encoded;
        return;
      }
    }
    keys.emplace_back(name, encoded);
  }
  void u32(const std::string& name, uint32_t value) { set(name, raw<uint32_t>(4) + raw(value)); }
  void f32(const std::string& name, float value) { set(name, raw<uint32_t>(6) + raw(value)); }
  void boolean(const std::string& name, bool value) {
    set(name, raw<uint32_t>(7) + raw<uint8_t>(value));
  }
  void string(const std::string& name, const std::string& value) {
    set(name, raw<uint32_t>(8) + text(value));
  }
  static std::string array_header(uint32_t element, uint64_t count) {
    return raw<uint32_t>(9) + raw(element) + raw(count);
  }
  void f32_array(const std::string& name, const std::vector<float>& values) {
    std::string encoded = array_header(6, values.size());
    for (const float value : values) encoded += raw(value);
    set(name, encoded);
  }
  void f64_array(const std::string& name, const std::vector<double>& values) {
    std::string encoded = array_header(12, values.size());
    for (const double value : values) encoded += raw(value);
    set(name, encoded);
  }
  void u32_array(const std::string& name, const std::vector<uint32_t>& values) {
    std::string encoded = array_header(4, values.size());
    for (const uint32_t value : values) encoded += raw(value);
    set(name, encoded);
  }
  void i32_array(const std::string& name, const std::vector<int32_t>& values) {
    std::string encoded = array_header(5, values.size());
    for (const int32_t value : values) encoded += raw(value);
    set(name, encoded);
  }
  void string_array(const std::string& name, const std::vector<std::string>& values) {
    std::string encoded = array_header(8, values.size());
    for (const std::string& value : values) encoded += text(value);
    set(name, encoded);
  }
  void erase(const std::string& name) {
    for (size_t i = 0; i < keys.size(); i++) {
      if (keys[i].first == name) keys.erase(keys.begin() + static_cast<std::ptrdiff_t>(i--));
    }
  }

  Tensor& tensor(const std::string& name) {
    for (Tensor& t : tensors) {
      if (t.name == name) return t;
    }
    tensors.push_back({name, {}, 0, {}});
    return tensors.back();
  }
  void floats(const std::string& name, const std::vector<float>& values) {
    Tensor& t = tensor(name);
    t.shape = {values.size()};
    t.type = 0;
    t.data.resize(values.size() * sizeof(float));
    std::memcpy(t.data.data(), values.data(), t.data.size());
  }

  std::vector<uint8_t> bytes() const {
    std::string out =
        "GGUF" + raw(version) + raw<uint64_t>(tensors.size()) + raw<uint64_t>(keys.size());
    for (const auto& [name, value] : keys) out += text(name) + value;
    std::string data;
    for (const Tensor& t : tensors) {
      out += text(t.name) + raw(static_cast<uint32_t>(t.shape.size()));
      for (const uint64_t n : t.shape) out += raw(n);
      out += raw(t.type) + raw<uint64_t>(t.offset == UINT64_MAX ? data.size() : t.offset);
      data.append(reinterpret_cast<const char*>(t.data.data()), t.data.size());
      data.resize((data.size() + alignment - 1) / alignment * alignment);
    }
    out.resize((out.size() + alignment - 1) / alignment * alignment);
    out += data;
    return {out.begin(), out.end()};
  }
};

struct ModelOptions {
  bool gpt2 = false;
  int layers = 3, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 96, context = 80;
  int weight_bits = 4, embedding_bits = 8;
  bool weight_levels = false;  // whether 4-bit codes of weights mean levels
  std::string activations = "4:8";
  bool tied = true;
  uint32_t version = 2;
  // What version 1 has not. All on, as a file may have it; every combination is tested from Python.
  bool row_steps = true, exponents = true, hadamard = true, levels = true;
  bool peaks = false;  // in place of exponents
  bool key_centers = false;
  bool wide_first_token = false;
  uint32_t recent_keys = 0;
  bool base2 = false;   // softmax
  bool rarity = false;  // decides the widths of 4:8
  // Whether there is a description of the graph, and as much as possible in it is unusual.
  bool described = false;
  // Of a Llama with a description: whether its first and its last layer have a convolution of three
  // tokens in place of attention.
  bool convolutions = false;
  uint32_t seed = 1;
};

inline bool has_recent_keys(const ModelOptions& o) {
  return o.recent_keys > 0 && o.activations != "8";
}

constexpr int kVocabulary = 272;  // three special tokens, 256 bytes, 13 merges

// GPT-2's alphabet: the bytes as printable characters, in UTF-8.
inline std::string byte_character(int byte) {
  const auto printable = [](int b) {
    return (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
  };
  int code = byte;
  if (!printable(byte)) {
    code = 0x100;
    for (int b = 0; b < byte; b++) code += !printable(b);
  }
  if (code < 0x80) return std::string(1, static_cast<char>(code));
  return {static_cast<char>(0xc0 | code >> 6), static_cast<char>(0x80 | (code & 0x3f))};
}

inline void add_tokenizer(GgufBuilder* file) {
  std::vector<std::string> tokens = {"<pad>", "<s>", "</s>"};
  std::vector<int32_t> types = {3, 3, 3};
  for (int byte = 0; byte < 256; byte++) tokens.push_back(byte_character(byte));
  const std::string space = byte_character(' ');
  std::vector<std::string> merges;
  for (const auto& [left, right] : std::vector<std::pair<std::string, std::string>>{
           {"h", "e"},
           {"l", "l"},
           {"he", "ll"},
           {"hell", "o"},
           {space, "hello"},
           {space, "w"},
           {"o", "r"},
           {space + "w", "or"},
           {"1", "9"},
           {"9", "9"},
           {"'", "s"},
           {space, space},
           {"\xc3\x83", "\xc2\xa9"}}) {  // the two bytes of U+00E9
    merges.push_back(left + " " + right);
    tokens.push_back(left + right);
  }
  types.resize(tokens.size(), 1);
  file->string("tokenizer.ggml.model", "gpt2");
  file->string("tokenizer.ggml.pre", "gpt-2");
  file->string_array("tokenizer.ggml.tokens", tokens);
  file->i32_array("tokenizer.ggml.token_type", types);
  file->string_array("tokenizer.ggml.merges", merges);
  file->u32("tokenizer.ggml.bos_token_id", 1);
  file->u32("tokenizer.ggml.eos_token_id", 2);
  file->boolean("tokenizer.ggml.add_space_prefix", false);
  file->boolean("squat.tokenizer.nfkc", true);
}

// fp16 of a power of two, and of a random number from there to the next one.
inline uint16_t half_power(int exponent) { return static_cast<uint16_t>((exponent + 15) << 10); }
inline uint16_t half_from(int exponent, std::mt19937* random) {
  return static_cast<uint16_t>(half_power(exponent) | ((*random)() & 0x3ff));
}

// A normal fp16 number.
inline float half_value(uint16_t half) {
  return std::ldexp(1.0f + static_cast<float>(half & 0x3ff) / 1024.0f, (half >> 10) - 15);
}

// A matrix of random codes, with a step for each row or one for all.
inline void add_matrix(GgufBuilder* file, std::mt19937* random, const std::string& name, int rows,
                       int inner, int bits, bool levels, int step_exponent, bool row_steps) {
  const bool blocks = inner % 32 == 0;
  const int row_bytes = bits == 8 ? inner : (inner + 1) / 2;
  GgufBuilder::Tensor t;
  t.name = blocks ? name : name + (bits == 8 ? ".q8" : levels ? ".iq4_nl" : ".q4");
  t.type = !blocks ? 24 : bits == 8 ? 8 : levels ? 20 : 2;
  t.shape = {static_cast<uint64_t>(blocks ? inner : row_bytes), static_cast<uint64_t>(rows)};
  std::vector<float> steps;
  for (int row = 0; row < rows; row++) {
    const uint16_t scale = row_steps ? half_from(step_exponent, random) : half_power(step_exponent);
    if (row_steps || row == 0) steps.push_back(half_value(scale));
    for (int i = 0; i < row_bytes; i++) {
      if (blocks && i % (4 * bits) == 0) {
        t.data.push_back(static_cast<uint8_t>(scale & 0xff));
        t.data.push_back(static_cast<uint8_t>(scale >> 8));
      }
      t.data.push_back(static_cast<uint8_t>((*random)()));
    }
  }
  file->tensors.push_back(t);
  if (!blocks) file->floats(name + ".step", steps);
}

// Blocks by layer: everything, none, a quarter of the power of two in it.
inline std::vector<uint32_t> hadamard_blocks(int layers, int size) {
  const uint32_t power = static_cast<uint32_t>(size & -size);
  std::vector<uint32_t> blocks;
  for (int layer = 0; layer < layers; layer++) {
    blocks.push_back(layer % 3 == 0   ? static_cast<uint32_t>(size)
                     : layer % 3 == 1 ? 1
                                      : std::max(power / 4, 1u));
  }
  return blocks;
}

// Sixteen random levels a layer; zeros in layer 0 where it has no 4-bit tokens.
inline std::vector<int32_t> random_levels(int layers, bool first_is_wide, std::mt19937* random) {
  std::vector<int32_t> all;
  for (int layer = 0; layer < layers; layer++) {
    std::set<int32_t> levels;
    while (levels.size() < 16) levels.insert(static_cast<int32_t>((*random)() % 256) - 128);
    if (layer == 0 && first_is_wide) levels.clear();
    all.insert(all.end(), levels.begin(), levels.end());
    all.resize(static_cast<size_t>(16 * (layer + 1)));
  }
  return all;
}

inline bool convolves(const ModelOptions& o, int layer) {
  return o.described && o.convolutions && (layer == 0 || layer == o.layers - 1);
}

// Of what attention makes: all heads together in every second layer that has it.
inline std::vector<uint32_t> output_blocks(const ModelOptions& o) {
  std::vector<uint32_t> blocks;
  for (int layer = 0; layer < o.layers; layer++) {
    const bool transformed = !convolves(o, layer) && layer % 2 == (o.convolutions ? 1 : 0);
    blocks.push_back(transformed ? static_cast<uint32_t>(o.heads * o.head_dim) : 1);
  }
  return blocks;
}

inline uint32_t kv_heads_of(const ModelOptions& o) {
  return static_cast<uint32_t>(o.gpt2 ? o.heads : o.kv_heads);
}

// Says of a graph what makes it another: as a Llama, norms and scales; as a GPT-2, parallel layers.
inline void describe(const ModelOptions& o, GgufBuilder* file) {
  const std::string graph = "squat.graph.", arch = o.gpt2 ? "gpt2" : "llama";
  const auto by_layer = [&](std::vector<uint32_t> values) {
    values.resize(static_cast<size_t>(o.layers));
    return values;
  };
  file->u32_array(graph + "windows", by_layer({5, 0, 33}));
  file->u32_array(graph + "rotation", by_layer({1, 2, 0}));
  file->f32(graph + "second_base", 1000);
  file->u32(arch + ".rope.dimension_count", static_cast<uint32_t>(o.head_dim / 4 * 2));
  file->string(graph + "pairs", "halves");
  file->f32(graph + "embedding_scale", 3);
  file->f32(graph + "attention_scale", 0.2f);
  file->f32(graph + "logit_divisor", 1.5f);
  if (o.gpt2) {
    file->boolean(graph + "parallel", true);
    file->string(graph + "activation", "gelu");
    return;
  }
  if (o.convolutions) {
    std::vector<uint32_t> taps(static_cast<size_t>(o.layers), 0),
        heads(taps.size(), kv_heads_of(o));
    taps.front() = taps.back() = 3;
    heads.front() = heads.back() = 0;
    file->u32_array(graph + "convolutions", taps);
    file->u32_array("llama.attention.head_count_kv", heads);
  }
  file->string(graph + "activation", "gelu_tanh");
  file->f32(graph + "residual_scale", 0.5f);
  const auto norm = [&](const std::string& name, int size) {
    std::vector<float> values(static_cast<size_t>(size));
    for (size_t i = 0; i < values.size(); i++) values[i] = 1 + static_cast<float>(i % 5) / 8;
    file->floats(name + ".weight", values);
  };
  for (int layer = 0; layer < o.layers; layer++) {
    const std::string block = "blk." + std::to_string(layer) + ".";
    norm(block + "post_attention_norm", o.hidden);
    norm(block + "post_ffw_norm", o.hidden);
    if (convolves(o, layer)) continue;
    norm(block + "attn_q_norm", o.head_dim);
    norm(block + "attn_k_norm", o.kv_heads * o.head_dim);
  }
}

inline GgufBuilder tiny_model(const ModelOptions& o = {}) {
  GgufBuilder file;
  std::mt19937 random(o.seed);
  const std::string arch = o.gpt2 ? "gpt2" : "llama";
  const int kv_heads = static_cast<int>(kv_heads_of(o));
  const uint32_t layers = static_cast<uint32_t>(o.layers);
  file.string("general.architecture", arch);
  file.u32("squat.format_version", o.version);
  file.u32(arch + ".context_length", static_cast<uint32_t>(o.context));
  file.u32(arch + ".embedding_length", static_cast<uint32_t>(o.hidden));
  file.u32(arch + ".block_count", layers);
  file.u32(arch + ".feed_forward_length", static_cast<uint32_t>(o.ffn));
  file.u32(arch + ".attention.head_count", static_cast<uint32_t>(o.heads));
  if (o.gpt2) {
    file.f32("gpt2.attention.layer_norm_epsilon", 1e-5f);
  } else {
    file.f32("llama.attention.layer_norm_rms_epsilon", 1e-5f);
    file.u32("llama.attention.head_count_kv", static_cast<uint32_t>(kv_heads));
    file.u32("llama.attention.key_length", static_cast<uint32_t>(o.head_dim));
    file.f32("llama.rope.freq_base", 10000.0f);
  }
  const bool exponents = o.version > 1 && o.exponents && !o.peaks;
  const bool hadamard = o.version > 1 && o.hadamard;
  const bool levels = o.version > 1 && o.levels;
  if (o.version > 1) {
    std::vector<std::string> features = {"token_exponents", "hadamard", "levels"};
    if (o.described) features.push_back("graph");
    if (o.peaks) features.push_back("token_steps");
    if (o.key_centers) features.push_back("key_centers");
    if (o.wide_first_token) features.push_back("first_token");
    if (has_recent_keys(o)) features.push_back("recent_keys");
    if (o.base2) features.push_back("softmax");
    file.string_array("squat.features", features);
  }
  if (o.described) describe(o, &file);
  if (o.peaks) file.string("squat.token_steps", "peak");
  if (o.wide_first_token) file.string("squat.first_token", "wide");
  if (has_recent_keys(o)) file.u32("squat.recent_keys", o.recent_keys);
  const bool ever_wide = o.activations != "4" || o.wide_first_token;
  for (const std::string site : {"attn_in", "q", "k", "v", "attn_out", "mlp_in", "mlp_mid"}) {
    const std::string prefix = "squat." + site;
    const bool follows = site == "attn_in" || site == "q" || site == "k";
    const bool has_exponents = exponents && site != "v";
    // Vectors with exponents are several times as large as their steps reach.
    const float scale = has_exponents ? 0.125f : o.peaks ? 32 : 1.0f;
    file.string(prefix + ".bits", o.activations);
    if (ever_wide) {
      file.f32_array(prefix + ".step8", std::vector<float>(layers, 0.03125f * scale));
    }
    if (o.activations != "8") {
      const float step4 = levels ? 0.03125f : 0.375f;
      file.f32_array(prefix + ".step4", std::vector<float>(layers, step4 * scale));
      if (levels) {
        const bool first_is_wide = follows && o.activations == "4:8";
        std::vector<int32_t> table = random_levels(o.layers, first_is_wide, &random);
        const bool inside = site == "q" || site == "k" || site == "v";
        for (int layer = 0; layer < o.layers; layer++) {
          // Before the first attention there are no 4-bit tokens, nor inside of what there is not.
          const bool before = convolves(o, 0) && o.activations == "4:8" && layer < 1 + follows;
          if (!before && !(inside && convolves(o, layer))) continue;
          std::fill_n(table.begin() + 16 * layer, 16, 0);
        }
        file.i32_array(prefix + ".levels4", table);
      }
    }
    if (has_exponents && ever_wide) file.u32(prefix + ".margin8", 0);
    if (has_exponents && o.activations != "8") file.u32(prefix + ".margin4", 1);
    if (hadamard && (site == "attn_in" || site == "k" || site == "mlp_in" || site == "mlp_mid")) {
      const int size = site == "k" ? o.head_dim : site == "mlp_mid" ? o.ffn : o.hidden;
      file.u32_array(prefix + ".hadamard", hadamard_blocks(o.layers, size));
    }
    if (hadamard && site == "attn_out") file.u32_array(prefix + ".hadamard", output_blocks(o));
  }
  file.string("squat.probs.bits", "8");
  if (o.base2) {
    file.string("squat.softmax", "base2");
  } else {
    file.f32_array("squat.probs.step8",
                   std::vector<float>(layers, o.peaks ? 0.50390625f : 0.00390625f));
  }
  file.string("squat.head_in.bits", "8");
  file.f32_array("squat.head_in.step8", {o.peaks ? 1.00390625f : 0.03125f});
  if (exponents) file.u32("squat.head_in.margin8", 0);
  if (hadamard) file.u32_array("squat.head_in.hadamard", hadamard_blocks(1, o.hidden));
  if (o.activations == "4:8") {
    file.string("squat.importance", o.rarity ? "rarity" : "relative_first_token");
    file.f32_array("squat.threshold", std::vector<float>(layers, o.rarity ? 100.0f : 1.0f));
    if (o.rarity) {
      std::vector<uint32_t> ranks(kVocabulary);
      for (size_t i = 0; i < ranks.size(); i++) {
        ranks[i] = static_cast<uint32_t>(i * 5 % ranks.size());  // no common divisor: each once
      }
      file.u32_array("squat.token_ranks", ranks);
    }
  }
  add_tokenizer(&file);

  const auto norm = [&](const std::string& name) {
    std::vector<float> values(static_cast<size_t>(o.hidden));
    for (float& v : values) v = 0.5f + static_cast<float>(random() % 1000) / 1000.0f;
    file.floats(name + ".weight", values);
    if (o.gpt2) file.floats(name + ".bias", values);
  };
  const auto matrix = [&](const std::string& name, int rows, int inner, int bits) {
    // Entries of about 1/8 whatever the width.
    add_matrix(&file, &random, name + ".weight", rows, inner, bits, o.weight_levels,
               bits == 4 && !o.weight_levels ? -5 : -9, o.version > 1 && o.row_steps);
  };
  const auto convolution = [&](const std::string& name) {
    std::vector<float> values(static_cast<size_t>(3 * o.hidden));
    for (float& v : values) v = static_cast<float>(random() % 1000) / 500.0f - 1;
    file.floats(name, values);
    file.tensor(name).shape = {3, static_cast<uint64_t>(o.hidden)};
  };
  const std::string of_head = hadamard && hadamard_blocks(1, o.hidden)[0] > 1 ? "_hadamard" : "";
  matrix("token_embd" + (o.tied ? of_head : ""), kVocabulary, o.hidden, o.embedding_bits);
  if (o.gpt2) matrix("position_embd", o.context, o.hidden, o.embedding_bits);
  if (!o.tied) matrix("output" + of_head, kVocabulary, o.hidden, o.embedding_bits);
  norm("output_norm");
  const int query = o.heads * o.head_dim, key = kv_heads * o.head_dim;
  for (int layer = 0; layer < o.layers; layer++) {
    const std::string block = "blk." + std::to_string(layer) + ".";
    const auto suffix = [&](int size) {
      const bool transformed = hadamard && hadamard_blocks(o.layers, size)[layer] > 1;
      return transformed ? "_hadamard" : "";
    };
    const std::string of_hidden = suffix(o.hidden), of_ffn = suffix(o.ffn);
    norm(block + "attn_norm");
    norm(block + "ffn_norm");
    if (convolves(o, layer)) {
      matrix(block + "shortconv.in_proj" + of_hidden, 3 * o.hidden, o.hidden, o.weight_bits);
    } else if (o.gpt2) {
      matrix(block + "attn_qkv" + of_hidden, query + 2 * key, o.hidden, o.weight_bits);
    } else {
      matrix(block + "attn_q" + of_hidden, query, o.hidden, o.weight_bits);
      matrix(block + "attn_k" + of_hidden, key, o.hidden, o.weight_bits);
      matrix(block + "attn_v" + of_hidden, key, o.hidden, o.weight_bits);
    }
    if (!o.gpt2) matrix(block + "ffn_gate" + of_hidden, o.ffn, o.hidden, o.weight_bits);
    if (convolves(o, layer)) {
      matrix(block + "shortconv.out_proj", o.hidden, o.hidden, o.weight_bits);
      convolution(block + "shortconv.conv.weight");
    } else {
      if (o.key_centers) {
        std::vector<float> center(static_cast<size_t>(key));
        for (float& v : center) v = static_cast<float>(random() % 1000) / 500.0f - 1;
        file.floats(block + "attn_k_center", center);
      }
      const bool transformed = hadamard && output_blocks(o)[static_cast<size_t>(layer)] > 1;
      matrix(block + "attn_output" + (transformed ? "_hadamard" : ""), o.hidden, query,
             o.weight_bits);
    }
    matrix(block + "ffn_up" + of_hidden, o.ffn, o.hidden, o.weight_bits);
    matrix(block + "ffn_down" + of_ffn, o.hidden, o.ffn, o.weight_bits);
  }
  return file;
}

// Each as a file of version 1, with everything that version 2 has, so with sizes that are no
// multiples of 32, and so with steps by peaks, and so with another graph.
inline std::vector<ModelOptions> variants() {
  std::vector<ModelOptions> all;
  for (const bool gpt2 : {false, true}) {
    for (const char* activations : {"4:8", "4", "8"}) {
      ModelOptions o;
      o.gpt2 = gpt2;
      o.activations = activations;
      o.version = 1;
      all.push_back(o);
      o.version = 2;
      o.weight_bits = 8;
      o.embedding_bits = 4;
      o.tied = false;
      o.weight_levels = true;  // of embedding and head
      all.push_back(o);
      o.weight_bits = 4;
      o.embedding_bits = 8;
      all.push_back(o);
      o.weight_levels = false;
      o.hidden = 36;
      o.head_dim = gpt2 ? 9 : 10;
      o.ffn = 42;
      all.push_back(o);
      o.weight_levels = o.peaks = o.key_centers = o.wide_first_token = true;
      all.push_back(o);
      o.described = o.base2 = true;
      all.push_back(o);
      o.recent_keys = 5;
      all.push_back(o);
      o.recent_keys = 0;
      if (gpt2) continue;
      o.convolutions = true;
      all.push_back(o);
      if (std::string(activations) != "4:8") continue;
      o.rarity = true;
      all.push_back(o);
    }
  }
  return all;
}

// Layers with a window, in texts of many times its length: long ones, so in one width of tokens,
// the one that has the other two in it.
inline std::vector<ModelOptions> windowed() {
  std::vector<ModelOptions> all;
  for (ModelOptions options : variants()) {
    if (!options.described || std::string(options.activations) != "4:8") continue;
    options.context = 900;
    all.push_back(options);
    options.hidden = 64;
    options.head_dim = 16;
    options.ffn = 96;
    all.push_back(options);
  }
  return all;
}

inline std::vector<uint8_t> windowed_file(const ModelOptions& options,
                                          const std::vector<uint32_t>& windows) {
  GgufBuilder file = tiny_model(options);
  file.u32_array("squat.graph.windows", windows);
  return file.bytes();
}

inline std::vector<uint8_t> windowed_file(const ModelOptions& options) {
  return options.hidden == 64 ? windowed_file(options, {64, 1, 200})
                              : windowed_file(options, {5, 0, 33});
}

// The instruction sets that whole models are compared on: those that this CPU has. With
// SQUAT_TEST_ISAS=best only the one that the engine chooses: an emulator takes minutes for the
// others.
inline std::vector<kernels::Isa> isas_to_compare() {
  std::vector<kernels::Isa> found;
  for (const kernels::Isa& isa : kernels::isas()) {
    if (kernels::runs_here(isa)) found.push_back(isa);
  }
  const char* which = std::getenv("SQUAT_TEST_ISAS");
  if (which != nullptr && std::strcmp(which, "best") == 0) return {found.back()};
  return found;
}

inline std::vector<int32_t> random_tokens(size_t n) {
  std::mt19937 random(3);
  std::vector<int32_t> tokens(n);
  for (int32_t& token : tokens) token = static_cast<int32_t>(random() % kVocabulary);
  return tokens;
}

}  // namespace squat::test
