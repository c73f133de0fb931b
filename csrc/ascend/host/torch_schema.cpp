// torch.ops.qwen3_fp8_ascend.ascendc_*: schemas and shapes (Meta). Needs torch alone, so it is also built by the tests.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "../tiling.h"

namespace qwen3_fp8_ascend {
namespace {

c10::SymInt groups_of(const c10::SymInt& columns) { return (columns + (kBlock - 1)) / static_cast<int64_t>(kBlock); }

std::tuple<at::Tensor, at::Tensor> group_quantize_meta(const at::Tensor& x, int64_t) {
  TORCH_CHECK(x.dim() == 2, "ascendc_group_quantize: x is (rows, columns), got ", x.dim(), " dimensions");
  at::Tensor codes = at::empty_symint(x.sym_sizes(), x.options().dtype(at::kByte));
  at::Tensor scale = at::empty_symint({x.sym_size(0), groups_of(x.sym_size(1))}, x.options().dtype(at::kFloat));
  return {codes, scale};
}

at::Tensor block_dequantize_meta(const at::Tensor& packed, const at::Tensor&, const at::Tensor&, c10::SymInt n,
                                 c10::SymInt k, at::ScalarType dtype) {
  return at::empty_symint({std::move(n), std::move(k)}, packed.options().dtype(dtype));
}

void block_dequantize_out_meta(const at::Tensor&, const at::Tensor&, const at::Tensor&, at::Tensor& out) {
  TORCH_CHECK(out.dim() == 2, "ascendc_block_dequantize_out: out is (n, k), got ", out.dim(), " dimensions");
}

at::Tensor block_linear_meta(const at::Tensor& x, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                             const std::optional<at::Tensor>&, c10::SymInt n, int64_t) {
  TORCH_CHECK(x.dim() == 2, "ascendc_block_linear: x is (m, k), got ", x.dim(), " dimensions");
  return at::empty_symint({x.sym_size(0), std::move(n)}, x.options());
}

at::Tensor block_grouped_linear_meta(const at::Tensor& x, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                     const at::Tensor&, c10::SymInt n, int64_t) {
  TORCH_CHECK(x.dim() == 2, "ascendc_block_grouped_linear: x is (m, k), got ", x.dim(), " dimensions");
  return at::empty_symint({x.sym_size(0), std::move(n)}, x.options());
}

}  // namespace
}  // namespace qwen3_fp8_ascend

// activation is a number of tiling.h's Activation.
// packed (tiles, k_blocks, 16384) uint8, scale (tiles, k_blocks, 8) float32, spans (tiles, 8) int32: see tiling.h; of a
// grouped linear they have a leading dimension of groups, and ends is (groups,) int64.
TORCH_LIBRARY_FRAGMENT(qwen3_fp8_ascend, m) {
  m.def("ascendc_group_quantize(Tensor x, int activation) -> (Tensor codes, Tensor scale)");
  m.def(
      "ascendc_block_dequantize(Tensor packed, Tensor scale, Tensor spans, SymInt n, SymInt k, ScalarType dtype) -> "
      "Tensor");
  m.def("ascendc_block_dequantize_out(Tensor packed, Tensor scale, Tensor spans, Tensor(a!) out) -> ()");
  m.def(
      "ascendc_block_linear(Tensor x, Tensor packed, Tensor scale, Tensor spans, Tensor? bias, SymInt n, int "
      "activation) "
      "-> Tensor");
  m.def(
      "ascendc_block_gemv(Tensor x, Tensor packed, Tensor scale, Tensor spans, Tensor? bias, SymInt n, int activation) "
      "-> Tensor");
  m.def(
      "ascendc_block_grouped_linear(Tensor x, Tensor packed, Tensor scale, Tensor spans, Tensor ends, SymInt n, int "
      "activation) -> Tensor");
}

TORCH_LIBRARY_IMPL(qwen3_fp8_ascend, Meta, m) {
  m.impl("ascendc_group_quantize", TORCH_FN(qwen3_fp8_ascend::group_quantize_meta));
  m.impl("ascendc_block_dequantize", TORCH_FN(qwen3_fp8_ascend::block_dequantize_meta));
  m.impl("ascendc_block_dequantize_out", TORCH_FN(qwen3_fp8_ascend::block_dequantize_out_meta));
  m.impl("ascendc_block_linear", TORCH_FN(qwen3_fp8_ascend::block_linear_meta));
  m.impl("ascendc_block_gemv", TORCH_FN(qwen3_fp8_ascend::block_linear_meta));
  m.impl("ascendc_block_grouped_linear", TORCH_FN(qwen3_fp8_ascend::block_grouped_linear_meta));
}
