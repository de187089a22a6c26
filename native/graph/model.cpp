#include "model.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "base/error.h"

namespace squat {

namespace {

constexpr uint32_t kFormatVersion = 2;  // version 1 is read as well
constexpr uint32_t kMaxContext = 1u << 20;
constexpr uint32_t kMaxVocabulary = 1u << 24;

// A matrix that will be packed, once all of them are known.
struct Pending {
  CodeTensor tensor;
  Weights* weights;
};

// Reads one file into one Model; the steps stand in the order of load_model().
class Loader {
 public:
  Loader(const Gguf& file, const MappedFile* mapping, const kernels::Choice& choice,
         ThreadPool& threads)
      : file_(file), mapping_(mapping), choice_(choice), threads_(threads) {}

  Model load() {
    read_version();
    read_dimensions();
    read_rotation();
    read_sites();
    read_tensors();
    pack();
    return std::move(model_);
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw Error(SQUAT_ERROR_FORMAT, file_.name() + ": " + what);
  }

  std::string key(const char* name) const { return architecture_ + "." + name; }

  int bounded(const std::string& name, uint32_t least, uint32_t most) const {
    const uint32_t value = file_.u32(name);
    if (value < least || value > most) {
      fail("key '" + name + "' is " + std::to_string(value) + ", not from " +
           std::to_string(least) + " to " + std::to_string(most));
    }
    return static_cast<int>(value);
  }

  // A factor or a base: positive and finite.
  float positive(const std::string& name) const {
    const float value = file_.f32(name);
    if (!(value > 0) || !std::isfinite(value)) {
      fail("key '" + name + "' is " + std::to_string(value) + ", not a positive number");
    }
    return value;
  }

  void read_version() {
    version_ = file_.u32("squat.format_version");
    if (version_ < 1 || version_ > kFormatVersion) {
      fail("key 'squat.format_version' is " + std::to_string(version_) +
           ", but this engine reads 1 to " + std::to_string(kFormatVersion) +
           "; use the engine that belongs to the exporter, or export again");
    }
    if (version_ == 1 || !file_.has(kFeatureList)) return;
    for (const std::string_view name : file_.string_array(kFeatureList)) {
      if (name != kExponents && name != kHadamard && name != kLevels) {
        fail("key '" + std::string(kFeatureList) + "' names '" + std::string(name.substr(0, 64)) +
             "', which this engine does not know; use the engine that belongs to the exporter");
      }
      features_.emplace_back(name);
    }
  }

  void read_dimensions() {
    architecture_ = file_.string("general.architecture");
    const bool llama = architecture_ == "llama";
    if (!llama && architecture_ != "gpt2") {
      fail("key 'general.architecture' is '" + architecture_.substr(0, 64) +
           "', expected 'llama' or 'gpt2'");
    }
    Model& m = model_;
    m.architecture = llama ? Architecture::kLlama : Architecture::kGpt2;
    const uint32_t inner = kernels::kMaxInner;
    m.n_embd = bounded(key("embedding_length"), 1, inner);
    m.n_ff = bounded(key("feed_forward_length"), 1, inner);
    m.n_context = bounded(key("context_length"), 1, kMaxContext);
    // Every layer has tensors of its own, so that a count past the number of tensors is an error.
    m.n_layer = bounded(key("block_count"), 1,
                        static_cast<uint32_t>(std::min<size_t>(file_.tensors().size(), 1u << 16)));
    m.n_head = bounded(key("attention.head_count"), 1, static_cast<uint32_t>(m.n_embd));
    m.n_head_kv = file_.has(key("attention.head_count_kv"))
                      ? bounded(key("attention.head_count_kv"), 1, static_cast<uint32_t>(m.n_head))
                      : m.n_head;
    if (m.n_head % m.n_head_kv != 0) {
      fail("key '" + key("attention.head_count_kv") + "' is " + std::to_string(m.n_head_kv) +
           ", which does not divide the " + std::to_string(m.n_head) + " query heads");
    }
    if (file_.has(key("attention.key_length"))) {
      m.head_dim = bounded(key("attention.key_length"), 1, inner / static_cast<uint32_t>(m.n_head));
      if (file_.has(key("attention.value_length"))) {
        const uint32_t size = static_cast<uint32_t>(m.head_dim);
        bounded(key("attention.value_length"), size, size);
      }
    } else {
      m.head_dim = m.n_embd / m.n_head;
      if (m.head_dim * m.n_head != m.n_embd) {
        fail("key '" + key("attention.head_count") + "' is " + std::to_string(m.n_head) +
             ", which does not divide the hidden size " + std::to_string(m.n_embd));
      }
    }
    m.norm_epsilon =
        positive(key(llama ? "attention.layer_norm_rms_epsilon" : "attention.layer_norm_epsilon"));

    const GgufTensor* embedding = nullptr;
    for (const int block : {1, 2}) {  // not transformed, or in blocks of any size
      for (const char* suffix : {"", ".q4", ".q8"}) {
        if (embedding != nullptr) break;
        embedding = file_.find_tensor(matrix_name(kEmbedding, block) + suffix);
      }
    }
    if (embedding == nullptr) fail("tensor '" + matrix_name(kEmbedding) + "' is missing");
    if (embedding->ne[1] > kMaxVocabulary) {
      fail("tensor '" + std::string(embedding->name) + "' has " + std::to_string(embedding->ne[1]) +
           " rows, more than the limit of " + std::to_string(kMaxVocabulary));
    }
    m.n_vocab = static_cast<int>(embedding->ne[1]);
  }

