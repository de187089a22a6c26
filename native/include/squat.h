/* The C interface of the Squat engine: load a .gguf file that `squat export` wrote, and evaluate
 * tokens, score text or generate.
 *
 * Every function that can fail returns a squat_status. When that is not SQUAT_OK,
 * squat_last_error() returns one line of text that names the field and the value; it belongs to the
 * calling thread and is valid until that thread's next call that fails. After a failure an engine
 * is as it was before the call (squat_generate may have evaluated some tokens). No C++ exception
 * leaves this interface.
 *
 * An engine is one model with one session: the tokens evaluated so far and their keys and values.
 * One engine may be used by one thread at a time; different engines are independent of each other,
 * also where they share a model (squat_share).
 * Logits do not depend, to the last bit, on how the tokens were cut into calls, on the number of
 * threads, or on the instruction set in use.
 *
 * What is here stays: a program that was compiled against this header runs with every later
 * library. Functions, values of enums and macros are added, never changed or removed; structs keep
 * their fields and their size, and what is new comes by functions of its own. New values of
 * squat_status may be returned where a failure had another one before. A test compiles a caller
 * against the header of version 0.1 and runs it.
 */
#ifndef SQUAT_H
#define SQUAT_H

#define SQUAT_VERSION "0.2.0" /* of this header */

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define SQUAT_API __attribute__((visibility("default")))
#else
#define SQUAT_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum squat_status {
  SQUAT_OK = 0,
  SQUAT_STOPPED = 1,        /* the callback ended a generation; not a failure */
  SQUAT_ERROR_ARGUMENT = 2, /* an argument is out of its range */
  SQUAT_ERROR_FILE = 3,     /* the file cannot be opened or read */
  SQUAT_ERROR_FORMAT = 4,   /* the file is damaged, or no Squat file that this version reads */
  SQUAT_ERROR_CONTEXT = 5,  /* the tokens do not fit in the context */
  SQUAT_ERROR_ISA = 6,      /* SQUAT_ISA names an instruction set that is unknown or missing here */
  SQUAT_ERROR_MEMORY = 7,   /* out of memory */
  SQUAT_ERROR_INTERNAL = 8  /* a fault of this library: please report it */
} squat_status;

/* The message of the calling thread's last failure; "" if there was none. */
SQUAT_API const char* squat_last_error(void);

/* The version of the library, "major.minor.patch". Since 0.2.0. */
SQUAT_API const char* squat_version(void);

/* ---- Engine ---------------------------------------------------------------------------------- */

typedef struct squat_engine squat_engine;

/* Loads `path`. `threads`: threads that compute, at least 1; 0 = one for each CPU that this process
 * may use. `context`: the most tokens that the session can hold; 0 = the model's own limit, which
 * it may not exceed, nor 131072 (65536 where tokens multiply the steps by their peaks). The
 * environment variable SQUAT_ISA pins the instruction set. The file is mapped into memory: replace
 * it by renaming another, but do not write to it while the engine lives. */
SQUAT_API squat_status squat_load(const char* path, uint32_t threads, uint32_t context,
                                  squat_engine** engine);

/* Another engine of the same model, with a session of its own, which is empty: weights are in
 * memory once. `threads` and `context` are as for squat_load. Either may be used by another thread
 * than the other, at the same time, and freed first. Since 0.2.0. */
SQUAT_API squat_status squat_share(const squat_engine* engine, uint32_t threads, uint32_t context,
                                   squat_engine** other);

/* Frees an engine; NULL is allowed. */
SQUAT_API void squat_free(squat_engine* engine);

typedef struct squat_info {
  uint32_t n_vocab;      /* number of token ids, and of logits for one position */
  uint32_t n_layer;      /* decoder layers */
  uint32_t n_embd;       /* hidden size */
  uint32_t n_context;    /* the most tokens that the session can hold */
  uint32_t n_threads;    /* threads that compute */
  uint64_t file_bytes;   /* size of the file */
  uint64_t weight_bytes; /* packed weights in memory */
  uint64_t cache_bytes;  /* keys and values of a full context in memory; less is touched before */
  int32_t bos_token;     /* -1: the model has none */
  int32_t eos_token;     /* -1: the model has none */
  uint32_t n_eos_tokens; /* tokens that end an answer, eos_token the first of them */
  const int32_t* eos_tokens;
  const char* architecture; /* as the file says; strings live as long as the engine */
  const char* isa;          /* instruction set in use */
  const char* kernels;      /* one line for each kind of product: "name: kernel\n" */
} squat_info;

/* Fills `info`. */
SQUAT_API squat_status squat_get_info(const squat_engine* engine, squat_info* info);

/* The text of a string key of the file's metadata, such as "general.name"; not zero-terminated,
 * alive as long as the engine. SQUAT_ERROR_FORMAT if the file has no such key. */
SQUAT_API squat_status squat_get_string(const squat_engine* engine, const char* key,
                                        const char** text, size_t* size);

/* ---- Evaluation ------------------------------------------------------------------------------ */

