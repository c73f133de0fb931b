// Runs one kernel in the emulator: `run_kernel KERNEL key=value ...`; tensors are files of raw bytes.
// Prints the counters as JSON. Exit status 3 and "fault NAME" on stderr when the emulator objects.
#include <cstdio>
#include <fstream>
#include <iostream>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "host/launch.h"
#include "host/plan.h"
#include "kernel_operator.h"

extern "C" {
void qwen3_fp8_group_quantize(GM_ADDR, GM_ADDR, GM_ADDR, qwen3_fp8_ascend::QuantizeTiling);
void qwen3_fp8_block_dequantize(GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR, qwen3_fp8_ascend::DequantizeTiling);
void qwen3_fp8_block_linear(GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR, qwen3_fp8_ascend::LinearTiling);
void qwen3_fp8_block_grouped_linear(GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR, qwen3_fp8_ascend::LinearTiling);
void qwen3_fp8_block_gemv(GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR, qwen3_fp8_ascend::LinearTiling);
}

namespace {

using namespace qwen3_fp8_ascend;
using ascendc_emulator::Counters;
using ascendc_emulator::Machine;
using ascendc_emulator::Storage;

GM_ADDR device(void *pointer) { return static_cast<GM_ADDR>(pointer); }

class Arguments {
public:
    Arguments(int count, char **values) {
        for (int i = 0; i < count; ++i) {
            const std::string pair = values[i];
            const size_t split = pair.find('=');
            if (split == std::string::npos) throw std::invalid_argument("not key=value: " + pair);
            values_[pair.substr(0, split)] = pair.substr(split + 1);
        }
    }
    const std::string &text(const std::string &key) const { return values_.at(key); }
    uint32_t number(const std::string &key) const { return static_cast<uint32_t>(std::stoul(values_.at(key))); }
    bool has(const std::string &key) const { return values_.count(key) && !values_.at(key).empty(); }

