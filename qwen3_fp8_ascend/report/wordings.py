"""The words of the report in its two languages. What is not a word is the same in both."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """One language. `machine` and `not_run` are templates."""

    title: str
    generated: str
    other: str
    properties: str
    property_header: tuple[str, str]
    property_rows: tuple[tuple[str, str], ...]
    chips: str
    chips_text: str
    chips_header: tuple[str, str, str]
    claims: tuple[str, ...]
    functional: str
    question: str
    answer: str
    verdicts: dict[str, str]
    precision: str
    precision_text: str
    comparison: str
    floor: str
    linears: str
    linears_text: str
    throughput: str
    throughput_header: tuple[str, ...]
    tools: str
    tool_header: tuple[str, str]
    tool_rows: tuple[tuple[str, str], ...]
    machine: str
    not_run: str
    picture_precision: str
    picture_throughput: str


EN = Words(
    title="Qwen3-8B-FP8 with vLLM and vLLM-Ascend: verification report",
    generated="Written by `qwen3-fp8-ascend report` from result files of real runs; not edited by hand.",
    other="中文版",
    properties="What is verified",
    property_header=("property", "value"),
    property_rows=(
        ("format", "block FP8: e4m3 weights, one fp32 scale for 128x128, dynamic e4m3 activations (1x128)"),
        ("method", "`vllm serve MODEL --quantization ascend`"),
        ("models of these runs", "{models}"),
        ("machines of these runs", "{machines}"),
        ("software", "{software}"),
    ),
    chips="By chip",
    chips_text="No NPU was at hand. The commands below fill these columns on a machine that has one.",
    chips_header=("claim", "x86-64 CPU", "Atlas A2 / A3 / Ascend 950"),
    claims=("functional verification", "precision", "every linear by itself", "throughput"),
    functional="Functional verification",
    question="Prompt",
    answer="Output",
    verdicts={"passed": "✅ passed", "failed": "❌ failed", "not applicable": "➖ not applicable"},
    precision="Precision",
    precision_text=(
        "Teacher-forced on the package's prompts. A relative error is that of one token's logits (L2); layers' cosine "
        "is that of all layers' outputs; greedy is the share of equal greedy tokens; perplexity is run / reference. "
        "Nobody can be nearer than the noise floor: the reference against itself with fp64 sums."
    ),
    comparison="comparison",
    floor="noise floor",
    linears="Every linear by itself",
    linears_text=(
        "The same activations to both, so that nothing is amplified; judged by the fp64 specification. Equal bits is "
        "the share of outputs that are the fp64 result rounded once."
    ),
    throughput="Throughput",
    throughput_header=("configuration", "rate", "concurrency", "req/s", "tokens/s", "TTFT (ms)", "TPOT (ms)", "TPOT x"),
    tools="Scripts",
    tool_header=("script", "purpose"),
    tool_rows=(
        ("scripts/serve_qwen3-8b-fp8.sh", "serve on NPU or CPU"),
        ("scripts/verify_qwen3-8b-fp8.sh", "functional verification"),
        ("scripts/eval_precision.sh", "precision"),
        ("scripts/eval_accuracy.sh", "public benchmarks: lm-evaluation-harness, evalscope"),
    ),
    machine="{cpu}, {cores} cores, {date}, commit {commit}",
    not_run="not run: `{command}`",
    picture_precision="KL divergence of each comparison, and the largest relative error layer by layer",
    picture_throughput="Time per output token by configuration and concurrency",
)

ZH = Words(
    title="Qwen3-8B-FP8 在 vLLM 与 vLLM-Ascend 上的验证报告",
    generated="由 `qwen3-fp8-ascend report` 根据真实运行的结果文件生成，未经手工修改。",
    other="English",
    properties="验证对象",
    property_header=("属性", "值"),
    property_rows=(
        ("格式", "分块 FP8：e4m3 权重，每 128x128 一个 fp32 缩放因子，动态 e4m3 激活（1x128）"),
        ("方式", "`vllm serve MODEL --quantization ascend`"),
        ("本次运行的模型", "{models}"),
        ("本次运行的机器", "{machines}"),
        ("软件", "{software}"),
    ),
    chips="按芯片",
    chips_text="手头没有 NPU。在有 NPU 的机器上运行下列命令即可填写这些栏目。",
    chips_header=("项目", "x86-64 CPU", "Atlas A2 / A3 / Ascend 950"),
    claims=("功能验证", "精度", "逐个线性层", "吞吐"),
    functional="功能验证",
    question="Prompt",
    answer="输出",
    verdicts={"passed": "✅ 通过", "failed": "❌ 未通过", "not applicable": "➖ 不适用"},
    precision="精度",
    precision_text=(
        "在本包自带的提示词上逐词强制（teacher-forced）比较。相对误差按每个词的 logits（L2）计算；"
        "layers' cosine 为所有层输出的余弦；greedy 为贪心生成中相同词的比例；perplexity 为 本次 / 基线。"
        "任何实现都不可能比噪声底更接近："
        "噪声底是参考实现与其自身 fp64 求和结果之间的差距。"
    ),
    comparison="对比",
    floor="噪声底",
    linears="逐个线性层",
    linears_text=(
        "两者输入相同的激活，误差不会被放大；以 fp64 规范为准。equal bits 为与 fp64 结果一次舍入后完全相同的输出比例。"
    ),
    throughput="吞吐",
    throughput_header=("配置", "速率", "并发", "req/s", "tokens/s", "TTFT (ms)", "TPOT (ms)", "TPOT 倍数"),
    tools="脚本",
    tool_header=("脚本", "用途"),
    tool_rows=(
        ("scripts/serve_qwen3-8b-fp8.sh", "在 NPU 或 CPU 上启动推理服务"),
        ("scripts/verify_qwen3-8b-fp8.sh", "功能验证"),
        ("scripts/eval_precision.sh", "精度评估"),
        ("scripts/eval_accuracy.sh", "公开评测：lm-evaluation-harness、evalscope"),
    ),
    machine="{cpu}，{cores} 核，{date}，提交 {commit}",
    not_run="未运行：`{command}`",
    picture_precision="各项对比的 KL 散度，以及逐层最大相对误差",
    picture_throughput="各配置与并发下的每词时间（TPOT）",
)

LANGUAGES = {"en": EN, "zh": ZH}
