// The choice of kernels, packing, grouping by width, and the split over threads.
#include "kernels.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <type_traits>

#include "base/cpu.h"
#include "base/thread_pool.h"
#include "micro.h"

namespace squat::kernels {
namespace {

int divide_up(int a, int b) { return (a + b - 1) / b; }

size_t align_up(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

int element_bytes(const Kernel& kernel) { return kernel.form == ActivationForm::kWide ? 2 : 1; }

// Groups that lie in one stored byte of the weights.
int groups_per_byte(const Kernel& kernel) { return 8 / bits_of(kernel.weights); }

int stored_groups(const Kernel& kernel, int inner) {
  return divide_up(inner, kernel.k * groups_per_byte(kernel));
}

// Bytes of a (4 bits: pair of) group of a panel.
size_t group_bytes(const Kernel& kernel) { return size_t(kernel.n) * kernel.k; }

// Codes of a row of activations that stand side by side.
int side_by_side(const Kernel& kernel) {
  return kernel.form == ActivationForm::kBlocks ? kBlock : kernel.k;
}

// Bytes of one row of activations in a kernel's form, padded to whole stored groups and blocks.
size_t row_bytes(const Kernel& kernel, int inner) {
  const int codes = stored_groups(kernel, inner) * groups_per_byte(kernel) * kernel.k;
  const int block = side_by_side(kernel);
  return size_t(divide_up(codes, block)) * block * element_bytes(kernel);
}

bool same_weight_layout(const Kernel& a, const Kernel& b) {
  return a.weights == b.weights && a.n == b.n && a.k == b.k && a.zero == b.zero;
}

}  // namespace

// ---------------------------------------------------------------------------------------------
// The table and the choice

const char* name_of(WeightForm weights) {
  static constexpr const char* kNames[] = {"w8", "w4", "t4"};
  return kNames[static_cast<int>(weights)];
}

const std::vector<Kernel>& table() {
  static const std::vector<Kernel> rows = {
#define SQUAT_ISA(name, features, quantizer)
#define SQUAT_MATMUL(a, w, m, n, k, zero, form, isa)   \
  {"matmul_a" #a "_" #w "_" #m "x" #n "x" #k "_" #isa, \
   #isa,                                               \
   a,                                                  \
   WeightForm::w,                                      \
   m,                                                  \
   n,                                                  \
   k,                                                  \
   zero,                                               \
   ActivationForm::form,                               \
   matmul_a##a##_##w##_##m##x##n##x##k##_##isa},
#include "kernels.inc"
#undef SQUAT_ISA
#undef SQUAT_MATMUL
  };
  return rows;
}

const std::vector<Isa>& isas() {
  static const std::vector<Isa> rows = {
#define SQUAT_ISA(name, features, quantizer) {#name, features, quantize_##quantizer},
#define SQUAT_MATMUL(a, w, m, n, k, zero, form, isa)
#include "kernels.inc"
#undef SQUAT_ISA
#undef SQUAT_MATMUL
  };
  return rows;
}

bool runs_here(const Isa& isa) { return (isa.features & ~cpu_features()) == 0; }

const Isa* find_isa(const char* name) {
  for (const Isa& isa : isas()) {
    if (std::strcmp(isa.name, name) == 0) return &isa;
  }
  return nullptr;
}

namespace {

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text.empty() ? "none of the known features" : text;
}

// The first kernel of the ISA that reads such activations; with `layout`, only one that reads
// weights packed for it. A kernel for exactly this width is preferred to a wider one.
const Kernel* find_kernel(const Isa& isa, int activation_bits, WeightForm weights,
                          const Kernel* layout) {
  const Kernel* wider = nullptr;
  for (const Kernel& kernel : table()) {
    if (std::strcmp(kernel.isa, isa.name) != 0 || kernel.weights != weights) continue;
    if (layout != nullptr && !same_weight_layout(kernel, *layout)) continue;
    if (kernel.activation_bits == activation_bits) return &kernel;
    if (kernel.activation_bits > activation_bits && wider == nullptr) wider = &kernel;
  }
  return wider;
}

Choice choice_for(const Isa& isa) {
  Choice choice;
  choice.isa = &isa;
  for (const WeightForm weights : kWeightForms) {
    const Kernel* wide = find_kernel(isa, 8, weights, nullptr);
    choice.kernel[0][static_cast<int>(weights)] = wide;
    choice.kernel[1][static_cast<int>(weights)] = find_kernel(isa, 4, weights, wide);
  }
  return choice;
}

}  // namespace

bool choose(const char* pin, Choice* choice, std::string* error) {
  const bool pinned = pin != nullptr && *pin != '\0';
  const Isa* best = nullptr;
  if (pinned) {
    best = find_isa(pin);
    if (best == nullptr) {
      std::vector<std::string> names;
      for (const Isa& isa : isas()) names.push_back(isa.name);
      *error = "SQUAT_ISA=" + std::string(pin) + ": unknown here; compiled in: " + join(names);
      return false;
    }
    if (!runs_here(*best)) {
      *error = "SQUAT_ISA=" + std::string(pin) + ": this CPU lacks " +
               join(cpu_feature_names(best->features & ~cpu_features())) + "; it has " +
               join(cpu_feature_names(cpu_features()));
      return false;
    }
  } else {
    for (const Isa& isa : isas()) {
      if (runs_here(isa)) best = &isa;
    }
  }
  *choice = choice_for(*best);
  choice->pinned = pinned;
  return true;
}

Choice choice_of(const Kernel& kernel) {
  Choice choice = choice_for(*find_isa(kernel.isa));
  const int w = static_cast<int>(kernel.weights);
  choice.kernel[0][w] = choice.kernel[1][w] = &kernel;
  return choice;
}

std::string explain(const Choice& choice, int activation_bits, WeightForm weights) {
  const Kernel& kernel = choice.matmul(activation_bits, weights);
  std::string text = kernel.name;
  text += choice.pinned ? ": SQUAT_ISA=" + std::string(choice.isa->name)
                        : ": " + std::string(choice.isa->name) + " is the best ISA of this CPU";
  if (kernel.activation_bits != activation_bits) {
    text += ", where 8-bit activations cost no more than 4-bit ones";
  }
  return text;
}

// ---------------------------------------------------------------------------------------------
// The right-hand side

namespace {

const Kernel& layout_of(const Choice& choice, WeightForm weights) {
  return choice.matmul(8, weights);
}

// Calls body(byte, row) for every row with the byte that holds its code of one column.
template <class Body>
void for_each_row(const PackedMatrix& matrix, int column, Body body) {
  const Kernel& layout = *matrix.layout;
  const int group = column / layout.k;
  uint8_t* panel =
      matrix.data + group / groups_per_byte(layout) * group_bytes(layout) + column % layout.k;
  for (int first = 0; first < matrix.rows; first += layout.n, panel += matrix.panel_stride) {
    const int last = std::min(first + layout.n, matrix.rows);
    uint8_t* byte = panel;
    for (int row = first; row < last; ++row, byte += layout.k) body(*byte, row);
  }
}

// The nibble of an odd group is the high one.
bool in_low_nibble(const PackedMatrix& matrix, int column) {
  return column / matrix.layout->k % 2 == 0;
}

// The code whose last four bits are those of `held` less the offset.
int nibble_code(int held, int zero) { return ((held - zero + 8) & 15) - 8; }

// Calls body(code, row) for every code of one column.
template <class Body>
void for_each_code(const PackedMatrix& matrix, int column, Body body) {
  const int zero = matrix.layout->zero;
  if (matrix.layout->weights == WeightForm::w8) {
    for_each_row(matrix, column,
                 [=](uint8_t& byte, int row) { body(static_cast<int8_t>(byte - zero), row); });
  } else {
    const int shift = in_low_nibble(matrix, column) ? 0 : 4;
    for_each_row(matrix, column, [=](uint8_t& byte, int row) {
      body(static_cast<int8_t>(nibble_code(byte >> shift, zero)), row);
    });
  }
}

// What a code stands for.
int value_of(int code, const int8_t* levels) { return levels == nullptr ? code : levels[code + 8]; }

// Where the first group of a row begins.
uint8_t* row_at(const PackedMatrix& matrix, int row) {
  const Kernel& layout = *matrix.layout;
  return matrix.data + row / layout.n * matrix.panel_stride + size_t(row % layout.n) * layout.k;
}

}  // namespace

size_t packed_bytes(const Choice& choice, WeightForm weights, int rows, int inner) {
  const Kernel& layout = layout_of(choice, weights);
  return divide_up(rows, layout.n) * stored_groups(layout, inner) * group_bytes(layout);
}

PackedMatrix packed_matrix(const Choice& choice, WeightForm weights, int rows, int inner,
                           uint8_t* data, const int8_t* levels) {
  const Kernel& layout = layout_of(choice, weights);
  PackedMatrix matrix;
  matrix.layout = &layout;
  matrix.rows = rows;
  matrix.inner = inner;
  matrix.data = data;
  matrix.panel_stride = stored_groups(layout, inner) * group_bytes(layout);
  matrix.levels = levels;
  return matrix;
}

namespace {

// Writes one row in groups of K codes, which a byte holds one or two of; a Word is a piece of a
// group. In two's complement adding an offset of 8 to a nibble or of 128 to a byte flips its
// highest bit.
template <int K, class Word>
void pack_groups(const int8_t* codes, int inner, int zero, int bits, size_t group_bytes,
                 uint8_t* to) {
  constexpr Word kOnes = static_cast<Word>(0x0101010101010101);
  const Word flip = static_cast<Word>(kOnes * zero);
  const auto load = [](const int8_t* from) {
    Word word;
    std::memcpy(&word, from, sizeof(word));
    return word;
  };
  const auto pack = [&](const int8_t* block) {
    for (size_t i = 0; i < K; i += sizeof(Word)) {
      Word word = load(block + i) ^ flip;
      if (bits == 4) {
        const Word high = load(block + K + i) ^ flip;
        word = static_cast<Word>((word & kOnes * 15) | (high & kOnes * 15) << 4);
      }
      std::memcpy(to + i, &word, sizeof(word));
    }
    to += group_bytes;
  };
  const int step = bits == 4 ? 2 * K : K;
  int first = 0;
  if constexpr (K == 2 || K == 4) {
    // Several groups at a time. Two of them are a word of twice the size, whose upper half moves
    // into the free bits of its lower one.
    using Pair = std::conditional_t<K == 2, uint32_t, uint64_t>;
    typedef Pair Pairs __attribute__((vector_size(16)));
    constexpr int kPairs = sizeof(Pairs) / sizeof(Pair);
    const Pair flips = static_cast<Pair>(0x0101010101010101) * static_cast<Pair>(zero);
    for (; bits == 4 && first + kPairs * step <= inner; first += kPairs * step) {
      Pairs pairs;
      std::memcpy(&pairs, codes + first, sizeof pairs);
      pairs = (pairs ^ flips) & static_cast<Pair>(0x0f0f0f0f0f0f0f0f);
      pairs |= pairs >> (8 * K - 4);
      for (int i = 0; i < kPairs; ++i, to += group_bytes) {
        const Word word = static_cast<Word>(pairs[i]);
        std::memcpy(to, &word, sizeof(word));
      }
    }
  }
  for (; first + step <= inner; first += step) pack(codes + first);
  if (first < inner) {
    int8_t rest[2 * K] = {};
    std::memcpy(rest, codes + first, inner - first);
    pack(rest);
  }
}

// Writes the codes of one column to `rows` groups of K codes; a Word is the piece of a group that
// holds them, `shift` their place in it. Whole words, so that compilers make vectors of them.
template <int K, class Word>
void pack_lane(const int8_t* __restrict codes, int rows, int zero, int bits, int shift,
               uint8_t* __restrict to) {
  const Word low = static_cast<Word>((1 << bits) - 1);
  const Word keep = static_cast<Word>(~(low << shift));
  for (int row = 0; row < rows; ++row, to += K) {
    Word word;
    std::memcpy(&word, to, sizeof(word));
    const Word code = static_cast<Word>(static_cast<Word>(codes[row] ^ zero) & low);
    word = static_cast<Word>((word & keep) | static_cast<Word>(code << shift));
    std::memcpy(to, &word, sizeof(word));
  }
}

// Writes whole groups of `rows` rows: K columns, for 4 bits another K in the high nibbles. Column j
// of the codes begins at codes + j * stride.
template <int K>
void pack_lanes(const int8_t* __restrict codes, size_t stride, int rows, int zero, int bits,
                uint8_t* __restrict to) {
  const auto write =
      [=](auto byte) {  // a loop for each width, so that compilers make vectors of it
        for (int row = 0; row < rows; ++row) {
          for (int j = 0; j < K; ++j) to[row * K + j] = static_cast<uint8_t>(byte(row, j));
        }
      };
  const auto held = [=](int row, int column) { return codes[column * stride + row] ^ zero; };
  if (bits == 8) {
    write(held);
  } else {
    write([=](int row, int j) { return (held(row, j) & 15) | held(row, K + j) * 16; });
  }
}

// The piece of a group of K codes that is handled at once.
template <int K>
struct Piece {
  using Word = uint64_t;
};
template <>
struct Piece<4> {
  using Word = uint32_t;
};
template <>
struct Piece<2> {
  using Word = uint16_t;
};
template <>
struct Piece<1> {
  using Word = uint8_t;
};

// Calls body(Constant<K>()) for the K of a layout.
template <class Body>
void with_group_size(const Kernel& layout, Body body) {
  switch (layout.k) {
    case 1:
      return body(Constant<1>());
    case 2:
      return body(Constant<2>());
    case 4:
      return body(Constant<4>());
    case 8:
      return body(Constant<8>());
    case 16:
      return body(Constant<16>());
  }
}

}  // namespace

void pack_row(const PackedMatrix& matrix, int row, const int8_t* codes) {
  const Kernel& layout = *matrix.layout;
  with_group_size(layout, [&](auto k) {
    pack_groups<k, typename Piece<k>::Word>(codes, matrix.inner, layout.zero,
                                            bits_of(layout.weights), group_bytes(layout),
                                            row_at(matrix, row));
  });
}

void pack_column(const PackedMatrix& matrix, int column, const int8_t* codes) {
  const Kernel& layout = *matrix.layout;
  const int group = column / layout.k, lane = column % layout.k;
  const int bits = bits_of(layout.weights);
  const bool high = bits == 4 && !in_low_nibble(matrix, column);
  uint8_t* panel = matrix.data + group / groups_per_byte(layout) * group_bytes(layout);
  with_group_size(layout, [&](auto k) {
    using Word = typename Piece<k>::Word;
    constexpr int kLanes = sizeof(Word);
    const int shift = lane % kLanes * 8 + (high ? 4 : 0);
    uint8_t* to = panel + lane / kLanes * kLanes;
    for (int first = 0; first < matrix.rows; first += layout.n, to += matrix.panel_stride) {
      const int rows = std::min(layout.n, matrix.rows - first);
      pack_lane<k, Word>(codes + first, rows, layout.zero, bits, shift, to);
    }
  });
}

namespace {

// Columns that fill whole groups, from `column` on, which begins one.
void pack_column_groups(const PackedMatrix& matrix, int column, const int8_t* codes) {
  const Kernel& layout = *matrix.layout;
  uint8_t* to = matrix.data + size_t(stored_groups(layout, column)) * group_bytes(layout);
  with_group_size(layout, [&](auto k) {
    for (int first = 0; first < matrix.rows; first += layout.n, to += matrix.panel_stride) {
      const int rows = std::min(layout.n, matrix.rows - first);
      pack_lanes<k>(codes + first, size_t(matrix.rows), rows, layout.zero, bits_of(layout.weights),
                    to);
    }
  });
}

// Asks for a share of the cache lines, the first being at begin / of: into the second-level cache,
// since it comes long before it is read.
void prefetch_lines(const uint8_t* from, size_t size, int begin, int end, int of) {
  constexpr size_t kLine = 64;
  const size_t lines = (size + kLine - 1) / kLine;
  const size_t last = lines * size_t(end) / size_t(of);
  for (size_t line = lines * size_t(begin) / size_t(of); line < last; ++line) {
    __builtin_prefetch(from + line * kLine, 0, 2);
  }
}

}  // namespace

size_t KeyPool::used_bytes() const {
  return size_t(matrix.rows / matrix.layout->n + 1) * matrix.panel_stride;
}

void KeyPool::prefetch(int begin, int end, int of) const {
  prefetch_lines(matrix.data, used_bytes(), begin, end, of);
}

size_t KeyPool::bytes(const Choice& choice, WeightForm form, int head_dim, int capacity) {
  return packed_bytes(choice, form, capacity, head_dim);
}

KeyPool KeyPool::empty(const Choice& choice, WeightForm form, int head_dim, uint8_t* data,
                       const int8_t* levels) {
  return {packed_matrix(choice, form, 0, head_dim, data, levels)};
}

void KeyPool::append(const int8_t* codes, int tokens) {
  for (int i = 0; i < tokens; ++i, codes += matrix.inner) pack_row(matrix, matrix.rows++, codes);
}

void KeyPool::read(int token, int8_t* codes) const {
  const Kernel& layout = *matrix.layout;
  const uint8_t* row = row_at(matrix, token);
  const bool wide = layout.weights == WeightForm::w8;
  for (int column = 0; column < matrix.inner; ++column) {
    const int group = column / layout.k;
    const uint8_t byte =
        row[group / groups_per_byte(layout) * group_bytes(layout) + column % layout.k];
    codes[column] = static_cast<int8_t>(
        wide ? byte - layout.zero
             : nibble_code(in_low_nibble(matrix, column) ? byte : byte >> 4, layout.zero));
  }
}

void KeyPool::drop(int tokens) {
  const Kernel& layout = *matrix.layout;
  const size_t stride = group_bytes(layout), end = stored_groups(layout, matrix.inner) * stride;
  for (int row = tokens; row < matrix.rows; ++row) {
    const uint8_t* from = row_at(matrix, row);
    uint8_t* to = row_at(matrix, row - tokens);
    for (size_t at = 0; at < end; at += stride) std::memcpy(to + at, from + at, size_t(layout.k));
  }
  matrix.rows -= tokens;
}

int KeyPool::skip_panels(int first) {
  const int panels = first / matrix.layout->n, tokens = panels * matrix.layout->n;
  matrix.data += size_t(panels) * matrix.panel_stride;
  matrix.rows -= tokens;
  return tokens;
}

size_t ValuePool::sums_bytes(int head_dim) { return align_up(size_t(head_dim) * sizeof(int32_t)); }

size_t ValuePool::bytes(const Choice& choice, WeightForm form, int head_dim, int capacity) {
  return sums_bytes(head_dim) + packed_bytes(choice, form, head_dim, capacity);
}

ValuePool ValuePool::empty(const Choice& choice, WeightForm form, int head_dim, int capacity,
                           uint8_t* data, const int8_t* levels) {
  ValuePool pool{
      packed_matrix(choice, form, head_dim, capacity, data + sums_bytes(head_dim), levels)};
  pool.matrix.inner = 0;
  return pool;
}

int32_t* ValuePool::sums() const {
  return reinterpret_cast<int32_t*>(matrix.data - sums_bytes(matrix.rows));
}

void ValuePool::append(const int8_t* codes, int tokens) {
  const int rows = matrix.rows;
  int32_t* __restrict to = sums();  // codes are bytes, which could be part of anything
  for (int t = 0; t < tokens; ++t) {
    const int8_t* of_token = codes + size_t(t) * rows;
    if (matrix.levels == nullptr) {
      for (int i = 0; i < rows; ++i) to[i] += of_token[i];
    } else {
      for (int i = 0; i < rows; ++i) to[i] += value_of(of_token[i], matrix.levels);
    }
  }
  const int whole = matrix.layout->k * groups_per_byte(*matrix.layout);
  while (tokens > 0) {
    int step = 1;
    if (tokens >= whole && matrix.inner % whole == 0) {
      step = whole;
      pack_column_groups(matrix, matrix.inner, codes);
    } else {
      pack_column(matrix, matrix.inner, codes);
    }
    matrix.inner += step;
    tokens -= step;
    codes += size_t(step) * rows;
  }
}

size_t ValuePool::panel_bytes() const {
  return stored_groups(*matrix.layout, matrix.inner + 1) * group_bytes(*matrix.layout);
}

size_t ValuePool::used_bytes() const {
  return divide_up(matrix.rows, matrix.layout->n) * panel_bytes();
}

void ValuePool::prefetch(int begin, int end, int of) const {
  const int panels = divide_up(matrix.rows, matrix.layout->n);
  for (int i = 0; i < panels; ++i) {
    prefetch_lines(matrix.data + i * matrix.panel_stride, panel_bytes(), begin, end, of);
  }
}

void ValuePool::read(int token, int8_t* codes) const {
  for_each_code(matrix, token, [=](int8_t code, int row) { codes[row] = code; });
}

void ValuePool::truncate(int count) {
  if (matrix.inner == count) return;
  int32_t* to = sums();
  if (count == 0) {
    std::fill(to, to + matrix.rows, 0);
    matrix.inner = 0;
  }
  const int8_t* levels = matrix.levels;
  for (; matrix.inner > count; --matrix.inner) {
    for_each_code(matrix, matrix.inner - 1,
                  [=](int8_t code, int row) { to[row] -= value_of(code, levels); });
  }
}

void ValuePool::drop(int tokens, int8_t* buffer) {
  int32_t* to = sums();
  const int8_t* levels = matrix.levels;
  for (int column = 0; column < tokens; ++column) {
    for_each_code(matrix, column, [=](int8_t code, int row) { to[row] -= value_of(code, levels); });
  }
  for (int column = tokens; column < matrix.inner; ++column) {
    for_each_code(matrix, column, [=](int8_t code, int row) { buffer[row] = code; });
    pack_column(matrix, column - tokens, buffer);
  }
  matrix.inner -= tokens;
}

// ---------------------------------------------------------------------------------------------
// The left-hand side

namespace {

// How a code becomes an element of a tile. A probability is lowered by 128, which in two's
// complement is a flip of its highest bit; the sums say by how much the results are then to be
// corrected.
struct Plain {
  using Element = int8_t;
  static Element encode(int8_t code) { return code; }
  static Element encode(uint8_t code) { return static_cast<int8_t>(code ^ 0x80); }
};

struct Negated {
  using Element = int8_t;
  template <class Code>
  static Element encode(Code code) {
    return static_cast<int8_t>(-Plain::encode(code));
  }
};

struct Wide {
  using Element = int16_t;
  template <class Code>
  static Element encode(Code code) {
    return Plain::encode(code);
  }
};

// Writes a row of a tile: K codes at a time, `group_bytes` from the start of one group to that of
// the next, zeros from `count` to the end of the last group.
template <class Form, int K, class Code>
void interleave_row(const Code* codes, int count, int groups, size_t group_bytes, uint8_t* to) {
  typename Form::Element block[K];
  int group = 0;
  for (; (group + 1) * K <= count; ++group, to += group_bytes) {
    for (int i = 0; i < K; ++i) block[i] = Form::encode(codes[group * K + i]);
    std::memcpy(to, block, sizeof(block));
  }
  for (; group < groups; ++group, to += group_bytes) {
    for (int i = 0; i < K; ++i) {
      const int at = group * K + i;
      block[i] = at < count ? Form::encode(codes[at]) : typename Form::Element(0);
    }
    std::memcpy(to, block, sizeof(block));
  }
}

template <class Code>
using Interleave = void (*)(const Code* codes, int count, int groups, size_t group_bytes,
                            uint8_t* to);

template <class Form, class Code>
Interleave<Code> interleave_of(int k) {
  switch (k) {
    case 1:
      return interleave_row<Form, 1, Code>;
    case 2:
      return interleave_row<Form, 2, Code>;
    case 4:
      return interleave_row<Form, 4, Code>;
    case 8:
      return interleave_row<Form, 8, Code>;
    case 16:
      return interleave_row<Form, 16, Code>;
    case kBlock:
      return interleave_row<Form, kBlock, Code>;
    default:
      return nullptr;  // no row of the table; a test makes every row pass here
  }
}

template <class Code>
Interleave<Code> interleave_for(const Kernel& kernel) {
  switch (kernel.form) {
    case ActivationForm::kNegated:
      return interleave_of<Negated, Code>(kernel.k);
    case ActivationForm::kWide:
      return interleave_of<Wide, Code>(kernel.k);
    default:
      return interleave_of<Plain, Code>(side_by_side(kernel));
  }
}

// Groups of four bytes, which most kernels read, are transposed as words: 4 x 4 of them at a time.
typedef uint32_t Words __attribute__((vector_size(16)));

// The next four groups of a row, of four codes each,
template <class Code>
Words load_words(Plain, const Code* codes) {
  Words words;
  std::memcpy(&words, codes, sizeof(words));
  return words ^ 0x01010101u * static_cast<uint8_t>(Plain::encode(Code(0)));
}

// or of two.
template <class Code>
Words load_words(Wide, const Code* codes) {
  typedef int8_t Bytes __attribute__((vector_size(8)));
  typedef int16_t Pairs __attribute__((vector_size(16)));
  Bytes bytes;
  std::memcpy(&bytes, codes, sizeof(bytes));
  return (Words) __builtin_convertvector(bytes ^ Plain::encode(Code(0)), Pairs);
}

// Writes N rows of a tile, up to four, side by side; `codes` has four in any case.
template <class Form, int N, class Code>
void interleave_words(const Code* const codes[4], int count, int groups, size_t group_bytes,
                      uint8_t* to) {
  constexpr int kCodes = 4 / sizeof(typename Form::Element);  // of a group
  int at = 0;
  for (; at + 4 * kCodes <= count; at += 4 * kCodes) {
    Words row[4];
    for (int i = 0; i < 4; ++i) row[i] = load_words(Form(), codes[i] + at);
    const Words low0 = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
    const Words high0 = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
    const Words low1 = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
    const Words high1 = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
    const Words group[4] = {__builtin_shufflevector(low0, low1, 0, 1, 4, 5),
                            __builtin_shufflevector(low0, low1, 2, 3, 6, 7),
                            __builtin_shufflevector(high0, high1, 0, 1, 4, 5),
                            __builtin_shufflevector(high0, high1, 2, 3, 6, 7)};
    for (const Words& words : group) {
      std::memcpy(to, &words, 4 * N);
      to += group_bytes;
    }
  }
  for (int i = 0; i < N; ++i) {
    interleave_row<Form, kCodes>(codes[i] + at, count - at, groups - at / kCodes, group_bytes,
                                 to + 4 * i);
  }
}

template <class Form, class Code>
void interleave_tile(const Code* const* codes, int rows, int count, int groups, uint8_t* to) {
  const size_t group_bytes = 4 * static_cast<size_t>(rows);
  for (int row = 0; row < rows; row += 4, to += 16) {
    const auto of = [&](int i) { return codes[std::min(row + i, rows - 1)]; };
    const Code* const four[4] = {of(0), of(1), of(2), of(3)};
    constexpr decltype(&interleave_words<Form, 1, Code>) kInterleave[] = {
        interleave_words<Form, 1, Code>, interleave_words<Form, 2, Code>,
        interleave_words<Form, 3, Code>, interleave_words<Form, 4, Code>};
    kInterleave[std::min(rows - row, 4) - 1](four, count, groups, group_bytes, to);
  }
}

template <class Code>
int32_t sum_of(const Code* codes, int count) {
  typedef int16_t Pairs __attribute__((vector_size(16)));
  typedef uint16_t Bits __attribute__((vector_size(16)));
  const uint16_t flip = 0x0101u * static_cast<uint8_t>(Plain::encode(Code(0)));
  int32_t sum = 0;
  int i = 0;
  while (count - i >= 16) {
    // A lane of 16 bits has room for the sum of 255 codes.
    Pairs sums = {};
    const int end = i + std::min((count - i) / 16, 127) * 16;
    for (; i < end; i += 16) {
      Bits codes_of_two;
      std::memcpy(&codes_of_two, codes + i, sizeof(codes_of_two));
      codes_of_two ^= flip;
      sums += (Pairs)(codes_of_two << 8) >> 8;
      sums += (Pairs)codes_of_two >> 8;
    }
    for (int lane = 0; lane < 8; ++lane) sum += sums[lane];
  }
  for (; i < count; ++i) sum += Plain::encode(codes[i]);
  return sum;
}

// The input of prepare() in one form; codes are int8_t, or uint8_t for probabilities.
template <class Code>
struct Source {
  const Code* codes;
  size_t stride;
  int rows, inner;
  const uint8_t* bits;
  const float* steps;
};

template <class Code>
void pack_tiles(const Source<Code>& source, const Prepared::Group& group, uint8_t* data,
                const int32_t* order, int32_t* sums, int tile_begin, int tile_end) {
  const Kernel& kernel = *group.kernel;
  const Interleave<Code> interleave = interleave_for<Code>(kernel);
  const size_t bytes = row_bytes(kernel, source.inner);
  const int block = side_by_side(kernel) * element_bytes(kernel);
  const int groups = static_cast<int>(bytes / block);
  for (int tile = tile_begin; tile < tile_end; ++tile) {
    const int first = group.begin + tile * kernel.m;
    const int rows = std::min(kernel.m, group.end - first);
    uint8_t* to = data + size_t(first - group.begin) * bytes;
    const Code* codes[kMaxTileRows];
    for (int i = 0; i < rows; ++i) codes[i] = source.codes + order[first + i] * source.stride;
    if (block == 4 && kernel.form == ActivationForm::kPlain) {
      interleave_tile<Plain>(codes, rows, source.inner, groups, to);
    } else if (block == 4 && kernel.form == ActivationForm::kWide) {
      interleave_tile<Wide>(codes, rows, source.inner, groups, to);
    } else {
      for (int i = 0; i < rows; ++i) {
        interleave(codes[i], source.inner, groups, size_t(rows) * block, to + i * block);
      }
    }
    for (int i = 0; i < rows; ++i) sums[first + i] = sum_of(codes[i], source.inner);
  }
}

template <class Code>
Prepared prepare_rows(const Choice& choice, WeightForm weights, const Source<Code>& source,
                      void* buffer, ThreadPool* threads) {
  const Kernel* wide = &choice.matmul(8, weights);
  const Kernel* narrow = &choice.matmul(4, weights);

  uint8_t* at = static_cast<uint8_t*>(buffer);
  const size_t array_bytes = align_up(size_t(source.rows) * 4);
  int32_t* order = reinterpret_cast<int32_t*>(at);
  int32_t* sums = reinterpret_cast<int32_t*>(at + array_bytes);
  float* steps = reinterpret_cast<float*>(at + 2 * array_bytes);
  uint8_t* data = at + 3 * array_bytes;

  // One kernel for both widths needs no grouping: all rows are one group, in token order.
  const bool merge = wide == narrow || source.bits == nullptr;
  int count = 0;
  const auto take = [&](int row) {
    order[count] = row;
    if (source.steps != nullptr) steps[count] = source.steps[row];
    ++count;
  };
  for (int row = 0; row < source.rows; ++row) {
    if (merge || source.bits[row] == 8) take(row);
  }
  const int split = count;
  if (!merge) {
    for (int row = 0; row < source.rows; ++row) {
      if (source.bits[row] != 8) take(row);
    }
  }

  Prepared prepared;
  prepared.rows = source.rows;
  prepared.inner = source.inner;
  prepared.weights = weights;
  prepared.order = order;
  prepared.sums = sums;
  prepared.steps = steps;
  prepared.group[0] = {wide, 0, split, data};
  prepared.group[1] = {narrow, split, count,
                       data + align_up(split * row_bytes(*wide, source.inner))};

  for (const Prepared::Group& group : prepared.group) {
    const int tiles = divide_up(group.end - group.begin, group.kernel->m);
    const auto pack = [&](int begin, int end, int) {
      pack_tiles(source, group, const_cast<uint8_t*>(group.data), order, sums, begin, end);
    };
    if (threads != nullptr) {
      threads->parallel_for(tiles, pack);
    } else {
      pack(0, tiles, 0);
    }
  }
  return prepared;
}

}  // namespace

size_t prepared_bytes(const Choice& choice, int rows, int inner) {
  size_t widest = 0;
  for (const auto& by_weights : choice.kernel) {
    for (const Kernel* kernel : by_weights) widest = std::max(widest, row_bytes(*kernel, inner));
  }
  // Behind the last tile are the rows that it lacks (amx.cpp).
  return 3 * align_up(size_t(rows) * 4) + rows * widest + 2 * kAlignment + kMaxTileRows * kBlock;
}

Prepared prepare(const Choice& choice, WeightForm weights, const ActivationRows& rows, void* buffer,
                 ThreadPool* threads) {
  const Source<int8_t> source{rows.codes, rows.stride, rows.rows,
                              rows.inner, rows.bits,   rows.steps};
  return prepare_rows(choice, weights, source, buffer, threads);
}

// ---------------------------------------------------------------------------------------------
// Products

namespace {

void run_groups(const Prepared& rows, const PackedMatrix& weights, const int32_t* column_sums,
                const Output& out, int panel_begin, int panel_end) {
  assert(weights.layout->weights == rows.weights && weights.inner == rows.inner);
  for (const Prepared::Group& group : rows.group) {
    if (group.begin == group.end) continue;
    const Kernel& kernel = *group.kernel;
    assert(same_weight_layout(kernel, *weights.layout));
    MatmulCall call;
    call.rows = group.data;
    call.row_bytes = row_bytes(kernel, rows.inner);
    call.row_count = group.end - group.begin;
    call.order = rows.order + group.begin;
    call.sums = rows.sums + group.begin;
    call.steps = rows.steps + group.begin;
    call.panels = weights.data;
    call.panel_stride = weights.panel_stride;
    call.levels = weights.levels;
    call.group_count = stored_groups(kernel, rows.inner);
    call.columns = weights.rows;
    call.panel_begin = panel_begin;
    call.panel_end = panel_end;
    call.ahead = prefetch_distance();
    call.column_sums = column_sums;
    call.out = out;
    kernel.run(call);
  }
}

int panel_count(const PackedMatrix& weights) { return divide_up(weights.rows, weights.layout->n); }

// The first panel of a part, which is the end of the one before it.
int first_panel(const PackedMatrix& weights, Part part) {
  return static_cast<int>(int64_t{panel_count(weights)} * part.index / part.of);
}

void run_part(const Prepared& rows, const PackedMatrix& weights, const int32_t* column_sums,
              const Output& out, Part part) {
  run_groups(rows, weights, column_sums, out, first_panel(weights, part),
             first_panel(weights, {part.index + 1, part.of}));
}

}  // namespace

void matmul(const Prepared& rows, const Product* products, int count, ThreadPool* threads,
            const Aside* aside) {
  int panels = 0;
  for (int i = 0; i < count; ++i) panels += panel_count(*products[i].weights);
  // All panels of all products in one line, of which every thread takes one piece.
  const auto run = [&](int begin, int end, int) {
    int first = 0;
    for (int i = 0; i < count; ++i) {
      const int here = panel_count(*products[i].weights);
      const int from = std::max(begin - first, 0), to = std::min(end - first, here);
      const PackedMatrix& weights = *products[i].weights;
      if (aside == nullptr) {
        if (from < to) run_groups(rows, weights, nullptr, products[i].out, from, to);
      } else {
        for (int panel = from; panel < to; ++panel) {
          aside->run(aside->what, first + panel, panels);
          run_groups(rows, weights, nullptr, products[i].out, panel, panel + 1);
        }
      }
      first += here;
    }
  };
  if (threads != nullptr) {
    threads->parallel_for(panels, run);
  } else {
    run(0, panels, 0);
  }
}

void scores(const Prepared& queries, const KeyPool& keys, int32_t* out, size_t stride, Part part) {
  run_part(queries, keys.matrix, nullptr, Output::exact(out, stride), part);
}

Columns weighted_values(const Choice& choice, const ProbabilityRows& rows, const ValuePool& values,
                        void* buffer, int32_t* out, size_t stride, Part part) {
  const Kernel& layout = *values.matrix.layout;
  Output output = Output::exact(out, stride);
  const int32_t* column_sums = values.sums();  // of all pieces
  for (int begin = 0; begin < rows.inner; begin += kMaxInner) {
    PackedMatrix piece = values.matrix;
    piece.inner = std::min(kMaxInner, rows.inner - begin);
    piece.data += size_t(stored_groups(layout, begin)) * group_bytes(layout);
    const Source<uint8_t> source{rows.codes + begin, rows.stride, rows.rows,
                                 piece.inner,        nullptr,     nullptr};
    run_part(prepare_rows(choice, values.form(), source, buffer, nullptr), piece, column_sums,
             output, part);
    column_sums = nullptr;
    output.add = true;
  }
  const auto begin_of = [&](Part p) {
    return std::min(first_panel(values.matrix, p) * layout.n, values.matrix.rows);
  };
  return {begin_of(part), begin_of({part.index + 1, part.of})};
}

// ---------------------------------------------------------------------------------------------
// Quantization

void quantize(const Choice& choice, const float* x, int n, float step, int bits, int8_t* codes) {
  const int high = (1 << (bits - 1)) - 1;
  choice.isa->quantize(x, n, 1.0f / step, -high - 1, high, codes);
}

}  // namespace squat::kernels
