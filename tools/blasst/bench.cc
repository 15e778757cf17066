// blasst bench: dense and sparse time on inputs whose sparsity is planted.
#include "bench.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <numeric>
#include <tuple>
#include <utility>

#include "commands.h"
#include "measure.h"
#include "options.h"
#include "problem/text.h"
#include "target.h"
#include "testing/element.h"
#include "testing/problem.h"

namespace blasst::command {
namespace {

using check::Access;
using check::Problem;

constexpr float kThreshold = 1e-3f;  // ln: -6.9; planted tiles miss by about 20 or not at all

}  // namespace

Problem make_problem(const BenchOptions& options, int64_t length, double sparsity) {
  const bool decode = options.phase == Phase::kDecode;
  check::Case c{.decode = decode,
                .dtype = options.dtype,
                .heads = options.heads,
                .kv_heads = options.kv_heads,
                .head_dim = options.head_dim,
                .value_dim = options.head_dim,
                .k_dtype = options.cache.k,
                .v_dtype = options.cache.v,
                .inputs = check::Inputs::kPlanted,
                .causal = true,
                .order = options.order,
                .test = BLASST_TEST_RELATIVE,
                .threshold = kThreshold,
                .threads = options.threads,
                .scores = options.scores};
  c.requests.assign(options.batch, {decode ? 1 : length, length});
  // The tile shape decides which density gives the sparsity; it does not depend on the lengths.
  check::Case small = c;
  small.requests = {{1, 1}};
  const TileShape shape = plan_on(Problem(small), options.backend).shape;
  c.block_rows = shape.query_rows, c.block_keys = shape.keys;
  const auto key_tiles = [&](int64_t keys) { return (keys + shape.keys - 1) / shape.keys; };
  int64_t tiles = 0, query_tiles = 0;
  for (int64_t end = decode ? length : std::min(length, shape.query_rows);;
       end = std::min(length, end + shape.query_rows)) {
    tiles += key_tiles(end);
    ++query_tiles;
    if (end == length) break;
  }
  c.density = check::planted_density(sparsity, tiles, query_tiles);
  return Problem(c);
}

double visible_pairs(const BenchOptions& options, int64_t length) {
  const auto queries = static_cast<double>(options.phase == Phase::kDecode ? 1 : length);
  return queries * (static_cast<double>(length) - (queries - 1) / 2);  // causal
}

// On a GPU none.
int threads_of(const BenchOptions& options) {
  if (options.backend != BLASST_BACKEND_CPU) return 0;
  return options.threads > 0 ? options.threads : default_threads();
}

nlohmann::ordered_json common_fields(const Problem& problem, const BenchOptions& options,
                                     int64_t length, double sparsity) {
  const blasst_problem& p = problem.params.problem;
  return {{"phase", name_of(kPhases, options.phase)},
          {"backend", name_of(kBackends, options.backend)},
          {"dtype", name_of(kDTypes, options.dtype)},
          {"order", name_of(kOrders, options.order)},
          {"scores", name_of(kScores, options.scores)},
          {"cache", name_of(kCaches, options.cache)},
          {"batch", p.batch},
          {"length", length},
          {"heads", p.heads},
          {"kv_heads", p.kv_heads},
          {"head_dim", p.head_dim},
          {"threads", threads_of(options)},
          {"isa", processor(options.backend)},
          {"sparsity", sparsity}};
}

namespace {

// Relative error of a few query tiles against the reference, which would take hours for all. A
// query tile of prefill is a problem of its own: its rows, over all keys.
double relative_error(const Problem& problem, TileShape shape) {
  const bool decode = problem.description.decode;
  const Access access(problem.params);
  const blasst_problem& whole = problem.params.problem;
  const int64_t group = whole.heads / whole.kv_heads;
  const int64_t length = access.requests()[0].keys;
  const int64_t last = decode ? 0 : (length - 1) / shape.query_rows;
  double worst = 0;
  for (const auto& [request, kv_head, tile] :
       {std::tuple{int64_t{0}, int64_t{0}, last / 2},
        std::tuple{whole.batch - 1, whole.kv_heads - 1, last}}) {
    const int64_t first_row = decode ? 0 : tile * shape.query_rows;
    const int64_t rows = decode ? 1 : std::min(shape.query_rows, length - first_row);
    AttentionParams params = problem.params;
    params.report = {};
    blasst_problem& p = params.problem;
    p.batch = 1;
    p.heads = decode ? group : 1;
    p.kv_heads = 1;
    p.query_length = rows;
    p.kv.lengths = nullptr;
    p.kv.key_length = length;
    // Its rows stand at the end of the keys now, and see what they saw before.
    const int64_t band[] = {length - rows - first_row, length};
    if (!decode) p.mask = {.bands = band};
    // From an element on, the rest of the buffer; the reference only reads.
    const auto from = [&](View& view, std::byte* address) {
      view.elements -=
          (address - static_cast<std::byte*>(view.data)) / check::element_bytes(view.dtype);
      view.data = address;
    };
    from(p.q, access.query(request, first_row, kv_head * group));
    from(p.out, access.output(request, first_row, kv_head * group));
    from(p.kv.k, access.key(request, 0, kv_head));
    from(p.kv.v, access.value(request, 0, kv_head));
    const reference::Result wanted = check::refer(params, decode, shape);
    const Access part(params);
    double error = 0, size = 0;
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t h = 0; h < p.heads; ++h) {
        for (int64_t d = 0; d < p.value_dim; ++d) {
          const double x = wanted.out[(row * p.heads + h) * p.value_dim + d];
          const double y = check::load_element(
              p.q.dtype, part.output(0, row, h) + d * check::element_bytes(p.q.dtype));
          error += (x - y) * (x - y);
          size += x * x;
        }
      }
    }
    worst = std::max(worst, std::sqrt(error / size));
    if (std::isnan(error)) return error;
  }
  return worst;
}

