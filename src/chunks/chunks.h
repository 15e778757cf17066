// Cutting keys into chunks and choosing among them: what blasst/chunks.h documents, on checked C++
// types. Throws Error.
#pragma once

#include <cstdint>
#include <vector>

#include "blasst/chunks.hpp"

namespace blasst::chunks {

Chunks next(ChunkView chunks, const ChunkRule& rule, const HeadRows& keys, int threads);

std::vector<float> scores(const ChunkRule& rule, const HeadRows& keys, int64_t begin, int64_t end,
                          int threads);

void select(ChunkView chunks, int64_t kv_heads, const HeadRows& queries, bool decode,
            ChunkBudget budget, uint8_t* blocks, int threads);

}  // namespace blasst::chunks
