// torch.ops.qwen3_fp8_ascend.ascendc_* on an NPU: checks, plans, and enqueues the kernels on the current stream.
//
// Nothing here waits for the device, and no size depends on device data, so the operators can be captured in a graph.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <acl/acl.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "launch.h"
#include "plan.h"
#include "torch_npu/csrc/core/npu/NPUStream.h"
#include "torch_npu/csrc/framework/OpCommand.h"

namespace qwen3_fp8_ascend {
namespace {

struct CoreCounts {
  uint32_t cube = 0, vector = 0;
};

uint32_t device_attribute(aclrtDevAttr attribute) {
  int32_t device = 0;
  TORCH_CHECK(aclrtGetDevice(&device) == ACL_SUCCESS, "ascendc: no current NPU");
  int64_t value = 0;
  TORCH_CHECK(aclrtGetDeviceInfo(static_cast<uint32_t>(device), attribute, &value) == ACL_SUCCESS && value > 0,
              "ascendc: the driver does not tell the number of cores of NPU ", device);
  return static_cast<uint32_t>(value);
}

const CoreCounts& chip_cores() {
  static const CoreCounts counts = [] {
    const char* name = aclrtGetSocName();
    TORCH_CHECK(name != nullptr,
                "ascendc: the driver does not tell which chip this NPU is (aclrtGetSocName); see `npu-smi info`");
    const std::string chip = name;
    const bool known = chip.rfind("Ascend910B", 0) == 0 || chip.rfind("Ascend910_93", 0) == 0;
    TORCH_CHECK(known,
                "ascendc: these kernels are built for Atlas A2 (Ascend910B*) and A3 (Ascend910_93*), this NPU is ",
                chip);
    return CoreCounts{device_attribute(ACL_DEV_ATTR_CUBE_CORE_NUM), device_attribute(ACL_DEV_ATTR_VECTOR_CORE_NUM)};
  }();
  return counts;
}

uint32_t stream_limit(aclrtStream stream, aclrtDevResLimitType type) {
  uint32_t value = 0;
  const aclError error = aclrtGetStreamResLimit(stream, type, &value);
  TORCH_CHECK(error == ACL_SUCCESS,
              "ascendc: the driver does not tell how many cores the stream may use (aclrtGetStreamResLimit): error ",
              error);
  TORCH_CHECK(value > 0, "ascendc: the stream may use no core of this kind: raise its limit (aclrtSetStreamResLimit)");
  return value;
}

// What a launch may take: the chip's cores, or fewer where the stream, the process or the device is limited. The blocks
// of a linear wait for each other, so all of them must run at once.
CoreCounts cores_of(aclrtStream stream) {
  const CoreCounts& chip = chip_cores();
  return {std::min(chip.cube, stream_limit(stream, ACL_RT_DEV_RES_CUBE_CORE)),
          std::min(chip.vector, stream_limit(stream, ACL_RT_DEV_RES_VECTOR_CORE))};
}

Dtype dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kHalf: return kFloat16;
    case at::kBFloat16: return kBfloat16;
    case at::kFloat: return kFloat32;
    default: TORCH_CHECK(false, "ascendc: float16, bfloat16 or float32 expected, got ", type);
  }
}

uint32_t narrow(int64_t value, const char* what) {
  TORCH_CHECK(value >= 0 && value <= UINT32_MAX, "ascendc: ", what, " does not fit 32 bits: ", value);
  return static_cast<uint32_t>(value);
}

void check_same_device(const at::Tensor& tensor, const at::Tensor& other, const char* what) {
  TORCH_CHECK(tensor.device() == other.device(), "ascendc: ", what, " is on ", tensor.device(), ", expected ",
              other.device());
}

// The weight as `pack` of backends/ascendc.py lays it out.
struct PackedView {
  at::Tensor packed, scale, spans;
  uint32_t tiles = 0;