// One line of results, as JSON fields.
nlohmann::ordered_json measure_forward(const BenchOptions& options, int64_t length,
                                       double wanted_sparsity) {
  const bool decode = options.phase == Phase::kDecode;
  Problem problem = make_problem(options, length, wanted_sparsity);
  const std::unique_ptr<Target> target = make_target(problem, options.backend, false);
  const Plan plan = plan_on(problem, options.backend);
  AttentionParams& p = target->params;

  // First the results: a fast wrong kernel is of no interest.
  print(stderr, "length {}, sparsity {}: errors", length, wanted_sparsity);
  const TileTest test = std::exchange(p.decision.test, TileTest{});
  const TileTest reference_test = std::exchange(problem.params.decision.test, TileTest{});
  target->run();
  double error = relative_error(problem, plan.shape);
  p.decision.test = test;
  problem.params.decision.test = reference_test;
  target->run();
  error = std::max(error, relative_error(problem, plan.shape));
  const double sparsity = static_cast<double>(sum(problem.tiles_skipped)) /
                          static_cast<double>(sum(problem.tiles_visitable));

  print(stderr, ", times");
  AttentionParams sparse = p;
  sparse.report = {};
  AttentionParams dense = sparse;
  dense.decision.test = {};
  size_t moved = 0;
  std::vector<std::function<void()>> calls = {[&] { check::call(dense, decode); },
                                              [&] { check::call(sparse, decode); }};
  if (decode)
    calls.emplace_back([&] { moved = target->move_keys_and_values(threads_of(options)); });
  const std::vector<double> ms = median_ms(calls, options.repeat, 20, [&] { target->finish(); });
  print(stderr, "\n");

  const double flops = 2 * visible_pairs(options, length) *
                       static_cast<double>((p.problem.head_dim + p.problem.value_dim) *
                                           p.problem.heads * p.problem.batch);
  nlohmann::ordered_json fields = common_fields(problem, options, length, sparsity);
  fields.update({{"dense_ms", ms[0]},
                 {"sparse_ms", ms[1]},
                 {"speedup", ms[0] / ms[1]},
                 {"dense_gflops", flops / ms[0] / 1e6},
                 {"effective_gflops", flops / ms[1] / 1e6},
                 {"relative_error", error},
                 {"workspace_mb", static_cast<double>(plan.workspace_bytes) / 1e6},
                 {"peak_rss_mb", peak_rss_mb()}});
  if (decode) {
    double bytes = 0;
    for (const View& view : {p.problem.kv.k, p.problem.kv.v})
      bytes += static_cast<double>(view.elements * check::element_bytes(view.dtype));
    fields["gb_per_s"] = bytes / ms[0] / 1e6;  // dense reads all of K and V
    // Of the same buffers, by a plain loop; on a GPU by a copy, reads and writes.
    fields["read_gb_per_s"] = static_cast<double>(moved) / ms[2] / 1e6;
  }
  return fields;
}

void print_header(bool decode) {
  print(stdout, "{:>8} {:>9} {:>7} {:>4} {:>9} {:>10} {:>10} {:>8} {:>9} {:>10} {:>9} {:>8}{}\n",
        "length", "dtype", "heads", "dim", "sparsity", "dense ms", "sparse ms", "speedup",
        "GFLOP/s", "effective", "error", "peak MB", decode ? "     GB/s  read GB/s" : "");
}

