// One vector of floats, as wide as the ISA that this translation unit is compiled for, and the few functions kernels need of it.
//
// Vectors are GCC/Clang vector types, so + - * / compile to the ISA's instructions and the generic build is the same code at
// SSE2/NEON width; only what the language cannot say (rounding, masks, conversions) has an intrinsic per ISA.
// Included inside namespace kd::cpu::<isa>::{anonymous}: two ISAs never share a symbol (see csrc/README.md).

#if defined(__AVX512F__)
typedef __m512 vf;
typedef __m512i vi;
constexpr int W = 16;
#elif defined(__AVX2__)
typedef __m256 vf;
typedef __m256i vi;
constexpr int W = 8;
#else
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
constexpr int W = 4;
#endif
typedef float vf_unaligned __attribute__((vector_size(W * sizeof(float)), aligned(4), may_alias));
typedef int32_t vi32 __attribute__((vector_size(W * sizeof(float))));

// Doubles of the same width, for the few sums that cancel.
constexpr int WD = W / 2;
typedef double vd __attribute__((vector_size(WD * sizeof(double))));
typedef double vd_unaligned __attribute__((vector_size(WD * sizeof(double)), aligned(8), may_alias));
typedef float vf_half __attribute__((vector_size(WD * sizeof(float)), aligned(4), may_alias));

inline vd set1(double x) { return x - vd{}; }
inline vd load(const double* p) { return *reinterpret_cast<const vd_unaligned*>(p); }
inline void store(double* p, vd x) { *reinterpret_cast<vd_unaligned*>(p) = x; }
inline vd load_wide(const float* p) { return __builtin_convertvector(*reinterpret_cast<const vf_half*>(p), vd); }

inline vf set1(float x) { return x - vf{}; }
inline vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
inline void store(float* p, vf x) { *reinterpret_cast<vf_unaligned*>(p) = x; }

// The first n < W lanes; the others read as `fill`.
inline vf load_n(const float* p, int64_t n, float fill) {
#if defined(__AVX512F__)
  return _mm512_mask_loadu_ps(set1(fill), static_cast<__mmask16>((1u << n) - 1), p);
#else
  float lanes[W];
  for (int i = 0; i < W; ++i) lanes[i] = i < n ? p[i] : fill;
  return load(lanes);
#endif
}

inline void store_n(float* p, vf x, int64_t n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), x);
#else
  for (int64_t i = 0; i < n; ++i) p[i] = x[i];
#endif
}

// A store past the caches where p is a whole vector's address: it saves reading the lines that it overwrites. For large outputs that
// nobody reads soon; stream_end() comes before another thread may read them.
inline void stream(float* p, vf x) {
#if defined(__AVX512F__)
  if (reinterpret_cast<uintptr_t>(p) % sizeof(vf) == 0) return _mm512_stream_ps(p, x);
#elif defined(__AVX2__)
  if (reinterpret_cast<uintptr_t>(p) % sizeof(vf) == 0) return _mm256_stream_ps(p, x);
#endif
  store(p, x);
}

