// squat-run: generates text with a model file, on the command line and without Python. It uses the
// C interface only, so that it is also the example of how to.
#include <cerrno>
#include <chrono>
#include <cinttypes>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <string>
#include <vector>

#include "squat.h"

namespace {

constexpr int kExitUsage = 2;  // bad input of any kind

const char kHelp[] =
    "usage: squat-run MODEL.gguf -p TEXT [options]\n"
    "       squat-run MODEL.gguf --chat TEXT [options]\n"
    "\n"
    "Continues TEXT, or answers it, with a model that `squat export` wrote.\n"
    "\n"
    "  -p, --prompt TEXT          the text to continue; '-' reads it from standard input\n"
    "      --chat TEXT            the message to answer; '-' reads it from standard input\n"
    "      --system TEXT          what the model is told before the message\n"
    "  -n, --tokens N             the most tokens to generate (default 64)\n"
    "  -t, --threads N            threads that compute (default 0: one for each usable CPU)\n"
    "  -c, --context N            tokens of prompt and answer together (default 0: the model's "
    "limit)\n"
    "      --temperature X        0 is greedy (default 0)\n"
    "      --top-k N              keep the N most probable tokens (default 0: all)\n"
    "      --top-p X              keep the fewest tokens that reach probability X (default 1: "
    "all)\n"
    "      --min-p X              drop tokens below X times the most probable (default 0: none)\n"
    "      --repetition-penalty X above 1 discourages tokens that were there (default 1)\n"
    "      --seed N               equal seeds give equal text (default 0)\n"
    "      --stats                print memory, times, kernels and a hash of the last logits to\n"
    "                             standard error\n"
    "      --version              print the version\n"
    "  -h, --help                 print this\n"
    "\n"
    "SQUAT_ISA pins the instruction set. Text goes to standard output as it comes, everything "
    "else\n"
    "to standard error. Exit status 2: bad input.\n";

[[noreturn]] void die(const std::string& message) {
  std::fprintf(stderr, "squat-run: %s\n", message.c_str());
  std::exit(kExitUsage);
}

void check(squat_status status) {
  if (status != SQUAT_OK && status != SQUAT_STOPPED) die(squat_last_error());
}

struct Options {
  const char* model = nullptr;
  const char* prompt = nullptr;
  const char* chat = nullptr;
  const char* system = nullptr;
  uint64_t tokens = 64;
  uint64_t threads = 0;
  uint64_t context = 0;
  squat_sampling sampling = squat_sampling_default();
  bool stats = false;
};

uint64_t parse_integer(const char* name, const char* text, uint64_t most) {
  char* end = nullptr;
  errno = 0;
  const unsigned long long value = std::strtoull(text, &end, 10);
  if (*text < '0' || *text > '9' || *end != '\0' || errno != 0 || value > most) {
    die(std::string(name) + ": '" + text + "' is no integer from 0 to " + std::to_string(most));
  }
  return value;
}

float parse_number(const char* name, const char* text) {
  char* end = nullptr;
  const float value = std::strtof(text, &end);
  if (end == text || *end != '\0' || !std::isfinite(value)) {
    die(std::string(name) + ": '" + text + "' is no number");
  }
  return value;
}

Options parse(int argc, char** argv) {
  Options o;
  for (int i = 1; i < argc; i++) {
    const char* name = argv[i];
    const auto is = [name](const char* brief, const char* full) {
      return (brief != nullptr && std::strcmp(name, brief) == 0) || std::strcmp(name, full) == 0;
    };
    const auto value = [&] {
      if (++i == argc) die(std::string(name) + ": needs a value; see squat-run --help");
      return argv[i];
    };
    if (is("-h", "--help")) {
      std::fputs(kHelp, stdout);
      std::exit(0);
    } else if (is(nullptr, "--version")) {
      std::printf("squat-run %s\n", squat_version());
      std::exit(0);
    } else if (is("-p", "--prompt")) {
      o.prompt = value();
    } else if (is(nullptr, "--chat")) {
      o.chat = value();
    } else if (is(nullptr, "--system")) {
      o.system = value();
    } else if (is("-n", "--tokens")) {
      o.tokens = parse_integer(name, value(), UINT32_MAX);
    } else if (is("-t", "--threads")) {
      o.threads = parse_integer(name, value(), UINT32_MAX);
    } else if (is("-c", "--context")) {
      o.context = parse_integer(name, value(), UINT32_MAX);
    } else if (is(nullptr, "--temperature")) {
      o.sampling.temperature = parse_number(name, value());
    } else if (is(nullptr, "--top-k")) {
      o.sampling.top_k = static_cast<uint32_t>(parse_integer(name, value(), UINT32_MAX));
    } else if (is(nullptr, "--top-p")) {
      o.sampling.top_p = parse_number(name, value());
    } else if (is(nullptr, "--min-p")) {
      o.sampling.min_p = parse_number(name, value());
    } else if (is(nullptr, "--repetition-penalty")) {
      o.sampling.repetition_penalty = parse_number(name, value());
    } else if (is(nullptr, "--seed")) {
      o.sampling.seed = parse_integer(name, value(), UINT64_MAX);
    } else if (is(nullptr, "--stats")) {
      o.stats = true;
    } else if (name[0] == '-' && name[1] != '\0') {
      die(std::string(name) + ": unknown option; see squat-run --help");
    } else if (o.model != nullptr) {
      die(std::string(name) + ": a second model; quote a prompt of several words");
    } else {
      o.model = name;
    }
  }
  if (o.model == nullptr) die("no model given; see squat-run --help");
  if (o.prompt == nullptr && o.chat == nullptr) die("no prompt given; see squat-run --help");
  if (o.prompt != nullptr && o.chat != nullptr) die("--chat: there is a prompt, too; give one");
  if (o.system != nullptr && o.chat == nullptr) die("--system: goes with --chat");
  return o;
}

std::string read_input() {
  std::string text;
  char buffer[4096];
  for (size_t n; (n = std::fread(buffer, 1, sizeof buffer, stdin)) > 0;) text.append(buffer, n);
  return text;
}

std::string text_of(const char* argument) {
  return std::strcmp(argument, "-") == 0 ? read_input() : argument;
}

// What follows makes a prompt of a message, from the pieces of a template that squat export found
// (docs/format.md).

bool has_string(squat_engine* engine, const char* key, std::string* text) {
  const char* data = nullptr;
  size_t size = 0;
  if (squat_get_string(engine, key, &data, &size) != SQUAT_OK) return false;
  text->assign(data, size);
  return true;
}

// Without white space, Unicode's, at both ends: what templates mean by `trim`.
std::string trimmed(std::string text) {
  static const char* const kSpaces[] = {"\t",     "\n",     "\v",     "\f",     "\r",     "\x1c",
                                        "\x1d",   "\x1e",   "\x1f",   " ",      "\u0085", "\u00a0",
                                        "\u1680", "\u2000", "\u2001", "\u2002", "\u2003", "\u2004",
                                        "\u2005", "\u2006", "\u2007", "\u2008", "\u2009", "\u200a",
                                        "\u2028", "\u2029", "\u202f", "\u205f", "\u3000"};
  for (bool found = true; found;) {
    found = false;
    for (const char* space : kSpaces) {
      const size_t size = std::strlen(space);
      if (text.size() < size) continue;
      if (text.compare(0, size, space) == 0) {
        text.erase(0, size);
        found = true;
      } else if (text.compare(text.size() - size, size, space) == 0) {
        text.resize(text.size() - size);
        found = true;
      }
    }
  }
  return text;
}

// Where a template writes the date, the file has a form for strftime between U+E000 and U+E001.
std::string with_date(std::string text) {
  const std::string open = "\ue000", close = "\ue001";
  const std::time_t now = std::time(nullptr);
  for (size_t begin; (begin = text.find(open)) != std::string::npos;) {
    const size_t end = text.find(close, begin);
    if (end == std::string::npos) break;
    const std::string form = text.substr(begin + open.size(), end - begin - open.size());
    char date[256];
    const size_t size = std::strftime(date, sizeof date, form.c_str(), std::localtime(&now));
    text.replace(begin, end + close.size() - begin, date, size);
  }
  return text;
}

std::string chat_prompt(squat_engine* engine, const Options& options) {
  const std::string file = options.model;
  std::string begin, end, trim, ignored;
  if (!has_string(engine, "squat.chat.begin", &begin) ||
      !has_string(engine, "squat.chat.end", &end) ||
      !has_string(engine, "squat.chat.trim", &trim)) {
    if (!has_string(engine, "tokenizer.chat_template", &ignored)) {
      die("--chat: " + file + " has no chat template; use -p");
    }
    die("--chat: the chat template of " + file +
        " is not of a kind that squat-run renders (such as ChatML, Llama 3, Gemma, Zephyr), or the "
        "file was exported by an earlier version; export it again, or use squat chat");
  }
  std::string message = text_of(options.chat);
  if (trim.find("user") != std::string::npos) message = trimmed(message);
  if (options.system == nullptr) return with_date(begin) + message + with_date(end);
  std::string system_begin, system_end, told = options.system;
  if (!has_string(engine, "squat.chat.system_begin", &system_begin) ||
      !has_string(engine, "squat.chat.system_end", &system_end)) {
    die("--system: the chat template of " + file +
        " has no place for it that squat-run knows; put it into the message");
  }
  if (trim.find("system") != std::string::npos) told = trimmed(told);
  return with_date(system_begin) + told + with_date(system_end) + message + with_date(end);
}

std::vector<int32_t> tokens_of(squat_engine* engine, const std::string& text) {
  size_t n = 0;
  std::vector<int32_t> tokens(4 * text.size() + 2);
  squat_status status =
      squat_tokenize(engine, text.data(), text.size(), tokens.data(), tokens.size(), &n);
  if (status == SQUAT_ERROR_ARGUMENT && n > tokens.size()) {
    tokens.resize(n);
    status = squat_tokenize(engine, text.data(), text.size(), tokens.data(), n, &n);
  }
  check(status);
  tokens.resize(n);
  return tokens;
}

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

volatile std::sig_atomic_t interrupted = 0;

struct Progress {
  squat_engine* engine;  // null: nobody asks what decoding costs
  std::vector<int32_t> tokens;
  Clock::time_point first;  // when the first token came: the prompt is evaluated
};

int print_token(int32_t token, const char* text, size_t size, void* user) {
  Progress& progress = *static_cast<Progress*>(user);
  if (progress.tokens.empty()) {
    progress.first = Clock::now();
    if (progress.engine != nullptr) check(squat_set_profiling(progress.engine, 1));
  }
  progress.tokens.push_back(token);
  const bool written = std::fwrite(text, 1, size, stdout) == size && std::fflush(stdout) == 0;
  return interrupted != 0 || !written;
}

// Bytes of weights, keys and values that were read since profiling was switched on.
uint64_t bytes_read(squat_engine* engine) {
  squat_profile_entry entries[64];
  size_t n = 0;
  check(squat_profile(engine, entries, 64, &n));
  uint64_t bytes = 0;
  for (size_t i = 0; i < n; i++) bytes += entries[i].bytes;
  return bytes;
}

// Of the logits after the session's last token, which is evaluated again for it.
uint64_t hash_of_last_logits(squat_engine* engine, const squat_info& info, int32_t last) {
  std::vector<float> logits(info.n_vocab);
  check(squat_rewind(engine, squat_length(engine) - 1));
  check(squat_eval(engine, &last, 1, SQUAT_LOGITS_LAST, logits.data(), logits.size()));
  return squat_hash_logits(logits.data(), logits.size());
}

}  // namespace

