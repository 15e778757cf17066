// The subcommands. Each adds its options to the application and returns what to run once they are
// parsed; that returns the exit status.
#pragma once

#include <functional>

namespace CLI {
class App;
}

namespace blasst::command {

using Run = std::function<int()>;

Run add_info(CLI::App& app);
Run add_verify(CLI::App& app);
Run add_bench(CLI::App& app);

}  // namespace blasst::command
