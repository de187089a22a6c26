// The C interface as Python classes: squat._native.Engine and squat._native.Sampler, which
// squat/engine.py wraps. Failures are raised as squat.errors.EngineError. The interpreter lock is
// released while the engine computes; a lock of its own keeps an engine from being used by two
// threads at once.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "bind.h"
#include "squat.h"

namespace nb = nanobind;

namespace {

using Tokens = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using LogitsRow = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Rows = nb::ndarray<nb::numpy, T, nb::ndim<2>>;

// The array owns its memory.
template <class T>
Rows<T> rows(std::unique_ptr<T[]> memory, size_t count, size_t size) {
  T* data = memory.release();
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return Rows<T>(data, {count, size}, owner);
}

// Carries a message to the translator below.
class EngineFailure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

void check(squat_status status) {
  if (status != SQUAT_OK) throw EngineFailure(squat_last_error());
}

class Engine {
 public:
  Engine(const std::string& path, uint32_t threads, uint32_t context) {
    squat_engine* engine = nullptr;
    {
      nb::gil_scoped_release release;
      check(squat_load(path.c_str(), threads, context, &engine));
    }
    own(engine);
  }

  // The caller's.
  Engine* share(uint32_t threads, uint32_t context) const {
    squat_engine* other = nullptr;
    {
      nb::gil_scoped_release release;
      check(squat_share(engine_.get(), threads, context, &other));
    }
    std::unique_ptr<Engine> engine(new Engine);
    engine->own(other);
    return engine.release();
  }

  nb::dict info() const {
    nb::dict out;
    out["architecture"] = info_.architecture;
    out["vocab_size"] = info_.n_vocab;
    out["layers"] = info_.n_layer;
    out["hidden_size"] = info_.n_embd;
    out["context"] = info_.n_context;
    out["threads"] = info_.n_threads;
    out["file_bytes"] = info_.file_bytes;
    out["weight_bytes"] = info_.weight_bytes;
    out["cache_bytes"] = info_.cache_bytes;
    out["isa"] = info_.isa;
    out["kernels"] = info_.kernels;
    out["bos_token"] = info_.bos_token;
    nb::list ends;
    for (uint32_t i = 0; i < info_.n_eos_tokens; i++) ends.append(info_.eos_tokens[i]);
    out["eos_tokens"] = nb::tuple(ends);
    return out;
  }

  nb::str string(const std::string& key) const {
    const char* text = nullptr;
    size_t size = 0;
    check(squat_get_string(engine_.get(), key.c_str(), &text, &size));
    return nb::steal<nb::str>(PyUnicode_DecodeUTF8(text, static_cast<Py_ssize_t>(size), "replace"));
  }

  // Logits of the last token, or of all, as [rows, n_vocab].
  Rows<float> eval(const Tokens& tokens, bool all) {
    return evaluate(squat_eval, tokens, all, info_.n_vocab);
  }

  // Final hidden states of all tokens, as [tokens, n_embd].
  Rows<float> eval_hidden(const Tokens& tokens) {
    return evaluate(squat_eval_hidden, tokens, true, info_.n_embd);
  }

  // Logits of the last tokens that other engines append, as [engines, n_vocab]; this one computes.
  Rows<float> step(const std::vector<std::pair<Engine*, Tokens>>& turns) {
    std::vector<squat_turn> all;
    std::vector<Engine*> engines = {this};
    for (const auto& [engine, tokens] : turns) {
      all.push_back({engine->engine_.get(), tokens.data(), tokens.shape(0)});
      engines.push_back(engine);
    }
    const size_t size = info_.n_vocab, count = turns.size();
    std::unique_ptr<float[]> logits(new float[count * size]);
    // In one order, whoever comes: two steps with engines in common do not wait for each other.
    std::sort(engines.begin(), engines.end());
    engines.erase(std::unique(engines.begin(), engines.end()), engines.end());
    {
      nb::gil_scoped_release release;
      std::vector<std::unique_lock<std::mutex>> locks;
      for (Engine* engine : engines) locks.emplace_back(engine->mutex_);
      check(squat_step(engine_.get(), all.data(), count, logits.get(), count * size));
    }
    return rows(std::move(logits), count, size);
  }

  void append(const Tokens& tokens) {
    run([&] {
      return squat_eval(engine_.get(), tokens.data(), tokens.shape(0), SQUAT_LOGITS_NONE, nullptr,
                        0);
    });
  }

  double score(const Tokens& tokens) {
    double sum = 0;
    run([&] { return squat_score(engine_.get(), tokens.data(), tokens.shape(0), &sum); });
    return sum;
  }

