"""The words of the report in its two languages. What is not a word is the same in both."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """One language; strings with braces are templates.

    `claims` are in the order of `pages.KINDS`, `chips` in that of `results.CHIPS`.
    """

    title: str
    other: str
    generated: str
    properties: str
    property_header: tuple[str, str]
    property_rows: tuple[tuple[str, str], ...]
    by_chip: str
    by_chip_text: str
    absent: str
    claim: str
    claims: tuple[str, ...]
    chips: tuple[str, ...]
    commands: str
    functional: str
    functional_text: str
    test: str
    verdicts: dict[str, str]
    precision: str
    precision_text: str
    summary_header: tuple[str, ...]
    summary_text: str
    without_runs: tuple[str, ...]
    against: str
    metric: str
    metrics: dict[str, str]
    floor: str
    reached: str
    linears: str
    linears_text: str
    linears_header: tuple[str, ...]
    units: dict[str, str]
    throughput: str
    throughput_text: str
    throughput_header: tuple[str, ...]
    tools: str
    tool_header: tuple[str, str]
    tool_rows: tuple[tuple[str, str], ...]
    hardware: str
    machine: str
    runs: str
    compared_by: str
    made_on: str
    not_run: str
    not_run_by: str
    picture_precision: str
    picture_throughput: str


EN = Words(
    title="Qwen3-8B-FP8 with vLLM and vLLM-Ascend: verification report",
    other="中文版",
    generated=(
        "Written by `make report` from [result files](results) of real runs; not edited by hand. Every table names "
        "the command, the machine, the date and the commit that made it. What has no result is marked not run."
    ),
    properties="What is verified",
    property_header=("property", "value"),
    property_rows=(
        ("format", "block FP8: e4m3 weights, one scale for each 128×128, dynamic e4m3 activations, one for each 1×128"),
        ("method", "`vllm serve MODEL --quantization ascend`"),
        ("models of these runs", "{models}"),
        ("machines of these runs", "{machines}"),
        ("software", "{software}"),
    ),
    by_chip="By chip",
    by_chip_text="✅ with the date of the run, or not run.",
    absent="Qwen3-8B-FP8 itself is not among the models of these runs.",
    claim="claim",
    claims=("functional verification", "precision of whole models", "every linear and layer alone", "throughput"),
    chips=("x86-64 CPU", "NVIDIA GPU", "Ascend NPU: Atlas A2, A3, 950"),
    commands=(
        "These commands fill the column of an NPU, on a machine that has one. With `--backend triton --device cuda` "
        "those of `eval_precision.sh` fill a GPU's. The last line writes this report anew."
    ),
    functional="Functional verification",
    functional_text="The three prompts of the report's form, and what was answered.",
    test="Test {number}: {verdict}",
    verdicts={"passed": "✅", "failed": "❌", "not applicable": "➖ not judged: the model does not speak the language"},
    precision="Precision",
    precision_text=(
        "Each run is teacher-forced on the package's prompts (English, Chinese, arithmetic, code). The relative "
        "error is ||a − b|| / ||b|| of one token's logits, exact match is the share of equal tokens of greedy "
        "continuations. The noise floor, in columns of its own, is the reference against itself with fp64 sums: the "
        "same arithmetic in another order. The bound is for a backend against the reference in the same arithmetic."
    ),
    summary_header=(
        "checkpoint",
        "comparison",
        "cosine_similarity",
        "noise floor",
        "max_relative_error",
        "noise floor",
        "exact_match",
        "noise floor",
        "top-1",
        "noise floor",
        "bound",
        "noise floor",
    ),
    summary_text=(
        "Where the noise floor itself misses the bound, no implementation can reach it end to end. In W8A8 one "
        "rounding that falls the other way moves an activation by a whole e4m3 code, 6 to 12 % of it, and the "
        "following layers amplify it: the specification with fp32 and with fp64 sums are then two different models. "
        "So W8A16, where nothing is rounded to codes, is judged beside W8A8, and the next section judges every "
        "linear and every decoder layer by itself. The original model stands beside them as what quantization itself "
        "costs."
    ),
    without_runs=("NPU vs CPU reference", "NPU vs GPU", "GPU vs CPU reference"),
    against="{model}, against {reference}",
    metric="",
    metrics={},
    floor="noise floor",
    reached="cosine ≥ {cosine} and top-1 ≥ {top1}",
    linears="Every linear and every decoder layer alone",
    linears_text=(
        "At each linear and each decoder layer of the model both get the same input, so that nothing is carried on "
        "and amplified. The fp64 specification judges the backend and the fp32 specification (reference) alike; the "
        "reference's line is the noise floor: within one decoder layer some roundings still fall the other way in "
        "W8A8. Equal bits is the share of a linear's outputs that are the fp64 result rounded once."
    ),
    linears_header=(
        "against the fp64 specification",
        "",
        "vectors",
        "cosine, mean",
        "cosine, smallest",
        "cosine ≥ {cosine}",
        "p99 rel. error",
        "max rel. error",
        "equal bits",
    ),
    units={"linear": "linears", "decoder layer": "decoder layers"},
    throughput="Throughput",
    throughput_text=(
        "Measured by `vllm bench serve`; the last column is TPOT of the last configuration over this one's."
    ),
    throughput_header=("configuration", "rate", "concurrency", "req/s", "tokens/s", "TTFT (ms)", "TPOT (ms)", "×"),
    tools="Scripts",
    tool_header=("script", "purpose"),
    tool_rows=(
        ("`scripts/serve_qwen3-8b-fp8.sh`", "serve on NPU or CPU"),
        ("`scripts/verify_qwen3-8b-fp8.sh`", "functional verification"),
        ("`scripts/eval_precision.sh`", "precision: runs, comparison, linears and layers alone"),
        ("`scripts/eval_accuracy.sh`", "public benchmarks: lm-evaluation-harness, evalscope"),
    ),
    hardware="{name}, {cores} cores",
    machine="{hardware}; {date}, commit {commit}",
    runs="Runs",
    compared_by="Compared by:",
    made_on="Made on {machine}, by:",
    not_run="not run",
    not_run_by="not run: `{command}`",
    picture_precision="KL divergence of each comparison, and the largest relative error layer by layer",
    picture_throughput="Time per output token by configuration and concurrency",
)

ZH = Words(
    title="Qwen3-8B-FP8 在 vLLM 与 vLLM-Ascend 上的验证报告",
    other="English",
    generated=(
        "由 `make report` 根据真实运行的[结果文件](results)生成，未经手工修改。每张表都注明得出它的命令、机器、日期和"
        "提交。没有结果的项目标为未运行。"
    ),
    properties="验证对象",
    property_header=("属性", "值"),
    property_rows=(
        ("格式", "分块 FP8：e4m3 权重，每 128×128 一个缩放系数；动态 e4m3 激活，每 1×128 一个"),
        ("方式", "`vllm serve MODEL --quantization ascend`"),
        ("本次运行的模型", "{models}"),
        ("本次运行的机器", "{machines}"),
        ("软件", "{software}"),
    ),
    by_chip="按芯片",
    by_chip_text="✅ 后为运行日期；否则为未运行。",
    absent="本次运行的模型中没有 Qwen3-8B-FP8 本身。",
    claim="项目",
    claims=("功能验证", "整模型精度", "逐个线性层与解码层", "吞吐"),
    chips=("x86-64 CPU", "NVIDIA GPU", "昇腾 NPU：Atlas A2、A3、950"),
    commands=(
        "在有 NPU 的机器上运行下列命令，即可填写 NPU 一列；`eval_precision.sh` 加 `--backend triton --device cuda` 则"
        "填写 GPU 一列。最后一行重新生成本报告。"
    ),
    functional="功能验证",
    functional_text="报告格式中的三个提示词，以及得到的回答。",
    test="测试 {number}：{verdict}",
    verdicts={"passed": "✅", "failed": "❌", "not applicable": "➖ 不评判：该模型不会这种语言"},
    precision="精度",
    precision_text=(
        "每次运行都在本包自带的提示词（英文、中文、算术、代码）上逐词强制（teacher forcing）。相对误差是一个词的 "
        "logits 的 ||a − b|| / ||b||；exact match 是贪心续写中相同词的比例。噪声底单独成列：参考实现与它自己改用 "
        "fp64 求和之间的差距，即同一算术换一种求和顺序。界限只用于同一算术下后端与参考实现的对比。"
    ),
    summary_header=(
        "模型",
        "对比基线",
        "cosine_similarity",
        "噪声底",
        "max_relative_error",
        "噪声底",
        "exact_match",
        "噪声底",
        "top-1",
        "噪声底",
        "界限",
        "噪声底",
    ),
    summary_text=(
        "凡噪声底自身达不到界限之处，任何实现都无法端到端达到。在 W8A8 中，一次舍入若落到另一侧，就会使一个激活移动整"
        "整一个 e4m3 码（其 6 % 到 12 %），并被后续各层放大：此时用 fp32 与 fp64 求和的规范本身就成了两个不同的模型。"
        "因此除 W8A8 外，还评判不做激活舍入的 W8A16；下一节则逐个评判每个线性层和解码层。旁边列出原始模型，表示量化本"
        "身的代价。"
    ),
    without_runs=("NPU vs CPU 参考实现", "NPU vs GPU", "GPU vs CPU 参考实现"),
    against="{model}，基线为 {reference}",
    metric="",
    metrics={
        "logits: cosine, mean": "logits：余弦，均值",
        "logits: cosine, smallest": "logits：余弦，最小",
        "logits: relative error, p99": "logits：相对误差，p99",
        "logits: relative error, max": "logits：相对误差，最大",
        "layers' outputs: cosine, mean": "各层输出：余弦，均值",
        "layers' outputs: relative error, p99": "各层输出：相对误差，p99",
        "layers' outputs: relative error, max": "各层输出：相对误差，最大",
        "KL divergence, mean, nats": "KL 散度，均值，nat",
        "KL divergence, p99, nats": "KL 散度，p99，nat",
        "log-probability off by, mean, nats": "对数概率之差，均值，nat",
        "top-1 agreement": "top-1 一致率",
        "greedy tokens equal": "贪心续写中相同的词",
        "greedy continuations equal": "完全相同的贪心续写",
        "perplexity": "困惑度",
        "perplexity of the reference": "基线的困惑度",
    },
    floor="噪声底",
    reached="余弦 ≥ {cosine} 且 top-1 ≥ {top1}",
    linears="逐个线性层与解码层",
    linears_text=(
        "在模型的每个线性层和每个解码层，双方都得到相同的输入，误差不会传下去被放大。后端与 fp32 规范（reference）都"
        "由 fp64 规范评判；reference 一行即噪声底：一个解码层之内，在 W8A8 中仍会有舍入落到另一侧。位相同为线性层输出"
        "中与 fp64 结果舍入一次后完全相同的比例。"
    ),
    linears_header=(
        "以 fp64 规范为准",
        "",
        "向量数",
        "余弦，均值",
        "余弦，最小",
        "余弦 ≥ {cosine}",
        "相对误差 p99",
        "相对误差，最大",
        "位相同",
    ),
    units={"linear": "个线性层", "decoder layer": "个解码层"},
    throughput="吞吐",
    throughput_text="由 `vllm bench serve` 测得；最后一列为最后一种配置的 TPOT 与本行之比。",
    throughput_header=("配置", "速率", "并发", "req/s", "tokens/s", "TTFT (ms)", "TPOT (ms)", "×"),
    tools="脚本",
    tool_header=("脚本", "用途"),
    tool_rows=(
        ("`scripts/serve_qwen3-8b-fp8.sh`", "在 NPU 或 CPU 上启动推理服务"),
        ("`scripts/verify_qwen3-8b-fp8.sh`", "功能验证"),
        ("`scripts/eval_precision.sh`", "精度评估：运行、比较、逐个线性层与解码层"),
        ("`scripts/eval_accuracy.sh`", "公开评测：lm-evaluation-harness、evalscope"),
    ),
    hardware="{name}，{cores} 核",
    machine="{hardware}；{date}，提交 {commit}",
    runs="运行",
    compared_by="比较命令：",
    made_on="在 {machine} 上由下列命令得到：",
    not_run="未运行",
    not_run_by="未运行：`{command}`",
    picture_precision="各项对比的 KL 散度，以及逐层最大相对误差",
    picture_throughput="各配置与并发下每个输出词的时间（TPOT）",
)

LANGUAGES = {"en": EN, "zh": ZH}