  PackedView(const at::Tensor& p, const at::Tensor& s, const at::Tensor& t, int64_t k) : packed(p), scale(s), spans(t) {
    const int64_t k_blocks = static_cast<int64_t>(ceil_div(static_cast<uint64_t>(k), kBlock));
    TORCH_CHECK(p.scalar_type() == at::kByte && p.dim() == 3 && p.size(1) == k_blocks && p.size(2) == kUnit &&
                    p.is_contiguous(),
                "ascendc: packed is uint8 (tiles, ", k_blocks, ", ", kUnit, ") for k = ", k, ", got ", p.sizes(), " ",
                p.scalar_type());
    TORCH_CHECK(s.scalar_type() == at::kFloat && s.dim() == 3 && s.size(0) == p.size(0) && s.size(1) == k_blocks &&
                    s.size(2) == kBroadcast && s.is_contiguous(),
                "ascendc: scale is float32 (", p.size(0), ", ", k_blocks, ", ", kBroadcast, "), got ", s.sizes(), " ",
                s.scalar_type());
    TORCH_CHECK(
        t.scalar_type() == at::kInt && t.dim() == 2 && t.size(0) == p.size(0) && t.size(1) == 8 && t.is_contiguous(),
        "ascendc: spans is int32 (", p.size(0), ", 8), got ", t.sizes(), " ", t.scalar_type());
    check_same_device(s, p, "scale");
    check_same_device(t, p, "spans");
    tiles = narrow(p.size(0), "the number of tiles");
  }
};

// The same for `groups` of them, one behind the other.
struct GroupedView {
  uint32_t groups;
  PackedView all;  // as if all groups' tiles were one weight's

  GroupedView(const at::Tensor& p, const at::Tensor& s, const at::Tensor& t, int64_t k)
      : groups(groups_of(p, s, t)), all(p.flatten(0, 1), s.flatten(0, 1), t.flatten(0, 1), k) {}
  uint32_t tiles() const { return all.tiles / groups; }

 private:
  static uint32_t groups_of(const at::Tensor& p, const at::Tensor& s, const at::Tensor& t) {
    TORCH_CHECK(
        p.dim() == 4 && s.dim() == 4 && t.dim() == 3 && p.size(0) > 0 && s.size(0) == p.size(0) &&
            t.size(0) == p.size(0) && p.is_contiguous() && s.is_contiguous() && t.is_contiguous(),
        "ascendc: of a grouped linear packed and scale have 4 dimensions, spans has 3, the first is that of the "
        "groups, and all are contiguous, got ",
        p.sizes(), ", ", s.sizes(), " and ", t.sizes());
    return narrow(p.size(0), "the number of groups");
  }
};

void* address(const at::Tensor& tensor) { return tensor.defined() ? tensor.data_ptr() : nullptr; }

// The device of a tensor, made the current one for as long as this lives, and the stream and cores that a kernel gets
// there.
struct Target {
  c10::OptionalDeviceGuard guard;
  aclrtStream stream;
  CoreCounts cores;

  explicit Target(const at::Tensor& tensor)
      : guard(tensor.device()), stream(c10_npu::getCurrentNPUStream().stream(false)), cores(cores_of(stream)) {}
};

// Enqueues `launch` behind what torch_npu has queued for the stream. The launch itself returns nothing: whether it
// failed is in the thread's last error, and torch_npu raises when the handler returns one.
template <class Launch>
void enqueue(const char* name, const Target& target, Launch launch) {
  at_npu::native::OpCommand command;
  command.Name(name);
  command.SetCustomHandler([stream = target.stream, launch]() -> int {
    (void)aclrtGetLastError(ACL_RT_THREAD_LEVEL);  // forgets what an earlier call of this thread left
    launch(stream);
    return static_cast<int>(aclrtGetLastError(ACL_RT_THREAD_LEVEL));
  });
  command.Run();
}

