// The forward pass: tokens in, logits out, with the keys and values of all tokens so far.
//
// Tokens are evaluated in chunks. Every float operation of a token depends on that token and on
// what is cached, never on the chunk around it, and everything else is integers: one piece, any
// chunks and token by token give the same logits, bit for bit.
//
// A token has 8 or 4 bits (docs/format.md, "Sites and token widths"). Each layer's attention keeps
// two pools of keys and two of values for each head, one for each width, in the order of the text;
// `widths_` remembers which pool a token is in. The keys of layer l have the widths that layer
// l-1 decided, the values those of layer l itself.
//
// A layer with a convolution keeps what it mixes of each token, in float32.
//
// A layer that looks at a few tokens holds no more than it needs: where a chunk would not fit any
// more, the oldest tokens are dropped, all but the window and kTakenBack tokens before it, and
// the others move to the front. So there is room for about two windows, and dropping is rare.
//
// All memory is taken when the session is made: evaluating allocates nothing.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "base/memory.h"
#include "base/profile.h"
#include "base/thread_pool.h"
#include "float_ops.h"
#include "kernels/kernels.h"
#include "model.h"

namespace squat {

class Session {
 public:
  // The longest context that a session of a model can have, whatever the model says: rows of
  // probabilities whose largest code is always 255 or near it may add up to that many times 255.
  static int most_tokens(const Model& model) {
    return model.sites.v.peaks ? kernels::kMaxInner : kernels::kMaxTokens;
  }

  // The references must outlive the session; 1 <= context <= most_tokens(model).
  Session(const Model& model, const kernels::Choice& choice, ThreadPool& threads, int context);

  int length() const { return length_; }
  int context() const { return context_; }

  const int32_t* tokens() const { return tokens_; }

  // Appends tokens; `logits` receives n_vocab floats for each of the last `wanted` tokens. Throws
  // Error, before anything has changed, if an id is out of range or the tokens do not fit.
  void eval(const int32_t* tokens, size_t n, size_t wanted, float* logits);

  // Like eval(); `hidden` receives n_embd floats, what the last norm makes of a token.
  void eval_hidden(const int32_t* tokens, size_t n, size_t wanted, float* hidden);

  // Empties the session, appends tokens, and returns the sum of the log-probabilities of tokens
  // 1 .. n-1; `each`, if not null, receives all n-1 of them. Throws like eval().
  double score(const int32_t* tokens, size_t n, double* each);

  // The session's tokens and what it holds of them, as bytes that belong to a model's file of this
  // identity (session_state.cpp); whatever the instruction set is, they are the same.
  std::vector<uint8_t> save(uint64_t identity) const;
  // Becomes the session that was saved. Throws Error, before anything has changed, if the bytes are
  // none that save() made for this model, or if the context has no room for it; `name` stands in
  // messages.
  void restore(const std::vector<uint8_t>& bytes, uint64_t identity, const std::string& name);
  // The most bytes that save() makes of a session of this model, whatever its context.
  size_t most_saved_bytes() const;

  // Forgets all but the first `length` tokens. Throws Error, before anything has changed, if there
  // are fewer, or if a layer no longer holds what the next token would see. The last kTakenBack
  // tokens can always be taken back, and so can all.
  void rewind(size_t length);
  static constexpr int kTakenBack = 128;

  // Since the session was made: how many tokens each layer has made wide, and how many there were.
  const std::vector<uint64_t>& wide_counts() const { return wide_counts_; }
  uint64_t token_count() const { return token_count_; }
  // By layer, the widths that it gave the session's tokens, 8 or 4; empty if no site is 4:8.
  const std::vector<uint8_t*>& widths() const { return widths_; }
  // What keys, values and widths of a full context take.
  size_t cache_bytes() const { return cache_bytes_; }

  Profile& profile() { return profile_; }
  const Profile& profile() const { return profile_; }

 private:
  struct HeadPools {
    kernels::KeyPool key8, key4;
    kernels::ValuePool value8, value4;
    // By position, whatever pool; null if there are none.
    int8_t *key_multipliers, *value_multipliers;