    std::vector<uint8_t> load(const std::string &key) const {
        std::ifstream file(text(key), std::ios::binary);
        if (!file) throw std::invalid_argument("cannot read " + text(key));
        return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    }
    void save(const std::string &key, const std::vector<uint8_t> &bytes) const {
        std::ofstream file(text(key), std::ios::binary);
        file.write(reinterpret_cast<const char *>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    }

private:
    std::map<std::string, std::string> values_;
};

uint32_t element_size(uint32_t dtype) { return dtype == kFloat32 ? 4 : 2; }

Machine *machine = nullptr;
Counters counters;

}  // namespace

// The launches of host/launch.h, on the emulator: the "stream" is not used.
namespace qwen3_fp8_ascend {

void launch_group_quantize(uint32_t blocks, void *, void *x, void *codes, void *scale, const QuantizeTiling &tiling) {
    counters = machine->run(AscendC::KERNEL_TYPE_AIV_ONLY, static_cast<int>(blocks),
                            [=] { qwen3_fp8_group_quantize(device(x), device(codes), device(scale), tiling); });
}

void launch_block_dequantize(uint32_t blocks, void *, void *packed, void *scale, void *spans, void *out, const DequantizeTiling &tiling) {
    counters = machine->run(AscendC::KERNEL_TYPE_AIV_ONLY, static_cast<int>(blocks), [=] {
        qwen3_fp8_block_dequantize(device(packed), device(scale), device(spans), device(out), tiling);
    });
}

void launch_block_linear(uint32_t blocks, void *, void *x, void *packed, void *scale, void *spans, void *bias, void *out, void *workspace,
                         const LinearTiling &tiling) {
    counters = machine->run(AscendC::KERNEL_TYPE_MIX_AIC_1_2, static_cast<int>(blocks), [=] {
        qwen3_fp8_block_linear(device(x), device(packed), device(scale), device(spans), device(bias), device(out), device(workspace), tiling);
    });
}

void launch_block_grouped_linear(uint32_t blocks, void *, void *x, void *packed, void *scale, void *spans, void *ends, void *out,
                                 void *workspace, const LinearTiling &tiling) {
    counters = machine->run(AscendC::KERNEL_TYPE_MIX_AIC_1_2, static_cast<int>(blocks), [=] {
        qwen3_fp8_block_grouped_linear(device(x), device(packed), device(scale), device(spans), device(ends), device(out),
                                       device(workspace), tiling);
    });
}

void launch_block_gemv(uint32_t blocks, void *, void *x, void *packed, void *scale, void *spans, void *bias, void *out, void *workspace,
                       const LinearTiling &tiling) {
    counters = machine->run(AscendC::KERNEL_TYPE_MIX_AIV_1_0, static_cast<int>(blocks), [=] {
        qwen3_fp8_block_gemv(device(x), device(packed), device(scale), device(spans), device(bias), device(out), device(workspace), tiling);
    });
}

}  // namespace qwen3_fp8_ascend

namespace {

void group_quantize(const Arguments &args) {
    const uint32_t rows = args.number("rows"), columns = args.number("columns"), dtype = args.number("dtype");
    const QuantizeTiling tiling = plan_quantize(rows, columns, activation_of(args.number("activation")), static_cast<Dtype>(dtype));
    std::vector<uint8_t> x = args.load("x"), codes(size_t{rows} * columns), scale(size_t{rows} * tiling.groups * sizeof(float));
    machine->map("x", x.data(), x.size(), Storage::input, true);
    machine->map("codes", codes.data(), codes.size(), Storage::output);
    machine->map("scale", scale.data(), scale.size(), Storage::output);
    launch_group_quantize(quantize_blocks(tiling, args.number("cores") * 2), nullptr, x.data(), codes.data(), scale.data(), tiling);
    args.save("codes", codes);
    args.save("scale", scale);
}

void block_dequantize(const Arguments &args) {
    const uint32_t n = args.number("n"), k = args.number("k"), dtype = args.number("dtype");
    std::vector<uint8_t> packed = args.load("packed"), scale = args.load("scale"), spans = args.load("spans");
    const DequantizeTiling tiling = plan_dequantize(n, k, static_cast<uint32_t>(spans.size() / sizeof(TileSpan)), static_cast<Dtype>(dtype));
    std::vector<uint8_t> out(size_t{n} * k * element_size(dtype));
    machine->map("packed", packed.data(), packed.size(), Storage::input, true);
    machine->map("scale", scale.data(), scale.size(), Storage::input, true);
    machine->map("spans", spans.data(), spans.size(), Storage::input);
    machine->map("out", out.data(), out.size(), Storage::output);
    launch_block_dequantize(dequantize_blocks(tiling, args.number("cores") * 2), nullptr, packed.data(), scale.data(), spans.data(),
                            out.data(), tiling);
    args.save("out", out);
}

void linear(const Arguments &args, bool gemv) {
    const uint32_t m = args.number("m"), n = args.number("n"), k = args.number("k"), dtype = args.number("dtype");
    std::vector<uint8_t> x = args.load("x"), packed = args.load("packed"), scale = args.load("scale"), spans = args.load("spans"), bias;
    if (args.has("bias")) bias = args.load("bias");
    const uint32_t tiles = static_cast<uint32_t>(spans.size() / sizeof(TileSpan));
    const Activation activation = static_cast<Activation>(args.number("activation"));
    const uint32_t bias_dtype = bias.empty() ? kNoBias : args.number("bias_dtype"), cores = args.number("cores");
    const LinearPlan plan = gemv ? plan_gemv(n, k, tiles, activation, static_cast<Dtype>(dtype), bias_dtype, cores * 2)
                                 : plan_linear(m, n, k, tiles, activation, static_cast<Dtype>(dtype), bias_dtype, cores);
    std::vector<uint8_t> out(size_t{m} * n * element_size(dtype)), workspace(plan.workspace_bytes);
    machine->map("x", x.data(), x.size(), Storage::input);
    machine->map("packed", packed.data(), packed.size(), Storage::input, true);
    machine->map("scale", scale.data(), scale.size(), Storage::input, true);
    machine->map("spans", spans.data(), spans.size(), Storage::input);
    machine->map("bias", bias.data(), bias.size(), Storage::input);
    machine->map("out", out.data(), out.size(), Storage::output);
    machine->map("workspace", workspace.data(), workspace.size(), Storage::workspace);
    (gemv ? launch_block_gemv : launch_block_linear)(plan.blocks, nullptr, x.data(), packed.data(), scale.data(), spans.data(), bias.data(),
                                                     out.data(), workspace.data(), plan.tiling);
    args.save("out", out);
}

void grouped_linear(const Arguments &args) {
    const uint32_t m = args.number("m"), n = args.number("n"), k = args.number("k"), dtype = args.number("dtype");
    std::vector<uint8_t> x = args.load("x"), packed = args.load("packed"), scale = args.load("scale"), spans = args.load("spans"),
                         ends = args.load("ends");
    const uint32_t groups = static_cast<uint32_t>(ends.size() / sizeof(int64_t));
    const uint32_t tiles = static_cast<uint32_t>(spans.size() / sizeof(TileSpan)) / groups;
    const LinearPlan plan = plan_grouped_linear(m, n, k, tiles, groups, static_cast<Activation>(args.number("activation")),
                                                static_cast<Dtype>(dtype), args.number("cores"));
    std::vector<uint8_t> out(size_t{m} * n * element_size(dtype)), workspace(plan.workspace_bytes);
    machine->map("x", x.data(), x.size(), Storage::input);
    machine->map("packed", packed.data(), packed.size(), Storage::input, true);
    machine->map("scale", scale.data(), scale.size(), Storage::input, true);
    machine->map("spans", spans.data(), spans.size(), Storage::input);
    machine->map("ends", ends.data(), ends.size(), Storage::input);
    machine->map("out", out.data(), out.size(), Storage::output);
    machine->map("workspace", workspace.data(), workspace.size(), Storage::workspace);
    launch_block_grouped_linear(plan.blocks, nullptr, x.data(), packed.data(), scale.data(), spans.data(), ends.data(), out.data(),
                                workspace.data(), plan.tiling);
    args.save("out", out);
}

}  // namespace

int main(int count, char **values) {
    try {
        if (count < 2) throw std::invalid_argument("usage: run_kernel KERNEL key=value ...");
        const std::string kernel = values[1];
        const Arguments args(count - 2, values + 2);
        Machine chip(ascendc_emulator::Chip::named(args.has("chip") ? args.text("chip") : "910B3"));
        if (args.has("flags")) chip.flags = ascendc_emulator::counting_named(args.text("flags"));
        machine = &chip;
        if (kernel == "group_quantize") {
            group_quantize(args);
        } else if (kernel == "block_dequantize") {
            block_dequantize(args);
        } else if (kernel == "block_linear" || kernel == "block_gemv") {
            linear(args, kernel == "block_gemv");
        } else if (kernel == "block_grouped_linear") {
            grouped_linear(args);
        } else {
            throw std::invalid_argument("no kernel " + kernel);
        }
        counters.write(std::cout);
        return 0;
    } catch (const ascendc_emulator::Fault &fault) {
        std::cerr << "fault " << fault.name() << "\n" << fault.what() << "\n";
        return 3;
    } catch (const std::exception &error) {
        std::cerr << "error " << error.what() << "\n";
        return 2;
    }
}