std::tuple<at::Tensor, at::Tensor> group_quantize(const at::Tensor& x, int64_t activation) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "ascendc_group_quantize: x is (rows, columns) and contiguous, got ",
              x.sizes());
  const uint32_t rows = narrow(x.size(0), "rows"), columns = narrow(x.size(1), "columns");
  const QuantizeTiling tiling = plan_quantize(rows, columns, activation_of(activation), dtype_of(x.scalar_type()));
  at::Tensor codes = at::empty({rows, columns}, x.options().dtype(at::kByte));
  at::Tensor scale = at::empty({rows, tiling.groups}, x.options().dtype(at::kFloat));
  if (codes.numel() == 0) return {codes, scale};
  const Target target(x);
  const uint32_t blocks = quantize_blocks(tiling, target.cores.vector);
  enqueue("qwen3_fp8_group_quantize", target, [=](void* stream) {
    launch_group_quantize(blocks, stream, address(x), address(codes), address(scale), tiling);
  });
  return {codes, scale};
}

void block_dequantize_out(const at::Tensor& packed, const at::Tensor& scale, const at::Tensor& spans, at::Tensor& out) {
  TORCH_CHECK(out.dim() == 2 && out.is_contiguous(), "ascendc_block_dequantize: out is (n, k) and contiguous, got ",
              out.sizes());
  check_same_device(out, packed, "out");
  const PackedView weight(packed, scale, spans, out.size(1));
  const DequantizeTiling tiling =
      plan_dequantize(narrow(out.size(0), "n"), narrow(out.size(1), "k"), weight.tiles, dtype_of(out.scalar_type()));
  if (out.numel() == 0) return;
  const Target target(out);
  const uint32_t blocks = dequantize_blocks(tiling, target.cores.vector);
  enqueue("qwen3_fp8_block_dequantize", target, [=](void* stream) {
    launch_block_dequantize(blocks, stream, address(packed), address(scale), address(spans), address(out), tiling);
  });
}

at::Tensor block_dequantize(const at::Tensor& packed, const at::Tensor& scale, const at::Tensor& spans, int64_t n,
                            int64_t k, at::ScalarType dtype) {
  at::Tensor out = at::empty({n, k}, packed.options().dtype(dtype));
  block_dequantize_out(packed, scale, spans, out);
  return out;
}

// Blocks of a mixed kernel that the stream may use: each takes one cube core and two vector cores.
uint32_t mixed_blocks(const char* name, const CoreCounts& cores) {
  const uint32_t blocks = std::min(cores.cube, cores.vector / kVectorCores);
  TORCH_CHECK(blocks > 0, name, ": a block takes 1 cube core and ", kVectorCores, " vector cores, the stream may use ",
              cores.cube, " and ", cores.vector);
  return blocks;
}

using Launch = void (*)(uint32_t, void*, void*, void*, void*, void*, void*, void*, void*, const LinearTiling&);

template <class Plan>
at::Tensor linear(const char* name, Launch launch, const at::Tensor& x, const at::Tensor& packed,
                  const at::Tensor& scale, const at::Tensor& spans, const std::optional<at::Tensor>& bias, int64_t n,
                  Plan make_plan) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), name, ": x is (m, k) and contiguous, got ", x.sizes());
  check_same_device(x, packed, "x");
  const PackedView weight(packed, scale, spans, x.size(1));
  const at::Tensor b = bias.value_or(at::Tensor());
  if (b.defined()) {
    const bool fits = b.scalar_type() == x.scalar_type() || b.scalar_type() == at::kFloat;
    TORCH_CHECK(b.dim() == 1 && b.size(0) == n && fits && b.is_contiguous(), name, ": bias is (", n, ") in ",
                x.scalar_type(), " or float32, got ", b.sizes(), " ", b.scalar_type());
    check_same_device(b, x, "bias");
  }
  at::Tensor out = at::empty({x.size(0), n}, x.options());
  if (out.numel() == 0) return out;
  const Target target(x);
  const LinearPlan plan =
      make_plan(weight.tiles, b.defined() ? static_cast<uint32_t>(dtype_of(b.scalar_type())) : kNoBias, target.cores);
  const at::Tensor workspace = at::empty({static_cast<int64_t>(plan.workspace_bytes)}, x.options().dtype(at::kByte));
  enqueue(name, target, [=](void* stream) {
    launch(plan.blocks, stream, address(x), address(packed), address(scale), address(spans), address(b), address(out),
           address(workspace), plan.tiling);
  });
  return out;
}

