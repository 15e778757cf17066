// The backward of a prefill problem: its memory, and its comparison with the reference.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "testing/problem.h"

namespace blasst::check {

// Case `c` as one that has a backward: a prefill.
Case differentiable(Case c);

// Takes the outputs of a forward that has run. The gradients have strides of their own, and their
// elements that belong to no row are NaN.
class BackwardProblem {
 public:
  explicit BackwardProblem(Problem& forward);

  Problem& forward;
  BackwardParams params;  // points into the buffers below; a test may change what it wants

  // Fills the gradients with marks and calls the library.
  void run();
  void mark();

  // Whether the call wrote outside the rows of the gradients, or anything at all.
  bool wrote_elsewhere() const;
  bool wrote_anything() const;

  // As stored, rounded to float. The keys of the requests follow each other, unused ones left out.
  std::vector<float> dq() const;  // [rows, heads, head_dim]
  std::vector<float> dk() const;  // [keys of all requests, kv_heads, head_dim]
  std::vector<float> dv() const;  // [keys of all requests, kv_heads, value_dim]
  std::vector<float> dsinks;
  std::vector<float> dlse;  // drawn; not set in params

  // Every gradient bit for bit, unused keys included.
  std::vector<std::byte> bits() const;

 private:
  template <typename Visit>
  void for_query_rows(const View& view, const Visit& visit) const;
  template <typename Visit>
  void for_key_rows(const View& view, bool unused, const Visit& visit) const;

  Access access_;
  std::vector<std::byte> dout_, dq_, dk_, dv_;
};

// How far a gradient is from the reference: largest and root mean square difference, of the kernel
// and of a plain implementation in the same type.
struct GradientError {
  double size = 0;  // largest sum of its terms' magnitudes: what rounding is relative to
  double largest = 0, plain_largest = 0;
  double rms = 0, plain_rms = 0;
};

struct BackwardComparison {
  std::string mismatch;  // empty: everything agrees
  GradientError dq, dk, dv, dsinks;
};

// After problem.run().
BackwardComparison compare(const BackwardProblem& problem);

}  // namespace blasst::check
