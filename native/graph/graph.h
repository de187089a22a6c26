// What a model computes beside its products (docs/format.md, "Graph"): building blocks, whatever
// the architecture is called. Where norms stand, whether queries, keys and values share a matrix,
// and whether the MLP has a gate, the tensors themselves say.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "file/gguf.h"

namespace squat {

// RoPE: what the pairs of a head's first elements are turned by.
struct Rotation {
  std::vector<float> frequencies;  // radians per position, by pair
  float scale = 1;                 // factor of rotated vectors (YaRN)
};

struct Graph {
  enum class Norm { kRms, kLayer } norm = Norm::kRms;
  enum class Activation { kSilu, kGeluTanh, kGelu } activation = Activation::kSilu;
  bool parallel = false;  // attention and MLP both read what a layer gets
  // Whether a file has the rows of q and k in two halves, of which each pair has one element, and
  // not pair after pair, as the engine has them.
  bool halves = false;
  std::vector<Rotation> rotations;
  std::vector<int> rotation;  // by layer, which of them; -1: none
  std::vector<int> window;    // by layer, how many tokens a token sees, itself among them; 0: all
  // By layer, 0: attention; otherwise a short convolution in its place, and how many tokens it
  // mixes.
  std::vector<int> taps;
  float embedding_scale = 1, attention_scale = 1, residual_scale = 1, logit_divisor = 1;

  bool attends(int layer) const { return taps[static_cast<size_t>(layer)] == 0; }
  // The first layer with attention; there is one.
  int first_attention() const {
    return static_cast<int>(std::find(taps.begin(), taps.end(), 0) - taps.begin());
  }
  // How many tokens a layer looks at, the token itself among them; 0: all.
  int reach(int layer) const {
    const size_t l = static_cast<size_t>(layer);
    return taps[l] > 0 ? taps[l] : window[l];
  }
  // Elements of a head that are rotated.
  int rotated() const {
    return rotations.empty() ? 0 : 2 * static_cast<int>(rotations[0].frequencies.size());
  }
};

// `described`: whether the file names the feature "graph"; only then may it say anything that is
// not usual. Throws Error.
Graph read_graph(const Gguf& file, const std::string& architecture, int layers, int head_dim,
                 bool described);

}  // namespace squat