typedef enum squat_logits {
  SQUAT_LOGITS_NONE = 0,
  SQUAT_LOGITS_LAST = 1, /* n_vocab floats: the last token's */
  SQUAT_LOGITS_ALL = 2   /* n x n_vocab floats, row-major */
} squat_logits;

/* Appends n >= 1 tokens to the session. `logits` receives what `which` asks for and must hold
 * `capacity` floats, at least that many. */
SQUAT_API squat_status squat_eval(squat_engine* engine, const int32_t* tokens, size_t n,
                                  squat_logits which, float* logits, size_t capacity);

/* Like squat_eval, but for what the last norm makes of a token, the input of the head before it is
 * quantized: `which` counts rows of n_embd floats. Since 0.2.0. */
SQUAT_API squat_status squat_eval_hidden(squat_engine* engine, const int32_t* tokens, size_t n,
                                         squat_logits which, float* hidden, size_t capacity);

/* A short name for n logits: FNV-1a, 64 bits, of their bytes as little-endian IEEE 754 numbers. The
 * same model file and the same tokens give the same hash on every CPU. Since 0.2.0. */
SQUAT_API uint64_t squat_hash_logits(const float* logits, size_t n);

/* Tokens to append to an engine's session: at least one. */
typedef struct squat_turn {
  squat_engine* engine;
  const int32_t* tokens;
  size_t n;
} squat_turn;

/* Evaluates the tokens of n >= 1 engines that share a model (squat_share) together, as if by
 * squat_eval one after the other: their logits are the same, bit for bit, and the weights are read
 * once for all of them, or once for each 128 tokens. `logits` receives n_vocab floats for each
 * turn: its last token's. The threads and buffers of `engine` compute, one of theirs or another
 * that shares the model; none of theirs may have a longer context than it, or come twice, and while
 * this runs no other thread may use any of them. On failure none has changed. Since 0.2.0. */
SQUAT_API squat_status squat_step(squat_engine* engine, const squat_turn* turns, size_t n,
                                  float* logits, size_t capacity);

/* The number of tokens in the session. */
SQUAT_API size_t squat_length(const squat_engine* engine);

/* The tokens in the session, of which *n receives the number; when it exceeds `capacity` nothing is
 * written and the status is SQUAT_ERROR_ARGUMENT. Since 0.2.0. */
SQUAT_API squat_status squat_get_tokens(const squat_engine* engine, int32_t* tokens,
                                        size_t capacity, size_t* n);

/* Forgets all tokens but the first `length`; 0 empties the session. The last 128 tokens can always
 * be taken back. What looks at a few tokens only (a window, a convolution, keys of 4 bits that are
 * seen in 8 when they are new) may no longer hold what the next token would see if it is more: then
 * it is SQUAT_ERROR_ARGUMENT, nothing has changed, and the way back is 0 and an evaluation of the
 * text. */
SQUAT_API squat_status squat_rewind(squat_engine* engine, size_t length);

/* Empties the session, evaluates n >= 1 tokens and stores the sum over tokens 1 .. n-1 of the
 * natural logarithm of the probability of each token after those before it. What they have in
 * common, from the beginning, with the tokens that were scored before is not computed again, if the
 * session has not lost it since. */
SQUAT_API squat_status squat_score(squat_engine* engine, const int32_t* tokens, size_t n,
                                   double* sum);

/* Like squat_score; `each` receives the n - 1 terms of the sum. Since 0.2.0. */
SQUAT_API squat_status squat_score_tokens(squat_engine* engine, const int32_t* tokens, size_t n,
                                          double* each, size_t capacity);

/* The widths that the layers gave the session's tokens from `begin` on: rows of squat_length -
 * `begin` bytes, 8 or 4, as many as *n_layer then says: one for each layer, or none if the model
 * has no token-adaptive sites. `capacity` is in bytes. Since 0.2.0. */
SQUAT_API squat_status squat_get_widths(const squat_engine* engine, size_t begin, uint8_t* bits,
                                        size_t capacity, size_t* n_layer);

/* How many tokens each layer has made wide (8 bits) since the engine was loaded: wide[n_layer]
 * receives the counts and `tokens` the number of all tokens evaluated. Models without
 * token-adaptive sites count no token as wide. */
SQUAT_API squat_status squat_wide_counts(const squat_engine* engine, uint64_t* wide, size_t n_layer,
                                         uint64_t* tokens);

/* ---- Saved sessions -------------------------------------------------------------------------- */

/* Writes the session's tokens and what the engine holds of them to a file, which an engine of the
 * same model file can load, on any CPU: what it evaluates then is the same, bit for bit. The file
 * is written under another name beside it, and then renamed. Since 0.2.0. */
SQUAT_API squat_status squat_save_session(squat_engine* engine, const char* path);

/* Replaces the session by one that squat_save_session wrote. The file may come from anybody: one
 * that is damaged, of another version or of another model file is SQUAT_ERROR_FORMAT, one of more
 * tokens than the context SQUAT_ERROR_CONTEXT. Since 0.2.0. */
