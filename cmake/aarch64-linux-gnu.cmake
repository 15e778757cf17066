# For aarch64 with Debian's cross compiler (g++-aarch64-linux-gnu); what is built runs under qemu-user.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -L /usr/aarch64-linux-gnu)

# Those of this machine lie beside its own C library's headers.
foreach(package fmt CLI11 nlohmann_json)
  set(CMAKE_DISABLE_FIND_PACKAGE_${package} ON)
endforeach()
