#include "model.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "file/keys.h"

namespace squat {

namespace {

constexpr int kMostRecent = 64;  // keys

constexpr uint32_t kFormatVersion = 2;  // version 1 is read as well
constexpr uint32_t kMaxContext = 1u << 20;
constexpr uint32_t kMaxVocabulary = 1u << 24;

// How the rows of a matrix stand in a file: those of `heads` heads from the first row on are turned
// in halves, the others are as they should be.
struct RowOrder {
  int heads = 0, head_dim = 1, rotated = 0;

  // Where the row is in the file that is `row` in the engine, where pair follows pair.
  int in_file(int row) const {
    const int element = row % head_dim;
    if (row >= heads * head_dim || element >= rotated) return row;
    return row - element + element % 2 * (rotated / 2) + element / 2;
  }
};

// A matrix that will be packed, once all of them are known.
struct Pending {
  CodeTensor tensor;
  Weights* weights;
  RowOrder order;
};

// Reads one file into one Model; the steps stand in the order of load_model().
class Loader {
 public:
  Loader(const Gguf& file, const MappedFile* mapping, const kernels::Choice& choice,
         ThreadPool& threads)
      : file_(file), keys_(file), mapping_(mapping), choice_(choice), threads_(threads) {}

  Model load() {
    read_version();
    read_dimensions();
    model_.graph =
        read_graph(file_, model_.architecture, model_.n_layer, model_.head_dim, has(kGraph));
    read_sites();
    read_tensors();
    pack();
    return std::move(model_);
  }

 private:
  [[noreturn]] void fail(const std::string& what) const { keys_.fail(what); }
  std::string key(const char* name) const { return model_.architecture + "." + name; }
  bool has(const char* feature) const {
    return std::find(features_.begin(), features_.end(), feature) != features_.end();
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
      const auto known = {kExponents,  kTokenSteps, kHadamard, kKeyCenters, kFirstToken,
                          kRecentKeys, kSoftmax,    kLevels,   kGraph,      kTokenizer};
      if (std::find(known.begin(), known.end(), name) == known.end()) {
        fail("key '" + std::string(kFeatureList) + "' names '" + std::string(name.substr(0, 64)) +
             "', which this engine does not know; use the engine that belongs to the exporter");
      }
      features_.emplace_back(name);
    }
  }

  void read_dimensions() {
    Model& m = model_;
    m.architecture = file_.string("general.architecture");
    // Of these two the name says what is computed.
    if (m.architecture != "llama" && m.architecture != "gpt2" && !has(kGraph)) {
      fail("key 'general.architecture' is '" + m.architecture.substr(0, 64) +
           "', expected 'llama' or 'gpt2' where '" + kFeatureList + "' does not name '" + kGraph +
           "'");
    }
    const uint32_t inner = kernels::kMaxInner;
    m.n_embd = keys_.bounded(key("embedding_length"), 1, inner);
    m.n_ff = keys_.bounded(key("feed_forward_length"), 1, inner);
    m.n_context = keys_.bounded(key("context_length"), 1, kMaxContext);
    // Every layer has tensors of its own, so that a count past the number of tensors is an error.
    m.n_layer =
        keys_.bounded(key("block_count"), 1,
                      static_cast<uint32_t>(std::min<size_t>(file_.tensors().size(), 1u << 16)));
    m.n_head = keys_.bounded(key("attention.head_count"), 1, static_cast<uint32_t>(m.n_embd));
    m.n_head_kv = read_key_heads();
    if (m.n_head % m.n_head_kv != 0) {
      fail("key '" + key("attention.head_count_kv") + "' is " + std::to_string(m.n_head_kv) +
           ", which does not divide the " + std::to_string(m.n_head) + " query heads");
    }
    if (file_.has(key("attention.key_length"))) {
      m.head_dim =
          keys_.bounded(key("attention.key_length"), 1, inner / static_cast<uint32_t>(m.n_head));
      if (file_.has(key("attention.value_length"))) {
        const uint32_t size = static_cast<uint32_t>(m.head_dim);
        keys_.bounded(key("attention.value_length"), size, size);
      }
    } else {
      m.head_dim = m.n_embd / m.n_head;
      if (m.head_dim * m.n_head != m.n_embd) {
        fail("key '" + key("attention.head_count") + "' is " + std::to_string(m.n_head) +
             ", which does not divide the hidden size " + std::to_string(m.n_embd));
      }
    }
    const char* epsilon = "attention.layer_norm_rms_epsilon";
    if (!file_.has(key(epsilon))) epsilon = "attention.layer_norm_epsilon";
    m.norm_epsilon = keys_.positive(key(epsilon));

    const GgufTensor* embedding = find_matrix(kEmbedding);
    if (embedding == nullptr) fail("tensor '" + matrix_name(kEmbedding) + "' is missing");
    if (embedding->ne[1] > kMaxVocabulary) {
      fail("tensor '" + std::string(embedding->name) + "' has " + std::to_string(embedding->ne[1]) +
           " rows, more than the limit of " + std::to_string(kMaxVocabulary));
    }
    m.n_vocab = static_cast<int>(embedding->ne[1]);
  }