SQUAT_API squat_status squat_load_session(squat_engine* engine, const char* path);

/* ---- Profile --------------------------------------------------------------------------------- */

/* One step of the graph, added up over all evaluations since profiling was switched on. */
typedef struct squat_profile_entry {
  const char* step; /* its name, such as "q, k, v" */
  double seconds;   /* of the calling thread, waiting for others included */
  uint64_t macs;    /* integer multiply-accumulates */
  uint64_t bytes;   /* packed weights, keys and values read */
  uint64_t calls;
} squat_profile_entry;

/* Switches profiling on (1) or off (0) and clears what was counted. It costs two looks at
 * the clock a step. */
SQUAT_API squat_status squat_set_profiling(squat_engine* engine, int on);

/* Copies what was counted, in the order of computation. *n receives the number of steps; when it
 * exceeds `capacity` nothing is written and the status is SQUAT_ERROR_ARGUMENT. */
SQUAT_API squat_status squat_profile(const squat_engine* engine, squat_profile_entry* entries,
                                     size_t capacity, size_t* n);

/* ---- Text ------------------------------------------------------------------------------------ */

/* Splits `size` bytes of UTF-8 text into tokens, with the model's beginning-of-sequence token first
 * if its tokenizer adds one. Ill-formed UTF-8 is read as U+FFFD. *n receives the number of tokens;
 * when it exceeds `capacity` nothing is written and the status is SQUAT_ERROR_ARGUMENT.
 * `size` + 2 tokens always suffice for byte-level tokenizers without normalization. */
SQUAT_API squat_status squat_tokenize(squat_engine* engine, const char* text, size_t size,
                                      int32_t* tokens, size_t capacity, size_t* n);

/* Turns tokens into text (not terminated by a zero byte; special tokens leave no text). *size
 * receives its size in bytes; when it exceeds `capacity` nothing is written and the status is
 * SQUAT_ERROR_ARGUMENT. A token may end inside a UTF-8 character. */
SQUAT_API squat_status squat_detokenize(squat_engine* engine, const int32_t* tokens, size_t n,
                                        char* text, size_t capacity, size_t* size);

/* The bytes that one token adds to a text, none for special tokens; alive as long as the engine. A
 * token may end inside a UTF-8 character. */
SQUAT_API squat_status squat_get_piece(squat_engine* engine, int32_t token, const char** text,
                                       size_t* size);

/* ---- Sampling -------------------------------------------------------------------------------- */

/* How the next token is chosen from the logits. The filters apply in the order of the fields,
 * after the penalty; 0 or 1 switches each off as noted. */
typedef struct squat_sampling {
  float repetition_penalty; /* > 0; 1 = off: logits of tokens seen so far are divided by it if
                               positive, multiplied if negative */
  float temperature;        /* >= 0; 0 = greedy: the largest logit, whatever the filters say */
  uint32_t top_k;           /* keep the k most probable tokens; 0 = off */
  float top_p;   /* in (0, 1]: keep the fewest tokens whose probabilities reach it; 1 = off */
  float min_p;   /* in [0, 1]: drop tokens less probable than min_p times the most
                    probable one; 0 = off */
  uint64_t seed; /* equal seeds give equal choices */
} squat_sampling;

typedef struct squat_sampler squat_sampler;

/* Greedy, every filter off, seed 0. */
SQUAT_API squat_sampling squat_sampling_default(void);

/* Makes a sampler for logits of `n_vocab` tokens. */
SQUAT_API squat_status squat_sampler_create(const squat_sampling* sampling, uint32_t n_vocab,
                                            squat_sampler** sampler);

/* Frees a sampler; NULL is allowed. */
SQUAT_API void squat_sampler_free(squat_sampler* sampler);

/* Marks tokens, such as those of the prompt, as seen (for the repetition penalty). */
SQUAT_API squat_status squat_sampler_accept(squat_sampler* sampler, const int32_t* tokens,
                                            size_t n);

/* Chooses a token from n_vocab logits and marks it as seen. */
SQUAT_API squat_status squat_sampler_next(squat_sampler* sampler, const float* logits,
                                          int32_t* token);

/* Receives each generated token and its text (`size` bytes, not zero-terminated, possibly ending
 * inside a UTF-8 character); returning anything but 0 ends the generation. */
typedef int (*squat_callback)(int32_t token, const char* text, size_t size, void* user);

/* Appends the n >= 1 prompt tokens to the session and generates until one of the end-of-sequence
 * tokens (which is not reported), `max_tokens` tokens, a full context (SQUAT_OK), or the callback's
 * wish (SQUAT_STOPPED). The sampler takes note of the prompt. */
SQUAT_API squat_status squat_generate(squat_engine* engine, squat_sampler* sampler,
                                      const int32_t* prompt, size_t n, size_t max_tokens,
                                      squat_callback callback, void* user);

#ifdef __cplusplus
}
#endif

#endif /* SQUAT_H */