  std::vector<double> score_tokens(const Tokens& tokens) {
    std::vector<double> each(std::max<size_t>(tokens.shape(0), 1) - 1);
    run([&] {
      return squat_score_tokens(engine_.get(), tokens.data(), tokens.shape(0), each.data(),
                                each.size());
    });
    return each;
  }

  // The session's tokens.
  std::vector<int32_t> tokens() {
    std::vector<int32_t> tokens(length());
    size_t n = 0;
    run([&] { return squat_get_tokens(engine_.get(), tokens.data(), tokens.size(), &n); });
    return tokens;
  }

  // Their widths from `begin` on, as [layers, tokens]; no layers without token-adaptive sites.
  Rows<uint8_t> widths(size_t begin) {
    const size_t count = length() - std::min(begin, length());
    std::unique_ptr<uint8_t[]> bits(new uint8_t[info_.n_layer * count + 1]);
    size_t layers = 0;
    run([&] {
      return squat_get_widths(engine_.get(), begin, bits.get(), info_.n_layer * count, &layers);
    });
    return rows(std::move(bits), layers, count);
  }

  void save_session(const std::string& path) {
    run([&] { return squat_save_session(engine_.get(), path.c_str()); });
  }

  void load_session(const std::string& path) {
    run([&] { return squat_load_session(engine_.get(), path.c_str()); });
  }

  size_t length() const { return squat_length(engine_.get()); }

  void rewind(size_t length) {
    run([&] { return squat_rewind(engine_.get(), length); });
  }

  std::pair<std::vector<uint64_t>, uint64_t> wide_counts() {
    std::vector<uint64_t> wide(info_.n_layer);
    uint64_t tokens = 0;
    run([&] { return squat_wide_counts(engine_.get(), wide.data(), wide.size(), &tokens); });
    return {wide, tokens};
  }

  void set_profiling(bool on) {
    run([&] { return squat_set_profiling(engine_.get(), on); });
  }

  nb::list profile() {
    std::vector<squat_profile_entry> entries(64);
    size_t n = 0;
    run([&] { return squat_profile(engine_.get(), entries.data(), entries.size(), &n); });
    nb::list out;
    for (size_t i = 0; i < n; ++i) {
      nb::dict row;
      row["step"] = entries[i].step;
      row["seconds"] = entries[i].seconds;
      row["macs"] = entries[i].macs;
      row["bytes"] = entries[i].bytes;
      row["calls"] = entries[i].calls;
      out.append(row);
    }
    return out;
  }

  std::vector<int32_t> tokenize(const nb::bytes& text) {
    std::vector<int32_t> tokens(text.size() + 2);
    size_t n = 0;
    run([&] {
      squat_status status = squat_tokenize(engine_.get(), text.c_str(), text.size(), tokens.data(),
                                           tokens.size(), &n);
      if (status == SQUAT_ERROR_ARGUMENT && n > tokens.size()) {
        tokens.resize(n);
        status = squat_tokenize(engine_.get(), text.c_str(), text.size(), tokens.data(), n, &n);
      }
      return status;
    });
    tokens.resize(n);
    return tokens;
  }

  nb::bytes detokenize(const Tokens& tokens) {
    std::string text;
    size_t size = 0;
    run([&] {
      squat_status status =
          squat_detokenize(engine_.get(), tokens.data(), tokens.shape(0), text.data(), 0, &size);
      if (status == SQUAT_ERROR_ARGUMENT && size > 0) {
        text.resize(size);
        status = squat_detokenize(engine_.get(), tokens.data(), tokens.shape(0), text.data(), size,
                                  &size);
      }
      return status;
    });
    return nb::bytes(text.data(), text.size());
  }

  nb::bytes piece(int32_t token) {
    const char* text = nullptr;
    size_t size = 0;
    run([&] { return squat_get_piece(engine_.get(), token, &text, &size); });
    return nb::bytes(text, size);
  }

 private:
  struct Free {
    void operator()(squat_engine* engine) const { squat_free(engine); }
  };

  Engine() = default;

  void own(squat_engine* engine) {
    engine_.reset(engine);
    check(squat_get_info(engine, &info_));
  }

  // What `function` gives of the last token, or of all, `size` floats each.
  template <class Function>
  Rows<float> evaluate(Function function, const Tokens& tokens, bool all, size_t size) {
    const size_t count = all ? tokens.shape(0) : 1;
    std::unique_ptr<float[]> results(new float[count * size]);
    run([&] {
      return function(engine_.get(), tokens.data(), tokens.shape(0),
                      all ? SQUAT_LOGITS_ALL : SQUAT_LOGITS_LAST, results.get(), count * size);
    });
    return rows(std::move(results), count, size);
  }