  // One number, or where some layers have no attention one for each: the same, or there 0.
  int read_key_heads() const {
    const std::string name = key("attention.head_count_kv");
    const uint32_t most = static_cast<uint32_t>(model_.n_head);
    if (!file_.has(name)) return model_.n_head;
    if (!file_.has("squat.graph.convolutions")) return keys_.bounded(name, 1, most);
    const std::vector<int> by_layer = keys_.bounded_array(name, model_.n_layer, most);
    const int heads = std::max(1, *std::max_element(by_layer.begin(), by_layer.end()));
    for (size_t i = 0; i < by_layer.size(); i++) {
      if (by_layer[i] != 0 && by_layer[i] != heads) {
        fail("key '" + name + "' element " + std::to_string(i) + " is " +
             std::to_string(by_layer[i]) + ", expected " + std::to_string(heads) +
             " as elsewhere, or 0");
      }
    }
    return heads;
  }

  // Whether its input is transformed or not; null if it is missing.
  const GgufTensor* find_matrix(const std::string& name) const {
    for (const int block : {1, 2}) {
      for (const char* suffix : {"", ".q4", ".iq4_nl", ".q8"}) {
        if (const GgufTensor* found = file_.find_tensor(matrix_name(name, block) + suffix)) {
          return found;
        }
      }
    }
    return nullptr;
  }

  // By layer, whether a site has tokens of a width.
  using Used = std::vector<bool>;

  std::vector<float> steps(const std::string& name, const Used& used) const {
    const size_t count = used.size();
    std::vector<float> values = file_.f32_array(name);
    if (values.size() != count) {
      fail("key '" + name + "' has " + std::to_string(values.size()) + " elements, expected " +
           std::to_string(count));
    }
    for (size_t i = 0; i < count; i++) {
      if (used[i] && !is_step(values[i])) {
        fail("key '" + name + "' element " + std::to_string(i) + " is " +
             std::to_string(values[i]) + ", which is not an fp16 number of at least 2^-14");
      }
      // Then products of multiplied steps are exact.
      if (used[i] && peaks_ &&
          std::fmod(std::ldexp(values[i], 8 - std::ilogb(values[i])), 1) != 0) {
        fail("key '" + name + "' element " + std::to_string(i) + " is " +
             std::to_string(values[i]) +
             ", which has more than 8 bits behind the point and is multiplied by tokens");
      }
    }
    return values;
  }

  // Whether a site has a key of a feature. If so, the file must name the feature, and the site must
  // be one that can have it.
  bool has_feature(const std::string& key, const char* feature, bool possible) const {
    if (!file_.has(key)) return false;
    if (!possible) fail("key '" + key + "' is there, but this site has no " + feature);
    if (!has(feature)) {
      fail("key '" + key + "' is there, but '" + kFeatureList + "' does not name '" + feature +
           "'");
    }
    return true;
  }

