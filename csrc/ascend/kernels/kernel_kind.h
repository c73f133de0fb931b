// How a kernel says which cores it runs on, and that all its blocks must start together.
//
// CANN 9 reads the cores from qualifiers, 8.5 from a line in the kernel's body. From 9.1 on, kernels that wait for all
// cores ask for batch mode (`__schedmode__(1)`): two of them on two streams could otherwise each hold some cores and
// wait for the rest. These are macros because they stand where keywords stand.
#pragma once

#ifndef QWEN3_FP8_CANN_VERSION  // major * 100 + minor; CMakeLists.txt reads it from the toolkit
#define QWEN3_FP8_CANN_VERSION 805
#endif

#if QWEN3_FP8_CANN_VERSION >= 901
#define QWEN3_FP8_ALL_CORES_AT_ONCE __schedmode__(1)
#else
#define QWEN3_FP8_ALL_CORES_AT_ONCE
#endif

#if QWEN3_FP8_CANN_VERSION >= 900
#define QWEN3_FP8_VECTOR_KERNEL __global__ __vector__
#define QWEN3_FP8_SYNCHRONIZED_VECTOR_KERNEL QWEN3_FP8_ALL_CORES_AT_ONCE __global__ __mix__(0, 1)
#define QWEN3_FP8_MIXED_KERNEL QWEN3_FP8_ALL_CORES_AT_ONCE __global__ __mix__(1, 2)
#define QWEN3_FP8_KERNEL_KIND(kind)
#else
#define QWEN3_FP8_VECTOR_KERNEL __global__ __aicore__
#define QWEN3_FP8_SYNCHRONIZED_VECTOR_KERNEL __global__ __aicore__
#define QWEN3_FP8_MIXED_KERNEL __global__ __aicore__
#define QWEN3_FP8_KERNEL_KIND(kind) KERNEL_TASK_TYPE_DEFAULT(kind)
#endif