    size_t used_bytes() const {
      size_t sum = 0;
      for (const kernels::KeyPool* keys : {&key8, &key4}) {
        if (keys->count() > 0) sum += keys->used_bytes();
      }
      for (const kernels::ValuePool* values : {&value8, &value4}) {
        if (values->count() > 0) sum += values->used_bytes();
      }
      return sum;
    }
    void prefetch(int begin, int end, int of) const {
      for (const kernels::KeyPool* keys : {&key8, &key4}) {
        if (keys->count() > 0) keys->prefetch(begin, end, of);
      }
      for (const kernels::ValuePool* values : {&value8, &value4}) {
        if (values->count() > 0) values->prefetch(begin, end, of);
      }
    }
  };

  // Buffers of one thread; a query row is a query head of a token.
  struct Scratch {
    float* row;             // a row of any float tensor
    uint8_t* query_widths;  // [query rows of a block]
    int32_t* sums[2];       // [query rows of a block][keys or head_dim], of the wide, narrow pool
    float* scores;          // [keys]
    uint8_t* probs[2];      // [query rows of a block][keys of the wide, narrow pool]
    uint8_t* prepared;
  };

  // Cosines and sines of the rotated elements of a head, of one token or of one after the other;
  // see FloatOps::rotate.
  struct Angles {
    float *cosine, *sine;
    Angles of(int token, int rotated) const {
      const size_t at = static_cast<size_t>(token) * static_cast<size_t>(rotated);
      return {cosine + at, sine + at};
    }
  };

  // Tokens in flight: positions `position` .. `position` + `count` - 1 of the text. Those from
  // `wanted` on are needed after the last layer's attention.
  struct Chunk {
    int position;
    int count;
    int wanted;
    int first;                // position of the oldest token that the layer's pools hold
    const uint8_t* previous;  // the tokens' widths by the previous layer; null: 8 bits
    uint8_t* current;         // the tokens' widths by this layer; null if no site is 4:8

    // Tokens before the chunk that the pools hold, and with the chunk.
    int past() const { return position - first; }
    int keys() const { return past() + count; }
  };

  // A row for each token of a chunk, as the input of a product.
  struct Input {
    const int8_t* codes;
    const uint8_t* widths;
    int rows, inner;
    const float* steps;  // of each row
  };

  // Vectors of q, k or v in the columns of qkv_ behind `column`, `group` of them for each key head,
  // and where their codes and multipliers go: [key head][token][group][head_dim].
  struct Vectors {
    const Site& site;
    const uint8_t* by_token;  // what decides their widths
    int column, group;
    const Norm* norm;     // queries and keys may be normalized, rotated and transformed first,
    float scale;          // with this scale; values (null) are not
    const float* center;  // taken off all heads then, or null
    int8_t* codes;
    int8_t* multipliers;
  };

  size_t lay_out(Arena arena);
  void check_tokens(const int32_t* tokens, size_t n, int length) const;

  void forward(const int32_t* tokens, int count, int wanted);
  // Tokens that a layer has room for; in a session of another context.
  int capacity(int layer) const { return capacity(layer, context_); }
  int capacity(int layer, int context) const;
  // Whether a layer may hold the tokens from `first` on, of `length`: its oldest one stands where
  // make_room() puts it, and they are what the next token sees.
  bool may_begin_at(int layer, int first, int length) const;
  // Drops a layer's oldest tokens if `count` more would not fit.
  void make_room(int layer, int count);
  // How many of a layer's tokens from position `begin` to `end` are wide at k and at v.
  struct WideCounts {
    int keys, values;
  };
  WideCounts count_wide(int layer, int begin, int end) const;
  void embed(const int32_t* tokens, const Chunk& chunk);
  // The angles of a position.
  static void turn(const Rotation& rotation, int position, const Angles& row);
  void attend(const Chunk& chunk, int layer);
  void convolve(const Chunk& chunk, int layer);
  // Quantizes the vectors of the tokens from `from` on.
  void quantize_vectors(const Chunk& chunk, int layer, const Vectors& vectors, int from);
  // Which of all vectors is the first one of a token at a key head, and where its codes begin.
  static size_t vector_of(const Chunk& chunk, int group, int head, int token) {
    return static_cast<size_t>((head * chunk.count + token) * group);
  }
  size_t codes_at(const Chunk& chunk, int group, int head, int token) const {
    return vector_of(chunk, group, head, token) * static_cast<size_t>(model_.head_dim);
  }
  // In decoding, attention would wait for memory longer than it computes: while the product before
  // it reads its weights, a layer's keys and values are asked for, part by part. Not with several
  // tokens, which compute longer than they wait, nor if they would not stay in the second-level
  // cache.
  bool reads_ahead(const Chunk& chunk, int layer) const;
  void read_ahead(int layer, int part, int parts) const;
  void score_head(const Chunk& chunk, int layer, int head, Scratch& scratch);
  void attention_row(const Chunk& chunk, int layer, int token, int query_head, int row, int stride,
                     const HeadPools& pools, Scratch& scratch);
  float importance(int layer, int token, int position) const;
  void decide_widths(const Chunk& chunk, int layer);
  void weigh_head(const Chunk& chunk, int layer, int head, Scratch& scratch);
  void head(int first, int count, float* logits);
  // Evaluates tokens chunk by chunk; after each, body(first, count) gets those of its rows that are
  // among the last `wanted` tokens.
  template <class Body>
  void eval_chunks(const int32_t* tokens, size_t n, size_t wanted, Body&& body);

