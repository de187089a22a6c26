// MKMP, the multi-kernel mixed-precision multiplier ("Squat", arXiv 2402.10787, section IV-E).
//
// A product has M tokens of 8- or 4-bit activation codes on one side and N rows of 8- or 4-bit
// weight codes on the other, and is an exact int32 sum over the whole inner dimension K, because
// every row of either side has one step for all of K. On the other side 4-bit codes may stand for
// sixteen levels of 8 bits, in a table. Its parts:
//
//   choose()      picks the instruction set (ISA) and with it one micro-kernel for every width of
//                 activations and form of weights, out of the one table in kernels.inc
//   PackedMatrix  the right-hand side in the layout of its kernel: weights (packed once, at load),
//                 cached keys (rows are appended) or cached values (columns are appended)
//   prepare()     the left-hand side: groups the tokens by width, so that each group's kernel is
//                 called once, and interleaves their codes; done once for all matrices that read it
//   matmul()      the product, for one matrix or several that share an input; results are written
//                 in token order
//
// Attention is the same product: scores multiply prepared queries with a KeyPool, and the output
// multiplies probabilities with a ValuePool.
//
// Nothing here allocates, starts threads or keeps state: buffers and the thread pool are the
// caller's, and different threads may compute at the same time. Every ISA gives the same bits:
// integers are exact, and a float result is `float(acc) * (step_of_token * step_of_row) + bias`,
// and where it is added to something that plus the result, each operation rounded on its own,
// whatever M, N, the chunk size or the number of threads.
//
// Sizes are trusted (M, N >= 0, 1 <= K <= kMaxInner, for values kMaxTokens): check what comes from
// a file before it gets here. Codes must fit their width: -8..7 or -128..127.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace squat {
class ThreadPool;
}

namespace squat::kernels {

// The largest inner dimension. One operand may be held with an offset that makes it unsigned, so
// that a partial sum reaches K * 255 * 128, which at 65536 is just below 2^31.
inline constexpr int kMaxInner = 65536;

// The most tokens of a pool. The inner dimension of a product with values is their number: it is
// computed in pieces of kMaxInner tokens, whose sums are added modulo 2^32. That is the result,
// since it is small. A probability p has the code rint(p / step), 0 below half a step, which is at
// most 2 p / step; so the codes of a row add up to at most 2 / step = 2^15 (docs/format.md,
// "Numbers"), and the result is at most 2^22, however many tokens there are. Where each row has a
// step of its own they may add up to 255 for each token: no more than kMaxInner of these.
inline constexpr int kMaxTokens = 131072;

// Alignment that every buffer should have; anything less is correct, and slower.
inline constexpr size_t kAlignment = 64;

// ---------------------------------------------------------------------------------------------
// The table and the choice

struct MatmulCall;  // what a micro-kernel is given; see micro.h

// How a kernel wants the activation codes of its tiles.
enum class ActivationForm : uint8_t {
  kPlain,    // int8, the code
  kNegated,  // int8, minus the code (4-bit codes only: -128 has no negative)
  kWide,     // int16, the code
  kBlocks,   // int8, the code, kBlock of them side by side instead of k
};
inline constexpr int kBlock = 64;

// What the codes of the right-hand side are: 8 bits, 4 bits, or 4 bits of which code i stands for
// level i + 8 of a table.
enum class WeightForm : uint8_t { w8, w4, t4 };
inline constexpr WeightForm kWeightForms[] = {WeightForm::w8, WeightForm::w4, WeightForm::t4};

constexpr WeightForm plain_weights(int bits) { return bits == 8 ? WeightForm::w8 : WeightForm::w4; }
constexpr int bits_of(WeightForm weights) { return weights == WeightForm::w8 ? 8 : 4; }
const char* name_of(WeightForm weights);

inline constexpr int kMaxTileRows = 32;  // of any kernel

// One row of the table: a micro-kernel that multiplies tiles of m tokens with panels of n weight
// rows, k codes of the inner dimension at a time.
struct Kernel {
  const char* name;     // matmul_a<bits>_<weights>_<m>x<n>x<k>_<isa>
  const char* isa;      // name of its Isa
  int activation_bits;  // widest activation codes that it can read; 8 reads 4-bit codes as well
  WeightForm weights;
  int m, n, k;
  int zero;  // weights are held as code + zero
  ActivationForm form;
  void (*run)(const MatmulCall& call);
};

// One instruction set: what the CPU must have, and the function that is not a product.
struct Isa {
  const char* name;
  uint32_t features;  // mask of squat::CpuFeature that the CPU must have
  void (*quantize)(const float* x, int n, float inverse_step, int low, int high, int8_t* codes);
};

const std::vector<Kernel>& table();     // every kernel compiled into this library
const std::vector<Isa>& isas();         // every ISA compiled into this library, the best one last
bool runs_here(const Isa& isa);         // whether this CPU and operating system can run it
const Isa* find_isa(const char* name);  // nullptr if it is not compiled in

// The kernels that an engine uses. A plain value: copy it, share it between threads.
struct Choice {
  const Isa* isa = nullptr;
  // [activations 8 | 4][WeightForm]. Both rows of a column read the same weight layout; where
  // one kernel is the best for both activation widths, they are the same kernel.
  const Kernel* kernel[2][3] = {};
  bool pinned = false;

