// 2 W consecutive elements of a row as two vectors, straight from and to memory: rows of 16-bit elements need no copy in floats.
//
// bf16 comes as the even and the odd elements, which takes one shift or mask a vector and no shuffle. So whoever works on pairs must not
// care which lane has which element, and read all rows that it compares as the same type.

struct Bf16 { uint16_t bits; };
struct F16 { uint16_t bits; };

struct Pair { vf a, b; };

typedef uint32_t vu32 __attribute__((vector_size(W * sizeof(float))));
typedef uint32_t vu32_unaligned __attribute__((vector_size(W * sizeof(float)), aligned(2), may_alias));

inline Pair load_pair(const float* p) { return {load(p), load(p + W)}; }

inline Pair load_pair(const Bf16* p) {
  const vu32 bits = *reinterpret_cast<const vu32_unaligned*>(p);
  return {reinterpret_cast<vf>(bits << 16), reinterpret_cast<vf>(bits & 0xffff0000u)};
}

inline Pair load_pair(const F16* p) { return {load_f16(&p->bits), load_f16(&p[W].bits)}; }

inline float from_float(float x, float) { return x; }
inline Bf16 from_float(float x, Bf16) { return {f32_to_bf16(x)}; }
inline F16 from_float(float x, F16) { return {f32_to_f16(x)}; }

// One vector, its elements in order.
inline vf load(const Bf16* p) { return load_bf16(&p->bits); }
inline vf load(const F16* p) { return load_f16(&p->bits); }
inline void store(Bf16* p, vf x) { store_bf16(&p->bits, x); }
inline void store(F16* p, vf x) { store_f16(&p->bits, x); }

// The first n < 2 W elements; the others read as `fill`.
template <typename T>
inline Pair load_pair_n(const T* p, int64_t n, float fill) {
  T x[2 * W];
#if defined(__AVX512BW__)
  const __m512i rest = _mm512_set1_epi16(static_cast<int16_t>(from_float(fill, T{}).bits));
  _mm512_storeu_si512(x, _mm512_mask_loadu_epi16(rest, static_cast<__mmask32>((1ull << n) - 1), p));
#else
  for (int i = 0; i < 2 * W; ++i) x[i] = i < n ? p[i] : from_float(fill, T{});
#endif
  return load_pair(x);
}

inline Pair load_pair_n(const float* p, int64_t n, float fill) {
  return {load_n(p, n < W ? n : W, fill), load_n(p + W, n < W ? 0 : n - W, fill)};
}

// A float's bits with the upper half rounded to bf16.
inline vu32 round_to_bf16(vf x) {
  const vu32 bits = reinterpret_cast<vu32>(x);
  return x == x ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000;
}

inline vu32 pack(Pair x, Bf16) { return round_to_bf16(x.a) >> 16 | (round_to_bf16(x.b) & 0xffff0000u); }

inline vu32 pack(Pair x, F16) {
#if defined(__AVX512F__)
  const __m256i a = _mm512_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT), b = _mm512_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT);
  return reinterpret_cast<vu32>(_mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1));
#elif defined(__AVX2__)
  const __m128i a = _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT), b = _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT);
  return reinterpret_cast<vu32>(_mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1));
#else
  vu32 bits{};
  for (int i = 0; i < W; ++i) {
    bits[i / 2] |= static_cast<uint32_t>(f32_to_f16(x.a[i])) << i % 2 * 16;
    bits[(W + i) / 2] |= static_cast<uint32_t>(f32_to_f16(x.b[i])) << i % 2 * 16;
  }
  return bits;
#endif
}

template <typename T>
inline void store_pair(T* p, Pair x) { *reinterpret_cast<vu32_unaligned*>(p) = pack(x, T{}); }

inline void store_pair(float* p, Pair x) {
  store(p, x.a);
  store(p + W, x.b);
}

template <typename T>
inline void store_pair_n(T* p, Pair x, int64_t n) {
#if defined(__AVX512BW__)
  _mm512_mask_storeu_epi16(p, static_cast<__mmask32>((1ull << n) - 1), reinterpret_cast<__m512i>(pack(x, T{})));
#else
  T all[2 * W];
  store_pair(all, x);
  __builtin_memcpy(p, all, n * sizeof(T));
#endif
}

inline void store_pair_n(float* p, Pair x, int64_t n) {
  store_n(p, x.a, n < W ? n : W);
  store_n(p + W, x.b, n < W ? 0 : n - W);
}

// As stream(): p is a whole vector's address where it is to help.
template <typename T>
inline void stream_pair(T* p, Pair x) { stream(reinterpret_cast<float*>(p), reinterpret_cast<vf>(pack(x, T{}))); }

inline void stream_pair(float* p, Pair x) {
  stream(p, x.a);
  stream(p + W, x.b);
}

// The even and the odd elements of two vectors, and the other way round.
inline Pair split(Pair x) {
  vi32 even{};
  for (int i = 0; i < W; ++i) even[i] = 2 * i;
  return {__builtin_shuffle(x.a, x.b, even), __builtin_shuffle(x.a, x.b, even + 1)};
}

inline Pair join(Pair x) {
  vi32 first{};
  for (int i = 0; i < W; ++i) first[i] = i / 2 + i % 2 * W;
  return {__builtin_shuffle(x.a, x.b, first), __builtin_shuffle(x.a, x.b, first + W / 2)};
}

template <typename T>
inline Pair load_split(const T* p) { return split(load_pair(p)); }
inline Pair load_split(const Bf16* p) { return load_pair(p); }

template <typename T>
inline void store_joined(T* p, Pair x) { store_pair(p, join(x)); }
inline void store_joined(Bf16* p, Pair x) { store_pair(p, x); }