  // Frequencies and scale of RoPE, for the variants of transformers' modeling_rope_utils.
  void read_rotation() {
    Model& m = model_;
    if (m.architecture != Architecture::kLlama) return;
    if (m.head_dim % 2 != 0) {
      fail("the head size is " + std::to_string(m.head_dim) + ", but rotation needs an even one");
    }
    const uint32_t size = static_cast<uint32_t>(m.head_dim);
    if (file_.has(key("rope.dimension_count"))) bounded(key("rope.dimension_count"), size, size);
    const int pairs = m.head_dim / 2;
    const float base = file_.has(key("rope.freq_base")) ? positive(key("rope.freq_base")) : 1e4f;
    m.rope_frequencies.resize(static_cast<size_t>(pairs));
    for (int i = 0; i < pairs; i++) {
      // Rounded where PyTorch rounds.
      const float exponent = static_cast<float>(2 * i) / static_cast<float>(m.head_dim);
      m.rope_frequencies[static_cast<size_t>(i)] =
          1.0f / static_cast<float>(std::pow(static_cast<double>(base), exponent));
    }
    const std::string type = file_.has(key("rope.scaling.type"))
                                 ? std::string(file_.string(key("rope.scaling.type")))
                                 : "none";
    if (type == "linear") {
      const float factor = positive(key("rope.scaling.factor"));
      for (float& frequency : m.rope_frequencies) frequency /= factor;
    } else if (type == "yarn") {
      scale_yarn(base);
    } else if (type != "none") {
      fail("key '" + key("rope.scaling.type") + "' is '" + type.substr(0, 64) +
           "', expected 'none', 'linear' or 'yarn'");
    }
    if (file_.find_tensor("rope_freqs.weight") != nullptr) {  // llama3
      const std::vector<float> factors = floats("rope_freqs.weight", static_cast<uint64_t>(pairs));
      for (size_t i = 0; i < factors.size(); i++) m.rope_frequencies[i] /= factors[i];
    }
  }

  // YaRN (Peng et al. 2023): high frequencies stay, low ones are interpolated, with a ramp between
  // the dimensions that turn 32 times and once within the original context.
  void scale_yarn(float base) {
    Model& m = model_;
    const double factor = positive(key("rope.scaling.factor"));
    const double original = bounded(key("rope.scaling.original_context_length"), 1, kMaxContext);
    const double size = m.head_dim;
    const auto dimension = [&](double turns) {
      return size * std::log(original / (turns * 2 * M_PI)) / (2 * std::log(double{base}));
    };
    const double low = std::max(std::floor(dimension(32)), 0.0);
    double high = std::min(std::ceil(dimension(1)), size - 1);
    if (low == high) high += 0.001;
    for (size_t i = 0; i < m.rope_frequencies.size(); i++) {
      const double ramp = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
      m.rope_frequencies[i] *= static_cast<float>((1 - ramp) + ramp / factor);
    }
    m.rope_scale = static_cast<float>(factor > 1 ? 0.1 * std::log(factor) + 1 : 1.0);
  }

