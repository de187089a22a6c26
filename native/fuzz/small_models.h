// The smallest models that have everything, for fuzzing: a mutation then has something to hit.
#pragma once

#include <cstdint>
#include <vector>

#include "../tests/model_file.h"

namespace squat::test {

// One of each kind of file, as small as the format allows.
inline std::vector<ModelOptions> small_variants() {
  std::vector<ModelOptions> all = variants();
  for (ModelOptions& options : all) {
    const bool whole_blocks = options.hidden % 32 == 0;
    options.layers = options.convolutions ? 3 : 2;
    options.heads = options.gpt2 ? 1 : 2;
    options.kv_heads = 1;
    options.hidden = whole_blocks ? 32 : 12;
    options.head_dim = options.hidden / options.heads;
    options.ffn = whole_blocks ? 32 : 10;
    options.context = 16;
  }
  return all;
}

// Two whose saved sessions have every part: convolutions, widths of tokens, windows, multipliers.
inline std::vector<std::vector<uint8_t>> session_models() {
  std::vector<std::vector<uint8_t>> files;
  for (const ModelOptions& options : small_variants()) {
    if (!options.described || std::string(options.activations) != "4:8") continue;
    files.push_back(tiny_model(options).bytes());
  }
  return files;
}

}  // namespace squat::test