void print_row(const nlohmann::ordered_json& r) {
  const auto number = [&](const char* key) { return r[key].get<double>(); };
  print(stdout,
        "{:>8} {:>9} {:>7} {:>4} {:>7.1f} % {:>10.3f} {:>10.3f} {:>7.2f}x {:>9.1f} {:>10.1f} "
        "{:>9.1e} {:>8.0f}",
        r["length"].get<int64_t>(), r["dtype"].get<std::string>(),
        formatted("{}/{}", r["heads"].get<int64_t>(), r["kv_heads"].get<int64_t>()),
        r["head_dim"].get<int64_t>(), 100 * number("sparsity"), number("dense_ms"),
        number("sparse_ms"), number("speedup"), number("dense_gflops"), number("effective_gflops"),
        number("relative_error"), number("peak_rss_mb"));
  if (r.contains("gb_per_s"))
    print(stdout, " {:>8.2f} {:>10.2f}", number("gb_per_s"), number("read_gb_per_s"));
  print(stdout, "\n");
}

int bench(const BenchOptions& options) {
  // In two norms over a query tile, rounding the output costs a third of the largest rounding
  // error. Gradients are differences of near equals: they keep fewer digits of the same scores.
  const double float32 = options.phase == Phase::kBackward ? 1e-4 : 1e-5;
  const double allowed = std::max(2 * check::unit_roundoff(options.dtype), float32);
  bool right = true;
  bool first = true;
  for (const int64_t length : options.lengths) {
    for (const double sparsity : options.sparsities) {
      const nlohmann::ordered_json fields = options.phase == Phase::kBackward
                                                ? measure_backward(options, length, sparsity)
                                                : measure_forward(options, length, sparsity);
      if (!options.json && std::exchange(first, false))
        print_header(options.phase == Phase::kDecode);
      options.json ? print(stdout, "{}\n", fields.dump()) : print_row(fields);
      std::fflush(stdout);
      const double error = fields["relative_error"];
      if (!(error <= allowed)) {
        print(stderr, "the relative error {} is larger than {}\n", error, allowed);
        right = false;
      }
    }
  }
  return right ? 0 : 1;
}

void add_options(CLI::App& app, BenchOptions& options) {
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  const auto count = [&](const char* name, auto& value, const char* help) {
    add_number(app, name, value, int64_t{1}, most, help);
  };
  add_choice(app, "--backend", options.backend, kBackends, "where to run");
  add_choice(app, "--dtype", options.dtype, kDTypes,
             "of q, k, v and out; on a GPU, and with --cache bf16, bfloat16 unless it is given");
  add_choice(app, "--order", options.order, kOrders, "of the key tiles");
  if (options.phase != Phase::kBackward) {
    add_choice(app, "--scores", options.scores, kScores,
               "the arithmetic of q.k; int8 is of prefill alone");
    add_choice(app, "--cache", options.cache, kCaches, "types of k and v; dtype: of q's");
  }
  count("--batch", options.batch, "requests");
  count("--length", options.lengths, "tokens; several give a row each");
  count("--heads", options.heads, "query heads");
  count("--kv-heads", options.kv_heads, "key and value heads");
  count("--head-dim", options.head_dim, "of q, k and v");
  add_number(app, "--sparsity", options.sparsities, 0.0, 1.0,
             "share of tiles to skip; several give a row each; 0 tests every tile and skips none");
  add_number(app, "--threads", options.threads, 0, 4096, "0: all processors");
  count("--repeat", options.repeat, "timed rounds; medians are reported");
  app.add_flag("--json", options.json, "one JSON object a line");
}

}  // namespace

Run add_bench(CLI::App& app) {
  struct Choice {
    CLI::App* app;
    BenchOptions options;
  };
  auto choices = std::make_shared<std::vector<Choice>>();
  choices->reserve(3);  // the applications keep pointers to the options
  const auto add = [&](const char* name, const char* help, BenchOptions options) {
    choices->push_back({app.add_subcommand(name, help), std::move(options)});
    add_options(*choices->back().app, choices->back().options);
  };
  app.require_subcommand(1);
  add("prefill", "causal attention of a whole prompt", {});
  add("decode", "one new token over a KV cache",
      {.phase = Phase::kDecode, .dtype = BLASST_BFLOAT16, .lengths = {65536}, .heads = 32});
  add("backward", "gradients of the prefill", {.phase = Phase::kBackward});
  return [=] {
    Choice& chosen =
        *std::ranges::find_if(*choices, [](const Choice& c) { return c.app->parsed(); });
    BenchOptions& options = chosen.options;
    check_usable(options.backend);
    const bool in_16_bits =
        options.backend != BLASST_BACKEND_CPU || options.cache.k == BLASST_BFLOAT16;
    if (in_16_bits && chosen.app->count("--dtype") == 0) options.dtype = BLASST_BFLOAT16;
    return bench(options);
  };
}

}  // namespace blasst::command
