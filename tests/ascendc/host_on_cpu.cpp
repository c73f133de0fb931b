// csrc/ascend/host/torch_ops.cpp on the CPU: its operators are registered for CPU tensors, acl answers as a test says
// (`ascend_host_test::set`), and what is called is kept (`ascend_host_test::log`). Nothing is computed.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <acl/acl.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <map>
#include <string>
#include <vector>

#include "host/launch.h"
#include "torch_npu/csrc/core/npu/NPUStream.h"

namespace {

std::map<std::string, int64_t> &settings() {
    static std::map<std::string, int64_t> values = {{"cube", 20}, {"vector", 40}, {"stream_cube", 20}, {"stream_vector", 40}};
    return values;
}
std::string &chip() {
    static std::string name = "Ascend910B3";
    return name;
}
std::vector<std::string> calls;
int guards = 0;
char stream_object;

// Torch asks for the current device where a guard begins and restores it where it ends.
struct RecordingGuard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CPU> {
    c10::Device getDevice() const override {
        ++guards;
        return c10::Device(c10::DeviceType::CPU, -1);
    }
    void uncheckedSetDevice(c10::Device) const noexcept override { --guards; }
};
c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CPU, new RecordingGuard);

void launched(const char *kernel, uint32_t blocks, void *stream) {
    calls.push_back(std::string(kernel) + " " + std::to_string(blocks) + (stream == &stream_object ? "" : " on another stream"));
    settings()["last_error"] = settings()["launch_error"];
}

}  // namespace

const char *aclrtGetSocName() { return chip().empty() ? nullptr : chip().c_str(); }
aclError aclrtGetDevice(int32_t *device) {
    *device = 0;
    return ACL_SUCCESS;
}
aclError aclrtGetDeviceInfo(uint32_t, aclrtDevAttr attribute, int64_t *value) {
    *value = settings()[attribute == ACL_DEV_ATTR_CUBE_CORE_NUM ? "cube" : "vector"];
    return ACL_SUCCESS;
}
aclError aclrtGetStreamResLimit(aclrtStream stream, aclrtDevResLimitType type, uint32_t *value) {
    *value = static_cast<uint32_t>(settings()[type == ACL_RT_DEV_RES_CUBE_CORE ? "stream_cube" : "stream_vector"]);
    return stream == &stream_object ? static_cast<aclError>(settings()["limit_error"]) : 1;
}
aclError aclrtGetLastError(aclrtLastErrLevel) {
    const aclError error = static_cast<aclError>(settings()["last_error"]);
    settings()["last_error"] = 0;
    return error;
}

namespace c10_npu {
aclrtStream NPUStream::stream(bool) const { return &stream_object; }
NPUStream getCurrentNPUStream() {
    calls.push_back(guards > 0 ? "stream of the tensor's device" : "stream of whichever device is current");
    return {};
}
}  // namespace c10_npu

namespace qwen3_fp8_ascend {
void launch_group_quantize(uint32_t blocks, void *stream, void *, void *, void *, const QuantizeTiling &) {
    launched("group_quantize", blocks, stream);
}
void launch_block_dequantize(uint32_t blocks, void *stream, void *, void *, void *, void *, const DequantizeTiling &) {
    launched("block_dequantize", blocks, stream);
}
void launch_block_linear(uint32_t blocks, void *stream, void *, void *, void *, void *, void *, void *, void *, const LinearTiling &) {
    launched("block_linear", blocks, stream);
}
void launch_block_grouped_linear(uint32_t blocks, void *stream, void *, void *, void *, void *, void *, void *, void *,
                                 const LinearTiling &) {
    launched("block_grouped_linear", blocks, stream);
}
void launch_block_gemv(uint32_t blocks, void *stream, void *, void *, void *, void *, void *, void *, void *, const LinearTiling &) {
    launched("block_gemv", blocks, stream);
}
}  // namespace qwen3_fp8_ascend

TORCH_LIBRARY(ascend_host_test, m) {
    m.def("set(str name, int value) -> ()", [](const std::string &name, int64_t value) { settings()[name] = value; });
    m.def("set_chip(str name) -> ()", [](const std::string &name) { chip() = name; });
    m.def("log() -> str[]", [] { return std::exchange(calls, {}); });
}

#define PrivateUse1 CPU
#include "host/torch_ops.cpp"
#undef PrivateUse1
