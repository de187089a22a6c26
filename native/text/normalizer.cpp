#include "normalizer.h"

#include "base/error.h"
#include "unicode.h"

namespace squat {

namespace {

struct Name {
  std::string_view text;
  Normalizer::Kind kind;
  size_t arguments;
};

constexpr Name kNames[] = {
    {"nfc", Normalizer::Kind::kNfc, 0},
    {"nfkc", Normalizer::Kind::kNfkc, 0},
    {"lowercase", Normalizer::Kind::kLowerCase, 0},
    {"prepend", Normalizer::Kind::kPrepend, 1},
    {"replace", Normalizer::Kind::kReplace, 2},
};

const Name* find_name(std::string_view text) {
  for (const Name& name : kNames) {
    if (name.text == text) return &name;
  }
  return nullptr;
}

std::u32string replace(const std::u32string& text, const std::u32string& what,
                       const std::u32string& by) {
  std::u32string out;
  out.reserve(text.size());
  size_t begin = 0;
  for (size_t found; (found = text.find(what, begin)) != std::u32string::npos;
       begin = found + what.size()) {
    out.append(text, begin, found - begin).append(by);
  }
  return out.append(text, begin);
}

}  // namespace

bool Normalizer::parse(const std::vector<std::string_view>& words, Normalizer* normalizer) {
  for (size_t i = 0; i < words.size();) {
    const Name* name = find_name(words[i++]);
    if (name == nullptr || name->arguments > words.size() - i) return false;
    std::u32string arguments[2];
    for (size_t k = 0; k < name->arguments; k++) {
      arguments[k] = decode_utf8(words[i++]);
      if (arguments[k].size() > kMost) return false;
    }
    if (name->arguments > 0 && arguments[0].empty()) return false;  // nothing to find or to put
    normalizer->add(name->kind, std::move(arguments[0]), std::move(arguments[1]));
  }
  return true;
}

std::u32string Normalizer::operator()(std::u32string_view text) const {
  std::u32string out(text);
  const size_t most = kMost * (text.size() + kMost);
  for (const Step& step : steps_) {
    if (out.size() > most) {
      throw Error(SQUAT_ERROR_FORMAT, "key 'squat.tokenizer.normalizers' makes a text of " +
                                          std::to_string(text.size()) + " characters longer than " +
                                          std::to_string(most));
    }
    switch (step.kind) {
      case Kind::kNfc:
        out = nfc(out);
        break;
      case Kind::kNfkc:
        out = nfkc(out);
        break;
      case Kind::kLowerCase:
        out = lower_case(out);
        break;
      case Kind::kPrepend:
        if (!out.empty()) out.insert(0, step.first);
        break;
      case Kind::kReplace:
        out = replace(out, step.first, step.second);
        break;
    }
  }
  return out;
}

}  // namespace squat