  // A saved session (session_state.cpp).
  struct Saved;
  Saved check_saved(const std::vector<uint8_t>& bytes, uint64_t identity,
                    const std::string& name) const;
  // Bytes of a saved layer; of an attention's, with that many keys and values that are wide.
  size_t saved_layer_bytes(int layer, int held, int wide_keys, int wide_values) const;

  // What a thread may ask for ahead: a part of a second-level cache.
  static constexpr size_t kReadAhead = 384 << 10;
  // Query tokens whose attention is computed together: enough to feed the kernels, few enough that
  // little is computed for keys that a query must not see.
  static constexpr int kQueryBlock = 16;
  // Products smaller than this many multiply-adds are not worth waking another thread.
  static constexpr int64_t kParallelWork = 1 << 16;

  // Whether widths depend on attention, so that every token's counts, whoever asks for its logits.
  bool attention_decides() const {
    return !widths_.empty() && (model_.importance == Importance::kFirstToken ||
                                model_.importance == Importance::kRelativeFirstToken);
  }
  // The first token whose attention anybody asks for.
  int first_query(const Chunk& chunk) const { return attention_decides() ? 0 : chunk.wanted; }

  // The most floats of a vector.
  static constexpr int kVector = 16;
  // Rows of keys are padded to whole vectors and cache lines.
  static int keys_padded(int keys) { return (keys + 63) / 64 * 64; }
  static bool is_wide(const uint8_t* widths, int token) {
    return widths == nullptr || widths[token] == 8;
  }

  template <class Body>
  static void for_runs(const uint8_t* widths, int begin, int end, Body&& body);
  // Calls body(head, scratch) for every key head.
  template <class Body>
  void for_heads(const Chunk& chunk, Body&& body);

  // 1 / sqrt(n), or the power of two next to it from above, n the power of two in block / inner.
  static float hadamard_scale(int block, int inner = 1);
  // Transforms n elements as a site's layer wants them.
  void transform(const Site& site, int layer, float* x, int n) const;
  // What a vector multiplies its site's step by (token_steps.h).
  int8_t multiplier_of(const Site& site, int layer, bool wide, const float* x, int n) const;
  // Makes a vector's codes; returns that multiplier.
  int8_t quantize(const Site& site, int layer, bool wide, const float* x, int n,
                  int8_t* codes) const;
  // Quantizes rows first .. first+count-1 of a float tensor into codes_; row(i, buffer) returns row
  // i, which it may make in the buffer. Where the site says so the row is transformed, in place.
  template <class Row>
  Input quantize_rows(Step step, const Site& site, int layer, const uint8_t* by_token, int first,
                      int count, int size, Row&& row);
  // The products of an input with matrices, side by side in `out` or added to it.
  enum class Add { kNo, kYes };
  void multiply(Step step, const Input& input, const Weights* weights, size_t matrices, float* out,
                size_t stride, Add add = Add::kNo, const kernels::Aside* aside = nullptr);
  // Without a norm: the row as it is.
  float* normalize(const Norm& norm, const float* x, float* out) const;
  // What attention or MLP make, from their last product on, for the tokens from `from` on.
  void add_to_residual(Step step, const Input& input, const Weights& weights, const Norm& after,
                       int from);
  // What a layer's first product makes of a token, and what its second one reads, in elements.
  int made_by(int layer) const {
    return model_.graph.attends(layer) ? model_.n_embd_qkv() : 3 * model_.n_embd;
  }
  int attended_by(int layer) const {
    return model_.graph.attends(layer) ? model_.n_embd_q() : model_.n_embd;
  }
  // Whether anything is done to it before it is added.
  bool needs_branch() const {
    const Graph& graph = model_.graph;
    const auto has_norm = [](const Layer& layer) {
      return layer.after_attn_norm.exists() || layer.after_mlp_norm.exists();
    };
    return graph.parallel || graph.residual_scale != 1 ||
           std::any_of(model_.layers.begin(), model_.layers.end(), has_norm);
  }

