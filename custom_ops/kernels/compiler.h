// Compiler dialects that the kernels need.
#pragma once

#if defined(_MSC_VER) && !defined(__clang__)
#define ONNXQ_INLINE __forceinline
#define ONNXQ_INLINE_LAMBDA
#define ONNXQ_NOINLINE __declspec(noinline)
#define ONNXQ_EXPORT __declspec(dllexport)
#else
#define ONNXQ_INLINE inline __attribute__((always_inline))
#define ONNXQ_INLINE_LAMBDA __attribute__((always_inline))
#define ONNXQ_NOINLINE __attribute__((noinline))
#if defined(_WIN32)
#define ONNXQ_EXPORT __declspec(dllexport)
#else
#define ONNXQ_EXPORT __attribute__((visibility("default")))
#endif
#endif

#if defined(__x86_64__) || defined(_M_X64)
#define ONNXQ_X86 1
#endif