  // Whether the key of a feature is there, which then has this one value.
  bool says(const std::string& key, const char* feature, const std::string& value) const {
    if (!has_feature(key, feature, true)) return false;
    if (const std::string_view found = file_.string(key); found != value) {
      fail("key '" + key + "' is '" + std::string(found.substr(0, 64)) + "', expected '" + value +
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
    if (site->ever_wide()) site->margin8 = keys_.bounded(of8, 0, 7);
    if (site->bits != Site::Bits::k8) site->margin4 = keys_.bounded(of4, 0, 7);
  }

  // One for each layer (head_in: one), each divides the size of the site and is a multiple of
  // `inner`.
  std::vector<int> read_blocks(const std::string& name, int count, int size, int inner) const {
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
      if (block == 0 || static_cast<uint32_t>(size) % block != 0 ||
          (block > 1 && block % static_cast<uint32_t>(inner) != 0)) {
        fail("key '" + name + "'" + (by_layer ? " element " + std::to_string(i) : "") + " is " +
             std::to_string(block) + ", not 1 nor a " +
             (inner > 1 ? "multiple of " + std::to_string(inner) : std::string("number")) +
             " that divides the site's size " + std::to_string(size));
      }
    }
    return {blocks.begin(), blocks.end()};
  }

  // Sixteen a layer; zeros where no token has 4 bits.
  std::vector<Levels> read_levels(const std::string& name, const Used& used) const {
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
        if (!used[layer]) {
          if (values[i] == 0) continue;
          fail(what + ", expected 0: layer " + std::to_string(layer) + " has no 4-bit tokens");
        }
        if (values[i] < -128 || values[i] > 127) fail(what + ", not from -128 to 127");
        if (i % 16 > 0 && values[i] <= values[i - 1]) {
          fail(what + ", not more than the one before it: the levels of a layer ascend");
        }
      }
      if (used[layer]) levels[layer] = make_levels(values.data() + 16 * layer);
    }
    return levels;
  }

  // What there is to know about a site beside its keys.
  struct Kind {
    bool follows_previous = false;  // its widths are the previous layer's
    bool in_attention = false;      // it is there only where there is attention
    bool exponents = false;         // whether it can have token exponents,
    int transformed = 0;            // be transformed, and with what size,
    bool levels = false;            // and have levels
    int inner = 1;                  // what is transformed already
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
    site.wide_first = model_.wide_first_token && site.bits == Site::Bits::k4 && !head;
    const int count = head ? 1 : model_.n_layer;
    const bool all_wide = site.bits == Site::Bits::k8;
    if (std::strcmp(name, "k") == 0) site.recent = read_recent(all_wide);
    // Before the first attention every token is wide.
    const int narrow_from =
        site.by_token() ? model_.graph.first_attention() + kind.follows_previous : 0;
    Used used8(static_cast<size_t>(count), true), used4(static_cast<size_t>(count), !all_wide);
    for (int l = 0; !head && l < count; l++) {
      const size_t layer = static_cast<size_t>(l);
      if (kind.in_attention && !model_.graph.attends(l)) used8[layer] = used4[layer] = false;
      if (l < narrow_from) used4[layer] = false;
    }
    if (site.ever_wide() || site.recent > 0) site.step8 = steps(prefix + "step8", used8);
    if (!all_wide) site.step4 = steps(prefix + "step4", used4);
    adaptive_ = adaptive_ || site.by_token();

    site.peaks = peaks_;
    read_margins(prefix, kind.exponents && !peaks_, &site);
    if (has_feature(prefix + "hadamard", kHadamard, kind.transformed > 0)) {
      site.inner = kind.inner;
      site.hadamard = read_blocks(prefix + "hadamard", count, kind.transformed, kind.inner);
    }
    if (has_feature(prefix + "levels4", kLevels, kind.levels)) {
      site.levels = read_levels(prefix + "levels4", used4);
    }
    return site;
  }

  int read_recent(bool all_wide) {
    const std::string key = "squat.recent_keys";
    if (!has_feature(key, kRecentKeys, true)) return 0;
    if (!peaks_) fail("key '" + key + "' is there, but 'squat.token_steps' is not 'peak'");
    if (all_wide) fail("key '" + key + "' is there, but 'squat.k.bits' is '8'");
    return keys_.bounded(key, 1, kMostRecent);
  }