  const Kernel& matmul(int activation_bits, WeightForm weights) const {
    return *kernel[activation_bits == 4][static_cast<int>(weights)];
  }
};

// The best ISA that this CPU runs, or the one called `pin` (the value of SQUAT_ISA; nullptr or ""
// leaves it open). Returns false and a one-line message if the name is unknown or the CPU lacks it.
bool choose(const char* pin, Choice* choice, std::string* error);

// A choice that uses `kernel` for every product of its weights: for tests and benchmarks. With
// a 4-bit-activation kernel such products must be given 4-bit rows only.
Choice choice_of(const Kernel& kernel);

// Which kernel computes a product and why, in one sentence, for people.
std::string explain(const Choice& choice, int activation_bits, WeightForm weights);

// ---------------------------------------------------------------------------------------------
// The right-hand side

// A matrix of N x K codes in the layout of a kernel; a view of memory that the caller owns and has
// zeroed before the first code is written. Groups of k codes of n rows stand side by side:
// [n/kernel.n panels][K/k groups][n][k], so that one vector load feeds n rows; in 4-bit matrices
// a byte holds the code of an even group in its low nibble and of the next group in its high one.
struct PackedMatrix {
  const Kernel* layout = nullptr;
  int rows = 0;             // N
  int inner = 0;            // K
  size_t panel_stride = 0;  // bytes from a panel to the next
  uint8_t* data = nullptr;
  const int8_t* levels = nullptr;  // of WeightForm::t4: sixteen, which outlive the matrix
};

size_t packed_bytes(const Choice& choice, WeightForm weights, int rows, int inner);
PackedMatrix packed_matrix(const Choice& choice, WeightForm weights, int rows, int inner,
                           uint8_t* data, const int8_t* levels = nullptr);

// Writes one row of `inner` codes, or one column of `rows` codes. Rows of different panels (row /
// layout->n) may be written by different threads.
void pack_row(const PackedMatrix& matrix, int row, const int8_t* codes);
void pack_column(const PackedMatrix& matrix, int column, const int8_t* codes);

// The keys of one head and one width, in order of position: token t is row t.
struct KeyPool {
  PackedMatrix matrix;  // rows = tokens appended so far

  static size_t bytes(const Choice& choice, WeightForm form, int head_dim, int capacity);
  // An empty pool in zeroed memory of bytes(...).
  static KeyPool empty(const Choice& choice, WeightForm form, int head_dim, uint8_t* data,
                       const int8_t* levels = nullptr);

  int count() const { return matrix.rows; }
  WeightForm form() const { return matrix.layout->weights; }
  // The bytes that a product reads and the next token's codes are written to, and a request for the
  // share from begin / of to end / of of them, to be in the second-level cache soon.
  size_t used_bytes() const;
  void prefetch(int begin, int end, int of) const;
  // `tokens` times head_dim codes, one after the other; the caller knows the capacity.
  void append(const int8_t* codes, int tokens = 1);
  void read(int token, int8_t* codes) const;         // what was appended: head_dim codes
  void truncate(int count) { matrix.rows = count; }  // keeps the first `count` tokens
  void drop(int tokens);                             // forgets the first `tokens`
  // Narrows this view, which nothing must be appended to then, to the panels from token `first` on;
  // returns how many tokens are left out.
  int skip_panels(int first);
};

// The values of one head and one width, in order of position: token t is column t. Panels have room
// for the whole capacity, so that decoding reads each from end to end. The buffer
// starts with the sum of the codes (or levels) of each column of the head (int32 x head_dim), by
// which a product with unsigned probabilities is corrected.
struct ValuePool {
  PackedMatrix matrix;  // inner = tokens appended so far; data = buffer + sums_bytes(head_dim)

  static size_t bytes(const Choice& choice, WeightForm form, int head_dim, int capacity);
  static ValuePool empty(const Choice& choice, WeightForm form, int head_dim, int capacity,
                         uint8_t* data, const int8_t* levels = nullptr);
  static size_t sums_bytes(int head_dim);

  int count() const { return matrix.inner; }
  WeightForm form() const { return matrix.layout->weights; }
  size_t used_bytes() const;  // like a KeyPool's
  void prefetch(int begin, int end, int of) const;
  int32_t* sums() const;
  void append(const int8_t* codes, int tokens = 1);
  void read(int token, int8_t* codes) const;  // like a KeyPool's
  void truncate(int count);
  void drop(int tokens, int8_t* buffer);  // with room for head_dim codes

