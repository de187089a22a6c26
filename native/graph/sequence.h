// A text in the engine: its tokens, and what each layer holds of them.
//
// A token has 8 or 4 bits (docs/format.md, "Sites and token widths"). Each layer's attention keeps
// two pools of keys and two of values for each head, one for each width, in the order of the text;
// `widths_` remembers which pool a token is in. The keys of layer l have the widths that layer
// l-1 decided, the values those of layer l itself.
//
// Where keys may have 4 bits and the newest are seen in 8 (squat.recent_keys), a third pool holds
// these, and kTakenBack tokens before them.
//
// A layer with a convolution keeps what it mixes of each token, in float32.
//
// A layer that looks at a few tokens holds no more than it needs: where tokens in flight would not
// fit any more, the oldest ones are dropped, all but the window and kTakenBack tokens before it,
// and the others move to the front. So there is room for about two windows, and dropping is rare.
//
// All memory is taken when the sequence is made.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "base/memory.h"
#include "kernels/kernels.h"
#include "model.h"

namespace squat {

class Sequence {
 public:
  // The most tokens that are appended at once.
  static constexpr int kChunk = 128;

  // The longest context that a sequence of a model can have, whatever the model says: rows of
  // probabilities whose largest code is always 255 or near it may add up to that many times 255.
  static int most_tokens(const Model& model) {
    const bool largest = model.sites.v.peaks || model.sites.probs_are_codes();
    return largest ? kernels::kMaxInner : kernels::kMaxTokens;
  }

  // The references must outlive the sequence; 1 <= context <= most_tokens(model).
  Sequence(const Model& model, const kernels::Choice& choice, int context);

  int length() const { return length_; }
  int context() const { return context_; }

  const int32_t* tokens() const { return tokens_; }

  // The sequence's tokens and what it holds of them, as bytes that belong to a model's file of this
  // identity (session_state.cpp); whatever the instruction set is, they are the same.
  std::vector<uint8_t> save(uint64_t identity) const;
  // Becomes the sequence that was saved. Throws Error, before anything has changed, if the bytes
  // are none that save() made for this model, or if the context has no room for it; `name` stands
  // in messages.
  void restore(const std::vector<uint8_t>& bytes, uint64_t identity, const std::string& name);
  // The most bytes that save() makes of a sequence of this model, whatever its context.
  size_t most_saved_bytes() const;

  // Forgets all but the first `length` tokens. Throws Error, before anything has changed, if there
  // are fewer, or if a layer no longer holds what the next token would see. The last kTakenBack
  // tokens can always be taken back, and so can all.
  void rewind(size_t length);
  static constexpr int kTakenBack = 128;

  // Since the sequence was made: how many tokens each layer has made wide, and how many there were.
  const std::vector<uint64_t>& wide_counts() const { return wide_counts_; }
  uint64_t token_count() const { return token_count_; }
  // By layer, the widths that it gave the tokens, 8 or 4; empty if no site is 4:8.
  const std::vector<uint8_t*>& widths() const { return widths_; }
  // What keys, values and widths of a full context take.
  size_t cache_bytes() const { return cache_bytes_; }

 private:
  // What computes.
  friend class Session;

  struct HeadPools {
    kernels::KeyPool key8, key4;
    kernels::KeyPool recent;  // in 8 bits, whatever the token has, from position recent_first_ on
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

  size_t lay_out(Arena arena);
  // The least that can be left of the text, but for nothing.
  int least_length() const;
  // Throws Error if an id is out of range, or if n tokens behind `length` do not fit.
  void check_tokens(const int32_t* tokens, size_t n, int length) const;

  HeadPools& pools(int layer, int head) {
    return pools_[static_cast<size_t>(layer * model_.n_head_kv + head)];
  }
  const HeadPools& pools(int layer, int head) const {
    return pools_[static_cast<size_t>(layer * model_.n_head_kv + head)];
  }
  // What a convolution mixes of the tokens that it holds: [held][n_embd]. Before them are those of
  // the tokens before, and zeros before the text.
  float* mixed(int layer) const {
    const size_t before = static_cast<size_t>(model_.graph.reach(layer) - 1);
    return mixed_[static_cast<size_t>(layer)] + before * static_cast<size_t>(model_.n_embd);
  }

  // Tokens that a layer has room for; in a sequence of another context.
  int capacity(int layer) const { return capacity(layer, context_); }
  int capacity(int layer, int context) const;
  // Whether a layer may hold the tokens from `first` on, of `length`: its oldest one stands where
  // make_room() puts it, and they are what the next token sees.
  bool may_begin_at(int layer, int first, int length) const;
  // Drops a layer's oldest tokens if `count` more would not fit.
  void make_room(int layer, int count);
  // The same of all layers' recent keys, in whose pools there is room for so many.
  void make_recent_room(int count);
  int recent_capacity() const { return std::min(context_, kept(model_.sites.k.recent) + kChunk); }
  // Tokens before the next one that are kept of those that can be dropped.
  static int kept(int reach) { return reach - 1 + kTakenBack; }
  // How many of a layer's tokens from position `begin` to `end` are wide at k and at v.
  struct WideCounts {
    int keys, values;
  };
  WideCounts count_wide(int layer, int begin, int end) const;
  // By position, the widths of all tokens at k or v of a layer, which has both.
  const uint8_t* cached_widths(const Site& site, int by_layer) const {
    return site.by_token()   ? widths_[static_cast<size_t>(by_layer)]
           : site.wide_first ? first_wide_
                             : first_wide_ + 1;
  }

  // Saved (session_state.cpp).
  struct Saved;
  Saved check_saved(const std::vector<uint8_t>& bytes, uint64_t identity,
                    const std::string& name) const;
  // Bytes of a saved layer; of an attention's, with that many keys and values that are wide and
  // that many recent keys.
  size_t saved_layer_bytes(int layer, int held, int wide_keys, int wide_values,
                           int recent_keys) const;
  // How many recent keys are saved, of longer texts.
  int saved_recent() const { return kept(model_.sites.k.recent); }

  const Model& model_;
  const kernels::Choice& choice_;
  const int context_;
  const int longest_;  // the most tokens that a layer holds

  Memory memory_;
  size_t cache_bytes_ = 0;
  int length_ = 0;
  int32_t* tokens_;  // [context]
  int scored_ = 0;   // tokens from the beginning whose log-probabilities `terms_` has
  double* terms_;    // [context]; the first token has none
  std::vector<uint64_t> wide_counts_;
  uint64_t token_count_ = 0;

  std::vector<uint8_t*> widths_;  // by layer, of all tokens: [context]; empty if no site is 4:8
  uint8_t* first_wide_;           // 8, then 4: [1 + context, padded]
  std::vector<int> first_;        // by layer, position of the oldest token in the pools
  std::vector<HeadPools> pools_;  // [layer][key head]; empty where there is no attention
  int recent_first_ = 0;          // position of the oldest recent key, in all layers
  // By layer with a convolution: zeros, one row less than it mixes, then [tokens held][n_embd].
  std::vector<float*> mixed_;
  int8_t* vector_;  // [head_dim]: codes on their way
};

}  // namespace squat
