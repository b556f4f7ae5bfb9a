// What the test programs share: counting checks, repeatable noise, and the kernels that an argument names.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>

#include "kernels/compiler.h"
#include "kernels/dispatch.h"
#include "kernels/matmul.h"
#include "kernels/tables.h"

namespace onnxq::tests {

using kernels::KernelTable;
using kernels::Parallel;

constexpr int kSkipped = 77;
inline int failures = 0;
inline long checks = 0;

inline void Check(bool good, const std::string& what) {
  ++checks;
  if (good) return;
  if (++failures <= 20) std::printf("FAILED %s\n", what.c_str());
}

struct Random {
  uint64_t state;
  uint32_t Next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return uint32_t(state >> 33);
  }
  float Float() { return float(Next() % 20001) / 10000.0f - 1.0f; }
};

inline bool RunInTurn(void*, Parallel::Task task, size_t count, void* argument) {
  for (size_t i = count; i-- > 0;) task(argument, i);  // any order must do
  return true;
}

/// Null when this processor lacks the ISA.
inline const KernelTable* Find(const std::string& name) {
  if (name == "best") return &kernels::ChosenKernels();
  if (name == "avx512vnni-emulated") return &kernels::kAvx512VnniEmulated;
  if (name == "scalar") return &kernels::kScalar;
#ifdef ONNXQ_X86
  const std::string described = kernels::Describe();
  const std::string choice = described.substr(0, described.find("\"built\""));
  const bool here = choice.find('"' + name + '"') != std::string::npos;
  if (here && name == "avx2") return &kernels::kAvx2;
  if (here && name == "avx512vnni") return &kernels::kAvx512Vnni;
#endif
  return nullptr;
}

inline int Report(const KernelTable& kernels) {
  std::printf("%s: %ld checks, %d failures\n", kernels.isa, checks, failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace onnxq::tests
