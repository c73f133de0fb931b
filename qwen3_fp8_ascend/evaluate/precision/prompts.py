"""The prompts that every run is made of: English, Chinese, arithmetic, code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

PROMPTS: dict[str, tuple[str, ...]] = {
    "English": (
        "The future of AI is increasingly intertwined with advances in machine learning, natural language processing, "
        "and robotics. As these technologies continue to evolve, systems become more capable and more autonomous.",
        "Water boils at 100 degrees Celsius at sea level. At the top of a high mountain the pressure is lower, and so "
        "it boils at a lower temperature, which is why cooking takes longer there.",
        "The library opened its doors in the spring of 1923. For its first readers there were four thousand books, "
        "two long tables, and a stove that had to be fed every hour.",
    ),
    "Chinese": (
        "人工智能是计算机科学的一个分支,它研究如何让机器完成通常需要人类智能才能完成的任务,例如理解语言、识别图像和做出决策。",
        "长江发源于青藏高原,流经十一个省级行政区,在上海注入东海,全长约六千三百公里,是亚洲最长的河流。",
        "春天来了,院子里的桃树开满了花。孩子们放学以后,总喜欢坐在树下,听爷爷讲过去的故事。",
    ),
    "arithmetic": (
        "If a train travels 120 km in 2 hours, its average speed is the distance divided by the time: 60 km per hour.",
        "Question: A shop sells pens at 3 dollars each. How much do 17 pens cost? Answer: 17 times 3 is 51 dollars.",
        "12 + 30 = 42. 81 / 9 = 9. 7 * 8 = 56. 100 - 37 = 63. 15 * 15 = 225. 2 to the power of 10 is 1024.",
    ),
    "code": (
        "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n",
        "SELECT name, COUNT(*) AS orders FROM customers JOIN orders ON orders.customer_id = customers.id "
        "GROUP BY name HAVING COUNT(*) > 3 ORDER BY orders DESC;",
        '#include <stdio.h>\n\nint main(void) {\n    for (int i = 0; i < 10; i++) {\n        printf("%d\\n", i * i);\n'
        "    }\n    return 0;\n}\n",
    ),
}
"""By category. Teacher-forced: what a model makes of each next token of these texts is compared."""


def all_prompts() -> list[str]:
    """The texts of all categories in order."""
    return [text for texts in PROMPTS.values() for text in texts]


def fingerprint(prompts: Sequence[str]) -> str:
    """A short hash by which two runs know that they were made of the same texts."""
    return hashlib.sha256(json.dumps(list(prompts), ensure_ascii=False).encode()).hexdigest()[:16]
