// The C interface: arguments checked, exceptions turned into a status and a message.
#include "squat.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/whole_file.h"
#include "engine.h"
#include "graph/sampler.h"

struct squat_engine {
  squat::Engine engine;
  std::vector<float> logits;  // of the last token, for squat_generate
};

struct squat_sampler {
  squat::Sampler sampler;
  uint32_t n_vocab;
};

namespace {

using squat::Error;

thread_local std::string last_error;

// Runs `body`; whatever it throws becomes the status.
template <class Body>
squat_status guard(Body&& body) noexcept {
  try {
    body();
    return SQUAT_OK;
  } catch (const Error& error) {
    last_error = error.what();
    return error.status();
  } catch (const std::bad_alloc&) {
    last_error = "out of memory";  // short enough to need none
    return SQUAT_ERROR_MEMORY;
  } catch (const std::exception& error) {
    last_error = error.what();
    return SQUAT_ERROR_INTERNAL;
  } catch (...) {  // a C++ callback may throw anything
    last_error = "an unknown exception";
    return SQUAT_ERROR_INTERNAL;
  }
}

void require(bool valid, const char* message) {
  if (!valid) throw Error(SQUAT_ERROR_ARGUMENT, message);
}

// What the caller's buffer must hold; `needed` has been told to the caller already.
void require_capacity(const char* name, size_t capacity, size_t needed) {
  if (capacity < needed) {
    throw Error(SQUAT_ERROR_ARGUMENT, std::string(name) + ": capacity is " +
                                          std::to_string(capacity) + ", needs " +
                                          std::to_string(needed));
  }
}

// How many of n tokens are asked for.
size_t wanted_tokens(squat_logits which, size_t n) {
  require(which == SQUAT_LOGITS_NONE || which == SQUAT_LOGITS_LAST || which == SQUAT_LOGITS_ALL,
          "which: is no value of squat_logits");
  return which == SQUAT_LOGITS_ALL ? n : which == SQUAT_LOGITS_LAST ? 1 : 0;
}

// That the caller's buffer has room for rows of a size.
void require_rows(const char* name, const float* buffer, size_t capacity, size_t rows, int size) {
  const size_t row = static_cast<size_t>(size);
  require(rows <= SIZE_MAX / row, "tokens: there are too many");
  if (rows == 0) return;
  require(buffer != nullptr, "results: the buffer is NULL");
  require_capacity(name, capacity, rows * row);
}

}  // namespace

const char* squat_last_error(void) { return last_error.c_str(); }

const char* squat_version(void) { return SQUAT_VERSION; }

squat_status squat_load(const char* path, uint32_t threads, uint32_t context,
                        squat_engine** engine) {
  return guard([&] {
    require(path != nullptr, "path: is NULL");
    require(engine != nullptr, "engine: is NULL");
    *engine = new squat_engine{{std::string(path), threads, context}, {}};
  });
}

squat_status squat_share(const squat_engine* engine, uint32_t threads, uint32_t context,
                         squat_engine** other) {
  return guard([&] {
    require(engine != nullptr, "engine: is NULL");
    require(other != nullptr, "other: is NULL");
    *other = new squat_engine{{engine->engine, threads, context}, {}};
  });
}

void squat_free(squat_engine* engine) { delete engine; }

squat_status squat_get_info(const squat_engine* engine, squat_info* info) {
  return guard([&] {
    require(engine != nullptr, "engine: is NULL");
    require(info != nullptr, "info: is NULL");
    const squat::Engine& e = engine->engine;
    const squat::Model& model = e.model();
    info->n_vocab = static_cast<uint32_t>(model.n_vocab);
    info->n_layer = static_cast<uint32_t>(model.n_layer);
    info->n_embd = static_cast<uint32_t>(model.n_embd);
    info->n_context = static_cast<uint32_t>(e.session().context());
    info->n_threads = static_cast<uint32_t>(e.threads());
    info->file_bytes = e.file_bytes();
    info->weight_bytes = model.weight_bytes;
    info->cache_bytes = e.session().cache_bytes();
    info->bos_token = e.bos_token();
    info->eos_token = e.eos_tokens().empty() ? -1 : e.eos_tokens()[0];
    info->eos_tokens = e.eos_tokens().data();
    info->n_eos_tokens = static_cast<uint32_t>(e.eos_tokens().size());
    info->architecture = model.architecture.c_str();
    info->isa = e.isa();
    info->kernels = e.kernels().c_str();
  });
}