  std::vector<float> steps(const std::string& name, int count, int first_used) const {
    std::vector<float> values = file_.f32_array(name);
    if (values.size() != static_cast<size_t>(count)) {
      fail("key '" + name + "' has " + std::to_string(values.size()) + " elements, expected " +
           std::to_string(count));
    }
    for (size_t i = static_cast<size_t>(first_used); i < values.size(); i++) {
      if (!is_step(values[i])) {
        fail("key '" + name + "' element " + std::to_string(i) + " is " +
             std::to_string(values[i]) + ", which is not an fp16 number of at least 2^-14");
      }
    }
    return values;
  }

  // Whether a site has a key of a feature. If so, the file must name the feature, and the site must
  // be one that can have it.
  bool has_feature(const std::string& key, const char* feature, bool possible) const {
    if (!file_.has(key)) return false;
    if (!possible) fail("key '" + key + "' is there, but this site has no " + feature);
    if (std::find(features_.begin(), features_.end(), feature) == features_.end()) {
      fail("key '" + key + "' is there, but '" + kFeatureList + "' does not name '" + feature +
           "'");
    }
    return true;
  }

  // Of each width that the site has, or of none.
  void read_margins(const std::string& prefix, bool possible, Site* site) const {
    const std::string of8 = prefix + "margin8", of4 = prefix + "margin4";
    const bool any8 = has_feature(of8, kExponents, possible);
    const bool any4 = has_feature(of4, kExponents, possible);
    if (!any8 && !any4) return;
    if (site->bits != Site::Bits::k4) site->margin8 = bounded(of8, 0, 7);
    if (site->bits != Site::Bits::k8) site->margin4 = bounded(of4, 0, 7);
  }

  // One for each layer (head_in: one), each a power of two that divides the site's size.
  std::vector<int> read_blocks(const std::string& name, int count, int size) const {
    const bool by_layer = version_ > 1;
    const std::vector<uint32_t> blocks =
        by_layer ? file_.u32_array(name)
                 : std::vector<uint32_t>(static_cast<size_t>(count), file_.u32(name));
    if (blocks.size() != static_cast<size_t>(count)) {
      fail("key '" + name + "' has " + std::to_string(blocks.size()) + " elements, expected " +
           std::to_string(count));
    }
    for (size_t i = 0; i < blocks.size(); i++) {
      const uint32_t block = blocks[i];
      if (block == 0 || (block & (block - 1)) != 0 || static_cast<uint32_t>(size) % block != 0) {
        fail("key '" + name + "'" + (by_layer ? " element " + std::to_string(i) : "") + " is " +
             std::to_string(block) + ", no power of two that divides the site's size " +
             std::to_string(size));
      }
    }
    return {blocks.begin(), blocks.end()};
  }

  // Sixteen a layer; zeros in the layers before `first_used`, where no token has 4 bits.
  std::vector<Levels> read_levels(const std::string& name, size_t first_used) const {
    const std::vector<int32_t> values = file_.i32_array(name);
    const size_t layers = static_cast<size_t>(model_.n_layer);
    if (values.size() != 16 * layers) {
      fail("key '" + name + "' has " + std::to_string(values.size()) + " elements, expected " +
           std::to_string(16 * layers) + ", 16 a layer");
    }
    std::vector<Levels> levels(layers);
    for (size_t layer = 0; layer < layers; layer++) {
      for (size_t i = 16 * layer; i < 16 * (layer + 1); i++) {
        const std::string what =
            "key '" + name + "' element " + std::to_string(i) + " is " + std::to_string(values[i]);
        if (layer < first_used) {
          if (values[i] == 0) continue;
          fail(what + ", expected 0: layer " + std::to_string(layer) + " has no 4-bit tokens");
        }
        if (values[i] < -128 || values[i] > 127) fail(what + ", not from -128 to 127");
        if (i % 16 > 0 && values[i] <= values[i - 1]) {
          fail(what + ", not more than the one before it: the levels of a layer ascend");
        }
      }
      levels[layer] = make_levels(values.data() + 16 * layer);
    }
    return levels;
  }

  // What there is to know about a site beside its keys.
  struct Kind {
    bool follows_previous = false;  // its widths are the previous layer's: layer 0 is always wide
    bool exponents = false;         // whether it can have token exponents,
    int transformed = 0;            // be transformed, and with what size,
    bool levels = false;            // and have levels
  };

