#include "unicode.h"

#include <algorithm>
#include <cstdint>
#include <iterator>

namespace squat {

namespace {

struct CodeRange {
  uint32_t first, last;
};

struct ClassRange {
  uint32_t first, last, combining_class;
};

struct Decomposition {
  uint32_t code;
  uint32_t begin;
};

struct Composition {
  uint32_t first, second, composed;
};

struct LowerCase {
  uint32_t code;
  uint32_t first, second;  // second: 0 if there is none
};

#include "unicode_tables.inc"

constexpr char32_t kReplacement = 0xfffd;

// Hangul syllables are composed by arithmetic (Unicode Standard, section 3.12).
constexpr char32_t kSyllableBase = 0xac00, kLeadBase = 0x1100, kVowelBase = 0x1161,
                   kTrailBase = 0x11a7;
constexpr char32_t kLeads = 19, kVowels = 21, kTrails = 28;

// The range that holds `code`, or null; ranges are sorted and disjoint.
template <typename Range, size_t n>
const Range* find_range(const Range (&table)[n], char32_t code) {
  const Range* found =
      std::lower_bound(std::begin(table), std::end(table), code,
                       [](const Range& range, char32_t value) { return range.last < value; });
  return found != std::end(table) && found->first <= code ? found : nullptr;
}

uint32_t combining_class(char32_t code) {
  const ClassRange* range =
      code < kCombiningClasses[0].first ? nullptr : find_range(kCombiningClasses, code);
  return range == nullptr ? 0 : range->combining_class;
}

// One of the two sorts of full decompositions.
struct Decompositions {
  const Decomposition *begin, *end;
  const uint16_t* units;
};

constexpr Decompositions kCanonical = {std::begin(kCanonicalDecompositions),
                                       std::end(kCanonicalDecompositions), kCanonicalUnits};
constexpr Decompositions kCompatibility = {std::begin(kCompatibilityDecompositions),
                                           std::end(kCompatibilityDecompositions),
                                           kCompatibilityUnits};

void decompose(char32_t code, const Decompositions& table, std::u32string* out) {
  if (code >= kSyllableBase && code < kSyllableBase + kLeads * kVowels * kTrails) {
    const char32_t syllable = code - kSyllableBase;
    out->push_back(kLeadBase + syllable / (kVowels * kTrails));
    out->push_back(kVowelBase + syllable / kTrails % kVowels);
    if (syllable % kTrails != 0) out->push_back(kTrailBase + syllable % kTrails);
    return;
  }
  const Decomposition* found = std::lower_bound(
      table.begin, table.end, code,
      [](const Decomposition& entry, char32_t value) { return entry.code < value; });
  if (found->code != code) {  // the table ends with an entry greater than every code point
    out->push_back(code);
    return;
  }
  for (uint32_t i = found[0].begin; i < found[1].begin; i++) {
    const char32_t unit = table.units[i];
    if (unit >= 0xd800 && unit < 0xdc00) {
      const char32_t low = table.units[++i];
      out->push_back(0x10000 + ((unit - 0xd800) << 10) + (low - 0xdc00));
    } else {
      out->push_back(unit);
    }
  }
}

// The primary composite of two characters, or 0.
char32_t composite(char32_t first, char32_t second) {
  if (first >= kLeadBase && first < kLeadBase + kLeads && second >= kVowelBase &&
      second < kVowelBase + kVowels) {
    return kSyllableBase + ((first - kLeadBase) * kVowels + (second - kVowelBase)) * kTrails;
  }
  if (first >= kSyllableBase && first < kSyllableBase + kLeads * kVowels * kTrails &&
      (first - kSyllableBase) % kTrails == 0 && second > kTrailBase &&
      second < kTrailBase + kTrails) {
    return first + (second - kTrailBase);
  }
  const Composition* found = std::lower_bound(
      std::begin(kCompositions), std::end(kCompositions), Composition{first, second, 0},
      [](const Composition& a, const Composition& b) {
        return a.first < b.first || (a.first == b.first && a.second < b.second);
      });
  const bool equal =
      found != std::end(kCompositions) && found->first == first && found->second == second;
  return equal ? found->composed : 0;
}

// Decomposed, put into canonical order, and composed.
std::u32string compose(const std::u32string& text, const Decompositions& decompositions) {
  std::u32string out;
  out.reserve(text.size());
  for (const char32_t code : text) decompose(code, decompositions, &out);

  // Canonical order: each run of combining marks sorted by class, equal classes in place.
  for (auto run = out.begin(); run != out.end();) {
    if (combining_class(*run) == 0) {
      ++run;
      continue;
    }
    auto end = run + 1;
    while (end != out.end() && combining_class(*end) != 0) ++end;
    std::stable_sort(
        run, end, [](char32_t a, char32_t b) { return combining_class(a) < combining_class(b); });
    run = end;
  }

  // Composition: a character joins the last starter unless one of no lower class stands between.
  size_t kept = 0;
  size_t starter = SIZE_MAX;
  uint32_t last_class = 0;
  for (const char32_t code : out) {
    const uint32_t current = combining_class(code);
    const bool adjacent = starter != SIZE_MAX && starter + 1 == kept;
    if (starter != SIZE_MAX && (adjacent || last_class < current)) {
      if (const char32_t composed = composite(out[starter], code); composed != 0) {
        out[starter] = composed;
        continue;
      }
    }
    if (current == 0) starter = kept;
    last_class = current;
    out[kept++] = code;
  }
  out.resize(kept);
  return out;
}

}  // namespace

std::u32string decode_utf8(std::string_view text) {
  std::u32string out;
  out.reserve(text.size());
  for (size_t i = 0; i < text.size();) {
    const uint8_t lead = static_cast<uint8_t>(text[i]);
    const size_t length = lead < 0x80   ? 1
                          : lead < 0xc2 ? 0
                          : lead < 0xe0 ? 2
                          : lead < 0xf0 ? 3
                          : lead < 0xf5 ? 4
                                        : 0;
    char32_t code = length == 1 ? lead : lead & (0x7f >> length);
    size_t read = 1;
    while (read < length && i + read < text.size()) {
      const uint8_t byte = static_cast<uint8_t>(text[i + read]);
      // The second byte's range excludes overlong forms, surrogates and values past U+10FFFF.
      const uint8_t low = read > 1 ? 0x80 : lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
      const uint8_t high = read > 1 ? 0xbf : lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
      if (byte < low || byte > high) break;
      code = (code << 6) | (byte & 0x3f);
      read++;
    }
    out.push_back(length != 0 && read == length ? code : kReplacement);
    i += read;
  }
  return out;
}

void append_utf8(char32_t code, std::string* out) {
  if (code < 0x80) {
    out->push_back(static_cast<char>(code));
    return;
  }
  const int extra = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
  out->push_back(static_cast<char>((0xff00 >> (extra + 1)) | (code >> (6 * extra))));
  for (int i = extra - 1; i >= 0; i--) {
    out->push_back(static_cast<char>(0x80 | ((code >> (6 * i)) & 0x3f)));
  }
}

std::string encode_utf8(std::u32string_view text) {
  std::string out;
  out.reserve(text.size());
  for (const char32_t code : text) append_utf8(code, &out);
  return out;
}

bool is_letter(char32_t code) { return find_range(kLetters, code) != nullptr; }

bool is_number(char32_t code) { return find_range(kNumbers, code) != nullptr; }

bool is_numeral(char32_t code) { return find_range(kNumerals, code) != nullptr; }

bool is_word_character(char32_t code) { return find_range(kWordCharacters, code) != nullptr; }

bool is_space(char32_t code) {
  return (code >= 0x09 && code <= 0x0d) || code == 0x20 || code == 0x85 || code == 0xa0 ||
         code == 0x1680 || (code >= 0x2000 && code <= 0x200a) || code == 0x2028 || code == 0x2029 ||
         code == 0x202f || code == 0x205f || code == 0x3000;
}

std::u32string lower_case(const std::u32string& text) {
  std::u32string out;
  out.reserve(text.size());
  for (const char32_t code : text) {
    const LowerCase* found =
        std::lower_bound(std::begin(kLowerCase), std::end(kLowerCase), code,
                         [](const LowerCase& entry, char32_t value) { return entry.code < value; });
    const bool changes = found != std::end(kLowerCase) && found->code == code;
    out.push_back(changes ? found->first : code);
    if (changes && found->second != 0) out.push_back(found->second);
  }
  return out;
}

std::u32string nfc(const std::u32string& text) { return compose(text, kCanonical); }

std::u32string nfkc(const std::u32string& text) { return compose(text, kCompatibility); }

}  // namespace squat