inline void stream_end() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// max(a, b), and b where either is NaN.
inline vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// As vmax, b where either is NaN.
inline vf vmin(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

inline vf vabs(vf x) { return reinterpret_cast<vf>(reinterpret_cast<vi32>(x) & 0x7fffffff); }

inline vf round_even(vf x) {
#if defined(__AVX512F__)
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vf magic = set1(12582912.0f);  // 1.5 * 2^23: adding it leaves no fraction bits; exact for |x| < 2^22
  return (x + magic) - magic;
#endif
}

// p * 2^n for integral n <= 0; 0 below the smallest normal number, NaN stays NaN.
inline vf scale_pow2(vf p, vf n) {
#if defined(__AVX512F__)
  const __mmask16 normal = _mm512_cmp_ps_mask(n, set1(-126.0f), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(normal, p, n);
#else
  const vi32 bits = __builtin_convertvector((n > -127.0f ? n : set1(-126.0f)), vi32) << 23;
  const vf scaled = reinterpret_cast<vf>(reinterpret_cast<vi32>(p) + bits);
  return (n < -126.0f ? set1(0.0f) : (n == n ? scaled : n));
#endif
}

// (2^f - 1) / f for f in [-1/2, 1/2]: minimax polynomial of degree 5, relative error of 2^f below 2^-28.
inline vf exp2m1_poly(vf f) {
  vf p = fma(set1(1.5353362e-4f), f, set1(1.3398874e-3f));
  p = fma(p, f, set1(9.6184374e-3f));
  p = fma(p, f, set1(5.5503325e-2f));
  p = fma(p, f, set1(2.4022648e-1f));
  return fma(p, f, set1(6.9314720e-1f));
}

// The generic round_even is exact for |x| < 2^22 only.
inline vf bounded_exponent(vf x) { return W == 4 ? vmax(set1(-2e6f), x) : x; }

// 2^(x * scale) for x * scale <= 0, to about 1 ulp: the product is never rounded before its integer part is taken off, so a scale
// of log2(e) / T costs no accuracy. exp2_scaled(0) is 1 to the bit.
inline vf exp2_scaled(vf x, vf scale) {
  const vf n = round_even(bounded_exponent(x * scale));
  const vf f = fma(x, scale, -n);
  return scale_pow2(fma(exp2m1_poly(f), f, set1(1.0f)), n);
}

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

// e^x - 1 for x <= 0, accurate near 0, where it is 0 to the bit; -inf gives -1.
inline vf expm1(vf x) {
  const vf bounded = vmax(set1(-80.0f), x);
  const vf n = round_even(bounded * kLog2E);
  const vf f = fma(bounded, set1(kLog2E), -n);
  const vf two_n = scale_pow2(set1(1.0f), n);
  return fma(exp2m1_poly(f) * f, two_n, two_n - 1.0f);
}

// log((1 + s) / (1 - s)) = 2 atanh(s) for |s| <= 0.172.
inline vf atanh2(vf s) {
  const vf s2 = s * s;
  vf p = fma(set1(0.22222222f), s2, set1(0.28571429f));
  p = fma(p, s2, set1(0.4f));
  p = fma(p, s2, set1(0.66666667f));
  return fma(p * s2, s, s + s);
}

// log(x) for normal x > 0; 0 gives -inf.
inline vf log(vf x) {
  const vi32 bits = reinterpret_cast<vi32>(x);
  const vi32 e = (bits - 0x3f3504f3) >> 23;  // exponent of x / sqrt(1/2)
  const vf m = reinterpret_cast<vf>(bits - (e << 23));
  const vf y = fma(__builtin_convertvector(e, vf), set1(kLn2), atanh2((m - 1.0f) / (m + 1.0f)));
  return (x == 0.0f ? set1(-__builtin_inff()) : y);
}

// log(1 + y) for -1 <= y <= 0, accurate near 0, where it is 0 to the bit.
inline vf log1p(vf y) { return (y > -0.29f ? atanh2(y / (y + 2.0f)) : log(y + 1.0f)); }

inline float sum(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(x);
#else
  float s = 0;
  for (int i = 0; i < W; ++i) s += x[i];
  return s;
#endif
}

// The sum in double: for a few large terms beside small ones, which a float would round.
inline double sum_wide(vf x) {
  float lanes[W];
  store(lanes, x);
  vd total = load_wide(lanes) + load_wide(lanes + WD);
  double s = 0;
  for (int i = 0; i < WD; ++i) s += total[i];
  return s;
}

inline float max(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(x);
#else
  float m = x[0];
  for (int i = 1; i < W; ++i) m = x[i] > m ? x[i] : m;
  return m;
#endif
}

// bf16 and fp16 <-> fp32. bf16 is the upper half of a float; rounding is to nearest even, NaN stays NaN.
inline float bf16_to_f32(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t f32_to_bf16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if (x != x) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float f16_to_f32(uint16_t x) {
#if defined(__F16C__)
  return _cvtsh_ss(x);
#else
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16, body = x & 0x7fff;
  uint32_t bits;
  if (body >= 0x7c00) {
    bits = sign | 0x7f800000 | (body & 0x3ff) << 13;
  } else {
    const float magnitude = static_cast<float>(body) * 0x1p-24f;  // subnormals: exact
    __builtin_memcpy(&bits, &magnitude, 4);
    if (body >= 0x400) bits = (body << 13) + 0x38000000;
    bits |= sign;
  }
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
#endif
}

inline uint16_t f32_to_f16(float x) {
#if defined(__F16C__)
  return static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (bits >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to 65536 or more: infinite
  if (bits < 0x38800000) {  // below 2^-14: subnormal, a multiple of 2^-24; adding 1/2 rounds it into the low bits
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    __builtin_memcpy(&bits, &magnitude, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | ((bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13));
#endif
}

inline vf load_bf16(const uint16_t* p) {
#if defined(__AVX512F__)
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
#elif defined(__AVX2__)
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
#else
  float lanes[W];
  for (int i = 0; i < W; ++i) lanes[i] = bf16_to_f32(p[i]);
  return load(lanes);
#endif
}

inline vf load_f16(const uint16_t* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  float lanes[W];
  for (int i = 0; i < W; ++i) lanes[i] = f16_to_f32(p[i]);
  return load(lanes);
#endif
}

inline void store_bf16(uint16_t* p, vf x) {
#if defined(__AVX512F__) || defined(__AVX2__)
  const vi32 bits = reinterpret_cast<vi32>(x);
  const vi32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vi32 half = (x == x ? rounded : (bits >> 16) | 0x40);
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(reinterpret_cast<vi>(half)));
#else
  const __m256i low = _mm256_and_si256(reinterpret_cast<vi>(half), _mm256_set1_epi32(0xffff));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
#endif
#else
  for (int i = 0; i < W; ++i) p[i] = f32_to_bf16(x[i]);
#endif
}

inline void store_f16(uint16_t* p, vf x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < W; ++i) p[i] = f32_to_f16(x[i]);
#endif
}

// n elements from any dtype and stride as contiguous floats: the row itself where it already is that, else a copy in `scratch`.
inline const float* as_floats(const void* data, DType dtype, int64_t offset, int64_t stride, int64_t n, float* scratch) {
  int64_t i = 0;
  if (dtype == DType::kF32) {
    const float* p = static_cast<const float*>(data) + offset;
    if (stride == 1) return p;
    for (; i < n; ++i) scratch[i] = p[i * stride];
    return scratch;
  }
  const uint16_t* p = static_cast<const uint16_t*>(data) + offset;
  const bool bf16 = dtype == DType::kBF16;
  if (stride == 1)
    for (; i + W <= n; i += W) {
      __builtin_prefetch(p + i + n);  // what a caller that walks a long row asks for next
      store(scratch + i, bf16 ? load_bf16(p + i) : load_f16(p + i));
    }
  for (; i < n; ++i) scratch[i] = bf16 ? bf16_to_f32(p[i * stride]) : f16_to_f32(p[i * stride]);
  return scratch;
}

// n contiguous floats into contiguous elements of any dtype, from `offset` on.
inline void from_floats(const float* x, int64_t n, void* data, DType dtype, int64_t offset) {
  int64_t i = 0;
  if (dtype == DType::kF32) {
    float* p = static_cast<float*>(data) + offset;
    if (p != x) __builtin_memmove(p, x, n * sizeof(float));
    return;
  }
  uint16_t* p = static_cast<uint16_t*>(data) + offset;
  const bool bf16 = dtype == DType::kBF16;
  for (; i + W <= n; i += W) bf16 ? store_bf16(p + i, load(x + i)) : store_f16(p + i, load(x + i));
  for (; i < n; ++i) p[i] = bf16 ? f32_to_bf16(x[i]) : f32_to_f16(x[i]);
}

// out[first, first + n) = a * x[first, first + n), contiguous.
void scaled_copy(const float* x, float a, void* out, DType dtype, int64_t first, int64_t n) {
  const int64_t end = first + n, whole = first + n / W * W;
  const auto vectors = [&](const auto& put) {
    for (int64_t i = first; i < whole; i += W) put(i, load(x + i) * a);
  };
  if (dtype == DType::kF32) vectors([out](int64_t i, vf v) { store(static_cast<float*>(out) + i, v); });
  if (dtype == DType::kBF16) vectors([out](int64_t i, vf v) { store_bf16(static_cast<uint16_t*>(out) + i, v); });
  if (dtype == DType::kF16) vectors([out](int64_t i, vf v) { store_f16(static_cast<uint16_t*>(out) + i, v); });
  float rest[W];
  store(rest, load_n(x + whole, end - whole, 0.0f) * a);
  from_floats(rest, end - whole, out, dtype, whole);
}