  Site read_site(const char* name, const Kind& kind) {
    const std::string prefix = std::string("squat.") + name + ".";
    const std::string_view bits = file_.string(prefix + "bits");
    const bool head = std::strcmp(name, "head_in") == 0;
    Site site;
    if (bits == "8") {
      site.bits = Site::Bits::k8;
    } else if (bits == "4") {
      site.bits = Site::Bits::k4;
    } else if (bits == "4:8" && !head) {
      site.bits = Site::Bits::kByToken;
    } else {
      fail("key '" + prefix + "bits' is '" + std::string(bits.substr(0, 64)) + "', expected " +
           (head ? "'4' or '8'" : "'4', '8' or '4:8'"));
    }
    const int count = head ? 1 : model_.n_layer;
    const bool all_wide = site.bits == Site::Bits::k8;
    // The first layer with 4-bit tokens.
    const int narrow_from = all_wide ? count : site.by_token() && kind.follows_previous ? 1 : 0;
    if (site.bits != Site::Bits::k4) site.step8 = steps(prefix + "step8", count, 0);
    if (!all_wide) site.step4 = steps(prefix + "step4", count, narrow_from);
    adaptive_ = adaptive_ || site.by_token();

    read_margins(prefix, kind.exponents, &site);
    if (has_feature(prefix + "hadamard", kHadamard, kind.transformed > 0)) {
      site.hadamard = read_blocks(prefix + "hadamard", count, kind.transformed);
    }
    if (has_feature(prefix + "levels4", kLevels, kind.levels)) {
      site.levels = read_levels(prefix + "levels4", static_cast<size_t>(narrow_from));
    }
    return site;
  }

  void read_sites() {
    Sites& s = model_.sites;
    const int n_embd = model_.n_embd, n_ff = model_.n_ff, head_dim = model_.head_dim;
    // Version 1 has one feature, which it does not name.
    if (version_ == 1 && file_.has("squat.mlp_mid.hadamard")) features_.emplace_back(kHadamard);
    s.attn_in = read_site("attn_in", {true, true, n_embd, true});
    s.q = read_site("q", {true, true, 0, true});
    s.k = read_site("k", {true, true, head_dim, true});
    s.v = read_site("v", {false, false, 0, true});
    s.k.cached = s.v.cached = true;
    s.attn_out = read_site("attn_out", {false, true, 0, true});
    s.mlp_in = read_site("mlp_in", {false, true, n_embd, true});
    s.mlp_mid = read_site("mlp_mid", {false, true, n_ff, true});
    s.head_in = read_site("head_in", {false, true, n_embd, false});
    read_probs();
    if (adaptive_) read_importance();
  }

  void read_probs() {
    if (const std::string_view bits = file_.string("squat.probs.bits"); bits != "8") {
      fail("key 'squat.probs.bits' is '" + std::string(bits.substr(0, 64)) + "', expected '8'");
    }
    model_.sites.probs_step = steps("squat.probs.step8", model_.n_layer, 0);
    has_feature("squat.probs.margin8", kExponents, false);
    has_feature("squat.probs.margin4", kExponents, false);
    has_feature("squat.probs.hadamard", kHadamard, false);
    has_feature("squat.probs.levels4", kLevels, false);
  }

  void read_importance() {
    const std::string_view importance = file_.string("squat.importance");
    if (importance == "first_token") {
      model_.importance = Importance::kFirstToken;
    } else if (importance == "relative_first_token") {
      model_.importance = Importance::kRelativeFirstToken;
    } else if (importance == "value_peak") {
      model_.importance = Importance::kValuePeak;
    } else {
      fail("key 'squat.importance' is '" + std::string(importance.substr(0, 64)) +
           "', expected 'first_token', 'relative_first_token' or 'value_peak'");
    }
    model_.thresholds = file_.f32_array("squat.threshold");
    if (model_.thresholds.size() != static_cast<size_t>(model_.n_layer)) {
      fail("key 'squat.threshold' has " + std::to_string(model_.thresholds.size()) +
           " elements, expected " + std::to_string(model_.n_layer));
    }
    for (size_t i = 0; i < model_.thresholds.size(); i++) {
      if (std::isnan(model_.thresholds[i])) {
        fail("key 'squat.threshold' element " + std::to_string(i) + " is not a number");
      }
    }
  }

