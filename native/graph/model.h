// A model as the engine computes with it: what the metadata say, checked against the tensors, and
// the weights packed for the kernels of this CPU. It knows nothing of sessions.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/mapped_file.h"
#include "base/memory.h"
#include "base/thread_pool.h"
#include "file/code_tensor.h"
#include "file/gguf.h"
#include "float_ops.h"
#include "graph.h"
#include "kernels/kernels.h"

namespace squat {

// A tensor of activations that is quantized (docs/format.md, "Sites and token widths").
struct Site {
  enum class Bits { k4, k8, kByToken } bits = Bits::k8;
  std::vector<float> step8, step4;  // by layer; 0 where a width is never used
  bool peaks = false;               // vectors multiply steps by their largest magnitude
  int margin8 = -1, margin4 = -1;   // of token exponents; -1: none, or a width that is never used
  std::vector<int> hadamard;        // blocks that are transformed, by layer; empty: none are
  int inner = 1;                    // elements that weights have transformed among themselves
  std::vector<Levels> levels;       // of 4-bit codes, by layer; empty: codes are uniform
  bool cached = false;              // k and v: the right-hand side of products
  bool wide_first = false;          // the first token of a text has 8 bits, the others 4
  int recent = 0;                   // k: how many of the last keys a token sees in 8 bits, if any

  bool by_token() const { return bits == Bits::kByToken; }
  bool ever_wide() const { return bits != Bits::k4 || wide_first; }
  bool token_exponents() const { return margin8 >= 0 || margin4 >= 0; }
  bool multiplied() const { return peaks || token_exponents(); }
  int margin(bool wide) const { return wide ? margin8 : margin4; }
  float step(int layer, bool wide) const {
    const std::vector<float>& steps = wide ? step8 : step4;
    return steps.empty() ? 0.0f : steps[static_cast<size_t>(layer)];
  }
  // 1: nothing is transformed.
  int block(int layer) const { return hadamard.empty() ? 1 : hadamard[static_cast<size_t>(layer)]; }
  // On the left-hand side levels are 8-bit codes for a kernel.
  bool has_levels() const { return !levels.empty(); }
  // On the right-hand side they are 4-bit codes with a table.
  kernels::WeightForm narrow_form() const {
    return has_levels() ? kernels::WeightForm::t4 : kernels::WeightForm::w4;
  }
  const int8_t* level_table(int layer) const {
    return has_levels() ? levels[static_cast<size_t>(layer)].values : nullptr;
  }
};

struct Sites {
  Site attn_in, q, k, v, attn_out, mlp_in, mlp_mid, head_in;
  // By layer, multiplied where values' are; empty: softmax is in base 2 and makes codes itself.
  std::vector<float> probs_step;
  bool probs_are_codes() const { return probs_step.empty(); }
};

// A quantized matrix with its bias.
struct Weights {
  kernels::PackedMatrix matrix;
  float* steps = nullptr;   // of each row, in the memory of the weights
  std::vector<float> bias;  // empty: none
};

// Where there is none, the weight is empty.
struct Norm {
  std::vector<float> weight;
  std::vector<float> bias;  // of LayerNorm
  bool exists() const { return !weight.empty(); }
};

struct Layer {
  Norm attn_norm, after_attn_norm, mlp_norm, after_mlp_norm;
  Norm q_norm, k_norm;          // of each head, or of all together
  std::vector<Weights> qkv;     // q, k, v, or one matrix with the rows of all three
  std::vector<float> k_center;  // taken off the keys of all heads; empty: nothing is
  Weights attn_out;
  // In a layer with a convolution qkv is one matrix, with the rows of the gate before it, the gate
  // behind it, and what it mixes; attn_out is the projection behind it.
  std::vector<float> convolution;  // [taps][n_embd], the oldest token's first
  std::vector<Weights> mlp_in;     // gate and up, or up alone
  Weights mlp_mid;
};

// Learned positions: quantized, or float32 as they stand in the file. A model may have none.
struct Positions {
  std::optional<CodeTensor> codes;
  const uint8_t* floats = nullptr;
};

// What decides a token's width (docs/format.md, "Sites and token widths").
enum class Importance : uint8_t { kFirstToken, kRelativeFirstToken, kValuePeak, kRarity };

struct Model {
  std::string architecture;
  int n_vocab, n_layer, n_embd, n_ff, n_context;
  int n_head, n_head_kv, head_dim;
  float norm_epsilon;
  Graph graph;

  Importance importance = Importance::kFirstToken;
  std::vector<float> thresholds;      // by layer; empty: no site is 4:8
  std::vector<uint32_t> token_ranks;  // of rarity: by token, the most frequent one has 0
  bool wide_first_token = false;      // where tokens have 4 bits, the first one of a text has 8
  Sites sites;

  std::optional<CodeTensor> embedding;
  int embedding_block = 1;  // tied to a head whose input is transformed: rows are transformed back
  Positions positions;
  std::vector<Layer> layers;
  Norm out_norm;
  Weights head;
  size_t weight_bytes = 0;
  Memory weight_memory;

  // Of a layer, whose keys may have 4 bits or not.
  bool narrow_keys(int layer) const {
    const bool may = !sites.k.by_token() || layer > graph.first_attention();
    return graph.attends(layer) && sites.k.bits != Site::Bits::k8 && may;
  }
  int recent_keys(int layer) const { return narrow_keys(layer) ? sites.k.recent : 0; }

  int group() const { return n_head / n_head_kv; }  // query heads of a key head
  int n_embd_q() const { return n_head * head_dim; }
  int n_embd_kv() const { return n_head_kv * head_dim; }
  int n_embd_qkv() const { return n_embd_q() + 2 * n_embd_kv(); }
  bool gated() const { return layers[0].mlp_in.size() == 2; }
};

// `mapping` may be null (a file that lies in memory). Throws Error.
Model load_model(const Gguf& file, const MappedFile* mapping, const kernels::Choice& choice,
                 ThreadPool& threads);

}  // namespace squat