int main(int argc, char** argv) {
  const Options options = parse(argc, argv);

  const Clock::time_point start = Clock::now();
  squat_engine* engine = nullptr;
  check(squat_load(options.model, static_cast<uint32_t>(options.threads),
                   static_cast<uint32_t>(options.context), &engine));
  const double load_seconds = seconds_since(start);
  squat_info info;
  check(squat_get_info(engine, &info));
  squat_sampler* sampler = nullptr;
  check(squat_sampler_create(&options.sampling, info.n_vocab, &sampler));

  const bool chats = options.chat != nullptr;
  const std::string prompt = chats ? chat_prompt(engine, options) : text_of(options.prompt);
  std::vector<int32_t> tokens = tokens_of(engine, prompt);
  if (chats) {  // a template writes itself what begins a text
    const std::ptrdiff_t in_front = static_cast<std::ptrdiff_t>(tokens_of(engine, "").size());
    tokens.erase(tokens.begin(), tokens.begin() + in_front);
  }
  if (tokens.empty() && info.bos_token >= 0) tokens.push_back(info.bos_token);
  if (tokens.empty()) die("prompt: has no tokens, and the model has none to begin with");
  if (tokens.size() > info.n_context) {
    die("prompt: its " + std::to_string(tokens.size()) + " tokens exceed the context of " +
        std::to_string(info.n_context));
  }

  std::signal(SIGINT, [](int) { interrupted = 1; });
  if (!chats) std::fputs(prompt.c_str(), stdout);
  std::fflush(stdout);
  Progress progress{options.stats ? engine : nullptr, {}, {}};
  const Clock::time_point begin = Clock::now();
  check(squat_generate(engine, sampler, tokens.data(), tokens.size(), options.tokens, print_token,
                       &progress));
  const double total = seconds_since(begin);
  std::fputs("\n", stdout);

  if (options.stats) {
    const double prefill = progress.tokens.empty()
                               ? total
                               : std::chrono::duration<double>(progress.first - begin).count();
    std::fprintf(stderr,
                 "model    %s, %u layers, hidden %u, %.1f MB file, %.1f MB packed weights\n"
                 "cache    %.1f MB with all %u tokens of the context\n"
                 "load     %.1f ms\n"
                 "prefill  %zu tokens, %.1f ms, %.0f tokens/s\n",
                 info.architecture, info.n_layer, info.n_embd,
                 static_cast<double>(info.file_bytes) / 1e6,
                 static_cast<double>(info.weight_bytes) / 1e6,
                 static_cast<double>(info.cache_bytes) / 1e6, info.n_context, load_seconds * 1e3,
                 tokens.size(), prefill * 1e3, static_cast<double>(tokens.size()) / prefill);
    const size_t decoded = squat_length(engine) - tokens.size();
    if (decoded > 0) {
      const double seconds = total - prefill;
      std::fprintf(stderr, "decode   %zu tokens, %.2f ms/token, %.0f tokens/s, %.1f GB/s\n",
                   decoded, seconds * 1e3 / static_cast<double>(decoded),
                   static_cast<double>(decoded) / seconds,
                   static_cast<double>(bytes_read(engine)) / 1e9 / seconds);
    }
    std::vector<uint64_t> wide(info.n_layer);
    uint64_t count = 0;
    check(squat_wide_counts(engine, wide.data(), wide.size(), &count));
    std::fprintf(stderr, "8 bits   ");
    for (const uint64_t w : wide) {
      std::fprintf(stderr, "%.0f%% ", 100.0 * static_cast<double>(w) / static_cast<double>(count));
    }
    const int32_t last = decoded > 0 ? progress.tokens[decoded - 1] : tokens.back();
    std::fprintf(stderr,
                 "of tokens at 4:8 sites, by layer\n"
                 "hash     %016" PRIx64
                 " of the last logits: the same on every CPU\n"
                 "version  %s, threads %u\n%s",
                 hash_of_last_logits(engine, info, last), squat_version(), info.n_threads,
                 info.kernels);
  }
  squat_sampler_free(sampler);
  squat_free(engine);
  return interrupted != 0 ? 130 : 0;
}