 private:
  size_t panel_bytes() const;  // of a panel's used bytes
};

// ---------------------------------------------------------------------------------------------
// The left-hand side

// M rows of activation codes, one byte each, as quantize() writes them.
struct ActivationRows {
  const int8_t* codes = nullptr;
  size_t stride = 0;              // bytes from a row to the next
  int rows = 0;                   // M
  int inner = 0;                  // K
  const uint8_t* bits = nullptr;  // width of every row, 8 or 4; nullptr: 8 for all
  const float* steps = nullptr;   // step of every row; nullptr: only for exact results
};

// M rows of unsigned probabilities for one ValuePool: `inner` is the pool's count, and a token that
// a row must not see (or that is not yet there for it) has probability 0. For more than kMaxInner
// tokens a row's codes add up to less than 2^24.
struct ProbabilityRows {
  const uint8_t* codes = nullptr;
  size_t stride = 0;
  int rows = 0;
  int inner = 0;
};

// Rows grouped by kernel and interleaved for it; a view of the caller's buffer.
struct Prepared {
  struct Group {
    const Kernel* kernel = nullptr;
    int begin = 0, end = 0;         // packed rows
    const uint8_t* data = nullptr;  // tiles of kernel->m rows
  };
  int rows = 0;
  int inner = 0;
  WeightForm weights = WeightForm::w8;
  Group group[2];                  // empty groups are never run
  const int32_t* order = nullptr;  // token of a packed row
  const int32_t* sums = nullptr;   // sum of a packed row's codes
  const float* steps = nullptr;    // step of a packed row, if the rows have any
};

// Bytes that prepare() needs for any widths of rows and weights.
size_t prepared_bytes(const Choice& choice, int rows, int inner);

// For products with matrices of these weights. Fills `buffer` (at least prepared_bytes, aligned to
// kAlignment), which must stay as long as the result is used. With a thread pool the work is split.
Prepared prepare(const Choice& choice, WeightForm weights, const ActivationRows& rows, void* buffer,
                 ThreadPool* threads = nullptr);

// ---------------------------------------------------------------------------------------------
// Products

// Where results go: M x N, row i = token i. Either int32 accumulators or scaled floats. They may be
// added to what is there (a residual stream; another piece of a sum, modulo 2^32).
struct Output {
  int32_t* accumulators = nullptr;
  float* values = nullptr;
  size_t stride = 0;             // elements from a row to the next
  const float* steps = nullptr;  // N, of the weights' rows; for values
  const float* bias = nullptr;   // N, or nullptr
  bool add = false;

  static Output exact(int32_t* accumulators, size_t stride) {
    Output out;
    out.accumulators = accumulators;
    out.stride = stride;
    return out;
  }
  static Output scaled(float* values, size_t stride, const float* steps,
                       const float* bias = nullptr) {
    Output out;
    out.values = values;
    out.stride = stride;
    out.steps = steps;
    out.bias = bias;
    return out;
  }
};

struct Product {
  const PackedMatrix* weights;
  Output out;
};

// Something small to do along with a product, in as many parts as the product has panels: run()
// is called before each of them, by the thread that computes the panel.
struct Aside {
  void (*run)(const void* what, int part, int parts);
  const void* what;

  // what(part, parts); the object must outlive the product.
  template <class What>
  static Aside of(const What& what) {
    return {[](const void* self, int part, int parts) {
              (*static_cast<const What*>(self))(part, parts);
            },
            &what};
  }
};

// Products of the same prepared rows with `count` matrices, all of the rows' weights and inner.
void matmul(const Prepared& rows, const Product* products, int count, ThreadPool* threads = nullptr,
            const Aside* aside = nullptr);

inline void matmul(const Prepared& rows, const PackedMatrix& weights, const Output& out,
                   ThreadPool* threads = nullptr) {
  const Product product{&weights, out};
  matmul(rows, &product, 1, threads);
}

// A share of a product's columns: whole panels, as near as can be to index / of .. (index + 1) / of
// of them. All shares together are the product.
struct Part {
  int index = 0, of = 1;
};
struct Columns {
  int begin, end;
};

// scores[i][t] = query row i . key t, int32, for the tokens of a part of the pool.
void scores(const Prepared& queries, const KeyPool& keys, int32_t* out, size_t stride,
            Part part = {});

// out[i][c] = sum over the pool's tokens of probability[i][t] * value[t][c], int32, for the columns
// of a part of the head, which it returns. `buffer` is one for prepare(), of prepared_bytes(choice,
// rows.rows, rows.inner).
Columns weighted_values(const Choice& choice, const ProbabilityRows& rows, const ValuePool& values,
                        void* buffer, int32_t* out, size_t stride, Part part = {});

// ---------------------------------------------------------------------------------------------
// Quantization (docs/format.md, "Numbers")

// codes[i] = clamp(rint(x[i] * (1.0f / step)), low, high) for signed codes of 4 or 8 bits, ties to
// even, the same on every ISA. NaN becomes 0, an infinity the end of the range.
void quantize(const Choice& choice, const float* x, int n, float step, int bits, int8_t* codes);

}  // namespace squat::kernels
