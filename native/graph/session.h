// The forward pass: tokens in, logits out.
//
// Tokens in flight are the rows of every product; they may belong to several sequences. Every float
// operation of a token depends on that token and on what its sequence holds, never on the rows
// around it, and everything else is integers: one piece, any chunks, token by token, alone or
// beside other sequences, a text's logits are the same, bit for bit.
//
// All memory is taken when the session is made: evaluating allocates nothing.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/memory.h"
#include "base/profile.h"
#include "base/thread_pool.h"
#include "float_ops.h"
#include "kernels/kernels.h"
#include "model.h"
#include "sequence.h"

namespace squat {

// A sequence with the buffers and the threads to compute it, and others along with it.
class Session : public Sequence {
 public:
  // The references must outlive the session; 1 <= context <= most_tokens(model).
  Session(const Model& model, const kernels::Choice& choice, ThreadPool& threads, int context);

  // Appends tokens; `logits` receives n_vocab floats for each of the last `wanted` tokens. Throws
  // Error, before anything has changed, if an id is out of range or the tokens do not fit.
  void eval(const int32_t* tokens, size_t n, size_t wanted, float* logits);

  // Like eval(); `hidden` receives n_embd floats, what the last norm makes of a token.
  void eval_hidden(const int32_t* tokens, size_t n, size_t wanted, float* hidden);

  // Empties the session, appends tokens, and returns the sum of the log-probabilities of tokens
  // 1 .. n-1; `each`, if not null, receives all n-1 of them. What the tokens have in common with
  // those that were scored before, from the beginning, is not computed again. Throws like eval().
  double score(const int32_t* tokens, size_t n, double* each);

  // Tokens to append to a sequence of this session's model, whose context is not longer than its
  // own; it may be the session itself. At least one.
  struct Turn {
    Sequence* sequence;
    const int32_t* tokens;
    size_t n;
  };
  // Appends tokens to several sequences, no one of them twice, in as few passes over the weights as
  // the buffers allow; `logits` receives n_vocab floats for the last token of each turn. Throws
  // Error, before anything has changed, like eval().
  void step(const Turn* turns, size_t n, float* logits);

  Profile& profile() { return profile_; }
  const Profile& profile() const { return profile_; }

 private:
  // Buffers of one thread; a query row is a query head of a token.
  struct Scratch {
    float* row;             // a row of any float tensor
    uint8_t* query_widths;  // [query rows of a block]
    int32_t* sums[2];       // [query rows of a block][keys or head_dim], of the wide, narrow pool
    int32_t* recent_sums;   // [query rows of a block][recent_stride()]
    float* scores;          // [keys, and a vector more]
    float *key_multipliers, *value_multipliers;  // [keys, and a vector more]
    uint8_t* probs[2];  // [query rows of a block][keys of the wide, narrow pool]
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

  // Tokens of one sequence in flight: rows `row` .. `row` + `count` - 1 of all buffers, positions
  // `position` .. of its text. Logits are wanted of those from `wanted` on.
  struct Chunk {
    Sequence* sequence;
    int row, position, count, wanted;
    // In the layer that is computed: the position of the oldest token that its pools hold, from
    // which of the chunk's tokens on anybody reads what attention makes, and where the chunk's rows
    // of probabilities begin.
    int first, needed;
    size_t probs_at;

    // Tokens before the chunk that the pools hold, and with the chunk.
    int past() const { return position - first; }
    int keys() const { return past() + count; }
  };

  // Tokens of a chunk.
  struct Tokens {
    int begin, end;
  };

  // A row for each token in flight, as the input of a product.
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
    int8_t* wide_codes;  // in 8 bits, whatever the token has; or null
  };

  // Keys that some queries see in 8 bits, and others around them, from position `first` on.
  struct RecentKeys {
    kernels::KeyPool pool;
    int first;
  };

  size_t lay_out(Arena arena);

