// blasst bench: dense and sparse time on inputs whose sparsity is planted.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <span>
#include <utility>

#include "check/element.h"
#include "check/problem.h"
#include "commands.h"
#include "measure.h"

namespace blasst::command {
namespace {

using check::Access;
using check::Problem;

constexpr float kThreshold = 1e-3f;  // ln: -6.9; planted tiles miss by about 20 or not at all

struct Options {
  bool decode = false;
  Backend backend = BLASST_BACKEND_CPU;
  DType dtype = BLASST_FLOAT32;
  Order order = BLASST_SINK_FIRST;
  int64_t batch = 1;
  std::vector<int64_t> lengths;
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t head_dim = 128;
  std::vector<double> sparsities = {0.75};
  int threads = 0;
  int repeat = 7;
  bool json = false;
};

// Causal prefill of `length` tokens, or one decode step over as many.
Problem make_problem(const Options& options, int64_t length, double sparsity) {
  check::Case c{.decode = options.decode,
                .dtype = options.dtype,
                .heads = options.heads,
                .kv_heads = options.kv_heads,
                .head_dim = options.head_dim,
                .value_dim = options.head_dim,
                .inputs = check::Inputs::kPlanted,
                .causal = true,
                .order = options.order,
                .test = BLASST_TEST_RELATIVE,
                .threshold = kThreshold,
                .threads = options.threads};
  c.requests.assign(options.batch, {options.decode ? 1 : length, length});
  // The tile shape decides which density gives the sparsity; it does not depend on the lengths.
  check::Case small = c;
  small.requests = {{1, 1}};
  Problem tiny(small);
  tiny.params.backend = options.backend;
  const TileShape shape = check::tile_shape(tiny.params, options.decode);
  const auto key_tiles = [&](int64_t keys) { return (keys + shape.keys - 1) / shape.keys; };
  int64_t tiles = 0, query_tiles = 0;
  for (int64_t end = options.decode ? length : std::min(length, shape.query_rows);;
       end = std::min(length, end + shape.query_rows)) {
    tiles += key_tiles(end);
    ++query_tiles;
    if (end == length) break;
  }
  c.density = check::planted_density(sparsity, tiles, query_tiles);
  Problem problem(c);
  problem.params.backend = options.backend;
  return problem;
}

// Relative error of a few query tiles against the reference, which would take hours for all. A
// query tile of prefill is a problem of its own: its rows, over the keys up to its last row.
double relative_error(const Problem& problem) {
  const bool decode = problem.description.decode;
  const Access access(problem.params);
  const TileShape shape = check::tile_shape(problem.params, decode);
  const int64_t group = problem.params.heads / problem.params.kv_heads;
  const int64_t length = access.requests()[0].keys;
  const int64_t last = decode ? 0 : (length - 1) / shape.query_rows;
  double worst = 0;
  for (const auto& [request, kv_head, tile] :
       {std::tuple{int64_t{0}, int64_t{0}, last / 2},
        std::tuple{problem.params.batch - 1, problem.params.kv_heads - 1, last}}) {
    const int64_t first_row = decode ? 0 : tile * shape.query_rows;
    const int64_t rows = decode ? 1 : std::min(shape.query_rows, length - first_row);
    PrefillParams p = problem.params;
    p.batch = 1;
    p.heads = decode ? group : 1;
    p.kv_heads = 1;
    p.query_length = rows;
    p.kv.lengths = nullptr;
    p.kv.key_length = decode ? length : first_row + rows;
    // From an element on, the rest of the buffer; the reference only reads.
    const auto from = [&](View& view, std::byte* address) {
      view.elements -=
          (address - static_cast<std::byte*>(view.data)) / check::element_bytes(p.dtype);
      view.data = address;
    };
    from(p.q, access.query(request, first_row, kv_head * group));
    from(p.out, access.output(request, first_row, kv_head * group));
    from(p.kv.k, access.key(request, 0, kv_head));
    from(p.kv.v, access.value(request, 0, kv_head));
    p.report = {};
    const reference::Result wanted = check::refer(p, decode, shape);
    const Access part(p);
    double error = 0, size = 0;
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t h = 0; h < p.heads; ++h) {
        for (int64_t d = 0; d < p.value_dim; ++d) {
          const double x = wanted.out[(row * p.heads + h) * p.value_dim + d];
          const double y = check::load_element(
              p.dtype, part.output(0, row, h) + d * check::element_bytes(p.dtype));
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

int64_t sum(const std::vector<int64_t>& counts) {
  return std::accumulate(counts.begin(), counts.end(), int64_t{0});
}

std::span<const std::byte> bytes_of(const View& view, DType dtype) {
  return {static_cast<const std::byte*>(view.data),
          static_cast<size_t>(view.elements * check::element_bytes(dtype))};
}

// One line of results, as JSON fields.
nlohmann::ordered_json measure(const Options& options, int64_t length, double wanted_sparsity) {
  Problem problem = make_problem(options, length, wanted_sparsity);
  const PrefillParams& p = problem.params;
  const int threads = options.threads > 0 ? options.threads : default_threads();

  // First the results: a fast wrong kernel is of no interest.
  fmt::print(stderr, "length {}, sparsity {}: errors", length, wanted_sparsity);
  const TileTest test = std::exchange(problem.params.test, TileTest{});
  problem.run();
  double error = relative_error(problem);
  problem.params.test = test;
  problem.run();
  error = std::max(error, relative_error(problem));
  const double sparsity = static_cast<double>(sum(problem.tiles_skipped)) /
                          static_cast<double>(sum(problem.tiles_visitable));

  fmt::print(stderr, ", times");
  PrefillParams sparse = p;
  sparse.report = {};
  PrefillParams dense = sparse;
  dense.test = {};
  const std::span<const std::byte> caches[] = {bytes_of(p.kv.k, p.dtype),
                                               bytes_of(p.kv.v, p.dtype)};
  volatile unsigned long long sink = 0;
  std::vector<std::function<void()>> calls = {[&] { check::call(dense, options.decode); },
                                              [&] { check::call(sparse, options.decode); }};
  if (options.decode) calls.emplace_back([&] { sink = read_all(caches, threads); });
  const std::vector<double> ms = median_ms(calls, options.repeat);
  fmt::print(stderr, "\n");

  const auto queries = static_cast<double>(options.decode ? 1 : length);
  const double pairs = queries * (static_cast<double>(length) - (queries - 1) / 2);  // causal
  const double flops =
      2 * pairs * static_cast<double>((p.head_dim + p.value_dim) * p.heads * p.batch);
  nlohmann::ordered_json fields = {
      {"phase", options.decode ? "decode" : "prefill"},
      {"backend", name_of(kBackends, options.backend)},
      {"dtype", name_of(kDTypes, options.dtype)},
      {"order", name_of(kOrders, options.order)},
      {"batch", p.batch},
      {"length", length},
      {"heads", p.heads},
      {"kv_heads", p.kv_heads},
      {"head_dim", p.head_dim},
      {"threads", threads},
      {"isa", cpu_isa()},
      {"sparsity", sparsity},
      {"dense_ms", ms[0]},
      {"sparse_ms", ms[1]},
      {"speedup", ms[0] / ms[1]},
      {"dense_gflops", flops / ms[0] / 1e6},
      {"effective_gflops", flops / ms[1] / 1e6},
      {"relative_error", error},
      {"workspace_mb", check::workspace_bytes(sparse, options.decode) / 1e6},
      {"peak_rss_mb", peak_rss_mb()}};
  if (options.decode) {
    const double bytes = static_cast<double>(caches[0].size() + caches[1].size());
    fields["gb_per_s"] = bytes / ms[0] / 1e6;       // dense reads all of K and V
    fields["read_gb_per_s"] = bytes / ms[2] / 1e6;  // of the same buffers, by a plain loop
  }
  return fields;
}

void print_header(bool decode) {
  fmt::print("{:>8} {:>9} {:>7} {:>4} {:>9} {:>10} {:>10} {:>8} {:>9} {:>10} {:>9} {:>8}{}\n",
             "length", "dtype", "heads", "dim", "sparsity", "dense ms", "sparse ms", "speedup",
             "GFLOP/s", "effective", "error", "peak MB", decode ? "     GB/s  read GB/s" : "");
}

void print_row(const nlohmann::ordered_json& r) {
  const auto number = [&](const char* key) { return r[key].get<double>(); };
  fmt::print(
      "{:>8} {:>9} {:>7} {:>4} {:>7.1f} % {:>10.3f} {:>10.3f} {:>7.2f}x {:>9.1f} {:>10.1f} "
      "{:>9.1e} {:>8.0f}",
      r["length"].get<int64_t>(), r["dtype"].get<std::string>(),
      fmt::format("{}/{}", r["heads"].get<int64_t>(), r["kv_heads"].get<int64_t>()),
      r["head_dim"].get<int64_t>(), 100 * number("sparsity"), number("dense_ms"),
      number("sparse_ms"), number("speedup"), number("dense_gflops"), number("effective_gflops"),
      number("relative_error"), number("peak_rss_mb"));
  if (r.contains("gb_per_s"))
    fmt::print(" {:>8.2f} {:>10.2f}", number("gb_per_s"), number("read_gb_per_s"));
  fmt::print("\n");
}

int bench(const Options& options) {
  // In two norms over a query tile, rounding the output costs a third of the largest rounding
  // error.
  const double allowed = std::max(2 * check::unit_roundoff(options.dtype), 1e-5);
  bool right = true;
  bool first = true;
  for (const int64_t length : options.lengths) {
    for (const double sparsity : options.sparsities) {
      const nlohmann::ordered_json fields = measure(options, length, sparsity);
      if (!options.json && std::exchange(first, false)) print_header(options.decode);
      options.json ? fmt::print("{}\n", fields.dump()) : print_row(fields);
      std::fflush(stdout);
      const double error = fields["relative_error"];
      if (!(error <= allowed)) {
        fmt::print(stderr, "the relative error {} is larger than {}\n", error, allowed);
        right = false;
      }
    }
  }
  return right ? 0 : 1;
}

void add_options(CLI::App& app, Options& options) {
  const auto positive = [&](const char* name, auto& value, const char* help) {
    app.add_option(name, value, help)->check(CLI::PositiveNumber)->capture_default_str();
  };
  add_choice(app, "--backend", options.backend, kBackends, "where to run");
  add_choice(app, "--dtype", options.dtype, kDTypes, "of q, k, v and out");
  add_choice(app, "--order", options.order, kOrders, "of the key tiles");
  positive("--batch", options.batch, "requests");
  positive("--length", options.lengths, "tokens; several give a row each");
  positive("--heads", options.heads, "query heads");
  positive("--kv-heads", options.kv_heads, "key and value heads");
  positive("--head-dim", options.head_dim, "of q, k and v");
  app.add_option(
         "--sparsity", options.sparsities,
         "share of tiles to skip; several give a row each; 0 tests every tile and skips none")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  app.add_option("--threads", options.threads, "0: all processors")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  positive("--repeat", options.repeat, "timed rounds; medians are reported");
  app.add_flag("--json", options.json, "one JSON object a line");
}

}  // namespace

Run add_bench(CLI::App& app) {
  auto prefill = std::make_shared<Options>();
  prefill->lengths = {8192};
  prefill->heads = prefill->kv_heads = 8;
  auto decode = std::make_shared<Options>();
  decode->decode = true;
  decode->lengths = {65536};
  decode->heads = 32, decode->kv_heads = 8;
  decode->dtype = BLASST_BFLOAT16;
  app.require_subcommand(1);
  add_options(*app.add_subcommand("prefill", "causal attention of a whole prompt"), *prefill);
  CLI::App* decode_app = app.add_subcommand("decode", "one new token over a KV cache");
  add_options(*decode_app, *decode);
  return [=] { return bench(decode_app->parsed() ? *decode : *prefill); };
}

}  // namespace blasst::command
