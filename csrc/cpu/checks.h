// Preconditions of operators' tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "require.h"

namespace qwen3_fp8_ascend::cpu {

inline void require_cpu(const torch::stable::Tensor& tensor, const char* name, std::int64_t dim) {
  require(tensor.is_cpu(), name, " must be on the CPU");
  require(tensor.dim() == dim, name, " must have ", dim, " dimensions, got ", tensor.dim());
}

// The tensor's memory has room for its elements, the last of which is `extent` - 1 elements behind the first:
// somebody may have taken memory from it (untyped_storage().resize_).
inline void require_memory(const torch::stable::Tensor& tensor, const char* name, std::int64_t extent) {
  if (extent == 0) return;
  std::int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  const std::int64_t size = static_cast<std::int64_t>(tensor.element_size());
  const std::int64_t needed = (tensor.storage_offset() + extent) * size;
  require(needed <= bytes, name, " needs ", needed, " bytes of memory, but its storage holds ", bytes);
}

}  // namespace qwen3_fp8_ascend::cpu