at::Tensor block_linear(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scale, const at::Tensor& spans,
                        const std::optional<at::Tensor>& bias, int64_t n, int64_t activation) {
  const auto make_plan = [&](uint32_t tiles, uint32_t bias_dtype, const CoreCounts& cores) {
    return plan_linear(narrow(x.size(0), "m"), narrow(n, "n"), narrow(x.size(1), "k"), tiles, activation_of(activation),
                       dtype_of(x.scalar_type()), bias_dtype, mixed_blocks("ascendc_block_linear", cores));
  };
  return linear("qwen3_fp8_block_linear", launch_block_linear, x, packed, scale, spans, bias, n, make_plan);
}

at::Tensor block_grouped_linear(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scale,
                                const at::Tensor& spans, const at::Tensor& ends, int64_t n, int64_t activation) {
  constexpr const char* name = "ascendc_block_grouped_linear";
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), name, ": x is (m, k) and contiguous, got ", x.sizes());
  check_same_device(x, packed, "x");
  const GroupedView weights(packed, scale, spans, x.size(1));
  TORCH_CHECK(
      ends.scalar_type() == at::kLong && ends.dim() == 1 && ends.size(0) == weights.groups && ends.is_contiguous(),
      name, ": ends is int64 (", weights.groups, ") and contiguous, got ", ends.sizes(), " ", ends.scalar_type());
  check_same_device(ends, x, "ends");
  at::Tensor out = at::empty({x.size(0), n}, x.options());
  if (out.numel() == 0) return out;
  const Target target(x);
  const LinearPlan plan = plan_grouped_linear(narrow(x.size(0), "m"), narrow(n, "n"), narrow(x.size(1), "k"),
                                              weights.tiles(), weights.groups, activation_of(activation),
                                              dtype_of(x.scalar_type()), mixed_blocks(name, target.cores));
  const at::Tensor workspace = at::empty({static_cast<int64_t>(plan.workspace_bytes)}, x.options().dtype(at::kByte));
  enqueue("qwen3_fp8_block_grouped_linear", target, [=](void* stream) {
    launch_block_grouped_linear(plan.blocks, stream, address(x), address(packed), address(scale), address(spans),
                                address(ends), address(out), address(workspace), plan.tiling);
  });
  return out;
}

at::Tensor block_gemv(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scale, const at::Tensor& spans,
                      const std::optional<at::Tensor>& bias, int64_t n, int64_t activation) {
  TORCH_CHECK(x.dim() == 2 && x.size(0) == 1, "ascendc_block_gemv: x has one row, got ", x.sizes());
  const auto make_plan = [&](uint32_t tiles, uint32_t bias_dtype, const CoreCounts& cores) {
    return plan_gemv(narrow(n, "n"), narrow(x.size(1), "k"), tiles, activation_of(activation),
                     dtype_of(x.scalar_type()), bias_dtype, cores.vector);
  };
  return linear("qwen3_fp8_block_gemv", launch_block_gemv, x, packed, scale, spans, bias, n, make_plan);
}

}  // namespace
}  // namespace qwen3_fp8_ascend

TORCH_LIBRARY_IMPL(qwen3_fp8_ascend, PrivateUse1, m) {
  m.impl("ascendc_group_quantize", TORCH_FN(qwen3_fp8_ascend::group_quantize));
  m.impl("ascendc_block_dequantize", TORCH_FN(qwen3_fp8_ascend::block_dequantize));
  m.impl("ascendc_block_dequantize_out", TORCH_FN(qwen3_fp8_ascend::block_dequantize_out));
  m.impl("ascendc_block_linear", TORCH_FN(qwen3_fp8_ascend::block_linear));
  m.impl("ascendc_block_gemv", TORCH_FN(qwen3_fp8_ascend::block_gemv));
  m.impl("ascendc_block_grouped_linear", TORCH_FN(qwen3_fp8_ascend::block_grouped_linear));
}