  // The widths of the chunk's tokens at a site; null: 8 bits. In front of the head `length_` is
  // behind the chunk already, which is the same to a site where no token is wide.
  const uint8_t* site_widths(const Site& site, const uint8_t* by_token) const {
    return site.bits == Site::Bits::k8 ? nullptr
           : site.by_token()           ? by_token
                                       : fixed_widths(site) + length_;
  }
  // By position, the widths of all tokens at a site that is not 4:8 and not 8 bits.
  const uint8_t* fixed_widths(const Site& site) const {
    return site.wide_first ? first_wide_ : first_wide_ + 1;
  }
  // By position, the widths of all tokens at k or v of a layer, which has both.
  const uint8_t* cached_widths(const Site& site, int by_layer) const {
    return site.by_token() ? widths_[static_cast<size_t>(by_layer)] : fixed_widths(site);
  }
  // The same, as a kernel sees the codes: a level is eight bits wide.
  static const uint8_t* code_widths(const Site& site, const uint8_t* widths) {
    return site.has_levels() ? nullptr : widths;
  }

  void measure_values(const Chunk& chunk, int layer, int column);
  uint8_t* probs_row(const Chunk& chunk, int token, int query_head) const;

  const Model& model_;
  const kernels::Choice& choice_;
  ThreadPool& threads_;
  const FloatOps& ops_;
  const int context_;
  const int longest_;     // the most tokens that a layer holds
  const int chunk_;       // the most tokens in flight
  const int score_rows_;  // rows of logits that score() computes at a time

  Memory memory_;
  size_t cache_bytes_ = 0;
  int length_ = 0;
  int32_t* tokens_;  // [context]
  std::vector<uint64_t> wide_counts_;
  uint64_t token_count_ = 0;
  Profile profile_;

  std::vector<uint8_t*> widths_;  // by layer, of all tokens: [context]; empty if no site is 4:8
  uint8_t* first_wide_;           // 8, then 4: [1 + context + chunk]
  std::vector<int> first_;        // by layer, position of the oldest token in the pools
  std::vector<Angles> angles_;    // by rotation, of the chunk in flight
  std::vector<HeadPools> pools_;  // [layer][key head]; empty where there is no attention
  // By layer with a convolution: zeros, one row less than it mixes, then [tokens held][n_embd].
  std::vector<float*> mixed_;
  std::vector<Scratch> scratch_;  // by thread

  // Of the chunk in flight; row i belongs to its token i.
  float* residual_;
  int8_t* codes_;        // the quantized input of the next product,
  float* steps_;         // and its step
  float* qkv_;           // [token][q heads, k heads, v heads][head_dim]; or what is convolved
  int8_t* query_codes_;  // [key head][token][q head of the group][head_dim]
  int8_t* key_codes_;    // [key head][token][head_dim]
  int8_t* value_codes_;
  int8_t* query_multipliers_;  // [key head][token][q head of the group]
  int8_t* key_multipliers_;    // [key head][token]
  int8_t* value_multipliers_;  // [key head][token]
  float* probs_steps_;         // [key head][token][q head of the group]
  float* attention_;           // [token][q heads][head_dim], or a convolution's result
  float* mlp_;                 // [token][gate, up]; gpt2: [token][up]
  float* branch_;       // [token][n_embd]: what is added to the residual, if anything is done to it
  uint8_t* probs_;      // [key head][token][q head of the group][keys]
  float* first_probs_;  // [token][q head]: attention to the first token
  uint8_t* prepared_;
  float* score_logits_;  // [score_rows_][n_vocab]
  double* score_terms_;  // [score_rows_]
};

}  // namespace squat
