// Unicode and the tokenizers on cases worked out by hand. That the results equal those of Hugging
// Face tokenizers on any text is tested from Python (tests/test_tokenizer.py).
#include <cstdio>
#include <numeric>
#include <string>
#include <vector>

#include "api/engine.h"
#include "base/error.h"
#include "check.h"
#include "model_file.h"
#include "text/tokenizer.h"
#include "text/unicode.h"

namespace {

using squat::Gguf;
using squat::Tokenizer;
using squat::test::GgufBuilder;
using squat::test::tiny_model;

void test_utf8() {
  CHECK(squat::decode_utf8("a\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80") == U"a\u00e9\u20ac\U0001f600");
  // Ill-formed: a stray continuation, overlong forms, a surrogate, past U+10FFFF, cut short.
  CHECK(squat::decode_utf8("\x80z") == U"\ufffdz");
  CHECK(squat::decode_utf8("\xc0\xaf") == U"\ufffd\ufffd");
  CHECK(squat::decode_utf8("\xe0\x80\x80") == U"\ufffd\ufffd\ufffd");
  CHECK(squat::decode_utf8("\xed\xa0\x80") == U"\ufffd\ufffd\ufffd");
  CHECK(squat::decode_utf8("\xf4\x90\x80\x80") == U"\ufffd\ufffd\ufffd\ufffd");
  CHECK(squat::decode_utf8("\xf0\x9f\x98") == U"\ufffd");
  CHECK(squat::decode_utf8("\xe2\x82q") == U"\ufffdq");
  for (char32_t code = 0; code < 0x110000; code += code < 0x3000 ? 1 : 37) {
    if (code >= 0xd800 && code < 0xe000) continue;
    std::string text;
    squat::append_utf8(code, &text);
    if (!CHECK(squat::decode_utf8(text) == std::u32string(1, code))) break;
  }
}

void test_nfkc() {
  CHECK(squat::nfkc(U"") == U"");
  CHECK(squat::nfkc(U"plain") == U"plain");
  CHECK(squat::nfkc(U"e\u0301") == U"\u00e9");
  CHECK(squat::nfkc(U"\ufb01\u2460\u00bd") == U"fi11\u20442");
  CHECK(squat::nfkc(U"\u212b\u00c5") == U"\u00c5\u00c5");
  // Marks are ordered by class before they are composed; equal classes block.
  CHECK(squat::nfkc(U"q\u0307\u0323") == U"q\u0323\u0307");
  CHECK(squat::nfkc(U"e\u0327\u0301") == U"\u0229\u0301");
  CHECK(squat::nfkc(U"\u1e9b\u0323") == U"\u1e69");
  CHECK(squat::nfkc(U"\u1100\u1161\u11a8") == U"\uac01");
  CHECK(squat::nfkc(U"\uac00\u11a8") == U"\uac01");
  CHECK(squat::nfkc(U"\u0301a") == U"\u0301a");
  CHECK(squat::nfkc(U"\U0001d54f") == U"X");
}

void test_nfc_and_lower_case() {
  CHECK(squat::nfc(U"e\u0301\ufb01\u00bd") == U"\u00e9\ufb01\u00bd");  // compatibility stays
  CHECK(squat::nfc(U"\u212b") == U"\u00c5");
  CHECK(squat::nfc(U"\u1100\u1161\u11a8") == U"\uac01");
  CHECK(squat::lower_case(U"A\u00c9\u03a3\u0130\U00010400") == U"a\u00e9\u03c3i\u0307\U00010428");
}

std::vector<std::u32string> split(const char* pre, const std::u32string& text) {
  std::vector<std::u32string> out;
  squat::find_pre_tokenizer(pre)->split(
      text, [&](std::u32string_view piece) { out.emplace_back(piece); });
  return out;
}

void test_splits() {
  using Pieces = std::vector<std::u32string>;
  const std::u32string text = U"I'LL  pay\t12345x!\r\n\n ok";
  CHECK(split("gpt-2", text) ==
        (Pieces{U"I", U"'", U"LL", U" ", U" pay", U"\t", U"12345", U"x", U"!", U"\r\n\n", U" ok"}));
  CHECK(split("smollm", U" a12 3") == (Pieces{U" a", U"1", U"2", U" ", U"3"}));
  CHECK(split("llama-bpe", text) ==
        (Pieces{U"I", U"'LL", U" ", U" pay", U"\t", U"123", U"45", U"x", U"!\r\n\n", U" ok"}));
  CHECK(split("qwen2", U" 12\n \n  x\u00a0(y)") ==
        (Pieces{U" ", U"1", U"2", U"\n \n", U" ", U" x", U"\u00a0", U"(y", U")"}));
  CHECK(split("qwen2", U"  ") == Pieces{U"  "});
  CHECK(split("llama-bpe", U"").empty());
  CHECK(squat::find_pre_tokenizer("GPT-2") == nullptr);
}

void test_added_tokens() {
  squat::AddedTokens tokens;
  tokens.add(U"<a>", {1});
  tokens.add(U"<a>b", {2});
  tokens.add(U"word", {3, true});
  tokens.add(U"<l>", {4, false, true});
  tokens.add(U"<r>", {5, false, false, true});
  const auto ids = [&tokens](const std::u32string& text) {
    std::string out;
    for (const squat::AddedTokens::Part& part : tokens.split(text)) {
      const std::u32string_view view(text);
      const std::string inside = squat::encode_utf8(view.substr(part.begin, part.end - part.begin));
      out += part.id < 0 ? inside : "[" + std::to_string(part.id) + "]";
    }
    return out;
  };
  CHECK(ids(U"x<a>b<a>c") == "x[2][1]c");  // the longest
  CHECK(ids(U"word words _word (word)") == "[3] words _word ([3])");
  CHECK(ids(U"x  <l>  y") == "x[4]  y");
  CHECK(ids(U"x  <r>  y") == "x  [5]y");
  CHECK(ids(U"<r>  <l>") == "[5][4]");
  CHECK(ids(U"").empty());
}

// Token ids joined, so that a result reads like the text.
std::string pieces(const Tokenizer& tokenizer, const std::string& text) {
  std::string out;
  for (const int32_t id : tokenizer.encode(text)) {
    out += "[" + (id < 3 ? "#" + std::to_string(id) : std::string(tokenizer.piece(id))) + "]";
  }
  return out;
}

void test_byte_level() {
  const std::vector<uint8_t> bytes = tiny_model().bytes();
  const Gguf file(bytes.data(), bytes.size(), "model");
  const Tokenizer tokenizer(file, squat::test::kVocabulary);
  CHECK(tokenizer.encode("").empty());
  CHECK(pieces(tokenizer, "hello hello") == "[hello][ hello]");
  CHECK(pieces(tokenizer, "helloworld") == "[hello][w][or][l][d]");
  // Of a run of spaces the last one belongs to the word.
  CHECK(pieces(tokenizer, "a   hello") == "[a][  ][ hello]");
  CHECK(pieces(tokenizer, "a  ") == "[a][  ]");
  CHECK(pieces(tokenizer, "a\n hello") == "[a][\n][ hello]");
  CHECK(pieces(tokenizer, "a\n\nhello") == "[a][\n][\n][hello]");
  // Contractions, numbers and punctuation are pieces of their own.
  CHECK(pieces(tokenizer, "he's 'S") == "[he]['s][ ]['][S]");
  CHECK(pieces(tokenizer, "a199b") == "[a][19][9][b]");
  CHECK(pieces(tokenizer, "hell,hello") == "[hell][,][hello]");
  // NFKC composes the accent before the bytes are looked up.
  CHECK(pieces(tokenizer, "e\xcc\x81") == "[\xc3\xa9]");
  CHECK(pieces(tokenizer, "a<s>hello</s><s") == "[a][#1][hello][#2][<][s]");
  CHECK(pieces(tokenizer, "\xff") == "[\xef][\xbf][\xbd]");

  const std::string text = "hello world, it's 1999!\n";
  const std::vector<int32_t> ids = tokenizer.encode(text);
  CHECK(tokenizer.decode(ids.data(), ids.size()) == text);
  const std::vector<int32_t> special = {1, ids[0], 2};
  CHECK(tokenizer.decode(special.data(), special.size()) == "hello");
}

void test_prefix_and_digits() {
  GgufBuilder model = tiny_model();
  model.boolean("tokenizer.ggml.add_space_prefix", true);
  model.boolean("tokenizer.ggml.add_bos_token", true);
  std::vector<uint8_t> bytes = model.bytes();
  const Gguf prefixed(bytes.data(), bytes.size(), "model");
  const Tokenizer tokenizer(prefixed, squat::test::kVocabulary);
  CHECK(pieces(tokenizer, "hello") == "[#1][ hello]");
  CHECK(pieces(tokenizer, " hello") == "[#1][ hello]");
  CHECK(pieces(tokenizer, "") == "[#1]");

  model = tiny_model();
  model.string("tokenizer.ggml.pre", "smollm");
  bytes = model.bytes();
  const Gguf digits(bytes.data(), bytes.size(), "model");
  CHECK(pieces(Tokenizer(digits, squat::test::kVocabulary), "a 199 hello") ==
        "[a][ ][1][9][9][ hello]");
}

// What a file says of normalizers, added tokens and rows without a token.
void test_keys() {
  GgufBuilder model = tiny_model();
  model.string_array("squat.tokenizer.normalizers",
                     {"lowercase", "replace", "--", "9", "prepend", "a"});
  model.string("squat.tokenizer.prefix", "first");
  model.u32_array("squat.tokenizer.added_tokens", {1, 2});
  model.u32_array("squat.tokenizer.added_token_flags", {8, 6});
  std::vector<uint8_t> bytes = model.bytes();
  const Gguf file(bytes.data(), bytes.size(), "model");
  const Tokenizer tokenizer(file, squat::test::kVocabulary);
  CHECK(pieces(tokenizer, "--9HELLO") == "[ ][a][99][hello]");
  CHECK(pieces(tokenizer, "x </s> </s>") == "[ ][a][x][#2][#2]");
  // A normalized token stands in the normalized text: there it is "a<s>".
  CHECK(pieces(tokenizer, "<S>") == "[#1]");

  // Steps that make a text longer and longer.
  std::vector<std::string> steps;
  for (int i = 0; i < 40; i++) {
    for (const char* word : {"replace", "h", "hhhhhhhh"}) steps.push_back(word);
  }
  model.string_array("squat.tokenizer.normalizers", steps);
  bytes = model.bytes();
  const Gguf growing(bytes.data(), bytes.size(), "model");
  try {
    Tokenizer(growing, squat::test::kVocabulary).encode("hello");
    CHECK(false);
  } catch (const squat::Error& error) {
    CHECK(std::string(error.what()).find("of 5 characters longer than 4416") != std::string::npos);
  }
}

// SentencePiece's kind: characters, bytes for those that are missing, one piece for the whole text.
void test_sentencepiece() {
  const std::string space = "\xe2\x96\x81";
  std::vector<std::string> tokens = {"<unk>", "<s>", "</s>"};
  std::vector<int32_t> types = {2, 3, 3};
  for (int byte = 0; byte < 256; byte++) {
    char name[8];
    std::snprintf(name, sizeof name, "<0x%02X>", static_cast<unsigned>(byte));
    tokens.push_back(name);
    types.push_back(6);
  }
  for (const std::string& piece : {space, std::string("a"), std::string("b"), std::string("ab"),
                                   space + "ab", std::string("ba"), "b" + space}) {
    tokens.push_back(piece);
    types.push_back(1);
  }
  GgufBuilder model;
  model.u32("squat.format_version", 1);
  model.string("tokenizer.ggml.model", "llama");
  model.string_array("tokenizer.ggml.tokens", tokens);
  model.i32_array("tokenizer.ggml.token_type", types);
  model.string_array("tokenizer.ggml.merges", {"a b", space + " ab", "b a", "b " + space});
  model.boolean("tokenizer.ggml.add_space_prefix", true);
  model.u32("tokenizer.ggml.unknown_token_id", 0);
  std::vector<uint8_t> bytes = model.bytes();
  const Gguf file(bytes.data(), bytes.size(), "model");
  const Tokenizer tokenizer(file, static_cast<uint32_t>(tokens.size()));
  CHECK(pieces(tokenizer, "ab") == "[ ab]");
  CHECK(pieces(tokenizer, "bab b") == "[ ][b][ab][ ][b]");
  CHECK(pieces(tokenizer, "bb a") == "[ ][b][b ][a]");
  CHECK(pieces(tokenizer, "a\xc3\xa9") == "[ ][a][\xc3][\xa9]");
  const std::string text = "ab b\xc3\xa9";
  const std::vector<int32_t> ids = tokenizer.encode(text);
  CHECK(tokenizer.decode(ids.data(), ids.size()) == text);

  // Without byte tokens a run of unknown characters is one unknown token.
  for (size_t i = 3; i < 259; i++) tokens[i] = "unused" + std::to_string(i);
  model.string_array("tokenizer.ggml.tokens", tokens);
  bytes = model.bytes();
  const Gguf other(bytes.data(), bytes.size(), "model");
  CHECK(pieces(Tokenizer(other, static_cast<uint32_t>(tokens.size())), "axyb") == "[ ][a][#0][b]");
}

void test_unigram() {
  const std::string e = "\xc3\xa9";
  const squat::Unigram model({{"a", 1, -1.0}, {"b", 2, -1.5}, {"ab", 3, -2.0}, {"aba", 4, -4.0}},
                             0);
  const auto split = [&model](std::string_view text) {
    std::string out;
    for (const std::string_view piece : model.split(text)) out += "[" + std::string(piece) + "]";
    return out;
  };
  CHECK(split("ab") == "[ab]");
  CHECK(split("aba") == "[ab][a]");
  CHECK(split("ba" + e + e + "b") == "[b][a][" + e + e + "][b]");
  CHECK(split(e) == "[" + e + "]");
  CHECK(split("").empty());
}

// A text that is one long piece must not take quadratic time; this one would take minutes.
void test_long_piece() {
  const std::vector<uint8_t> bytes = tiny_model().bytes();
  const Gguf file(bytes.data(), bytes.size(), "model");
  const Tokenizer tokenizer(file, squat::test::kVocabulary);
  std::string text;
  for (int i = 0; i < 200000; i++) text += "hello";
  CHECK(tokenizer.encode(text).size() == 200000);
}

}  // namespace

int main() {
  test_utf8();
  test_nfkc();
  test_nfc_and_lower_case();
  test_splits();
  test_added_tokens();
  test_keys();
  test_byte_level();
  test_prefix_and_digits();
  test_sentencepiece();
  test_unigram();
  test_long_piece();
  return squat::test::report("test_tokenizer");
}