  // Puts tokens of a sequence behind what is in flight, as many as there is room for; returns how
  // many. The last `wanted` of all n are asked for.
  size_t take(Sequence* sequence, const int32_t* tokens, size_t n, size_t wanted);
  // Computes what is in flight. Then its rows are those that were asked for, one after the other.
  void forward();
  void embed();
  // The angles of a position.
  static void turn(const Rotation& rotation, int position, const Angles& row);
  void attend(int layer);
  void convolve(int layer);
  // Moves the rows that are asked for to the front: all others have done their work.
  void keep_wanted();
  void quantize_vectors(int layer, const Vectors& vectors);
  // Which of all vectors is the first one of a row at a key head, and where its codes begin.
  size_t vector_of(int group, int head, int row) const {
    return static_cast<size_t>((head * rows_ + row) * group);
  }
  size_t codes_at(int group, int head, int row) const {
    return vector_of(group, head, row) * static_cast<size_t>(model_.head_dim);
  }
  // In decoding, attention would wait for memory longer than it computes: while the product before
  // it reads its weights, a layer's keys and values are asked for, part by part. Not with several
  // tokens of a text, which compute longer than they wait, nor if they would not stay in the
  // second-level cache.
  bool reads_ahead(int layer) const;
  void read_ahead(int layer, int part, int parts) const;
  void append_keys(const Chunk& chunk, int layer, int head, Tokens block);
  // Products of queries with keys, with those of a part of the cache.
  void multiply_keys(const Chunk& chunk, int layer, int head, Tokens block, Tokens queries,
                     kernels::Part part, Scratch& scratch) const;
  // Makes quantized probabilities of these products, for a part of the query heads.
  void make_probs(const Chunk& chunk, int layer, int head, Tokens block, Tokens queries,
                  kernels::Part part, Scratch& scratch);
  // Of the block's keys and those before it, what its queries from `query` on need.
  RecentKeys recent_keys(const Chunk& chunk, int layer, int head, int query) const;
  // Elements of a query row's products with them.
  size_t recent_stride() const {
    const int panel = choice_.matmul(8, kernels::WeightForm::w8).n;
    return static_cast<size_t>(keys_padded(kQueryBlock + model_.sites.k.recent + 2 * panel));
  }
  void set_query_widths(const Chunk& chunk, Tokens queries, Scratch& scratch) const;
  void attention_row(const Chunk& chunk, int layer, int token, int query_head, int row, int stride,
                     int recent, const HeadPools& pools, Scratch& scratch);
  float importance(int layer, int row, int position) const;
  void decide_widths(const Chunk& chunk, int layer);
  void set_width(const Chunk& chunk, int layer, int token, bool wide) {
    const size_t l = static_cast<size_t>(layer);
    const uint8_t bits = wide ? 8 : 4;
    current_[chunk.row + token] = chunk.sequence->widths_[l][chunk.position + token] = bits;
    chunk.sequence->wide_counts_[l] += wide;
  }
  void append_values(const Chunk& chunk, int layer, int head, Tokens block);
  // Multiplies values with probabilities, for a part of the elements of a head.
  void weigh(const Chunk& chunk, int layer, int head, Tokens block, Tokens queries,
             kernels::Part part, Scratch& scratch);
  void head(int first, int count, float* logits);
  // Appends tokens to this sequence, as many at a time as there is room for; each time, body(count)
  // gets that many rows, those of the last `wanted` tokens that were among them.
  template <class Body>
  void eval_chunks(const int32_t* tokens, size_t n, size_t wanted, Body&& body);

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
  // The first of a chunk's tokens whose attention anybody asks for.
  int first_query(const Chunk& chunk) const { return attention_decides() ? 0 : chunk.needed; }

  // The most floats of a vector.
  static constexpr int kVector = 16;
  // Rows of keys are padded to whole vectors and cache lines.
  static int keys_padded(int keys) { return (keys + 63) / 64 * 64; }
  static bool is_wide(const uint8_t* widths, int token) {
    return widths == nullptr || widths[token] == 8;
  }

  // Appends the codes of a block's keys or values, each to the pool of its width.
  template <class Pool>
  void append(const Chunk& chunk, int head, Tokens block, const uint8_t* widths,
              const int8_t* codes, Pool* wide, Pool* narrow) const;
  // For every key head and block of tokens of all that is in flight calls append(chunk, head,
  // block), and then attend(chunk, head, block, queries, scratch) for some of its tokens after the
  // other. `macs` says whether that is worth other threads.
  template <class Append, class Attend>
  void for_blocks(int64_t macs, Append&& append, Attend&& attend);
  // A single new token's heads may be too few, or an odd number, for the threads: into so many
  // parts each of them is cut, 1 for not at all.
  int parts_of_heads(int64_t macs) const;
  // Elements of a head's products with keys or values in a Scratch.
  size_t sums_of_head() const;
  // Calls body(head, part, scratch) for every part of every key head.
  template <class Body>
  void for_parts(int parts, Body&& body);

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
  // What attention or MLP make, from their last product on.
  void add_to_residual(Step step, const Input& input, const Weights& weights, const Norm& after);
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

  // The widths of all rows at a site; null: 8 bits.
  const uint8_t* site_widths(const Site& site, const uint8_t* by_token) const {
    return site.bits == Site::Bits::k8 ? nullptr
           : site.by_token()           ? by_token
           : site.wide_first           ? first_wide_rows_
                                       : narrow_rows_;
  }
  // The same, as a kernel sees the codes: a level is eight bits wide.
  static const uint8_t* code_widths(const Site& site, const uint8_t* widths) {
    return site.has_levels() ? nullptr : widths;
  }

  void measure_values(int layer, int column);
  uint8_t* probs_row(const Chunk& chunk, int token, int query_head) const;

  ThreadPool& threads_;
  const FloatOps& ops_;
  const int most_rows_;   // in flight
  const int score_rows_;  // rows of logits that score() computes at a time

  Memory buffers_;
  Profile profile_;
  std::vector<Angles> angles_;    // by rotation, of all rows
  std::vector<Scratch> scratch_;  // by thread

  // In flight.
  std::vector<Chunk> chunks_;
  int rows_ = 0;             // of all chunks together
  const uint8_t* previous_;  // the rows' widths by the previous layer; null: 8 bits
  uint8_t* current_;         // the rows' widths by this layer; null if no site is 4:8

  int32_t* row_tokens_;
  int32_t* row_positions_;
  uint8_t* row_widths_[2];    // where `previous_` and `current_` are, in turn
  uint8_t* first_wide_rows_;  // 8 for the first token of a text, 4 for others
  uint8_t* narrow_rows_;      // 4
  float* residual_;
  int8_t* codes_;         // the quantized input of the next product,
  float* steps_;          // and its step
  float* qkv_;            // [token][q heads, k heads, v heads][head_dim]; or what is convolved
  int8_t* query_codes_;   // [key head][token][q head of the group][head_dim]
  int8_t* key_codes_;     // [key head][token][head_dim]
  int8_t* recent_codes_;  // the same in 8 bits, if any are seen so
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
};

}  // namespace squat
