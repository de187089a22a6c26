// squat-run: generates text with a model file, on the command line and without Python. It uses the
// C interface only, so that it is also the example of how to.
#include <cerrno>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "squat.h"

namespace {

constexpr int kExitUsage = 2;  // bad input of any kind

const char kHelp[] =
    "usage: squat-run MODEL.gguf -p TEXT [options]\n"
    "\n"
    "Continues TEXT with a model that `squat export` wrote.\n"
    "\n"
    "  -p, --prompt TEXT          the text to continue; '-' reads it from standard input\n"
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
    "      --stats                print memory, times and kernels to standard error\n"
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
    } else if (is("-p", "--prompt")) {
      o.prompt = value();
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
  if (o.prompt == nullptr) die("no prompt given; see squat-run --help");
  return o;
}

std::string read_input() {
  std::string text;
  char buffer[4096];
  for (size_t n; (n = std::fread(buffer, 1, sizeof buffer, stdin)) > 0;) text.append(buffer, n);
  return text;
}

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

volatile std::sig_atomic_t interrupted = 0;

struct Progress {
  size_t tokens = 0;
  Clock::time_point first;  // when the first token came: the prompt is evaluated
};

int print_token(int32_t, const char* text, size_t size, void* user) {
  Progress& progress = *static_cast<Progress*>(user);
  if (progress.tokens++ == 0) progress.first = Clock::now();
  const bool written = std::fwrite(text, 1, size, stdout) == size && std::fflush(stdout) == 0;
  return interrupted != 0 || !written;
}

}  // namespace

int main(int argc, char** argv) {
  const Options options = parse(argc, argv);
  const std::string prompt = std::strcmp(options.prompt, "-") == 0 ? read_input() : options.prompt;

  const Clock::time_point start = Clock::now();
  squat_engine* engine = nullptr;
  check(squat_load(options.model, static_cast<uint32_t>(options.threads),
                   static_cast<uint32_t>(options.context), &engine));
  const double load_seconds = seconds_since(start);
  squat_info info;
  check(squat_get_info(engine, &info));
  squat_sampler* sampler = nullptr;
  check(squat_sampler_create(&options.sampling, info.n_vocab, &sampler));

  size_t n = 0;
  std::vector<int32_t> tokens(4 * prompt.size() + 2);
  squat_status status =
      squat_tokenize(engine, prompt.data(), prompt.size(), tokens.data(), tokens.size(), &n);
  if (status == SQUAT_ERROR_ARGUMENT && n > tokens.size()) {
    tokens.resize(n);
    status = squat_tokenize(engine, prompt.data(), prompt.size(), tokens.data(), n, &n);
  }
  check(status);
  tokens.resize(n);
  if (tokens.empty() && info.bos_token >= 0) tokens.push_back(info.bos_token);
  if (tokens.empty()) die("prompt: has no tokens, and the model has none to begin with");
  if (tokens.size() > info.n_context) {
    die("prompt: its " + std::to_string(tokens.size()) + " tokens exceed the context of " +
        std::to_string(info.n_context));
  }

  std::signal(SIGINT, [](int) { interrupted = 1; });
  std::fputs(prompt.c_str(), stdout);
  std::fflush(stdout);
  Progress progress;
  const Clock::time_point begin = Clock::now();
  check(squat_generate(engine, sampler, tokens.data(), tokens.size(), options.tokens, print_token,
                       &progress));
  const double total = seconds_since(begin);
  std::fputs("\n", stdout);

  if (options.stats) {
    const double prefill =
        progress.tokens > 0 ? std::chrono::duration<double>(progress.first - begin).count() : total;
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
    if (progress.tokens > 1) {
      std::fprintf(stderr, "decode   %zu tokens, %.2f ms/token, %.0f tokens/s\n",
                   progress.tokens - 1,
                   (total - prefill) * 1e3 / static_cast<double>(progress.tokens - 1),
                   static_cast<double>(progress.tokens - 1) / (total - prefill));
    }
    std::vector<uint64_t> wide(info.n_layer);
    uint64_t count = 0;
    check(squat_wide_counts(engine, wide.data(), wide.size(), &count));
    std::fprintf(stderr, "8 bits   ");
    for (const uint64_t w : wide) {
      std::fprintf(stderr, "%.0f%% ", 100.0 * static_cast<double>(w) / static_cast<double>(count));
    }
    std::fprintf(stderr, "of tokens at 4:8 sites, by layer\nthreads  %u\n%s", info.n_threads,
                 info.kernels);
  }
  squat_sampler_free(sampler);
  squat_free(engine);
  return interrupted != 0 ? 130 : 0;
}
