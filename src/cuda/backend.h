// The backend for GPUs of compute capability 9.0. No CUDA types here.
#pragma once

#include <cstddef>
#include <cstdint>

#include "blasst/blasst.hpp"

namespace blasst::cuda {

void run(const PrefillParams& params);
std::size_t workspace_bytes(const PrefillParams& params);
TileShape tile_shape(const PrefillParams& params);

void run(const DecodeParams& params);
std::size_t workspace_bytes(const DecodeParams& params);
TileShape tile_shape(const DecodeParams& params);

void merge(const MergeParams& params);
void check_pages(const KeysValues& kv, int64_t batch, int32_t* found, void* stream);

BackendInfo info();

}  // namespace blasst::cuda