squat_status squat_get_string(const squat_engine* engine, const char* key, const char** text,
                              size_t* size) {
  return guard([&] {
    require(engine != nullptr, "engine: is NULL");
    require(key != nullptr, "key: is NULL");
    require(text != nullptr && size != nullptr, "text, size: one is NULL");
    const std::string_view value = engine->engine.file().string(key);
    *text = value.data();
    *size = value.size();
  });
}

squat_status squat_eval(squat_engine* engine, const int32_t* tokens, size_t n, squat_logits which,
                        float* logits, size_t capacity) {
  return guard([&] {
    require(engine != nullptr, "engine: is NULL");
    require(tokens != nullptr && n > 0, "tokens: there are none");
    const size_t wanted = wanted_tokens(which, n);
    require_rows("logits", logits, capacity, wanted, engine->engine.model().n_vocab);
    engine->engine.session().eval(tokens, n, wanted, logits);
  });
}

squat_status squat_step(squat_engine* engine, const squat_turn* turns, size_t n, float* logits,
                        size_t capacity) {
  return guard([&] {
    require(engine != nullptr, "engine: is NULL");
    require(turns != nullptr && n > 0, "turns: there are none");
    squat::Session& computing = engine->engine.session();
    std::vector<squat::Session::Turn> all;
    std::vector<const squat_engine*> engines;
    for (size_t i = 0; i < n; i++) {
      const squat_turn& turn = turns[i];
      const auto require_turn = [i](bool valid, const std::string& what) {
        if (!valid) throw Error(SQUAT_ERROR_ARGUMENT, "turn " + std::to_string(i) + ": " + what);
      };
      require_turn(turn.engine != nullptr, "engine: is NULL");
      require_turn(turn.tokens != nullptr && turn.n > 0, "tokens: there are none");
      require_turn(turn.engine->engine.shares_model(engine->engine),
                   "engine: has another model; make it with squat_share");
      squat::Session& session = turn.engine->engine.session();
      require_turn(session.context() <= computing.context(),
                   "engine: its context of " + std::to_string(session.context()) +
                       " is longer than that of the engine that computes, " +
                       std::to_string(computing.context()));
      all.push_back({&session, turn.tokens, turn.n});
      engines.push_back(turn.engine);
    }
    std::sort(engines.begin(), engines.end());
    require(std::adjacent_find(engines.begin(), engines.end()) == engines.end(),
            "turns: an engine comes twice; give it all its tokens in one turn");
    require_rows("logits", logits, capacity, n, engine->engine.model().n_vocab);
    computing.step(all.data(), n, logits);
  });
}

squat_status squat_eval_hidden(squat_engine* engine, const int32_t* tokens, size_t n,
                               squat_logits which, float* hidden, size_t capacity) {
  return guard([&] {
    require(engine != nullptr, "engine: is NULL");
    require(tokens != nullptr && n > 0, "tokens: there are none");
    const size_t wanted = wanted_tokens(which, n);
    require_rows("hidden", hidden, capacity, wanted, engine->engine.model().n_embd);
    engine->engine.session().eval_hidden(tokens, n, wanted, hidden);
  });
}

uint64_t squat_hash_logits(const float* logits, size_t n) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (size_t i = 0; i < n; i++) {
    uint32_t bits;
    std::memcpy(&bits, logits + i, sizeof bits);
    for (int shift = 0; shift < 32; shift += 8) {
      hash = (hash ^ (bits >> shift & 0xffu)) * 0x100000001b3u;
    }
  }
  return hash;
}

size_t squat_length(const squat_engine* engine) {
  return engine == nullptr ? 0 : static_cast<size_t>(engine->engine.session().length());
}

squat_status squat_get_tokens(const squat_engine* engine, int32_t* tokens, size_t capacity,
                              size_t* n) {
  return guard([&] {
    require(engine != nullptr, "engine: is NULL");
    require(n != nullptr, "n: is NULL");
    const squat::Session& session = engine->engine.session();
    *n = static_cast<size_t>(session.length());
    require_capacity("tokens", capacity, *n);
    require(tokens != nullptr || *n == 0, "tokens: is NULL");
    std::copy(session.tokens(), session.tokens() + *n, tokens);
  });
}

