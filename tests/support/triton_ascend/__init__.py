"""triton-ascend without a device: an offline compiler driver, a reader of HIVM, and two executors on x86."""