  void read_sites() {
    Sites& s = model_.sites;
    const int n_embd = model_.n_embd, n_ff = model_.n_ff, head_dim = model_.head_dim;
    // Version 1 has one feature, which it does not name.
    if (version_ == 1 && file_.has("squat.mlp_mid.hadamard")) features_.emplace_back(kHadamard);
    peaks_ = says("squat.token_steps", kTokenSteps, "peak");
    model_.wide_first_token = says("squat.first_token", kFirstToken, "wide");
    s.attn_in = read_site("attn_in", {true, false, true, n_embd, true});
    s.q = read_site("q", {true, true, true, 0, true});
    s.k = read_site("k", {true, true, true, head_dim, true});
    s.v = read_site("v", {false, true, false, 0, true});
    s.k.cached = s.v.cached = true;
    s.attn_out =
        read_site("attn_out", {false, false, true, model_.n_embd_q(), true, head_dim & -head_dim});
    for (int l = 0; l < model_.n_layer; l++) {
      if (!model_.graph.attends(l) && s.attn_out.block(l) > 1) {
        fail("key 'squat.attn_out.hadamard' element " + std::to_string(l) + " is " +
             std::to_string(s.attn_out.block(l)) + ", expected 1: layer " + std::to_string(l) +
             " has no attention");
      }
    }
    s.mlp_in = read_site("mlp_in", {false, false, true, n_embd, true});
    s.mlp_mid = read_site("mlp_mid", {false, false, true, n_ff, true});
    s.head_in = read_site("head_in", {false, false, true, n_embd, false});
    read_probs();
    if (adaptive_) read_importance();
  }

