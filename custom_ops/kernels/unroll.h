// Loops unrolled at compile time. Included inside an anonymous namespace, once per ISA.

template <class T>
ONNXQ_INLINE constexpr T Min(T a, T b) {
  return a < b ? a : b;
}

template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  using Type = Indices<I...>;
};
template <int I>
struct Constant {
  static constexpr int value = I;
};
template <class F, int... I>
ONNXQ_INLINE void UnrollOver(const F& f, Indices<I...>) {
  (f(Constant<I>{}), ...);
}
/// f(Constant<0>), f(Constant<1>), ... f(Constant<N - 1>), each inlined.
template <int N, class F>
ONNXQ_INLINE void Unroll(const F& f) {
  UnrollOver(f, typename MakeIndices<N>::Type{});
}

/// f(r, i) for every row and vector of a register block, unrolled: the arrays that f indexes stay in
/// registers.
template <int Rows, int Vectors, class F>
ONNXQ_INLINE void EachSum(const F& f) {
  Unroll<Rows>([&](auto row) ONNXQ_INLINE_LAMBDA {
    Unroll<Vectors>([&](auto vector)
                        ONNXQ_INLINE_LAMBDA { f(decltype(row)::value, decltype(vector)::value); });
  });
}

/// Calls f(Constant<count>) for a count that is only known at run time, 1 <= count <= Most.
template <int Most, class F>
ONNXQ_INLINE void WithCount(int64_t count, const F& f) {
  if constexpr (Most == 1) {
    f(Constant<1>{});
  } else {
    count >= Most ? f(Constant<Most>{}) : WithCount<Most - 1>(count, f);
  }
}
