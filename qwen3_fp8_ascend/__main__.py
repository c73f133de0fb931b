from qwen3_fp8_ascend.cli import main

main()