  std::vector<float> floats(const std::string& name, uint64_t count) const {
    const GgufTensor* tensor = file_.find_tensor(name);
    if (tensor == nullptr) fail("tensor '" + name + "' is missing");
    if (tensor->type != TensorType::kF32 || tensor->rank != 1 || tensor->ne[0] != count) {
      fail("tensor '" + name + "' has type " + tensor_type_name(tensor->type) + ", rank " +
           std::to_string(tensor->rank) + " and " + std::to_string(tensor->ne[0]) +
           " elements a row, expected F32, rank 1 and " + std::to_string(count));
    }
    std::vector<float> values(count);
    std::memcpy(values.data(), tensor->data, tensor->size);
    return values;
  }

  Norm read_norm(const std::string& name) const {
    Norm norm;
    norm.weight = floats(name + ".weight", static_cast<uint64_t>(model_.n_embd));
    if (model_.architecture == Architecture::kGpt2) {
      norm.bias = floats(name + ".bias", static_cast<uint64_t>(model_.n_embd));
    }
    return norm;
  }

  CodeTensor codes(const std::string& name, int rows, int inner) const {
    return CodeTensor(file_, name, static_cast<uint64_t>(rows), static_cast<uint64_t>(inner),
                      version_ == 1 ? CodeTensor::Steps::kOne : CodeTensor::Steps::kByRow);
  }

  // Of a matrix whose input is transformed in blocks the tensor has another name.
  static std::string matrix_name(const std::string& name, int block = 1) {
    return name + (block > 1 ? "_hadamard.weight" : ".weight");
  }

  // Its bias has the other name in version 1 only.
  void read_weights(const std::string& name, int rows, int inner, Weights* weights, int block = 1) {
    pending_.push_back({codes(matrix_name(name, block), rows, inner), weights});
    const std::string bias = name + (version_ == 1 && block > 1 ? "_hadamard.bias" : ".bias");
    if (file_.find_tensor(bias) != nullptr) {
      weights->bias = floats(bias, static_cast<uint64_t>(rows));
    }
  }

  void read_tensors() {
    Model& m = model_;
    const int of_head = m.sites.head_in.block(0);
    const std::string head = matrix_name("output", of_head);
    const bool tied =
        file_.find_tensor(head) == nullptr && file_.find_tensor(head + ".step") == nullptr;
    m.embedding_block = tied ? of_head : 1;
    m.embedding = codes(matrix_name(kEmbedding, m.embedding_block), m.n_vocab, m.n_embd);
    m.layers.resize(static_cast<size_t>(m.n_layer));
    const bool llama = m.architecture == Architecture::kLlama;
    for (int l = 0; l < m.n_layer; l++) {
      Layer& layer = m.layers[static_cast<size_t>(l)];
      const std::string block = "blk." + std::to_string(l) + ".";
      layer.attn_norm = read_norm(block + "attn_norm");
      layer.mlp_norm = read_norm(block + "ffn_norm");
      const int of_qkv = m.sites.attn_in.block(l), of_ffn = m.sites.mlp_in.block(l);
      if (llama) {
        layer.qkv.resize(3);
        read_weights(block + "attn_q", m.n_embd_q(), m.n_embd, &layer.qkv[0], of_qkv);
        read_weights(block + "attn_k", m.n_embd_kv(), m.n_embd, &layer.qkv[1], of_qkv);
        read_weights(block + "attn_v", m.n_embd_kv(), m.n_embd, &layer.qkv[2], of_qkv);
        layer.mlp_in.resize(2);
        read_weights(block + "ffn_gate", m.n_ff, m.n_embd, &layer.mlp_in[0], of_ffn);
        read_weights(block + "ffn_up", m.n_ff, m.n_embd, &layer.mlp_in[1], of_ffn);
      } else {
        layer.qkv.resize(1);
        read_weights(block + "attn_qkv", m.n_embd_qkv(), m.n_embd, &layer.qkv[0], of_qkv);
        layer.mlp_in.resize(1);
        read_weights(block + "ffn_up", m.n_ff, m.n_embd, &layer.mlp_in[0], of_ffn);
      }
      read_weights(block + "attn_output", m.n_embd, m.n_embd_q(), &layer.attn_out);
      read_weights(block + "ffn_down", m.n_embd, m.n_ff, &layer.mlp_mid, m.sites.mlp_mid.block(l));
    }
    m.out_norm = read_norm("output_norm");
    if (tied) {
      pending_.push_back({*m.embedding, &m.head});
    } else {
      read_weights("output", m.n_vocab, m.n_embd, &m.head, of_head);
      m.embedding->check_scales();
      release(*m.embedding);
    }
    if (!llama) read_positions();
  }

