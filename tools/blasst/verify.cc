// blasst verify: random problems against the double-precision reference, decision by decision; on
// the CPU also what else can be asked of their numbers (testing/calls.h).
#include <unistd.h>

#include <algorithm>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "commands.h"
#include "options.h"
#include "problem/text.h"
#include "target.h"
#include "testing/calls.h"
#include "testing/compare.h"

namespace blasst::command {
namespace {

struct Options {
  Backend backend = BLASST_BACKEND_CPU;
  uint64_t seed = 0;
  int64_t cases = 100;
  std::string isa;
  std::optional<Scores> scores;
};

const std::map<std::string, std::optional<Scores>> kVerifiedScores = {
    {"exact", BLASST_SCORES_EXACT}, {"int8", BLASST_SCORES_INT8}, {"mixed", std::nullopt}};

check::Case case_of(const Options& options, uint64_t seed) {
  check::Case c = check::random_case(seed);
  if (options.scores == BLASST_SCORES_INT8) c.decode = false;  // which has exact ones only
  c = case_for(c, options.backend);
  c.scores = options.scores.value_or(c.scores);
  return c;
}

check::Comparison run_and_compare(check::Problem& problem, Backend backend) {
  make_target(problem, backend, true)->run();
  return compare_on(problem, backend);
}

// On a GPU thresholds that are none skip nothing: the bits of the dense call, or in the absolute
// test, whose splits begin otherwise than a dense call's, those of a threshold that no score is
// below.
std::string check_no_thresholds_on(const check::Case& c, Backend backend) {
  if (c.test == BLASST_TEST_NONE) return "";
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN(),
                  kInf = std::numeric_limits<float>::infinity();
  const bool absolute = c.test == BLASST_TEST_ABSOLUTE;
  check::Case dense_case = c;
  if (!absolute) dense_case.test = BLASST_TEST_NONE;
  check::Problem dense(dense_case), problem(c);
  if (absolute) std::ranges::fill(dense.thresholds, -kInf);
  if (const check::Comparison found = run_and_compare(dense, backend); !found.mismatch.empty())
    return "with nothing to skip: " + found.mismatch;
  for (const float none : {kNan, -0.5f, -kInf}) {
    if (absolute && none == -0.5f) continue;  // as good as any
    std::ranges::fill(problem.thresholds, none);
    make_target(problem, backend, true)->run();
    if (problem.out_bits() != dense.out_bits() || problem.lse != dense.lse)
      return formatted("thresholds of {} gave other bits than none", none);
  }
  return "";
}

// Whether all cases agree on the backend, `name` of it or an instruction set. Case i has the seed
// first + i.
bool verify(const Options& options, const std::string& name) {
  int64_t decisions = 0, skipped = 0, rounded = 0, gradients = 0;
  double error = 0;
  const bool show_progress = isatty(STDERR_FILENO);
  for (int64_t i = 0; i < options.cases; ++i) {
    const uint64_t seed = options.seed + static_cast<uint64_t>(i);
    check::Problem problem(case_of(options, seed));
    check::Comparison comparison = run_and_compare(problem, options.backend);
    const check::Case& c = problem.description;
    if (comparison.mismatch.empty() && options.backend == BLASST_BACKEND_CPU) {
      check::SeededChoices choices(seed);
      comparison.mismatch = check::check_calls(problem, choices);
      gradients += check::has_gradients(problem);
    } else if (comparison.mismatch.empty()) {
      comparison.mismatch = check_no_thresholds_on(c, options.backend);
    }
    if (!comparison.mismatch.empty()) {
      print(stderr,
            "\nmismatch at seed {} on {}: {}\n  {}\nagain: blasst verify --seed {} --cases 1 "
            "{} {} --scores {}\n",
            seed, name, comparison.mismatch, check::describe(problem.description), seed,
            options.backend == BLASST_BACKEND_CPU ? "--isa" : "--backend", name,
            name_of(kVerifiedScores, options.scores));
      return false;
    }
    decisions += comparison.decisions;
    skipped += comparison.skipped;
    rounded += comparison.rounded;
    if (comparison.plain_error > 0)
      error = std::max(error, comparison.error / comparison.plain_error);
    if (show_progress) print(stderr, "\r{}: {} of {} problems", name, i + 1, options.cases);
  }
  if (show_progress) print(stderr, "\r\033[K");
  print(stdout,
        "{:<12} {} problems agree, {} of them with gradients: {} decisions, {:.1f} % skipped, {} "
        "decided by rounding; largest error {:.2f} of a plain implementation's\n",
        name, options.cases, gradients, decisions,
        100.0 * static_cast<double>(skipped) / static_cast<double>(std::max<int64_t>(decisions, 1)),
        rounded, error);
  return true;
}

}  // namespace

Run add_verify(CLI::App& app) {
  auto options = std::make_shared<Options>();
  add_choice(app, "--backend", options->backend, kBackends, "what to verify");
  add_number(app, "--cases", options->cases, int64_t{1}, std::numeric_limits<int64_t>::max(),
             "number of random problems");
  add_number(app, "--seed", options->seed, uint64_t{0}, std::numeric_limits<uint64_t>::max(),
             "of the first problem; the next ones follow");
  app.add_option("--isa", options->isa,
                 "one instruction set; default: all that `blasst info` lists");
  add_choice(app, "--scores", options->scores, kVerifiedScores,
             "the arithmetic of q.k; int8 is of prefill alone");
  return [options] {
    if (options->backend != BLASST_BACKEND_CPU && !options->isa.empty())
      throw Error(BLASST_INVALID_ARGUMENT,
                  formatted("--isa {} is an instruction set of the cpu; --backend is {}",
                            options->isa, name_of(kBackends, options->backend)));
    check_usable(options->backend);
    if (options->backend != BLASST_BACKEND_CPU)
      return verify(*options, name_of(kBackends, options->backend)) ? 0 : 1;
    bool agree = true;
    for (const std::string& isa : options->isa.empty() ? cpu_isas() : std::vector{options->isa}) {
      set_cpu_isa(isa);
      agree &= verify(*options, isa);
    }
    return agree ? 0 : 1;
  };
}

}  // namespace blasst::command