  template <class Body>
  void run(Body&& body) {
    nb::gil_scoped_release release;
    std::lock_guard<std::mutex> lock(mutex_);
    check(body());
  }

  std::unique_ptr<squat_engine, Free> engine_;
  squat_info info_;
  std::mutex mutex_;
};

class Sampler {
 public:
  Sampler(uint32_t n_vocab, float repetition_penalty, float temperature, uint32_t top_k,
          float top_p, float min_p, uint64_t seed)
      : n_vocab_(n_vocab) {
    const squat_sampling sampling = {repetition_penalty, temperature, top_k, top_p, min_p, seed};
    squat_sampler* sampler = nullptr;
    check(squat_sampler_create(&sampling, n_vocab, &sampler));
    sampler_.reset(sampler);
  }

  void accept(const Tokens& tokens) {
    check(squat_sampler_accept(sampler_.get(), tokens.data(), tokens.shape(0)));
  }

  int32_t next(const LogitsRow& logits) {
    if (logits.shape(0) != n_vocab_) {
      throw EngineFailure("logits: has " + std::to_string(logits.shape(0)) +
                          " elements, expected " + std::to_string(n_vocab_));
    }
    int32_t token = 0;
    check(squat_sampler_next(sampler_.get(), logits.data(), &token));
    return token;
  }

 private:
  struct Free {
    void operator()(squat_sampler* sampler) const { squat_sampler_free(sampler); }
  };

  std::unique_ptr<squat_sampler, Free> sampler_;
  uint32_t n_vocab_;
};

}  // namespace

void bind_engine(nb::module_& module) {
  nb::register_exception_translator([](const std::exception_ptr& pointer, void*) {
    try {
      std::rethrow_exception(pointer);
    } catch (const EngineFailure& failure) {
      const nb::object type = nb::module_::import_("squat.errors").attr("EngineError");
      PyErr_SetString(type.ptr(), failure.what());
    }
  });
  module.def("version", &squat_version, "The version of the engine.");
  module.def(
      "hash_logits",
      [](const LogitsRow& logits) { return squat_hash_logits(logits.data(), logits.size()); },
      nb::arg("logits"), "FNV-1a of the bytes of logits.");
  nb::class_<Engine>(module, "Engine")
      .def(nb::init<const std::string&, uint32_t, uint32_t>(), nb::arg("path"), nb::arg("threads"),
           nb::arg("context"))
      .def("share", &Engine::share, nb::arg("threads"), nb::arg("context"),
           nb::rv_policy::take_ownership)
      .def("info", &Engine::info)
      .def("string", &Engine::string, nb::arg("key"))
      .def("eval", &Engine::eval, nb::arg("tokens"), nb::arg("all") = false)
      .def("eval_hidden", &Engine::eval_hidden, nb::arg("tokens"))
      .def("step", &Engine::step, nb::arg("turns"))
      .def("append", &Engine::append, nb::arg("tokens"))
      .def("score", &Engine::score, nb::arg("tokens"))
      .def("score_tokens", &Engine::score_tokens, nb::arg("tokens"))
      .def("length", &Engine::length)
      .def("tokens", &Engine::tokens)
      .def("widths", &Engine::widths, nb::arg("begin"))
      .def("save_session", &Engine::save_session, nb::arg("path"))
      .def("load_session", &Engine::load_session, nb::arg("path"))
      .def("rewind", &Engine::rewind, nb::arg("length"))
      .def("wide_counts", &Engine::wide_counts)
      .def("set_profiling", &Engine::set_profiling, nb::arg("on"))
      .def("profile", &Engine::profile)
      .def("tokenize", &Engine::tokenize, nb::arg("text"))
      .def("detokenize", &Engine::detokenize, nb::arg("tokens"))
      .def("piece", &Engine::piece, nb::arg("token"));
  nb::class_<Sampler>(module, "Sampler")
      .def(nb::init<uint32_t, float, float, uint32_t, float, float, uint64_t>(),
           nb::arg("vocab_size"), nb::arg("repetition_penalty"), nb::arg("temperature"),
           nb::arg("top_k"), nb::arg("top_p"), nb::arg("min_p"), nb::arg("seed"))
      .def("accept", &Sampler::accept, nb::arg("tokens"))
      .def("next", &Sampler::next, nb::arg("logits"));
}