  void read_positions() {
    Model& m = model_;
    const std::string name = "position_embd.weight";
    const GgufTensor* tensor = file_.find_tensor(name);
    if (tensor != nullptr && tensor->type == TensorType::kF32) {
      const uint64_t n_embd = static_cast<uint64_t>(m.n_embd);
      const uint64_t rows = static_cast<uint64_t>(m.n_context);
      if (tensor->rank != 2 || tensor->ne[0] != n_embd || tensor->ne[1] != rows) {
        fail("tensor '" + name + "' has shape " + std::to_string(tensor->ne[0]) + " x " +
             std::to_string(tensor->ne[1]) + ", but the metadata ask for " +
             std::to_string(n_embd) + " x " + std::to_string(rows));
      }
      m.positions.floats = tensor->data;
      return;
    }
    m.positions.codes = codes(name, m.n_context, m.n_embd);
    m.positions.codes->check_scales();
    release(*m.positions.codes);
  }

  void release(const CodeTensor& tensor) const {
    if (mapping_ != nullptr) mapping_->release(tensor.data(), tensor.size());
  }

  // Lays all matrices out in one piece of memory and fills it, each thread its own panels. A
  // tensor's pages are given back once it is packed, so that the file and its packed form are never
  // both in memory.
  void pack() {
    const auto lay_out = [this](Arena arena) {
      for (Pending& p : pending_) {
        const kernels::WeightForm form = kernels::plain_weights(p.tensor.bits());
        const int rows = p.tensor.rows(), inner = p.tensor.inner();
        uint8_t* data = arena.take<uint8_t>(kernels::packed_bytes(choice_, form, rows, inner));
        p.weights->matrix = kernels::packed_matrix(choice_, form, rows, inner, data);
      }
      // Behind all of them: the codes stay one stream from matrix to matrix, which the CPU's
      // prefetchers follow when a token is decoded.
      for (Pending& p : pending_) {
        p.weights->steps = arena.take<float>(static_cast<size_t>(p.tensor.rows()));
      }
      return arena.used();
    };
    model_.weight_bytes = lay_out(Arena());
    model_.weight_memory = Memory(model_.weight_bytes, Memory::Pages::kHuge);
    lay_out(Arena(model_.weight_memory));

    // Room for every thread's row of codes, so that the threads need not allocate.
    std::vector<int8_t> rows(static_cast<size_t>(threads_.size()) * kernels::kMaxInner);
    for (const Pending& p : pending_) {
      const kernels::PackedMatrix& matrix = p.weights->matrix;
      const int panel = matrix.layout->n;
      std::atomic<int64_t> bad{-1};  // a row and block whose scale is not the row's
      threads_.parallel_for((matrix.rows + panel - 1) / panel, [&](int begin, int end, int thread) {
        int8_t* codes = rows.data() + static_cast<size_t>(thread) * kernels::kMaxInner;
        const int last = std::min(end * panel, matrix.rows);
        for (int row = begin * panel; row < last; row++) {
          if (const int block = p.tensor.bad_block(row); block >= 0) {
            bad.store(static_cast<int64_t>(row) << 32 | block);
            return;
          }
          p.weights->steps[row] = p.tensor.step(row);
          p.tensor.unpack(row, codes);
          kernels::pack_row(matrix, row, codes);
        }
      });
      if (bad.load() >= 0) {
        p.tensor.refuse(static_cast<int>(bad.load() >> 32),
                        static_cast<int>(bad.load() & 0xffffffff));
      }
      release(p.tensor);
    }
  }

  static constexpr const char* kEmbedding = "token_embd";
  // What a file may have beyond the plain network.
  static constexpr const char* kFeatureList = "squat.features";
  static constexpr const char* kExponents = "token_exponents";
  static constexpr const char* kHadamard = "hadamard";
  static constexpr const char* kLevels = "levels";

  const Gguf& file_;
  const MappedFile* mapping_;
  const kernels::Choice& choice_;
  ThreadPool& threads_;
  uint32_t version_ = 0;
  std::vector<std::string> features_;
  std::string architecture_;
  bool adaptive_ = false;
  std::vector<Pending> pending_;
  Model model_ = {};
};

}  // namespace

Model load_model(const Gguf& file, const MappedFile* mapping, const kernels::Choice& choice,
                 ThreadPool& threads) {
  return Loader(file, mapping, choice, threads).load();
}

}  // namespace squat
