#include "graph.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>

#include "file/keys.h"

namespace squat {

namespace {

constexpr uint32_t kMaxContext = 1u << 20;
constexpr uint32_t kMaxTaps = 64;
constexpr const char* kPrefix = "squat.graph.";
constexpr const char* kKnown[] = {
    "norm",           "activation",    "pairs",           "rotation",
    "second_base",    "windows",       "embedding_scale", "attention_scale",
    "residual_scale", "logit_divisor", "parallel",        "convolutions"};

class Reader {
 public:
  Reader(const Gguf& file, const std::string& architecture, int layers, int head_dim)
      : file_(file),
        keys_(file),
        architecture_(architecture),
        layers_(layers),
        head_dim_(head_dim) {}

  Graph read(bool described) {
    refuse_unknown(described);
    const bool gpt2 = architecture_ == "gpt2";
    graph_.norm = choice<Graph::Norm>("norm", {"rms", "layer"}, gpt2 ? 1 : 0);
    graph_.activation =
        choice<Graph::Activation>("activation", {"silu", "gelu_tanh", "gelu"}, gpt2 ? 1 : 0);
    graph_.halves = choice<bool>("pairs", {"adjacent", "halves"}, 0);
    graph_.parallel = file_.has(name("parallel")) && file_.boolean(name("parallel"));
    graph_.embedding_scale = keys_.positive(name("embedding_scale"), 1);
    graph_.attention_scale = keys_.positive(name("attention_scale"),
                                            static_cast<float>(1 / std::sqrt(double(head_dim_))));
    graph_.residual_scale = keys_.positive(name("residual_scale"), 1);
    graph_.logit_divisor = keys_.positive(name("logit_divisor"), 1);
    graph_.window.assign(static_cast<size_t>(layers_), 0);
    if (file_.has(name("windows"))) {
      graph_.window = keys_.bounded_array(name("windows"), layers_, kMaxContext);
    }
    graph_.taps.assign(static_cast<size_t>(layers_), 0);
    if (file_.has(name("convolutions"))) {
      graph_.taps = keys_.bounded_array(name("convolutions"), layers_, kMaxTaps);
      if (graph_.first_attention() == layers_) {
        keys_.fail("key '" + name("convolutions") + "' leaves no layer with attention");
      }
    }
    if (graph_.parallel && graph_.residual_scale != 1) {
      keys_.fail("key '" + name("residual_scale") + "' is " +
                 std::to_string(graph_.residual_scale) + ", but layers are parallel");
    }
    read_rotation(gpt2);
    return std::move(graph_);
  }

 private:
  static std::string name(const char* key) { return std::string(kPrefix) + key; }
  std::string key(const char* name) const { return architecture_ + "." + name; }

  void refuse_unknown(bool described) const {
    for (const std::string_view found : file_.keys()) {
      if (found.substr(0, std::strlen(kPrefix)) != kPrefix) continue;
      if (!described) {
        keys_.fail("key '" + std::string(found.substr(0, 64)) +
                   "' is there, but 'squat.features' does not name 'graph'");
      }
      const std::string_view end = found.substr(std::strlen(kPrefix));
      if (std::find(std::begin(kKnown), std::end(kKnown), end) == std::end(kKnown)) {
        keys_.fail("key '" + std::string(found.substr(0, 64)) +
                   "' is none that this engine knows; use the engine that belongs to the exporter");
      }
    }
  }

  // Which of some words a key is, as a value of `Kind`; the word `usual` where there is no key.
  template <class Kind>
  Kind choice(const char* key, std::initializer_list<const char*> words, int usual) const {
    if (!file_.has(name(key))) return static_cast<Kind>(usual);
    const std::string_view word = file_.string(name(key));
    std::string expected;
    int number = 0;
    for (const char* known : words) {
      if (word == known) return static_cast<Kind>(number);
      expected += (number++ == 0 ? "'" : ", '") + std::string(known) + "'";
    }
    keys_.fail("key '" + name(key) + "' is '" + std::string(word.substr(0, 64)) +
               "', expected one of " + expected);
  }

