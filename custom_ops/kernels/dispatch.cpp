#include "kernels/dispatch.h"

#include <cstdlib>
#include <string>

#include "kernels/compiler.h"
#include "kernels/tables.h"

#if defined(ONNXQ_X86) && defined(_MSC_VER)
#include <intrin.h>
#elif defined(ONNXQ_X86)
#include <cpuid.h>
#endif

#ifndef ONNXQ_VERSION
#define ONNXQ_VERSION "unknown"
#endif

static_assert(sizeof(void*) == 8, "onnxq kernels are written for 64-bit processors");
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "packed weights are little-endian"
#endif

namespace onnxq::kernels {
namespace {

#ifdef ONNXQ_X86
struct Registers {
  unsigned a, b, c, d;
};

Registers CpuId(unsigned leaf, unsigned subleaf) {
#ifdef _MSC_VER
  int r[4];
  __cpuidex(r, int(leaf), int(subleaf));
  return {unsigned(r[0]), unsigned(r[1]), unsigned(r[2]), unsigned(r[3])};
#else
  Registers r{};
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
  return r;
#endif
}

/// Register state that the operating system saves; only asked for when it says that it saves any.
uint64_t SavedState() {
#ifdef _MSC_VER
  return _xgetbv(0);
#else
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
#endif
}

constexpr bool Has(unsigned reg, std::initializer_list<int> bits) {
  for (int bit : bits)
    if (!(reg >> bit & 1u)) return false;
  return true;
}
#endif

struct Available {
  bool avx2 = false;
  bool avx512vnni = false;
};

Available Detect() {
  Available found;
#ifdef ONNXQ_X86
  const Registers one = CpuId(1, 0);
  if (CpuId(0, 0).a < 7 || !Has(one.c, {27})) return found;  // 27: OSXSAVE
  const uint64_t saved = SavedState();
  const Registers seven = CpuId(7, 0);
  // fma 12, avx 28, f16c 29; avx2 5; state: xmm 1, ymm 2.
  found.avx2 = (saved & 0x6) == 0x6 && Has(one.c, {12, 28, 29}) && Has(seven.b, {5});
  // avx512f 16, bw 30, vl 31; vnni 11; state: also opmask 5, zmm 6 and 7.
  found.avx512vnni = found.avx2 && (saved & 0xe6) == 0xe6 && Has(seven.b, {16, 30, 31}) && Has(seven.c, {11});
#endif
  return found;
}

struct Candidate {
  const KernelTable* kernels;
  bool runs_here;
};

struct Choice {
  const KernelTable* kernels;
  std::string description;
};

std::string Quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    if (static_cast<unsigned char>(c) >= 0x20) out += c;
  }
  return out + '"';
}

Choice Choose() {
  const Available here = Detect();
  // Best first.
  const Candidate candidates[] = {
#ifdef ONNXQ_X86
      {&kAvx512Vnni, here.avx512vnni},
      {&kAvx2, here.avx2},
#endif
      {&kScalar, true},
  };
  static_cast<void>(here);
  const char* variable = std::getenv("ONNXQ_ISA");
  const std::string wanted = variable ? variable : "";
  const KernelTable* best = nullptr;
  const KernelTable* forced = nullptr;
  std::string available, built;
  for (const Candidate& candidate : candidates) {
    const std::string name = candidate.kernels->isa;
    built += (built.empty() ? "" : ", ") + Quoted(name);
    if (!candidate.runs_here) continue;
    available += (available.empty() ? "" : ", ") + Quoted(name);
    if (!best) best = candidate.kernels;
    if (name == wanted) forced = candidate.kernels;
  }
  std::string reason = "the best instruction set of this processor that the library holds";
  std::string warning;
  if (forced) {
    reason = "ONNXQ_ISA=" + wanted;
  } else if (!wanted.empty()) {
    warning =
        "ONNXQ_ISA=" + wanted + " is not available here; using " + best->isa + " (one of: " + available + ")";
  }
  const KernelTable* chosen = forced ? forced : best;
  return {chosen, "{\"version\": " + Quoted(ONNXQ_VERSION) +
                      ", \"layout_version\": 1, \"isa\": " + Quoted(chosen->isa) + ", \"available\": [" +
                      available + "], \"built\": [" + built + "], \"reason\": " + Quoted(reason) +
                      ", \"warning\": " + (warning.empty() ? "null" : Quoted(warning)) + "}"};
}

const Choice& TheChoice() {
  // Never destroyed: sessions may outlive this library's static objects at process exit.
  static const Choice* choice = new Choice(Choose());
  return *choice;
}

}  // namespace

const KernelTable& ChosenKernels() { return *TheChoice().kernels; }
const char* Describe() { return TheChoice().description.c_str(); }

}  // namespace onnxq::kernels
