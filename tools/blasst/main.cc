// The blasst command. Exit status: 0 all well, 1 a wrong result, 2 wrong usage, 3 anything else.
#include <CLI/CLI.hpp>
#include <exception>
#include <new>

#include "blasst/blasst.hpp"
#include "commands.h"
#include "problem/text.h"

int main(int argc, char** argv) {
  using namespace blasst::command;
  CLI::App app("Attention made sparse by softmax thresholding", "blasst");
  app.set_version_flag("--version", blasst::version());
  app.require_subcommand(1);
  int status = 0;
  const auto add = [&](const char* name, const char* help, Run (*add_command)(CLI::App&)) {
    CLI::App* command = app.add_subcommand(name, help);
    command->final_callback([&status, run = add_command(*command)] { status = run(); });
  };
  add("info", "version, backends, instruction sets, threads", add_info);
  add("verify", "check random problems against the reference", add_verify);
  add("bench", "time dense and sparse attention on planted inputs", add_bench);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  } catch (const blasst::Error& error) {
    blasst::print(stderr, "blasst: {}\n", error.what());
    return error.status() == BLASST_INVALID_ARGUMENT || error.status() == BLASST_UNSUPPORTED ? 2
                                                                                             : 3;
  } catch (const std::bad_alloc&) {
    blasst::print(stderr, "blasst: not enough memory\n");
    return 3;
  } catch (const std::exception& error) {
    blasst::print(stderr, "blasst: {}\n", error.what());
    return 3;
  }
  return status;
}