  void read_rotation(bool gpt2) {
    std::vector<int> which(static_cast<size_t>(layers_), gpt2 ? 0 : 1);
    if (file_.has(name("rotation"))) which = keys_.bounded_array(name("rotation"), layers_, 2);
    graph_.rotation.clear();
    for (const int rotation : which) graph_.rotation.push_back(rotation - 1);
    const int last = *std::max_element(which.begin(), which.end());
    if (last == 0) return;
    int size = head_dim_;
    if (file_.has(key("rope.dimension_count"))) {
      size = keys_.bounded(key("rope.dimension_count"), 1, static_cast<uint32_t>(head_dim_));
    }
    if (size % 2 != 0) {
      keys_.fail("the rotated size of a head is " + std::to_string(size) +
                 ", but rotation needs an even one");
    }
    graph_.rotations.push_back(scaled(keys_.positive(key("rope.freq_base"), 1e4f), size));
    if (last == 2) {
      graph_.rotations.push_back({unscaled(keys_.positive(name("second_base")), size)});
    }
  }

  static std::vector<float> unscaled(float base, int size) {
    std::vector<float> frequencies;
    for (int i = 0; i < size; i += 2) {
      // Rounded where PyTorch rounds.
      const float exponent = static_cast<float>(i) / static_cast<float>(size);
      frequencies.push_back(1.0f /
                            static_cast<float>(std::pow(static_cast<double>(base), exponent)));
    }
    return frequencies;
  }

  // With the variants of transformers' modeling_rope_utils.
  Rotation scaled(float base, int size) const {
    Rotation rotation = {unscaled(base, size)};
    const std::string type = file_.has(key("rope.scaling.type"))
                                 ? std::string(file_.string(key("rope.scaling.type")))
                                 : "none";
    if (type == "linear") {
      const float factor = keys_.positive(key("rope.scaling.factor"));
      for (float& frequency : rotation.frequencies) frequency /= factor;
    } else if (type == "yarn") {
      scale_yarn(base, size, &rotation);
    } else if (type != "none") {
      keys_.fail("key '" + key("rope.scaling.type") + "' is '" + type.substr(0, 64) +
                 "', expected 'none', 'linear' or 'yarn'");
    }
    if (file_.find_tensor("rope_freqs.weight") != nullptr) {  // llama3
      const std::vector<float> factors =
          keys_.floats("rope_freqs.weight", rotation.frequencies.size());
      for (size_t i = 0; i < factors.size(); i++) rotation.frequencies[i] /= factors[i];
    }
    return rotation;
  }

  // YaRN (Peng et al. 2023): high frequencies stay, low ones are interpolated, with a ramp between
  // the dimensions that turn 32 times and once within the original context.
  void scale_yarn(float base, double size, Rotation* rotation) const {
    const double factor = keys_.positive(key("rope.scaling.factor"));
    const double original =
        keys_.bounded(key("rope.scaling.original_context_length"), 1, kMaxContext);
    const auto dimension = [&](double turns) {
      return size * std::log(original / (turns * 2 * M_PI)) / (2 * std::log(double{base}));
    };
    const double low = std::max(std::floor(dimension(32)), 0.0);
    double high = std::min(std::ceil(dimension(1)), size - 1);
    if (low == high) high += 0.001;
    for (size_t i = 0; i < rotation->frequencies.size(); i++) {
      const double ramp = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
      rotation->frequencies[i] *= static_cast<float>((1 - ramp) + ramp / factor);
    }
    rotation->scale = static_cast<float>(factor > 1 ? 0.1 * std::log(factor) + 1 : 1.0);
  }

  const Gguf& file_;
  const Keys keys_;
  const std::string& architecture_;
  const int layers_, head_dim_;
  Graph graph_;
};

}  // namespace

Graph read_graph(const Gguf& file, const std::string& architecture, int layers, int head_dim,
                 bool described) {
  return Reader(file, architecture, layers, head_dim).read(described);
}

}  // namespace squat
