/* A program of version 0.1: compiled against that version's header, run with today's library. It
 * calls every function and reads every field that there was. */
#include <stdlib.h>
#include <string.h>

#include "squat_0_1.h"

#define CALL(expression)                              \
  do {                                                \
    if ((expression) != SQUAT_OK) return #expression; \
  } while (0)
#define HOLD(condition)                  \
  do {                                   \
    if (!(condition)) return #condition; \
  } while (0)

static int count(int32_t token, const char* text, size_t size, void* user) {
  (void)token;
  (void)text;
  (void)size;
  ++*(size_t*)user;
  return 0;
}

/* Of what a caller makes room for. */
const size_t old_sizes[3] = {sizeof(squat_info), sizeof(squat_profile_entry),
                             sizeof(squat_sampling)};

/* Works with a model of 3 or more tokens; NULL, or what did not hold. */
const char* run_old_caller(const char* path) {
  squat_engine* engine = NULL;
  HOLD(squat_load("", 1, 0, &engine) == SQUAT_ERROR_FILE);
  HOLD(strlen(squat_last_error()) > 0);
  CALL(squat_load(path, 1, 0, &engine));

  squat_info info;
  memset(&info, 0xff, sizeof info);
  CALL(squat_get_info(engine, &info));
  HOLD(info.n_vocab >= 3 && info.n_layer > 0 && info.n_embd > 0 && info.n_threads == 1);
  HOLD(info.n_context > 8 && info.file_bytes > 0 && info.weight_bytes > 0 && info.cache_bytes > 0);
  HOLD(info.n_eos_tokens == 0 || info.eos_token == info.eos_tokens[0]);
  HOLD(info.bos_token < (int32_t)info.n_vocab);
  HOLD(strlen(info.architecture) > 0 && strlen(info.isa) > 0 && strlen(info.kernels) > 0);

  const char* text = NULL;
  size_t size = 0;
  CALL(squat_get_string(engine, "general.architecture", &text, &size));
  HOLD(size == strlen(info.architecture) && memcmp(text, info.architecture, size) == 0);

  const int32_t tokens[3] = {2, 1, 2};
  float* logits = malloc(3 * info.n_vocab * sizeof *logits);
  HOLD(logits != NULL);
  CALL(squat_set_profiling(engine, 1));
  CALL(squat_eval(engine, tokens, 1, SQUAT_LOGITS_NONE, NULL, 0));
  CALL(squat_eval(engine, tokens + 1, 1, SQUAT_LOGITS_LAST, logits, info.n_vocab));
  CALL(squat_eval(engine, tokens + 1, 2, SQUAT_LOGITS_ALL, logits, 2 * info.n_vocab));
  HOLD(squat_length(engine) == 4);
  CALL(squat_rewind(engine, 1));
  HOLD(squat_eval(engine, tokens, 1, SQUAT_LOGITS_LAST, logits, 0) == SQUAT_ERROR_ARGUMENT);

  squat_profile_entry entries[64];
  size_t n = 0;
  CALL(squat_profile(engine, entries, 64, &n));
  uint64_t macs = 0, bytes = 0, calls = 0;
  double seconds = 0;
  for (size_t i = 0; i < n; i++) {
    HOLD(strlen(entries[i].step) > 0);
    macs += entries[i].macs;
    bytes += entries[i].bytes;
    calls += entries[i].calls;
    seconds += entries[i].seconds;
  }
  HOLD(macs > 0 && bytes > 0 && calls > 0 && seconds > 0);

  double sum = 1;
  CALL(squat_score(engine, tokens, 3, &sum));
  HOLD(sum < 0);
  uint64_t* wide = calloc(info.n_layer, sizeof *wide);
  uint64_t evaluated = 0;
  HOLD(wide != NULL);
  CALL(squat_wide_counts(engine, wide, info.n_layer, &evaluated));
  HOLD(evaluated >= 6);

  int32_t ids[64];
  CALL(squat_tokenize(engine, "a b", 3, ids, 64, &n));
  HOLD(n > 0);
  char back[256];
  CALL(squat_detokenize(engine, ids, n, back, sizeof back, &size));
  CALL(squat_get_piece(engine, ids[n - 1], &text, &size));

  squat_sampling sampling = squat_sampling_default();
  HOLD(sampling.repetition_penalty == 1 && sampling.temperature == 0 && sampling.top_k == 0);
  HOLD(sampling.top_p == 1 && sampling.min_p == 0 && sampling.seed == 0);
  squat_sampler* sampler = NULL;
  CALL(squat_sampler_create(&sampling, info.n_vocab, &sampler));
  CALL(squat_sampler_accept(sampler, tokens, 3));
  int32_t token = -1;
  CALL(squat_sampler_next(sampler, logits, &token));
  HOLD(token >= 0 && token < (int32_t)info.n_vocab);
  size_t generated = 0;
  CALL(squat_rewind(engine, 0));
  CALL(squat_generate(engine, sampler, tokens, 3, 4, count, &generated));
  HOLD(generated <= 4);

  squat_sampler_free(sampler);
  squat_free(engine);
  free(wide);
  free(logits);
  return NULL;
}