squat_status squat_rewind(squat_engine* engine, size_t length) {
  return guard([&] {
    require(engine != nullptr, "engine: is NULL");
    engine->engine.session().rewind(length);
  });
}

squat_status squat_score(squat_engine* engine, const int32_t* tokens, size_t n, double* sum) {
  return guard([&] {
    require(engine != nullptr, "engine: is NULL");
    require(tokens != nullptr && n > 0, "tokens: there are none");
    require(sum != nullptr, "sum: is NULL");
    *sum = engine->engine.session().score(tokens, n, nullptr);
  });
}

squat_status squat_score_tokens(squat_engine* engine, const int32_t* tokens, size_t n, double* each,
                                size_t capacity) {
  return guard([&] {
    require(engine != nullptr, "engine: is NULL");
    require(tokens != nullptr && n > 0, "tokens: there are none");
    require(each != nullptr || n == 1, "each: is NULL");
    require_capacity("each", capacity, n - 1);
    engine->engine.session().score(tokens, n, each);
  });
}

squat_status squat_get_widths(const squat_engine* engine, size_t begin, uint8_t* bits,
                              size_t capacity, size_t* n_layer) {
  return guard([&] {
    require(engine != nullptr, "engine: is NULL");
    require(n_layer != nullptr, "n_layer: is NULL");
    const squat::Session& session = engine->engine.session();
    const size_t length = static_cast<size_t>(session.length());
    require(begin <= length, "begin: is more than the tokens in the session");
    *n_layer = session.widths().size();
    require_capacity("bits", capacity, *n_layer * (length - begin));
    require(bits != nullptr || *n_layer * (length - begin) == 0, "bits: is NULL");
    for (const uint8_t* widths : session.widths()) {
      bits = std::copy(widths + begin, widths + length, bits);
    }
  });
}

squat_status squat_save_session(squat_engine* engine, const char* path) {
  return guard([&] {
    require(engine != nullptr, "engine: is NULL");
    require(path != nullptr, "path: is NULL");
    squat::Engine& e = engine->engine;
    squat::write_file(path, e.session().save(e.identity()));
  });
}

squat_status squat_load_session(squat_engine* engine, const char* path) {
  return guard([&] {
    require(engine != nullptr, "engine: is NULL");
    require(path != nullptr, "path: is NULL");
    squat::Engine& e = engine->engine;
    const std::vector<uint8_t> bytes = squat::read_file(path, e.session().most_saved_bytes());
    e.session().restore(bytes, e.identity(), path);
  });
}

squat_status squat_wide_counts(const squat_engine* engine, uint64_t* wide, size_t n_layer,
                               uint64_t* tokens) {
  return guard([&] {
    require(engine != nullptr, "engine: is NULL");
    require(wide != nullptr && tokens != nullptr, "wide, tokens: one is NULL");
    const squat::Session& session = engine->engine.session();
    require_capacity("wide", n_layer, session.wide_counts().size());
    std::copy(session.wide_counts().begin(), session.wide_counts().end(), wide);
    *tokens = session.token_count();
  });
}

squat_status squat_set_profiling(squat_engine* engine, int on) {
  return guard([&] {
    require(engine != nullptr, "engine: is NULL");
    engine->engine.session().profile().restart(on != 0);
  });
}

squat_status squat_profile(const squat_engine* engine, squat_profile_entry* entries,
                           size_t capacity, size_t* n) {
  return guard([&] {
    require(engine != nullptr, "engine: is NULL");
    require(n != nullptr, "n: is NULL");
    *n = squat::kSteps;
    require_capacity("entries", capacity, *n);
    require(entries != nullptr, "entries: is NULL");
    const squat_profile_entry* counted = engine->engine.session().profile().entries();
    std::copy(counted, counted + *n, entries);
  });
}

squat_status squat_tokenize(squat_engine* engine, const char* text, size_t size, int32_t* tokens,
                            size_t capacity, size_t* n) {
  return guard([&] {
    require(engine != nullptr, "engine: is NULL");
    require(text != nullptr || size == 0, "text: is NULL");
    require(n != nullptr, "n: is NULL");
    const std::vector<int32_t> ids = engine->engine.tokenizer().encode({text, size});
    *n = ids.size();
    require_capacity("tokens", capacity, ids.size());
    require(tokens != nullptr || ids.empty(), "tokens: is NULL");
    std::copy(ids.begin(), ids.end(), tokens);
  });
}

