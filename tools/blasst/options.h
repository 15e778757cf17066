// What options of several subcommands take, and how they are added.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdlib>
#include <map>
#include <string>
#include <type_traits>

#include "blasst/blasst.hpp"
#include "problem/text.h"

namespace blasst::command {

inline const std::map<std::string, Backend> kBackends = {{"cpu", BLASST_BACKEND_CPU},
                                                         {"cuda", BLASST_BACKEND_CUDA}};
inline const std::map<std::string, DType> kDTypes = {
    {"float32", BLASST_FLOAT32}, {"float16", BLASST_FLOAT16}, {"bfloat16", BLASST_BFLOAT16}};
inline const std::map<std::string, Order> kOrders = {
    {"forward", BLASST_FORWARD}, {"reverse", BLASST_REVERSE}, {"sink_first", BLASST_SINK_FIRST}};
inline const std::map<std::string, Scores> kScores = {{"exact", BLASST_SCORES_EXACT},
                                                      {"int8", BLASST_SCORES_INT8}};

// An error unless this build has the backend and this machine can run it; of those for GPUs, any,
// or the one that BLASST_CUDA_BACKEND names.
inline void check_usable(Backend backend) {
  const char* variable = std::getenv("BLASST_CUDA_BACKEND");
  const std::string named = backend == BLASST_BACKEND_CPU || !variable ? "" : variable;
  std::string why, names;
  for (const BackendInfo& info : backends()) {
    if ((info.backend == BLASST_BACKEND_CPU) != (backend == BLASST_BACKEND_CPU)) continue;
    names += (names.empty() ? "" : " or ") + info.name;
    if (!named.empty() && info.name != named) continue;
    if (info.usable) return;
    why += (why.empty() ? "" : "; ") + info.name + " is not usable here: " + info.detail;
  }
  if (!why.empty()) throw Error(BLASST_UNSUPPORTED, why);
  if (!names.empty())
    throw Error(BLASST_UNSUPPORTED,
                formatted("BLASST_CUDA_BACKEND is '{}'; it must be {}", named, names));
  throw Error(BLASST_UNSUPPORTED, "this build has no CUDA backend; it was built without nvcc");
}

template <typename T>
std::string name_of(const std::map<std::string, T>& names, T value) {
  for (const auto& [name, named] : names)
    if (named == value) return name;
  return "?";
}

// An option that takes one of the names.
template <typename T>
void add_choice(CLI::App& app, const std::string& option, T& value,
                const std::map<std::string, T>& names, const std::string& help) {
  std::string list;
  for (const auto& entry : names) list += (list.empty() ? "" : ", ") + entry.first;
  app.add_option_function<std::string>(
         option,
         [&value, &names, option, list](const std::string& name) {
           const auto found = names.find(name);
           if (found == names.end())
             throw CLI::ValidationError(option, "'" + name + "' is none of: " + list);
           value = found->second;
         },
         help + ": " + list)
      ->default_str(name_of(names, value));
}

// An option, of one number or several, each of a range with both ends included.
template <typename T, typename Number>
void add_number(CLI::App& app, const std::string& option, T& value, Number least, Number most,
                const std::string& help) {
  const auto validator = [least, most](const std::string& text) {
    Number number{};
    // A number below zero would wrap around in an unsigned type.
    const bool negative = std::is_unsigned_v<Number> && text.starts_with('-');
    if (!negative && CLI::detail::lexical_cast(text, number) && number >= least && number <= most)
      return std::string();
    return formatted("'{}' is no number from {} to {}", text, least, most);
  };
  app.add_option(option, value, help)
      ->check(CLI::Validator(validator, formatted("from {} to {}", least, most)))
      ->capture_default_str();
}

}  // namespace blasst::command
