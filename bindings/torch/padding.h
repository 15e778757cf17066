// A padded batch on the CPU, request by request.
#pragma once

#include <vector>

#include "blasst/blasst.hpp"
#include "problem.h"

namespace blasst::binding {

// What a padded batch leaves out: keys before a request's first, rows from its query length on,
// and the rows that causally see no key, so that a request has the query tiles it has without
// padding.
class Padding {
 public:
  // Checks starts and query_lengths, and replaces them by what is read.
  template <typename Params>
  Padding(const Params& p, Arguments& a);

  bool any() const { return any_; }
  int64_t start(int64_t request) const { return starts_ ? starts_[request] : 0; }
  int64_t rows(int64_t request, int64_t all) const {
    return query_lengths_ ? query_lengths_[request] : all;
  }

 private:
  const int32_t* starts_;         // [batch] null: 0
  const int32_t* query_lengths_;  // [batch] null: all rows
  bool any_ = false;
};

// Rows that are padding are 0, their lse is -inf; rows without a key are 0, their lse is the sink,
// -inf if there is none. out and the report are contiguous. `bit_words`: of all requests.
void run_padded(const PrefillParams& batch, const Padding& padding, int64_t bit_words);
void run_padded(const DecodeParams& batch, const Padding& padding, int64_t bit_words);

// Rows and keys left out have no gradient.
void run_padded_backward(const PrefillParams& forward, const BackwardParams& batch,
                         const Padding& padding, int64_t bit_words);

// The backward of a forward, as far as that says what it is.
BackwardParams backward_of(const PrefillParams& forward);

}  // namespace blasst::binding