squat_status squat_detokenize(squat_engine* engine, const int32_t* tokens, size_t n, char* text,
                              size_t capacity, size_t* size) {
  return guard([&] {
    require(engine != nullptr, "engine: is NULL");
    require(tokens != nullptr || n == 0, "tokens: is NULL");
    require(size != nullptr, "size: is NULL");
    for (size_t i = 0; i < n; i++) {
      require(tokens[i] >= 0 && tokens[i] < engine->engine.model().n_vocab,
              "tokens: one is out of range");
    }
    const std::string out = engine->engine.tokenizer().decode(tokens, n);
    *size = out.size();
    require_capacity("text", capacity, out.size());
    require(text != nullptr || out.empty(), "text: is NULL");
    out.copy(text, out.size());
  });
}

squat_status squat_get_piece(squat_engine* engine, int32_t token, const char** text, size_t* size) {
  return guard([&] {
    require(engine != nullptr, "engine: is NULL");
    require(token >= 0 && token < engine->engine.model().n_vocab, "token: is out of range");
    require(text != nullptr && size != nullptr, "text, size: one is NULL");
    const std::string_view piece = engine->engine.tokenizer().piece(token);
    *text = piece.data();
    *size = piece.size();
  });
}

squat_sampling squat_sampling_default(void) { return {1.0f, 0.0f, 0, 1.0f, 0.0f, 0}; }

squat_status squat_sampler_create(const squat_sampling* sampling, uint32_t n_vocab,
                                  squat_sampler** sampler) {
  return guard([&] {
    require(sampling != nullptr, "sampling: is NULL");
    require(sampler != nullptr, "sampler: is NULL");
    *sampler = new squat_sampler{squat::Sampler(*sampling, n_vocab), n_vocab};
  });
}

void squat_sampler_free(squat_sampler* sampler) { delete sampler; }

squat_status squat_sampler_accept(squat_sampler* sampler, const int32_t* tokens, size_t n) {
  return guard([&] {
    require(sampler != nullptr, "sampler: is NULL");
    require(tokens != nullptr || n == 0, "tokens: is NULL");
    sampler->sampler.accept(tokens, n);
  });
}

squat_status squat_sampler_next(squat_sampler* sampler, const float* logits, int32_t* token) {
  return guard([&] {
    require(sampler != nullptr, "sampler: is NULL");
    require(logits != nullptr, "logits: is NULL");
    require(token != nullptr, "token: is NULL");
    *token = sampler->sampler.next(logits);
  });
}

squat_status squat_generate(squat_engine* engine, squat_sampler* sampler, const int32_t* prompt,
                            size_t n, size_t max_tokens, squat_callback callback, void* user) {
  bool stopped = false;
  const squat_status status = guard([&] {
    require(engine != nullptr, "engine: is NULL");
    require(sampler != nullptr, "sampler: is NULL");
    require(prompt != nullptr && n > 0, "prompt: has no tokens");
    require(callback != nullptr, "callback: is NULL");
    squat::Engine& e = engine->engine;
    require(sampler->n_vocab == static_cast<uint32_t>(e.model().n_vocab),
            "sampler: was made for another vocabulary size");
    squat::Session& session = e.session();
    const squat::Tokenizer& tokenizer = e.tokenizer();
    const std::vector<int32_t>& ends = e.eos_tokens();
    engine->logits.resize(static_cast<size_t>(e.model().n_vocab));
    session.eval(prompt, n, 1, engine->logits.data());
    sampler->sampler.accept(prompt, n);
    for (size_t i = 0; i < max_tokens; i++) {
      const int32_t token = sampler->sampler.next(engine->logits.data());
      if (std::find(ends.begin(), ends.end(), token) != ends.end()) return;
      const std::string_view piece = tokenizer.piece(token);
      stopped = callback(token, piece.data(), piece.size(), user) != 0;
      if (stopped || i + 1 == max_tokens || session.length() == session.context()) return;
      session.eval(&token, 1, 1, engine->logits.data());
    }
  });
  return status == SQUAT_OK && stopped ? SQUAT_STOPPED : status;
}
