#include "engine.h"

#include <algorithm>
#include <cstdlib>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

#include "base/error.h"
#include "base/hash.h"

namespace squat {

namespace {

constexpr uint32_t kMaxThreads = 256;

// The CPUs that this process may use.
uint32_t usable_cpus() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) {
    return static_cast<uint32_t>(std::max(1, CPU_COUNT(&set)));
  }
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

int thread_count(uint32_t threads) {
  if (threads > kMaxThreads) {
    throw Error(SQUAT_ERROR_ARGUMENT, "threads: " + std::to_string(threads) +
                                          " is more than the limit of " +
                                          std::to_string(kMaxThreads));
  }
  return static_cast<int>(threads == 0 ? std::min(usable_cpus(), kMaxThreads) : threads);
}

int context_length(const Model& model, uint32_t context) {
  const int most = std::min(model.n_context, Session::most_tokens(model));
  if (context > static_cast<uint32_t>(most)) {
    const char* who =
        most == Session::most_tokens(model) ? "a session can hold" : "the model can see";
    throw Error(SQUAT_ERROR_ARGUMENT, "context: " + std::to_string(context) + " is more than the " +
                                          std::to_string(most) + " tokens that " + who);
  }
  return context == 0 ? most : static_cast<int>(context);
}

kernels::Choice choose() {
  kernels::Choice choice;
  std::string error;
  if (!kernels::choose(std::getenv("SQUAT_ISA"), &choice, &error)) {
    throw Error(SQUAT_ERROR_ISA, error);
  }
  return choice;
}

int32_t checked_token(const Gguf& file, const std::string& key, uint32_t token, int n_vocab) {
  if (token >= static_cast<uint32_t>(n_vocab)) {
    throw Error(SQUAT_ERROR_FORMAT, file.name() + ": key '" + key + "' is " +
                                        std::to_string(token) + ", but the vocabulary has " +
                                        std::to_string(n_vocab) + " tokens");
  }
  return static_cast<int32_t>(token);
}

int32_t optional_token(const Gguf& file, const char* key, int n_vocab) {
  return file.has(key) ? checked_token(file, key, file.u32(key), n_vocab) : -1;
}

std::vector<int32_t> end_tokens(const Gguf& file, int n_vocab) {
  constexpr const char* kAll = "squat.tokenizer.eos_token_ids";
  std::vector<int32_t> tokens;
  if (file.has(kAll)) {
    for (const uint32_t token : file.u32_array(kAll)) {
      tokens.push_back(checked_token(file, kAll, token, n_vocab));
    }
    return tokens;
  }
  const int32_t only = optional_token(file, "tokenizer.ggml.eos_token_id", n_vocab);
  if (only >= 0) tokens.push_back(only);
  return tokens;
}

// One line for each kind of product that the model has.
std::string explain(const Model& model, const kernels::Choice& choice) {
  using Form = kernels::WeightForm;
  bool used[2][3] = {};  // [activations 8 | 4][weights]
  const auto use = [&used](const Site& site, Form weights) {
    const bool narrow = site.bits != Site::Bits::k8, levels = site.has_levels();
    const size_t form = static_cast<size_t>(weights);
    if (site.ever_wide() || levels) used[0][form] = true;
    if (narrow && !levels) used[1][form] = true;
  };
  const auto multiply = [&use](const Site& site, const Weights& weights) {
    use(site, weights.matrix.layout->weights);
  };
  const Sites& s = model.sites;
  for (const Layer& layer : model.layers) {
    for (const Weights& w : layer.qkv) multiply(s.attn_in, w);
    multiply(s.attn_out, layer.attn_out);
    for (const Weights& w : layer.mlp_in) multiply(s.mlp_in, w);
    multiply(s.mlp_mid, layer.mlp_mid);
  }
  multiply(s.head_in, model.head);
  // Keys and values are the right-hand side of attention.
  if (s.k.ever_wide()) use(s.q, Form::w8);
  if (s.k.bits != Site::Bits::k8) use(s.q, s.k.narrow_form());
  const Site probs = {};  // 8 bits
  if (s.v.ever_wide()) use(probs, Form::w8);
  if (s.v.bits != Site::Bits::k8) use(probs, s.v.narrow_form());
  std::string out;
  for (const int activation : {8, 4}) {
    for (const Form weights : kernels::kWeightForms) {
      if (!used[activation == 4][static_cast<size_t>(weights)]) continue;
      out += "a" + std::to_string(activation) + " " + kernels::name_of(weights) + ": " +
             kernels::explain(choice, activation, weights) + "\n";
    }
  }
  return out;
}

}  // namespace

Loaded::Loaded(std::unique_ptr<MappedFile> mapped, const uint8_t* data, size_t size,
               const std::string& name, ThreadPool& threads)
    : mapping(std::move(mapped)),
      bytes(mapping != nullptr ? mapping->data() : data),
      file_bytes(mapping != nullptr ? mapping->size() : size),
      file(bytes, file_bytes, name),
      choice(choose()),
      model(load_model(file, mapping.get(), choice, threads)),
      kernels(explain(model, choice)),
      bos_token(optional_token(file, "tokenizer.ggml.bos_token_id", model.n_vocab)),
      eos_tokens(end_tokens(file, model.n_vocab)) {}

const Tokenizer& Loaded::tokenizer() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (tokenizer_ == nullptr) {
    tokenizer_ = std::make_unique<Tokenizer>(file, static_cast<uint32_t>(model.n_vocab));
  }
  return *tokenizer_;
}

uint64_t Loaded::identity() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!identity_) {
    identity_ = hash64(bytes, file_bytes);
    if (mapping != nullptr) mapping->release(bytes, file_bytes);
  }
  return *identity_;
}

Engine::Engine(const std::string& path, uint32_t threads, uint32_t context)
    : Engine(std::make_unique<MappedFile>(path), nullptr, 0, path, threads, context) {}

Engine::Engine(const uint8_t* data, size_t size, const std::string& name, uint32_t threads,
               uint32_t context)
    : Engine(nullptr, data, size, name, threads, context) {}

Engine::Engine(std::unique_ptr<MappedFile> mapping, const uint8_t* data, size_t size,
               const std::string& name, uint32_t threads, uint32_t context)
    : threads_(thread_count(threads)),
      loaded_(std::make_shared<Loaded>(std::move(mapping), data, size, name, threads_)),
      session_(loaded_->model, loaded_->choice, threads_, context_length(loaded_->model, context)) {
}

Engine::Engine(const Engine& other, uint32_t threads, uint32_t context)
    : threads_(thread_count(threads)),
      loaded_(other.loaded_),
      session_(loaded_->model, loaded_->choice, threads_, context_length(loaded_->model, context)) {
}

}  // namespace squat