  void read_probs() {
    if (const std::string_view bits = file_.string("squat.probs.bits"); bits != "8") {
      fail("key 'squat.probs.bits' is '" + std::string(bits.substr(0, 64)) + "', expected '8'");
    }
    const std::string step8 = "squat.probs.step8";
    if (!says("squat.softmax", kSoftmax, "base2")) {
      Used used(static_cast<size_t>(model_.n_layer));
      for (size_t l = 0; l < used.size(); l++) used[l] = model_.graph.attends(static_cast<int>(l));
      model_.sites.probs_step = steps(step8, used);
    } else if (file_.has(step8)) {
      fail("key '" + step8 + "' is there, but 'squat.softmax' makes codes without steps");
    }
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
    } else if (importance == "rarity") {
      model_.importance = Importance::kRarity;
      model_.token_ranks = file_.u32_array("squat.token_ranks");
      if (model_.token_ranks.size() != static_cast<size_t>(model_.n_vocab)) {
        fail("key 'squat.token_ranks' has " + std::to_string(model_.token_ranks.size()) +
             " elements, expected " + std::to_string(model_.n_vocab));
      }
      for (size_t i = 0; i < model_.token_ranks.size(); i++) {
        if (model_.token_ranks[i] >= model_.token_ranks.size()) {
          fail("key 'squat.token_ranks' element " + std::to_string(i) + " is " +
               std::to_string(model_.token_ranks[i]) + ", expected less than " +
               std::to_string(model_.n_vocab));
        }
      }
    } else {
      fail("key 'squat.importance' is '" + std::string(importance.substr(0, 64)) +
           "', expected 'first_token', 'relative_first_token', 'value_peak' or 'rarity'");
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

  Norm read_norm(const std::string& name, int size) const {
    Norm norm;
    norm.weight = keys_.floats(name + ".weight", static_cast<uint64_t>(size));
    if (model_.graph.norm == Graph::Norm::kLayer) {
      norm.bias = keys_.floats(name + ".bias", static_cast<uint64_t>(size));
    }
    return norm;
  }

  bool has_norm(const std::string& name) const {
    return file_.find_tensor(name + ".weight") != nullptr;
  }

  // What attention or MLP reads, and what they make, may be normalized: one of them is.
  void read_norms(const std::string& before, const std::string& after, Norm* first,
                  Norm* last) const {
    if (has_norm(after)) *last = read_norm(after, model_.n_embd);
    if (last->exists() && model_.graph.parallel) {
      fail("tensor '" + after + ".weight' is there, but layers are parallel");
    }
    if (has_norm(before) || !last->exists()) *first = read_norm(before, model_.n_embd);
  }

  // Of queries or keys: of each head alone, or of all together.
  Norm read_head_norm(const std::string& name, int heads) const {
    const GgufTensor* tensor = file_.find_tensor(name + ".weight");
    if (tensor == nullptr) return {};
    const int together = heads * model_.head_dim;
    const bool all = tensor->ne[0] == static_cast<uint64_t>(together);
    Norm norm = read_norm(name, all ? together : model_.head_dim);
    norm.weight = in_order(norm.weight, row_order(all ? heads : 1));
    return norm;
  }

  RowOrder row_order(int heads) const {
    const Graph& graph = model_.graph;
    return {graph.halves ? heads : 0, model_.head_dim, graph.rotated()};
  }

  static std::vector<float> in_order(const std::vector<float>& values, const RowOrder& order) {
    std::vector<float> out(values.size());
    for (size_t i = 0; i < out.size(); i++) {
      out[i] = values[static_cast<size_t>(order.in_file(static_cast<int>(i)))];
    }
    return out;
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
  void read_weights(const std::string& name, int rows, int inner, Weights* weights, int block = 1,
                    const RowOrder& order = {}) {
    pending_.push_back({codes(matrix_name(name, block), rows, inner), weights, order});
    const std::string bias = name + (version_ == 1 && block > 1 ? "_hadamard.bias" : ".bias");
    if (file_.find_tensor(bias) != nullptr) {
      weights->bias = in_order(keys_.floats(bias, static_cast<uint64_t>(rows)), order);
    }
  }

  void read_layer(int l, Layer* layer) {
    const Model& m = model_;
    const std::string block = "blk." + std::to_string(l) + ".";
    read_norms(block + "attn_norm", block + "post_attention_norm", &layer->attn_norm,
               &layer->after_attn_norm);
    read_norms(block + "ffn_norm", block + "post_ffw_norm", &layer->mlp_norm,
               &layer->after_mlp_norm);
    const int of_qkv = m.sites.attn_in.block(l), of_ffn = m.sites.mlp_in.block(l);
    if (m.graph.attends(l)) {
      read_attention(block, of_qkv, m.sites.attn_out.block(l), layer);
    } else {
      layer->convolution = read_convolution(block + "shortconv.conv", m.graph.reach(l));
      layer->qkv.resize(1);
      read_weights(block + "shortconv.in_proj", 3 * m.n_embd, m.n_embd, &layer->qkv[0], of_qkv);
      read_weights(block + "shortconv.out_proj", m.n_embd, m.n_embd, &layer->attn_out);
    }

    // Only GELU goes without a gate.
    const bool gated =
        m.graph.activation == Graph::Activation::kSilu || find_matrix("blk.0.ffn_gate") != nullptr;
    layer->mlp_in.resize(gated ? 2 : 1);
    if (gated) read_weights(block + "ffn_gate", m.n_ff, m.n_embd, &layer->mlp_in[0], of_ffn);
    read_weights(block + "ffn_up", m.n_ff, m.n_embd, &layer->mlp_in.back(), of_ffn);
    read_weights(block + "ffn_down", m.n_embd, m.n_ff, &layer->mlp_mid, m.sites.mlp_mid.block(l));
  }

  void read_attention(const std::string& block, int of_qkv, int of_output, Layer* layer) {
    const Model& m = model_;
    layer->q_norm = read_head_norm(block + "attn_q_norm", m.n_head);
    layer->k_norm = read_head_norm(block + "attn_k_norm", m.n_head_kv);
    const std::string center = block + "attn_k_center";
    if (file_.find_tensor(center) != nullptr) {
      if (!has(kKeyCenters)) {
        fail("tensor '" + center + "' is there, but '" + kFeatureList + "' does not name '" +
             kKeyCenters + "'");
      }
      layer->k_center = keys_.floats(center, static_cast<uint64_t>(m.n_embd_kv()));
    }
    if (find_matrix(block + "attn_qkv") != nullptr) {
      layer->qkv.resize(1);
      read_weights(block + "attn_qkv", m.n_embd_qkv(), m.n_embd, &layer->qkv[0], of_qkv,
                   row_order(m.n_head + m.n_head_kv));
    } else {
      layer->qkv.resize(3);
      read_weights(block + "attn_q", m.n_embd_q(), m.n_embd, &layer->qkv[0], of_qkv,
                   row_order(m.n_head));
      read_weights(block + "attn_k", m.n_embd_kv(), m.n_embd, &layer->qkv[1], of_qkv,
                   row_order(m.n_head_kv));
      read_weights(block + "attn_v", m.n_embd_kv(), m.n_embd, &layer->qkv[2], of_qkv);
    }
    read_weights(block + "attn_output", m.n_embd, m.n_embd_q(), &layer->attn_out, of_output);
  }

  // In a file [channels][taps].
  std::vector<float> read_convolution(const std::string& name, int taps) const {
    const size_t channels = static_cast<size_t>(model_.n_embd), count = static_cast<size_t>(taps);
    const std::vector<float> stored =
        keys_.floats(name + ".weight", {static_cast<uint64_t>(taps), channels});
    std::vector<float> weights(stored.size());
    for (size_t channel = 0; channel < channels; channel++) {
      for (size_t tap = 0; tap < count; tap++) {
        weights[tap * channels + channel] = stored[channel * count + tap];
      }
    }
    return weights;
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
    for (int l = 0; l < m.n_layer; l++) read_layer(l, &m.layers[static_cast<size_t>(l)]);
    // The one that LFM2's files have.
    const char* out_norm = has_norm("token_embd_norm") ? "token_embd_norm" : "output_norm";
    m.out_norm = read_norm(out_norm, m.n_embd);
    if (tied) {
      pending_.push_back({*m.embedding, &m.head, {}});
    } else {
      read_weights("output", m.n_vocab, m.n_embd, &m.head, of_head);
      m.embedding->check_scales();
      release(*m.embedding);
    }
    if (m.graph.rotations.empty() || find_matrix(kPositions) != nullptr) read_positions();
  }

  void read_positions() {
    Model& m = model_;
    const std::string name = matrix_name(kPositions);
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
        const int8_t* levels = p.tensor.levels();
        const kernels::WeightForm form =
            levels != nullptr ? kernels::WeightForm::t4 : kernels::plain_weights(p.tensor.bits());
        const int rows = p.tensor.rows(), inner = p.tensor.inner();
        uint8_t* data = arena.take<uint8_t>(kernels::packed_bytes(choice_, form, rows, inner));
        p.weights->matrix = kernels::packed_matrix(choice_, form, rows, inner, data, levels);
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
          const int stored = p.order.in_file(row);
          if (const int block = p.tensor.bad_block(stored); block >= 0) {
            bad.store(static_cast<int64_t>(stored) << 32 | block);
            return;
          }
          p.weights->steps[row] = p.tensor.step(stored);
          p.tensor.unpack(stored, codes);
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

  static constexpr const char *kEmbedding = "token_embd", *kPositions = "position_embd";
  // What a file may have beyond the plain network.
  static constexpr const char* kFeatureList = "squat.features";
  static constexpr const char* kExponents = "token_exponents";
  static constexpr const char* kTokenSteps = "token_steps";
  static constexpr const char* kHadamard = "hadamard";
  static constexpr const char* kKeyCenters = "key_centers";
  static constexpr const char* kFirstToken = "first_token";
  static constexpr const char* kRecentKeys = "recent_keys";
  static constexpr const char* kSoftmax = "softmax";
  static constexpr const char* kLevels = "levels";
  static constexpr const char* kGraph = "graph";
  static constexpr const char* kTokenizer = "tokenizer";  // its keys, which text/ reads

  const Gguf& file_;
  const Keys keys_;
  const MappedFile* mapping_;
  const kernels::Choice& choice_;
  ThreadPool& threads_;
  uint32_t version_ = 0;
  std::vector<std::string> features_;
  bool adaptive_ = false;
  bool peaks_ = false;  // squat.token_steps
  std::vector<Pending> pending_;
  Model model_ = {};
};

}  // namespace

Model load_model(const Gguf& file, const MappedFile* mapping, const kernels::Choice& choice,
                 ThreadPool& threads) {
  return Loader(file, mapping, choice, threads).load();
}

}  // namespace squat
