#include "tensors.h"

namespace blasst::binding {
namespace {

// As torch writes it.
std::string device_of(const Tensor& t) {
  return t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "cpu";
}

}  // namespace

void check_shape(std::string_view name, const Tensor& t, std::string_view meaning,
                 const std::vector<int64_t>& shape) {
  check(std::ranges::equal(t.sizes(), shape), name, " is ", t, "; it must be ", meaning, " = ",
        std::span(shape));
}

void check_type(std::string_view name, const Tensor& t, ScalarType type) {
  if (t.scalar_type() != type)
    raise("TypeError", name, " is ", t.scalar_type(), "; it must be ", type);
}

void check_devices(std::string_view first_name, const Tensor& first,
                   std::initializer_list<std::pair<std::string_view, const Tensor*>> others) {
  for (const auto& [name, t] : others) {
    check(!t || (t->is_cuda() == first.is_cuda() &&
                 t->get_device_index() == first.get_device_index()),
          name, " is on ", t ? device_of(*t) : "", ", ", first_name, " on ", device_of(first),
          "; they must share a device");
  }
}

DType dtype_of(std::string_view name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return BLASST_FLOAT32;
    case ScalarType::Half:
      return BLASST_FLOAT16;
    case ScalarType::BFloat16:
      return BLASST_BFLOAT16;
    default:
      raise("TypeError", name, " is ", t.scalar_type(),
            "; blasst takes float32, float16 and bfloat16");
  }
}

DType cache_dtype_of(std::string_view name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Char:
      return BLASST_INT8;
    case ScalarType::Float8_e4m3fn:
      return BLASST_FLOAT8_E4M3;
    default:
      return dtype_of(name, t);
  }
}

Tensor readable(const Tensor& t) {
  return t.numel() == 0 || t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t);
}

Tensor aligned(const Tensor& t) {
  const int64_t pieces = 16 / element_bytes(dtype_of("tensor", t));
  bool fits = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) fits = fits && t.stride(i) % pieces == 0;
  return fits ? readable(t) : torch::stable::clone(torch::stable::contiguous(t));
}

View view_of(const Tensor& t) {
  const int64_t dims = t.dim();
  std::vector<int64_t> strides(t.strides().begin(), t.strides().end());
  int64_t elements = t.numel() == 0 ? 0 : 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    if (t.size(i) == 1) strides[i] = i + 1 == dims ? 1 : t.size(i + 1) * strides[i + 1];
    if (elements > 0) elements += (t.size(i) - 1) * strides[i];
  }
  return {.data = t.data_ptr(),
          .dtype = cache_dtype_of("a tensor", t),
          .elements = elements,
          .stride_request = dims == 4 ? strides[0] : 0,
          .stride_token = strides[dims - 3],
          .stride_head = strides[dims - 2]};
}

const float* floats(std::string_view name, OptionalTensor& t, std::string_view meaning,
                    const std::vector<int64_t>& shape) {
  if (!t) return nullptr;
  check_shape(name, *t, meaning, shape);
  check_type(name, *t, ScalarType::Float);
  t = torch::stable::contiguous(*t);
  return static_cast<const float*>(t->const_data_ptr());
}

const int32_t* indices(std::string_view name, OptionalTensor& t, std::string_view meaning,
                       const std::vector<int64_t>& shape) {
  if (!t) return nullptr;
  check_shape(name, *t, meaning, shape);
  t = torch::stable::contiguous(*t);
  if (t->is_cuda()) {
    check_type(name, *t, ScalarType::Int);
    return static_cast<const int32_t*>(t->const_data_ptr());
  }
  if (t->scalar_type() == ScalarType::Long) {
    Tensor narrow = torch::stable::new_empty(*t, shape, ScalarType::Int);
    const auto* from = static_cast<const int64_t*>(t->const_data_ptr());
    auto* to = static_cast<int32_t*>(narrow.mutable_data_ptr());
    for (int64_t i = 0; i < t->numel(); ++i) {
      check(std::in_range<int32_t>(from[i]), name, " holds ", from[i], "; it must fit in int32");
      to[i] = static_cast<int32_t>(from[i]);
    }
    t = narrow;
  }
  if (t->scalar_type() != ScalarType::Int)
    raise("TypeError", name, " is ", t->scalar_type(), "; it must be int32 or int64");
  return static_cast<const int32_t*>(t->const_data_ptr());
}

}  // namespace blasst::binding
